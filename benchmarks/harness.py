"""Benchmark harness: checks every result against float64, then times effvit and its peers interleaved in one run.

A bench file lists shapes, peers and cost (`Case`) and calls `main(op, cases)`. Everything else is here: pinned
threads, correctness, timing on CPU and GPU, the measured roofline, peak memory, the printed table and the CSV.
"""

import argparse
import csv
import ctypes
import datetime
import gc
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata


def _early_option(name, default):
    """Value of an option needed before torch is imported, when its thread pools read the environment."""
    for i, arg in enumerate(sys.argv):
        if arg == name and i + 1 < len(sys.argv):
            return sys.argv[i + 1]
        if arg.startswith(name + "="):
            return arg.split("=", 1)[1]
    return default


def _one_cpu_per_core():
    """CPUs this process may use, one of each physical core first."""
    first, rest, seen = [], [], set()
    for cpu in sorted(os.sched_getaffinity(0)):
        path = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings = path.read_text().strip() if path.exists() else str(cpu)
        (rest if siblings in seen else first).append(cpu)
        seen.add(siblings)
    return first + rest


THREADS = int(_early_option("--threads", "2"))
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, _one_cpu_per_core()[:THREADS])
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402

from effvit import _backends  # noqa: E402
from effvit._accuracy import measure  # noqa: E402
from effvit.ops._op import Cost  # noqa: E402
from effvit.testing import torchvision_schemas  # noqa: E402

torch.set_num_threads(THREADS)
torchvision_schemas()  # for peers that import timm beside a torch that torchvision's binary does not match
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("forward", "forward+backward")
REFERENCE_DTYPE = torch.float64
SLOW_S = 2.0  # a call beyond this is timed once, unless all are that slow

FIELDS = (
    "run", "date", "commit", "device", "isa", "threads", "torch", "python", "timm", "effvit", "kernel",
    "op", "shape", "dtype", "direction", "contender", "mode", "status", "error", "median_ms", "p20_ms", "p80_ms",
    "rounds", "calls", "best_peer", "ratio", "gb_per_s", "tflop_per_s", "roofline_share", "copy_gb_per_s",
    "gemm_tflop_per_s", "peak_extra_mib", "outputs_mib", "load_average",
)  # fmt: skip


@dataclass
class Case:
    """One shape of one operator.

    ``inputs(dtype, device)`` draws the inputs as a dict of tensors (the harness seeds the generator).
    A contender is a builder ``make(**inputs) -> fn`` with ``fn() -> Tensor``; it may instead return
    ``(fn, {name: [tensors to differentiate]})``; the default is to differentiate the inputs in ``wrt``.
    ``reference`` is a builder that receives the inputs in float64. The contender named ``baseline`` is the plain
    formula in PyTorch, the yardstick of effvit's error; ``magnitudes(inputs, grad_out, eps)``, of float64 inputs,
    are by name what it is measured against, where sums cancel. ``compiled`` names the one given to torch.compile too.
    One in ``unchecked`` computes something else: it is timed, not compared. ``approximate``: allowed relative errors.
    """

    shape: str
    inputs: Callable[[torch.dtype, torch.device], dict[str, torch.Tensor]]
    effvit: Callable
    peers: dict[str, Callable]
    reference: Callable
    cost: Callable[[str, torch.dtype], Cost] | None = None
    wrt: tuple[str, ...] = ()
    baseline: str = "eager"
    compiled: str | None = "eager"
    unchecked: tuple[str, ...] = ()
    approximate: dict[str, float] = field(default_factory=dict)
    magnitudes: Callable | None = None
    memory: bool = False
    products: torch.dtype | None = None  # of its matrix products, where that is not the dtype: int8
    directions: tuple[str, ...] = DIRECTIONS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    tags: tuple[str, ...] = field(default=("default",))  # default | extended | smoke


def price_of(cost, shapes, **kwargs):
    """The `cost` of a case: that of the op's calls, forward, or forward and backward, on tensors of these shapes."""

    def price(direction, dtype):
        args = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        calls = [cost(args, kwargs, backward) for backward in (False, True)][: 1 if direction == "forward" else 2]
        return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

    return price


# ---------------------------------------------------------------------------------------------------- calls


class Call:
    """One contender ready to run: forward, or forward and the gradients of what it names."""

    def __init__(self, make, inputs, case, direction, grad_out=None):
        built = make(**inputs)
        self.fn, wrt = built if isinstance(built, tuple) else (built, {n: [inputs[n]] for n in case.wrt})
        self.backward = direction != "forward"
        self.names = [(name, len(tensors)) for name, tensors in wrt.items()]
        self.wrt = [t for tensors in wrt.values() for t in tensors]
        self.grad_out = grad_out
        if self.backward and grad_out is None:
            with torch.no_grad():
                out = self.fn()
            self.grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)

    def __call__(self):
        if not self.backward:
            with torch.no_grad():
                return (self.fn(),)
        out = self.fn()
        return (out.detach(), *torch.autograd.grad(out, self.wrt, self.grad_out))

    def named(self, results):
        """Results of a call by name: the output, then one tensor (or one vector of several tensors) per gradient."""
        named = {"out": results[0]}
        rest = list(results[1:])
        for name, count in self.names if self.backward else ():
            named["d" + name] = rest[0] if count == 1 else torch.cat([t.flatten() for t in rest[:count]])
            rest = rest[count:]
        return named


def relative_error(got, want):
    """||got - want|| / ||want||; infinite for NaN, so that NaN never passes."""
    error = (got.double() - want).norm().item() / max(want.norm().item(), 1e-300)
    return error if math.isfinite(error) else math.inf


def why_wrong(got, want, yardstick, magnitudes):
    """Why effvit's results are not right (the rule of effvit.testing, as in the tests), or None."""
    reports = {n: measure(got[n], truth, yardstick.get(n), magnitude=magnitudes.get(n)) for n, truth in want.items()}
    return next((f"{name}: {report}" for name, report in reports.items() if not report.ok), None)


# ---------------------------------------------------------------------------------------------------- timing


class CpuTimer:
    """Wall clock over bursts of calls, caches warm."""

    mode = "warm"
    burst_s = 0.02

    def prepare(self, call, small):
        return call, self.mode

    def estimate(self, call):
        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        return first if first > SLOW_S else self.burst(call, 1)[0]

    def burst(self, call, count):
        call()  # the previous contender emptied the caches, and the system may have taken back what this one freed
        start = time.perf_counter()
        for _ in range(count):
            call()
        return [(time.perf_counter() - start) / count]


class CudaTimer:
    """CUDA events around single calls, L2 flushed before each; CUDA graphs where launches would dominate."""

    mode = "cold L2"
    burst_s = 0.02
    graph_below_s = 5e-4

    def __init__(self, device):
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 28)
        self.l2 = torch.empty(size, dtype=torch.int8, device=device)

    def prepare(self, call, small):
        if not small:
            return call, self.mode
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                graph_outputs = call()
        except Exception as error:  # a peer that cannot be captured is timed as it is
            torch.cuda.synchronize()
            return call, f"{self.mode}, no graph: {type(error).__name__}"

        def replay():
            graph.replay()
            return graph_outputs

        return replay, f"{self.mode}, graph"

    def estimate(self, call):
        for _ in range(3):
            call()
        return statistics.median(self.burst(call, 5))

    def burst(self, call, count):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            self.l2.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


@dataclass
class Timing:
    median: float
    p20: float
    p80: float
    rounds: int
    calls: int
    mode: str


def quantile(values, share):
    values = sorted(values)
    position = share * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def time_interleaved(calls, timer, budget_s, min_rounds, max_rounds=40):
    """Rounds in which every contender runs one burst; the order rotates, so none always follows the same neighbour.

    A contender that takes seconds, and ten times as long as another, is not run again: its first call counts.
    """
    estimates = {name: timer.estimate(call) for name, call in calls.items()}
    fastest = min(estimates.values())
    slow = {name: t for name, t in estimates.items() if t > max(SLOW_S, 10 * fastest)}
    calls = {name: call for name, call in calls.items() if name not in slow}
    estimates = {name: t for name, t in estimates.items() if name not in slow}
    small = min(estimates.values()) < getattr(timer, "graph_below_s", 0)
    prepared = {name: timer.prepare(call, small) for name, call in calls.items()}
    if small:
        estimates = {name: timer.estimate(call) for name, (call, _) in prepared.items()}
    counts = {name: min(max(1, math.ceil(timer.burst_s / t)), 100) for name, t in estimates.items()}
    round_s = sum((counts[name] + 1) * t for name, t in estimates.items())
    rounds = min(max(int(budget_s / round_s), min_rounds), max_rounds)
    samples = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name] += timer.burst(prepared[name][0], counts[name])
    finally:
        gc.enable()
    return {
        name: Timing(
            quantile(s, 0.5), quantile(s, 0.2), quantile(s, 0.8), rounds, rounds * counts[name], prepared[name][1]
        )
        for name, s in samples.items()
    } | {name: Timing(t, t, t, 1, 1, f"{timer.mode}, one call") for name, t in slow.items()}  # fmt: skip


class Roofline:
    """Copy bandwidth and GEMM rate of this machine, measured in this run with PyTorch."""

    def __init__(self, device, timer, dtypes, products=()):
        self.device, self.gemm = device, {}
        size = 1 << (26 if device.type == "cpu" else 30)  # elements; far beyond the last-level cache
        src, dst = torch.rand(size, device=device), torch.empty(size, device=device)
        self.copy = 2 * src.nbytes / self._best(timer, lambda: dst.copy_(src))
        for dtype in {torch.float32, *dtypes, *products}:
            for n in (512, 1024, 2048) if device.type == "cpu" else (8192,):
                a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
                product = torch._int_mm if dtype == torch.int8 else torch.mm
                seconds = self._best(timer, lambda a=a, b=b, product=product: product(a, b))
                self.gemm[dtype] = max(self.gemm.get(dtype, 0), 2 * n**3 / seconds)
                if seconds > 0.1:
                    break

    @staticmethod
    def _best(timer, call):
        estimate = timer.estimate(call)
        return min(t for _ in range(3 if estimate > 0.1 else 6) for t in timer.burst(call, 1))

    def rate(self, dtype):
        """Attainable FLOP/s: a dtype may always be widened to float32, so never less than the float32 rate."""
        return max(self.gemm[dtype], self.gemm[torch.float32])

    def seconds(self, cost, dtype, copy_seconds):
        """Least time of a call: its FLOPs, or its bytes at the better of a large copy and a copy of just these."""
        return max(min(cost.bytes / self.copy, copy_seconds), cost.flops / self.rate(dtype))

    def __str__(self):
        rates = ", ".join(f"GEMM {str(d)[6:]} {r / 1e12:.3g} TFLOP/s" for d, r in sorted(self.gemm.items(), key=str))
        return f"copy {self.copy / 1e9:.1f} GB/s, {rates}"


# ---------------------------------------------------------------------------------------------------- memory


def _status_kib(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE).group(1))


def peak_memory(call, device):
    """(bytes at the peak of one call beyond its inputs, bytes of its results)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        libc = ctypes.CDLL(None)
        gc.collect()
        libc.malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
        before = _status_kib("VmRSS")
        results = call()
        peak = (_status_kib("VmHWM") - before) * 1024
    return peak, sum(t.nbytes for t in results)


def memory_worker(cases, request):
    """Runs in a process of its own: the first call of one contender, after a tiny case has started the thread pools."""
    device = torch.device(request["device"])
    if device.type == "cpu":
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would round every buffer up
    dtype = DTYPES[request["dtype"]]

    def build(case):
        inputs = draw(case, dtype, device, request["direction"] != "forward")
        return Call(contenders(case)[request["contender"]], inputs, case, request["direction"])

    small = next(c for c in cases if "smoke" in c.tags and c.memory)
    warm = build(small)
    warm()
    torch.ones(1 << 20, device=device).sum()
    del warm
    peak, outputs = peak_memory(build(next(c for c in cases if c.shape == request["shape"])), device)
    kernel = _backends.chosen(request["kernel_op"], device.type).name
    print("MEMORY " + json.dumps({"peak": peak, "outputs": outputs, "kernel": kernel}))


def measure_memory(case, dtype, direction, device, name, facts):
    request = {"shape": case.shape, "dtype": str(dtype)[6:], "direction": direction, "contender": name}
    request = json.dumps(request | {"device": str(device), "kernel_op": facts["kernel_op"]})
    command = [sys.executable, sys.argv[0], "--threads", str(THREADS), "--memory-worker", request]
    # A fixed mmap threshold makes malloc return every freed buffer, so that the resident set follows what is live.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    found = re.search(r"^MEMORY (.*)$", done.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(f"memory of {name} at {case.shape}: {done.stderr.strip().splitlines()[-1:]}")
    used = json.loads(found.group(1))
    if used["kernel"] != facts["kernel"]:
        raise RuntimeError(f"the measuring process ran kernel {used['kernel']}, this one {facts['kernel']}")
    return used["peak"], used["outputs"]


# ---------------------------------------------------------------------------------------------------- the run


def draw(case, dtype, device, requires_grad):
    torch.manual_seed(0)
    inputs = case.inputs(dtype, device)
    for name in case.wrt:
        inputs[name].requires_grad_(requires_grad)
    return inputs


def contenders(case):
    return {"effvit": case.effvit, **case.peers}


def compiled(make):
    """The same contender under torch.compile, static shapes."""

    def build(**inputs):
        built = make(**inputs)
        fn, *rest = built if isinstance(built, tuple) else (built,)
        torch._dynamo.reset()  # every case compiles afresh; a recompile limit would fall back to eager unseen
        fast = torch.compile(fn, fullgraph=True, dynamic=False)
        return (fast, *rest) if rest else fast

    return build


def widen(case, inputs, direction):
    """The same inputs in float64; the gradients are taken at the rounded values every contender got."""
    wide = {}
    for name, t in inputs.items():
        wide[name] = t.detach().to(REFERENCE_DTYPE) if torch.is_tensor(t) and t.is_floating_point() else t
        if name in case.wrt:
            wide[name].requires_grad_(direction != "forward")
    return wide


def short_error(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def run_case(case, dtype, direction, device, timer, roofline, facts, options):
    """Rows of one case, dtype and direction: checked, then timed side by side."""
    inputs = draw(case, dtype, device, direction != "forward")
    makers = contenders(case)
    if case.compiled and not options.no_compile:
        makers["compile"] = compiled(makers[case.compiled])
    if options.contender:
        makers = {n: m for n, m in makers.items() if n in ("effvit", case.baseline, *options.contender)}

    # The baseline first: it draws grad_out, shared by all, and its error sets the bound of the others.
    makers = {case.baseline: makers[case.baseline]} | makers
    calls, statuses, errors, grad_out = {}, {}, {}, None
    for name, make in makers.items():
        try:
            calls[name] = Call(make, inputs, case, direction, grad_out)
            grad_out, statuses[name] = calls[name].grad_out, "ok"
        except Exception as error:
            if options.traceback:
                traceback.print_exc()
            statuses[name] = f"failed: {short_error(error)}"
    wide_grad = None if grad_out is None else grad_out.to(REFERENCE_DTYPE)
    wide = widen(case, inputs, direction)
    reference = Call(case.reference, wide, case, direction, wide_grad)
    want, yardstick, got = reference.named(reference()), {}, None
    magnitudes = case.magnitudes(wide, wide_grad, torch.finfo(dtype).eps) if case.magnitudes else {}
    for name in [n for n in calls if n not in case.unchecked]:
        try:
            got = calls[name].named(calls[name]())
        except Exception as error:
            if options.traceback:
                traceback.print_exc()
            statuses[name] = f"failed: {short_error(error)}"
            continue
        errors[name] = max(relative_error(got[key], want[key]) for key in want)
        yardstick = got if name == case.baseline else yardstick
        bound = case.approximate.get(name, math.sqrt(torch.finfo(dtype).eps))
        wrong = name == "effvit" and name not in case.approximate and why_wrong(got, want, yardstick, magnitudes)
        if not wrong and not errors[name] <= bound:
            wrong = f"relative error {errors[name]:.1e}: it computes something else"
        if wrong:
            statuses[name] = f"wrong: {wrong}"
    del want, reference, yardstick, got, wide, magnitudes
    calls = {name: call for name, call in calls.items() if statuses[name] == "ok"}

    cost = case.cost(direction, dtype) if case.cost else None
    timed = dict(calls)
    if cost:
        half = torch.rand(max(int(cost.bytes / 8), 1), device=device)  # float32; the copy reads and writes cost.bytes
        target = torch.empty_like(half)
        timed["copy"] = lambda: target.copy_(half)
    timings = time_interleaved(timed, timer, options.budget, options.min_rounds)
    copy = timings.pop("copy", None)

    peers = {name: t.median for name, t in timings.items() if name != "effvit"}
    best = min(peers, key=peers.get) if peers else ""
    rows = []
    for name in sorted(makers, key=lambda n: n != "effvit"):
        row = {"shape": case.shape, "dtype": str(dtype)[6:], "direction": direction, "contender": name}
        row["status"] = statuses[name]
        if name in errors:
            row["error"] = f"{errors[name]:.2e}"
        if name in timings:
            t = timings[name]
            row |= {"mode": t.mode, "rounds": t.rounds, "calls": t.calls}
            row |= {f"{k}_ms": f"{1e3 * getattr(t, k):.4f}" for k in ("median", "p20", "p80")}
            if cost:
                least = roofline.seconds(cost, case.products or dtype, copy.median)
                row["gb_per_s"] = f"{cost.bytes / t.median / 1e9:.2f}"
                row["tflop_per_s"] = f"{cost.flops / t.median / 1e12:.4f}"
                row["roofline_share"] = f"{least / t.median:.3f}"
            if name == "effvit" and best:
                row |= {"best_peer": best, "ratio": f"{peers[best] / t.median:.3f}"}
        if case.memory and not options.no_memory and name in calls and name != "compile":
            try:
                if device.type == "cuda":  # its allocator counts; on the CPU a fresh process is needed
                    peak, outputs = peak_memory(calls[name], device)
                else:
                    peak, outputs = measure_memory(case, dtype, direction, device, name, facts)
                row["outputs_mib"] = f"{outputs / 2**20:.2f}"
                row["peak_extra_mib"] = f"{(peak - outputs) / 2**20:.2f}"
            except Exception as error:
                print(f"  peak memory not measured: {short_error(error)}", file=sys.stderr)
        rows.append(row)
    return rows


def environment(device, op, kernel_op):
    """The columns that are the same for every row of a run."""

    def git(*args):
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    dirty = "+" if git("status", "--porcelain", "--", "csrc", "python", "triton_kernels", "benchmarks/*.py") else ""
    now = datetime.datetime.now(datetime.timezone.utc)

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    return {
        "run": now.strftime("%Y%m%dT%H%M%SZ"),
        "date": now.strftime("%Y-%m-%d"),
        "commit": (git("rev-parse", "--short", "HEAD") or "none") + dirty,
        "device": device_name(device),
        "isa": active_isa(device),
        "threads": THREADS,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "timm": version("timm"),
        "effvit": version("effvit"),
        "kernel": _backends.chosen(kernel_op, device.type).name,
        "op": op,
        "kernel_op": kernel_op,  # not a column
        "load_average": f"{os.getloadavg()[0]:.2f}",
    }


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def active_isa(device):
    """The GPU architecture, or the instruction set of effvit's CPU library (torch's, without that library)."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return _backends.isa() or torch.backends.cpu.get_cpu_capability().lower()


def append_csv(path, rows):
    """Appends rows; a file written with other columns is rewritten with the present ones, keeping its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != FIELDS:
                old = list(reader)
    mode = "w" if old or not path.exists() else "a"
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore", lineterminator="\n")
        if mode == "w":
            writer.writeheader()
        writer.writerows(old + rows)


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def print_rows(rows):
    effvit = next(r for r in rows if r["contender"] == "effvit")
    print(f"{effvit['shape']:<30} {effvit['dtype']:<9} {effvit['direction']}")
    for row in rows:
        if "median_ms" not in row:
            print(f"  {row['contender']:<9} {row['status']}")
            continue
        line = f"  {row['contender']:<9} {float(row['median_ms']):9.3f} ms [{float(row['p20_ms']):.3f}, "
        line += f"{float(row['p80_ms']):.3f}]  error {row.get('error', '-')}"
        if "gb_per_s" in row:
            line += f"  {float(row['gb_per_s']):7.1f} GB/s  {float(row['tflop_per_s']):7.3f} TFLOP/s"
            line += f"  roofline {100 * float(row['roofline_share']):3.0f} %"
        if row.get("peak_extra_mib"):
            line += f"  peak {row['outputs_mib']} + {row['peak_extra_mib']} MiB"
        if row.get("ratio"):
            line += f"  {float(row['ratio']):.2f}x over {row['best_peer']}"
        print(line)
    sys.stdout.flush()


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, pinned (default 2)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: float32 and bfloat16")
    parser.add_argument("--direction", action="append", choices=list(DIRECTIONS), help="default: both")
    parser.add_argument("--filter", default="", help="regular expression on the shape's name")
    parser.add_argument("--contender", action="append", help="time only this peer (and the baseline); repeatable")
    parser.add_argument("--quick", action="store_true", help="few rounds, no CSV")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no CSV: does every path run?")
    parser.add_argument("--extended", action="store_true", help="shapes beyond the default set as well")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="without peak memory")
    parser.add_argument("--budget", type=float, help="seconds of timing per shape, dtype and direction")
    parser.add_argument("--csv", type=pathlib.Path, help="append here (default benchmarks/results/<device>.csv)")
    parser.add_argument("--traceback", action="store_true", help="print the traceback of a contender that fails")
    parser.add_argument("--memory-worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.min_rounds = 1 if options.smoke else 3 if options.quick else 5
    if options.budget is None:
        options.budget = 0.05 if options.smoke else 0.6 if options.quick else 5.0
    return options


def csv_path(device):
    name = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{name}.csv"


def main(op: str, cases: Iterable[Case], kernel_op: str | None = None, argv=None) -> int:
    """Runs a bench file. `op` names the results; `kernel_op` is the operator whose kernel is recorded, if not `op`."""
    options = parse(argv)
    cases = list(cases)
    if options.memory_worker:
        memory_worker(cases, options.memory_worker)
        return 0
    device = torch.device(options.device)
    timer = CpuTimer() if device.type == "cpu" else CudaTimer(device)
    dtypes = [DTYPES[name] for name in options.dtype or ("float32", "bfloat16")]
    wanted = {"smoke"} if options.smoke else {"default", "extended"} if options.extended else {"default"}
    cases = [c for c in cases if wanted & set(c.tags) and re.search(options.filter, c.shape)]
    if not cases:
        print(f"no shape matches {options.filter!r}", file=sys.stderr)
        return 2

    path = options.csv or (None if options.quick or options.smoke else csv_path(device))
    facts = environment(device, op, kernel_op or op)
    roofline = Roofline(device, timer, dtypes, {c.products for c in cases if c.products})
    facts["copy_gb_per_s"] = f"{roofline.copy / 1e9:.2f}"
    print(f"{op} on {facts['device']} ({facts['isa']}), kernel {facts['kernel']}, {THREADS} threads, ", end="")
    print(f"torch {facts['torch']}")
    print(f"measured: {roofline}; load average {facts['load_average']}\n")
    if device.type == "cpu" and os.getloadavg()[0] > 0.5:
        print("warning: the machine is not idle; ratios may be off\n")

    rows, bad = [], []
    for dtype in dtypes:
        for direction in options.direction or DIRECTIONS:
            ratios = []
            for case in (c for c in cases if direction in c.directions and str(dtype)[6:] in c.dtypes):
                done = run_case(case, dtype, direction, device, timer, roofline, facts, options)
                for row in done:
                    row |= facts | {"gemm_tflop_per_s": f"{roofline.rate(dtype) / 1e12:.4f}"}
                print_rows(done)
                if path:
                    append_csv(path, done)  # at once: a run that is cut short keeps what it measured
                rows += done
                effvit = next(r for r in done if r["contender"] == "effvit")
                if effvit["status"] != "ok":
                    bad.append(f"{case.shape} {effvit['dtype']} {direction}: {effvit['status']}")
                if effvit.get("ratio"):
                    ratios.append(float(effvit["ratio"]))
            if ratios:
                print(
                    f"== {str(dtype)[6:]} {direction}: geometric mean {geometric_mean(ratios):.2f}x, "
                    f"least {min(ratios):.2f}x, over {len(ratios)} shapes\n"
                )
    if path:
        print(f"{len(rows)} rows appended to {path}")
    for line in bad:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if bad else 0
