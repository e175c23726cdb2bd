"""`python -m effvit info`, effvit.explain, and the choice of an implementation, with and without libraries."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import effvit
from effvit import _backends, _load
from effvit.ops._op import OPS
from effvit.testing.window_attention import SPEC

ROOT = Path(__file__).resolve().parent.parent


def run(code_or_module, **env):
    command = [sys.executable, *code_or_module]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, cwd="/")


def info(**env):
    done = run(["-m", "effvit", "info"], **env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def registered(op, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"effvit::{op}", key)


def test_info_as_installed():
    text = info()
    assert f"torch         {torch.__version__}" in text
    for op in OPS:
        for device in ("cpu", "cuda"):
            assert f"  {op} on {device}: {_backends.chosen(op, device).name}" in text
    for name, library in _load.LIBRARIES.items():
        state = "loaded" if library.handle else f"not loaded: {library.reason}"
        assert f"  {name:14}{state}" in text
        assert library.handle or library.fix in text


def test_info_without_libraries(tmp_path):
    text = info(EFFVIT_LIB_DIR=str(tmp_path))
    assert "effvit_cpu    not loaded: not built" in text
    assert "window_attention on cpu: reference" in text
    assert "effvit_cpu    in effvit's source folder: pip install" in text


def test_info_with_a_broken_library(tmp_path):
    (tmp_path / "libeffvit_cpu.so").write_text("not a library")
    text = info(EFFVIT_LIB_DIR=str(tmp_path))
    assert "effvit_cpu    not loaded: the loader refused it: " in text
    assert "window_attention on cpu: reference" in text


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_info_says_what_the_loader_said(tmp_path):
    code = "int effvit_nowhere(void); int effvit_call(void) { return effvit_nowhere(); }"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "libeffvit_cpu.so"]
    subprocess.run(command, input=code, text=True, check=True)
    text = info(EFFVIT_LIB_DIR=str(tmp_path))
    refused = f"the loader refused it: {tmp_path}/libeffvit_cpu.so: undefined symbol: effvit_nowhere"
    assert f"effvit_cpu    not loaded: {refused}\n" in text
    assert f"window_attention on cpu: reference\n    not cpu: {refused}\n" in text


def test_forced_reference():
    text = info(EFFVIT_BACKEND="reference")
    assert "effvit_cpu    not loaded: EFFVIT_BACKEND=reference" in text
    assert "window_attention on cpu: reference" in text and "window_attention on cuda: reference" in text


def test_unknown_backend_is_an_error():
    done = run(["-c", "import effvit"], EFFVIT_BACKEND="gpu")
    assert done.returncode != 0
    assert "ValueError: effvit: EFFVIT_BACKEND must be one of reference, cpu, triton, cuda, got gpu" in done.stderr


@pytest.mark.parametrize("name", ["sse9", "amx", "generic"])
def test_isa_that_is_not_here_is_an_error(name):
    if not _backends.isas():
        pytest.skip(f"the CPU library is not loaded: {_load.LIBRARIES['effvit_cpu'].reason}")
    if name in _backends.isas():
        pytest.skip(f"{name} is here")
    code = "try: import effvit\nexcept ValueError: pass\nimport effvit"  # the second import fails like the first
    done = run(["-c", code], EFFVIT_ISA=name)
    usable = ", ".join(_backends.isas())
    message = f"ValueError: effvit: EFFVIT_ISA must be one of {usable} (built, and this machine has it), got {name}"
    assert done.returncode != 0 and message in done.stderr
    assert "ISA           none: the CPU library is not loaded" in info(EFFVIT_ISA=name, EFFVIT_BACKEND="reference")


def test_import_is_silent_and_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import effvit; assert 'timm' not in sys.modules"
    done = run(["-W", "error::UserWarning", "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "xpu"])
def test_exactly_one_implementation_runs(op, device):
    choices = _backends.choices(op, device)
    assert sorted(c.name for c in choices) == ["cpu", "cuda", "reference", "triton"]
    assert [c.runs for c in choices].count(True) == 1
    assert all(c.runs or c.reason for c in choices)
    runs = _backends.chosen(op, device).name
    assert registered(op, "CPU") == (_backends.chosen(op, "cpu").name == "cpu")
    assert registered(op, "CUDA") == (_backends.chosen(op, "cuda").name in ("cuda", "triton"))
    assert device in ("cpu", "cuda") or runs == "reference"


def test_triton_is_registered_where_there_is_no_cuda_library():
    code = """
import torch
torch.backends.cuda.is_built = lambda: True  # the only thing that registration asks of torch
import effvit
from effvit import _backends
assert _backends.chosen("window_attention", "cuda").name == "triton"
assert torch._C._dispatch_has_kernel_for_dispatch_key("effvit::window_attention_backward", "CUDA")
"""
    done = run(["-c", code], EFFVIT_BACKEND="triton")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "cuda, driver, reason",
    [
        (None, None, "this torch is built for CPU only"),
        ("13.0", (12040, [(8, 0)]), "the NVIDIA driver is for CUDA 12.4, the library was built with CUDA 13"),
        ("13.0", (13000, [(9, 0), (7, 5)]), "needs compute capability 8.0 of every GPU, found 9.0, 7.5"),
        ("13.0", (13000, [(8, 6)]), ""),
        ("13.0", (13000, [(8, 9), (9, 0)]), "the library was built for sm_80, a GPU is sm_90"),
        ("13.0", None, ""),
    ],
)
def test_cuda_obstacles(monkeypatch, cuda, driver, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_load, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(_load, "build_status", lambda name: "nvcc 13.0.88, sm_80")
    found, fix = _load._cuda_obstacle()
    assert found == reason and bool(fix) == bool(reason)


def test_set_isa():
    if not _backends.isas():
        pytest.skip(f"the CPU library is not loaded: {_load.LIBRARIES['effvit_cpu'].reason}")
    before = _backends.isa()
    assert before in _backends.isas()
    for name in _backends.isas():
        _backends.set_isa(name)
        assert _backends.isa() == name
        assert f"instruction set {name}" in _backends.chosen("window_attention", "cpu").reason
    with pytest.raises(ValueError, match=f"isa must be one of {_backends.isas()[0]}.*, got sse9"):
        _backends.set_isa("sse9")
    _backends.set_isa(before)
    assert _backends.isa() == before


def test_forced_isa():
    if not _backends.isas():
        pytest.skip(f"the CPU library is not loaded: {_load.LIBRARIES['effvit_cpu'].reason}")
    for name in _backends.isas():
        assert f"ISA           {name} of {_backends.isas()[0]}" in info(EFFVIT_ISA=name)


@pytest.mark.parametrize(
    "status, runs",
    [
        ("nvcc 13.0.88, sm_80", [(8, 0), (8, 6), (8, 9)]),
        ("nvcc 13.0.88, sm_90a", [(9, 0)]),
        ("nvcc 13.0.88, sm_86, sm_90a", [(8, 6), (8, 9), (9, 0)]),
        ("nvcc 13.0.88, sm_80 and compute_90 PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
    ],
)
def test_machine_code_runs_on(monkeypatch, status, runs):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_load, "build_status", lambda name: status)
    found = []
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(_load, "nvidia_driver", lambda capability=capability: (13000, [capability]))
        found += [] if _load._cuda_obstacle()[0] else [capability]
    assert found == runs


def test_cpu_features_agree_with_the_library():
    """Linux names them in one way, the library asks the CPU."""
    table = (ROOT / "csrc/cpu/isa/isas.h").read_text()
    groups = dict(re.findall(r"^// target (\w+): (.*)$", table, re.M))
    real = dict(re.findall(r'^EFFVIT_ISA\((\w+), .*, -, "(.*)", ".*"\)$', table, re.M))
    features = {name.replace("_", "") for name in _backends.cpu_features()}
    usable = [isa for isa in _backends.isas() if real.get(isa)]
    if not usable:
        pytest.skip("no instruction set of the CPU library is in use")
    for isa in usable:
        names = ",".join(groups[group] for group in real[isa].split())
        assert {name.replace("-", "") for name in names.split(",")} <= features


def test_amx_permission():
    assert "amx" not in _backends.isas() or _backends.amx_permission()  # asking what is usable asks for it
    assert "amx_tile" in _backends.cpu_features() or not _backends.amx_permission()


# ---- explain -------------------------------------------------------------------------------------------------------

RATES = effvit._explain.Rates(bytes_per_second=10e9, flops_per_second=100e9)


def test_explain():
    args, kwargs = SPEC.samples[0].build()
    found = effvit.explain("window_attention", *args, rates=RATES, **kwargs)
    cost = SPEC.cost(args, kwargs)
    assert (found.flops, found.bytes) == (cost.flops, cost.bytes) and cost.flops > 0 and cost.bytes > 0
    assert found.seconds == max(cost.bytes / 10e9, cost.flops / 100e9)
    assert found.bound == ("memory" if cost.bytes / 10e9 >= cost.flops / 100e9 else "compute")
    assert found.kernel == _backends.chosen("window_attention", "cpu").name
    text = str(found)
    assert f"runs  {found.kernel}" in text and "no    cuda" in text and f"{found.bound} bound" in text


def test_explain_measures_rates():
    args, kwargs = SPEC.samples[0].build()
    found = effvit.explain("window_attention", *args, **kwargs)
    assert 1e8 < found.rates.bytes_per_second < 1e14 and 1e8 < found.rates.flops_per_second < 1e17


def test_explain_backward():
    args, kwargs = SPEC.samples[0].build()
    out, lse = effvit.window_attention(*args, **kwargs)
    q, k, v, *small = args
    found = effvit.explain("window_attention_backward", out, None, q, k, v, out, lse, *small, rates=RATES, **kwargs)
    cost = SPEC.cost(args, kwargs, backward=True)
    assert (found.op, found.flops, found.bytes) == ("window_attention_backward", cost.flops, cost.bytes)


def cost_of(op, *args, **kwargs):
    found = effvit.explain(op, *args, rates=RATES, **kwargs)
    return found.flops, found.bytes


@pytest.mark.parametrize("op", effvit.ops.__all__)
def test_explain_takes_the_arguments_of_the_function_and_of_the_op(op):
    spec = importlib.import_module(f"effvit.testing.{op}").SPEC
    for sample in spec.tagged("framework"):
        args, kwargs = sample.build()
        expected = spec.cost(args, kwargs)
        calls = [OPS[op].complete(kwargs)]
        calls += [] if spec.public_kwargs(kwargs) is None else [spec.public_kwargs(kwargs)]
        for options in calls:
            assert cost_of(op, *args, **options) == (expected.flops, expected.bytes), (sample.name, options)


def test_explain_is_about_what_the_function_does_with_its_arguments():
    q, k, v = torch.randn(3, 1, 4, 2, 8).unbind()
    quadratic, linear = (cost_of("linear_attention", q, k, v, quadratic=x) for x in (True, False))
    assert quadratic < linear
    assert cost_of("linear_attention", q, k, v) == quadratic  # the form that it chooses
    assert cost_of("linear_attention", q, v=v, k=k, feature_map="elu1") == quadratic
    assert cost_of("linear_attention", q, k, v, return_state=True) == linear
    packed = cost_of("linear_attention", q, k, v, cu_seqlens=torch.tensor([0, 1, 4]))  # int64 is cut to int32
    assert packed == cost_of("linear_attention", q, k, v, None, None, None, torch.tensor([0, 1, 4], dtype=torch.int32))
    maps = torch.randn(3, 1, 4, 6, 2, 8).unbind()
    assert cost_of("window_attention", *maps, window=(2, 3)) == cost_of("window_attention", *maps, window=[2, 3])


def test_explain_runs_nothing():
    """Results of 2 TiB; in training and under autocast as well, where it is the cast call that is explained."""
    q = torch.zeros(64, requires_grad=True).expand(1, 1 << 30, 8, 64)
    found = effvit.explain("linear_attention", q, q, q, rates=RATES)
    assert found.bytes > 8 << 40
    half = torch.empty(64, requires_grad=True).expand(2, 3, 64)
    whole = cost_of("glu", half, act="silu")
    with torch.autocast("cpu", torch.bfloat16):
        assert 2 * cost_of("glu", half, act="silu")[1] == whole[1]


def test_explain_checks_its_arguments():
    args, kwargs = SPEC.samples[0].build()
    with pytest.raises(ValueError, match="effvit::explain: op must be one of .*window_attention"):
        effvit.explain("attention", *args, **kwargs)
    with pytest.raises(ValueError, match="effvit::window_attention: q must be"):
        effvit.explain("window_attention", args[0][0], *args[1:], **kwargs)
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="effvit::linear_attention: feature_map must be one of none, relu, .*'tanh'"):
        effvit.explain("linear_attention", q, q, q, feature_map="tanh")
    with pytest.raises(TypeError, match="effvit::linear_attention: k must be a torch.Tensor, got NoneType"):
        effvit.explain("linear_attention", q, None, q)
    with pytest.raises(TypeError, match="unexpected keyword argument 'fast'"):
        effvit.explain("linear_attention", q, q, q, fast=True)
    with pytest.raises(TypeError, match="effvit::glu_backward: got an unexpected keyword argument 'fast'"):
        effvit.explain("glu_backward", q, q, fast=True)


def test_triton_kernels_are_reached_by_valid_arguments_only():
    """Public functions leave the checks to the kernels."""
    for op in ("linear_attention", "window_attention"):
        module = _load.triton_module(op)
        if module is None:
            pytest.skip("the Triton kernels are not here")
        kernel = _load._triton_kernel(op, module)
        options = {"window": [2, 2]} if op == "window_attention" else {}
        with pytest.raises(ValueError, match=f"effvit::{op}: q must be"):
            kernel(*(torch.zeros(2, 3) for _ in range(3)), **options)
