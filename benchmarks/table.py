"""Markdown tables from benchmarks/results: printed, or written between the markers of Markdown files.

What is between two markers becomes the latest rows in results/cpu.csv:

    <!-- bench:window_attention -->           a table of all shapes, up to <!-- /bench:window_attention -->
    <!-- bench:window_attention isa=avx2 -->  on the last machine with this instruction set
    <!-- bench-summary:window_attention -->   a row per name of the family and instruction set: means and least ratios
    <!-- bench-peers:quantize -->             times and errors of every contender, forward

`results=nvidia-h200` in a marker stands for results/nvidia-h200.csv.
"""

import argparse
import pathlib
import re
import sys

from results import (
    broadest,
    describe,
    distinct,
    family,
    find,
    geometric_mean,
    groups,
    instruction_sets,
    latest,
    measured_ops,
    ratios,
)

MARKER = re.compile(
    r"(<!-- (bench|bench-summary|bench-peers):(\w+)((?: (?:results|isa)=[\w.-]+)*) -->\n)(.*?)(<!-- /\2:\3 -->)",
    re.DOTALL,
)


def milliseconds(text):
    value = float(text)
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def cell(rows, shape, dtype, direction):
    row = find(rows, shape=shape, dtype=dtype, direction=direction, contender="effvit")
    if row is None:
        return ""
    if not row["median_ms"]:
        return row["status"].split(":")[0]
    time = f"{milliseconds(row['median_ms'])} ms"
    if not row["ratio"]:
        return time
    peer = find(rows, shape=shape, dtype=dtype, direction=direction, contender=row["best_peer"])
    return f"**{float(row['ratio']):.1f}×** ({time}; {row['best_peer']} {milliseconds(peer['median_ms'])})"


def mean(rows, dtype, direction):
    """Geometric mean and least ratio, and of how many shapes where some are missing."""
    found, shapes = list(ratios(rows, dtype, direction).values()), len(distinct(rows, "shape"))
    if not found:
        return "not measured"
    text = f"**{geometric_mean(found):.1f}×**"
    if shapes > 1:
        text += f", least {min(found):.1f}×"
    return text + (f" ({len(found)} of {shapes} shapes)" if len(found) < shapes else "")


def notes(rows):
    """Sentences on the roofline and on memory, where they were measured."""
    lines = []
    measured = [r for r in rows if r["contender"] == "effvit" and r["roofline_share"]]
    if measured:
        shape = measured[0]["shape"]
        at_shape = {(r["dtype"], r["direction"]): r for r in measured if r["shape"] == shape}
        shares = [
            f"{100 * float(at_shape[column]['roofline_share']):.0f} % ({' '.join(column)})"
            for column in groups(at_shape.values())
        ]
        copies = distinct(sorted(at_shape.values(), key=lambda r: r["run"]), "copy_gb_per_s")
        lines.append(
            f"Share of the roofline, max(bytes / copy bandwidth, FLOPs / GEMM rate), both measured in the same run "
            f"(copy {' and '.join(f'{float(c):.0f}' for c in copies)} GB/s), at {shape}: {', '.join(shares)}."
        )
    memory = [r for r in rows if r["peak_extra_mib"]]
    by_shape = {}
    for r in memory:
        by_shape.setdefault((r["shape"], r["dtype"], r["direction"]), {})[r["contender"]] = float(r["peak_extra_mib"])
    if by_shape:
        (shape, dtype, direction), used = max(by_shape.items(), key=lambda item: item[1].get("effvit", 0))
        figures = ", ".join(f"{name} {mib:.1f} MiB" for name, mib in sorted(used.items()))
        lines.append(f"Peak memory beyond inputs and results at {shape}, {dtype} {direction}: {figures}.")
    failed = sorted({f"{r['contender']} at {r['shape']} ({r['dtype']})" for r in rows if r["status"] != "ok"})
    if failed:
        lines.append(f"Not timed: {', '.join(failed[:6])}{' and others' if len(failed) > 6 else ''}.")
    return lines


def row_of(cells):
    return f"| {' | '.join(cells)} |"


def markdown(op, results="cpu", run=None, isa=None):
    """The table of one op: a row per shape. Of several instruction sets the broadest, unless one is named."""
    rows = latest(op, results, run, isa if isa or run else broadest(op, results))
    columns = groups(rows)
    lines = [row_of(["shape", *map(" ".join, columns)]), "|---" * (len(columns) + 1) + "|"]
    for shape in distinct(rows, "shape"):
        lines.append(row_of([shape, *(cell(rows, shape, *column) for column in columns)]))
    if len(distinct(rows, "shape")) > 1:
        lines.append(row_of(["geometric mean", *(mean(rows, *column) for column in columns)]))
    lines += ["", f"Best peer's time over effvit's (effvit's time; the best peer and its time). {describe(rows)}."]
    return "\n".join([*lines, *notes(rows)]) + "\n"


def peers(op, results="cpu", isa=None):
    """The table of one op with a column per contender: forward times, and errors of results."""
    rows = [r for r in latest(op, results, isa=isa) if r["direction"] == "forward"]
    names, dtypes = distinct(rows, "contender"), distinct(rows, "dtype")
    lines = [row_of(["shape", *names]), "|---" * (len(names) + 1) + "|"]
    for dtype in dtypes:
        for shape in distinct(rows, "shape"):
            cells = [shape if len(dtypes) == 1 else f"{shape} {dtype}"]
            for name in names:
                row = find(rows, shape=shape, dtype=dtype, direction="forward", contender=name)
                if row is None or not row["median_ms"]:
                    cells.append("" if row is None else row["status"].split(":")[0])
                    continue
                error = f" ({float(row['error']):.0e})" if row["error"] else ""
                cells.append(f"{milliseconds(row['median_ms'])} ms{error}")
            lines.append(row_of(cells))
    lines += ["", f"Milliseconds (error relative to float64). {describe(rows)}."]
    return "\n".join(lines) + "\n"


def summary(name, results="cpu", isa=None):
    """The table of a family: a row per op and instruction set."""
    found = [(op, i) for op in family(name, results) for i in instruction_sets(op, results) if isa in (None, i)]
    if not found:
        raise LookupError(f"no run of {name} in results {results}: run benchmarks/bench_{name}.py first")
    tables = {(op, isa): latest(op, results, isa=isa) for op, isa in found}
    every = [row for rows in tables.values() for row in rows]
    columns = groups(every)
    lines = [row_of(["", "instruction set", *map(" ".join, columns)]), "|---" * (len(columns) + 2) + "|"]
    for (op, isa), rows in tables.items():
        lines.append(row_of([f"`{op}`", isa, *(mean(rows, *column) for column in columns)]))
    common = ("device", "threads")
    lines += ["", f"Best peer's time over effvit's: geometric mean and least of the shapes. {describe(every, common)}."]
    return "\n".join(lines) + "\n"


def rewritten(text):
    """(text with every marked table up to date, number of tables)."""

    def replace(found):
        start, kind, name, options, _, end = found.groups()
        options = dict(option.split("=") for option in options.split())
        table = {"bench": markdown, "bench-summary": summary, "bench-peers": peers}[kind]
        return start + table(name, **options) + end

    return MARKER.subn(replace, text)


def write(path):
    """Brings every marked table of a file up to date; returns their number."""
    text = path.read_text()
    new, count = rewritten(text)
    if new != text:
        path.write_text(new)
    print(f"{path}: {count} tables")
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help="default: every op with results")
    parser.add_argument("--results", default="cpu", help="results/<this>.csv, or a path (default cpu)")
    parser.add_argument("--run", help="a run's id instead of the latest")
    parser.add_argument("--isa", help="the latest run with this instruction set")
    parser.add_argument("--write", type=pathlib.Path, nargs="+", help="rewrite every marked table of these files")
    options = parser.parse_args()
    try:
        if options.write is not None:
            counts = [write(path) for path in options.write]
            return 0 if all(counts) else 1
        for op in options.op or measured_ops(options.results):
            print(f"{op}\n\n{markdown(op, options.results, options.run, options.isa)}")
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
