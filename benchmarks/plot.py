"""Draws the ratios of the latest runs in benchmarks/results/<device>.csv, one <device>-<op>.png beside it per op."""

import argparse
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results import FOLDER, describe, distinct, find, geometric_mean, groups, latest_run, measured_ops, ratios

COLOURS = {"float32": "#3b6ea5", "bfloat16": "#d9822b", "float16": "#5a9367"}


def draw(op, results, path, run=None):
    rows = latest_run(op, results, run)
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
        axis.set_xlabel("best peer's time / effvit's time")
        axis.set_xlim(0, 1.45 * max([1, *(r for d in dtypes for r in ratios(rows, d, direction).values())]))
        axis.set_yticks(range(len(shapes)), shapes, fontsize=8)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.45 / height - 0.06), frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{op}: {describe(rows)}", fontsize=9, wrap=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="*", help="default: every op with results for more than one shape")
    parser.add_argument("--results", default="cpu", help="results/<this>.csv, or a path (default cpu)")
    parser.add_argument("--run", help="a run's id instead of the latest")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER, help="default benchmarks/results")
    options = parser.parse_args()
    try:
        ops = options.op or [
            op for op in measured_ops(options.results) if len(distinct(latest_run(op, options.results), "shape")) > 1
        ]
        for op in ops:
            path = options.folder / f"{pathlib.Path(options.results).stem}-{op}.png"
            draw(op, options.results, path, options.run)
            print(path)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
