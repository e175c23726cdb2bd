"""Markdown tables from benchmarks/results: printed, or written between the markers of a Markdown file.

The lines between `<!-- bench:window_attention -->` and `<!-- /bench:window_attention -->` become the latest run in
results/cpu.csv; `<!-- bench:window_attention nvidia-h200 -->` stands for results/nvidia-h200.csv.
"""

import argparse
import pathlib
import re
import sys

from results import describe, distinct, find, geometric_mean, groups, latest_run, measured_ops, ratios

MARKER = re.compile(r"(<!-- bench:(\w+)(?: ([\w.-]+))? -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)


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


def notes(rows):
    """Sentences on the roofline and on memory, where they were measured."""
    lines = []
    measured = [r for r in rows if r["contender"] == "effvit" and r["roofline_share"]]
    if measured:
        shape = measured[0]["shape"]
        at_shape = [r for r in measured if r["shape"] == shape]
        shares = [f"{100 * float(r['roofline_share']):.0f} % ({r['dtype']} {r['direction']})" for r in at_shape]
        lines.append(
            f"Share of the roofline, max(bytes / copy bandwidth, FLOPs / GEMM rate), both measured in the same run "
            f"(copy {float(measured[0]['copy_gb_per_s']):.0f} GB/s), at {shape}: {', '.join(shares)}."
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


def markdown(op, results="cpu", run=None):
    rows = latest_run(op, results, run)
    columns = groups(rows)
    lines = [
        "| " + " | ".join(["shape", *(f"{dtype} {direction}" for dtype, direction in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for shape in distinct(rows, "shape"):
        lines.append("| " + " | ".join([shape, *(cell(rows, shape, *column) for column in columns)]) + " |")
    means = [list(ratios(rows, *column).values()) for column in columns]
    if len(distinct(rows, "shape")) > 1:
        figures = [f"**{geometric_mean(m):.1f}×**, least {min(m):.1f}×" if m else "" for m in means]
        lines.append("| " + " | ".join(["geometric mean", *figures]) + " |")
    lines += ["", f"Best peer's time over effvit's (effvit's time; the best peer and its time). {describe(rows)}."]
    return "\n".join([*lines, *notes(rows)]) + "\n"


def rewrite(path):
    """Replaces what is between the markers of a file; returns the number of tables."""
    text = path.read_text()
    new, count = MARKER.subn(lambda m: m[1] + markdown(m[2], m[3] or "cpu") + m[5], text)
    if count and new != text:
        path.write_text(new)
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help="default: every op with results")
    parser.add_argument("--results", default="cpu", help="results/<this>.csv, or a path (default cpu)")
    parser.add_argument("--run", help="a run's id instead of the latest")
    parser.add_argument("--write", type=pathlib.Path, help="rewrite every marked table of this Markdown file")
    options = parser.parse_args()
    try:
        if options.write is None:
            for op in options.op or measured_ops(options.results):
                print(f"{op}\n\n{markdown(op, options.results, options.run)}")
            return 0
        count = rewrite(options.write)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.write}: {count} tables")
    return 0 if count else 1


if __name__ == "__main__":
    raise SystemExit(main())
