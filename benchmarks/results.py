"""Reading benchmarks/results/*.csv: the latest rows of an operator, and what they say."""

import csv
import math
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent / "results"
DTYPES = ("float32", "bfloat16", "float16")
MACHINE = ("device", "isa", "threads", "kernel")  # what rows of one table have in common
# Names that are shown together, by the operator that heads them. Any other is a family of its own.
FAMILIES = {
    "window_attention": ("window_attention", "swin"),
    "int8_linear": (
        "int8_linear",
        "sparse24_int8_linear",
        "block_sparse_int8_linear",
        "quantize_int8",
        "quantize",
        "sparse24_linear",
        "block_sparse_linear",
    ),
    "shiftmax": (
        "shiftmax",
        "shift_gelu",
        "int_layer_norm",
        "int_add_layer_norm",
        "requantize",
        "int_linear",
        "int_attention",
        "int8_matmul",
        "integer_block",
    ),
    "quantize_lut": ("quantize_lut", "dequantize_lut", "fake_quantize_lut"),
    "binary_linear": ("binary_linear", "sign_bits", "pow2_linear", "table_lookup", "pam_matmul"),
    "gated_linear_attention": (
        "gated_linear_attention",
        "gated_linear_attention_step",
        "selective_scan2d",
        "dwconv_glu",
        "local_pool_attention",
        "block_relu2_attention",
        "aft",
        "rnn_scan",
    ),
    "fft_conv": ("fft_conv", "spectral_gate", "dwconv"),
    "linear_attention": ("linear_attention", "soft", "rbf_gram", "newton_pinv"),
}


def _rows(results):
    path = pathlib.Path(results) if str(results).endswith(".csv") else FOLDER / f"{results}.csv"
    if not path.exists():
        raise LookupError(f"no results in {path}: run benchmarks/bench_<op>.py first")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured_ops(results="cpu"):
    """Names of the operators in results/<results>.csv, in the order they first appear."""
    return distinct(_rows(results), "op")


def latest(op, results="cpu", run=None, isa=None):
    """The newest rows of `op` in results/<results>.csv; LookupError if there are none.

    They are of one machine, with as many threads as were measured there: the last one that measured it, or the last
    with instruction set `isa`. Each dtype and direction comes from the newest run that has it, or all from the run
    named.
    """
    rows = [r for r in _rows(results) if r["op"] == op and run in (None, r["run"]) and isa in (None, r["isa"])]
    if not rows:
        what = " ".join([op, *(f"{name}={value}" for name, value in (("run", run), ("isa", isa)) if value)])
        raise LookupError(f"no run of {what} in results {results}: run benchmarks/bench_{op}.py first")
    last = max(rows, key=lambda r: r["run"])
    rows = [r for r in rows if all(r[key] == last[key] for key in MACHINE if key != "threads")]
    most = max((r["threads"] for r in rows), key=lambda n: int(n or 0))
    rows = [r for r in rows if r["threads"] == most]
    newest = {}
    for r in rows:
        column = r["dtype"], r["direction"]
        newest[column] = max(newest.get(column, ""), r["run"])
    return [r for r in rows if r["run"] == newest[r["dtype"], r["direction"]]]


def instruction_sets(op, results="cpu"):
    """Those that `op` was measured with, the latest first."""
    rows = [row for row in _rows(results) if row["op"] == op]
    return distinct(sorted(rows, key=lambda row: row["run"], reverse=True), "isa")


def broadest(op, results="cpu"):
    """The instruction set that `op` was measured with in most dtypes and directions, of several the latest."""
    columns = lambda isa: len({(r["dtype"], r["direction"]) for r in latest(op, results, isa=isa)})
    return max(instruction_sets(op, results), key=columns)


def family(name, results="cpu"):
    """The names shown together under `name`, as far as they were measured."""
    return [op for op in FAMILIES.get(name, (name,)) if op in measured_ops(results)]


def distinct(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def groups(rows):
    """[(dtype, direction)] of these rows, float32 first."""
    found = {(row["dtype"], row["direction"]) for row in rows}
    return sorted(found, key=lambda column: (DTYPES.index(column[0]), column[1]))


def find(rows, **wanted):
    """The row with these values, or None."""
    return next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def ratios(rows, dtype, direction):
    """{shape: best peer's time over effvit's}."""
    chosen = [r for r in rows if (r["dtype"], r["direction"], r["contender"]) == (dtype, direction, "effvit")]
    return {r["shape"]: float(r["ratio"]) for r in chosen if r["ratio"]}


def describe(rows, common=MACHINE):
    """One line: device, instruction set, threads, kernel (those in `common`), versions, commits and dates."""
    r = rows[0]
    on_gpu = r["isa"].startswith("sm_")
    where = {"device": r["device"], "isa": r["isa"], "kernel": f"kernel {r['kernel']}"}
    where["threads"] = "" if on_gpu else f"{r['threads']} threads"
    timm = [f"timm {version}" for version in distinct(rows, "timm") if version]
    commits = sorted(distinct(rows, "commit"), key=lambda c: min(r["run"] for r in rows if r["commit"] == c))
    commit = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    torch = f"torch {', '.join(distinct(rows, 'torch'))}"
    return ", ".join(filter(None, [*(where[key] for key in common), torch, *timm, commit, max(distinct(rows, "date"))]))
