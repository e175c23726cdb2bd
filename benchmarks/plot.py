"""Draws the latest ratios in benchmarks/results/<device>.csv: one picture beside it per op, and one per family.

<device>-<op>.png has a bar per shape, <device>-family-<op>.png a bar per op of the family, with a dot per shape.
"""

import argparse
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results import (
    DTYPES,
    FAMILIES,
    FOLDER,
    broadest,
    describe,
    distinct,
    family,
    find,
    geometric_mean,
    groups,
    latest,
    measured_ops,
    ratios,
)

COLOURS = {"float32": "#3b6ea5", "bfloat16": "#d9822b", "float16": "#5a9367"}
LABEL = "best peer's time / effvit's time"


def draw(op, results, path, run=None):
    rows = latest(op, results, run, None if run else broadest(op, results))
    directions = list(dict.fromkeys(direction for _, direction in groups(rows)))
    dtypes = list(dict.fromkeys(dtype for dtype, _ in groups(rows)))
    shapes = distinct(rows, "shape")
    height = 2.2 + 0.2 * len(shapes) * (len(dtypes) + 0.8)
    size = (5.5 * len(directions) + 1.5, height)
    figure, axes = plt.subplots(1, len(directions), figsize=size, sharey=True, squeeze=False, layout="constrained")
    width = 0.8 / len(dtypes)
    for axis, direction in zip(axes[0], directions, strict=True):
        for i, dtype in enumerate(dtypes):
            found = ratios(rows, dtype, direction)
            if not found:
                continue
            label = f"{dtype}, geometric mean {geometric_mean(list(found.values())):.1f}×"
            at = [shapes.index(shape) + (i - (len(dtypes) - 1) / 2) * width for shape in found]
            axis.barh(at, list(found.values()), width, label=label, color=COLOURS.get(dtype))
            for y, (shape, ratio) in zip(at, found.items(), strict=True):
                row = find(rows, shape=shape, dtype=dtype, direction=direction, contender="effvit")
                note = f" {ratio:.1f}× over {row['best_peer']}, {float(row['median_ms']):.3g} ms"
                axis.text(ratio, y, note, va="center", fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(direction, fontsize=10)
        axis.set_xlabel(LABEL)
        axis.set_xlim(0, 1.45 * max([1, *(r for d in dtypes for r in ratios(rows, d, direction).values())]))
        axis.set_yticks(range(len(shapes)), shapes, fontsize=8)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.45 / height - 0.06), frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{op}: {describe(rows)}", fontsize=9, wrap=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_family(name, results, path):
    """A bar to the geometric mean of each op, and a dot for each shape."""
    tables = {op: latest(op, results, isa=broadest(op, results)) for op in family(name, results)}
    every = [row for rows in tables.values() for row in rows]
    directions = list(dict.fromkeys(direction for _, direction in groups(every)))
    dtypes = [dtype for dtype in DTYPES if dtype in distinct(every, "dtype")]
    height = 1.5 + 0.28 * len(tables) * (len(dtypes) + 0.6)
    size = (5.5 * len(directions) + 1.5, height)
    figure, axes = plt.subplots(1, len(directions), figsize=size, sharey=True, squeeze=False, layout="constrained")
    width = 0.8 / len(dtypes)
    for axis, direction in zip(axes[0], directions, strict=True):
        largest = 1
        for i, dtype in enumerate(dtypes):
            for y, rows in enumerate(tables.values()):
                found = list(ratios(rows, dtype, direction).values())
                if not found:
                    continue
                y += (i - (len(dtypes) - 1) / 2) * width
                average = geometric_mean(found)
                axis.barh(y, average, 0.9 * width, color=COLOURS[dtype], alpha=0.55)
                axis.plot(found, [y] * len(found), "o", color=COLOURS[dtype], markersize=3.5, markeredgewidth=0)
                note = f"{average:.1f}×" + (f", least {min(found):.1f}×" if len(found) > 1 else "")
                axis.annotate(note, (max(found), y), (5, 0), textcoords="offset points", va="center", fontsize=8)
                largest = max(largest, *found)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(direction, fontsize=10)
        axis.set_xlabel(LABEL, fontsize=9)
        axis.set_xlim(0, 1.3 * largest)
        axis.set_ylim(len(tables) - 0.45, -0.55)
        axis.set_yticks(range(len(tables)), [f"{op}\n{rows[0]['isa']}" for op, rows in tables.items()], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[dtype], alpha=0.55) for dtype in dtypes]
    labels = [f"{dtype}: geometric mean (bar), shapes (dots)" for dtype in dtypes]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(dtypes), fontsize=8, frameon=False)
    figure.suptitle(describe(every, ("device", "threads")), fontsize=9, wrap=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="*", help="default: every op measured at more than one shape, and the families")
    parser.add_argument("--results", default="cpu", help="results/<this>.csv, or a path (default cpu)")
    parser.add_argument("--run", help="a run's id instead of the latest")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER, help="default benchmarks/results")
    options = parser.parse_args()
    results, stem = options.results, pathlib.Path(options.results).stem
    try:
        every = measured_ops(results)
        for op in options.op or [op for op in every if len(distinct(latest(op, results), "shape")) > 1]:
            path = options.folder / f"{stem}-{op}.png"
            draw(op, results, path, options.run)
            print(path)
        others = [op for op in every if not any(op in ops for ops in FAMILIES.values())]
        for name in [] if options.op else [name for name in (*FAMILIES, *others) if family(name, results)]:
            path = options.folder / f"{stem}-family-{name}.png"
            draw_family(name, results, path)
            print(path)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
