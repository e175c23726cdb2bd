"""Reading benchmarks/results/*.csv: the rows of the latest run of an operator, and what they say."""

import csv
import math
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent / "results"


def _rows(results):
    path = pathlib.Path(results) if str(results).endswith(".csv") else FOLDER / f"{results}.csv"
    if not path.exists():
        raise LookupError(f"no results in {path}: run benchmarks/bench_<op>.py first")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured_ops(results="cpu"):
    """Names of the operators in results/<results>.csv, in the order they first appear."""
    return distinct(_rows(results), "op")


def latest_run(op, results="cpu", run=None):
    """Rows of one run (the newest unless named) of `op` in results/<results>.csv; LookupError if there are none."""
    rows = [row for row in _rows(results) if row["op"] == op and run in (None, row["run"])]
    if not rows:
        raise LookupError(f"no run of {op} in results {results}: run benchmarks/bench_{op}.py first")
    newest = max(row["run"] for row in rows)
    return [row for row in rows if row["run"] == newest]


def distinct(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def groups(rows):
    """[(dtype, direction)] of a run, in the order they ran."""
    return list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows))


def find(rows, **wanted):
    """The row with these values, or None."""
    return next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def ratios(rows, dtype, direction):
    """{shape: best peer's time over effvit's}."""
    chosen = [r for r in rows if (r["dtype"], r["direction"], r["contender"]) == (dtype, direction, "effvit")]
    return {r["shape"]: float(r["ratio"]) for r in chosen if r["ratio"]}


def describe(rows):
    """One line: device, instruction set, threads, versions, commit and date."""
    r = rows[0]
    where = f"{r['device']}, {r['isa']}"
    if not r["isa"].startswith("sm_"):
        where += f", {r['threads']} threads"
    timm = f", timm {r['timm']}" if r["timm"] else ""
    return f"{where}, kernel {r['kernel']}, torch {r['torch']}{timm}, commit {r['commit']}, {r['date']}"
