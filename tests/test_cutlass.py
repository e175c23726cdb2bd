"""CUTLASS in the CUDA library: what is in it, the rule that chooses, the order of metadata, what is said of it.

The kernels themselves need a GPU: there they are compared with our own. In the emulator all of sm_80's but the main
loop runs, and of sm_90's the visitor node.
"""

import ctypes
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_abi import library, output, preload_cuda
from test_info import info

import effvit
from effvit import _cutlass, _load, sparse24_formats
from effvit._explain import Rates
from effvit.testing import assert_bitwise_equal, emulator

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ("float32", "bfloat16", "float16", "int32", "int8")
RATES = Rates(1e12, 1e15)
DTYPE = {name: i for i, name in enumerate(OUTPUTS)}


@pytest.fixture(scope="module")
def emulated():
    handle, reason = emulator.load()
    if handle is None:
        pytest.skip(reason)
    return handle


# ---- metadata -------------------------------------------------------------------------------------------------------


def _full_weight(n, k):
    """(values, meta) of two nonzeros in every group: of these sm80's packing keeps the same as the canonical form."""
    g = torch.Generator().manual_seed(n + k)
    kept = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8)
    nibbles = kept[torch.randint(6, (n, k // 4), generator=g)]
    values = torch.randint(1, 128, (n, k // 2), generator=g, dtype=torch.int8)
    return values, nibbles[:, ::2] | nibbles[:, 1::2] << 4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (32, 128), (80, 192), (144, 384), (5, 32), (70, 160), (200, 992)])
@pytest.mark.parametrize("arch", [80, 90])
def test_metadata_are_repacked_as_sparse24_formats_does(emulated, arch, n, k, seed):
    values, meta = _full_weight(n, k)
    _, expected = sparse24_formats.pack(values, meta, format=f"sm{arch}")
    found = torch.zeros(expected.numel() * expected.element_size(), dtype=torch.uint8)
    with emulator.seeded(seed):
        error = emulated.effvit_cuda_sparse24_meta(
            ctypes.c_void_p(meta.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(k), ctypes.c_int64(arch),
            ctypes.c_void_p(found.data_ptr()), None,
        )  # fmt: skip
    assert error == 0
    assert_bitwise_equal(found, expected.contiguous().flatten().view(torch.uint8))


# ---- the epilogues, in the emulator ----------------------------------------------------------------------------------


def _includes():
    """Folders of CUTLASS's and CUDA's headers."""
    found = importlib.util.find_spec("cutlass_library")
    wheel = f"{found.submodule_search_locations[0]}/source" if found else None
    cutlass = os.environ.get("CUTLASS_PATH") or wheel
    if cutlass is None:
        pytest.skip("CUTLASS was not found")
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        pytest.skip("needs nvcc, for CUDA's headers, and g++")
    done = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    cuda = [p for p in re.findall(r'"-I([^"]+)"', done.stderr) if os.path.isfile(f"{p}/cuda_runtime.h")]
    return [f"{cutlass}/include", *cuda, *(f"{p}/cccl" for p in cuda)]


@pytest.fixture(scope="module", params=[80, 90], ids="sm{}".format)
def epilogue(request, emulated, tmp_path_factory):
    """The entry of the harness of an architecture; CUTLASS's sources are not all standard C++."""
    name = f"cutlass_sm{request.param}"
    sources = [ROOT / f"tests/prim/{name}_harness.cpp", *sorted((ROOT / "csrc/emu").glob("*.cpp"))]
    path = tmp_path_factory.mktemp("cutlass") / f"lib{name}.so"
    includes = [option for folder in _includes() for option in ("-isystem", folder)]
    flags = ["-std=c++17", "-O1", "-w", "-fpermissive", "-fPIC", "-shared", "-fvisibility=hidden"]
    output("g++", *flags, "-DEFFVIT_EMU", "-DNDEBUG", "-I", ROOT / "csrc", *includes, *sources, "-o", path)
    return getattr(ctypes.CDLL(str(path)), f"run_{name}")


@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("activation", range(4), ids=["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize(("m", "n"), [(128, 128), (197, 150), (70, 272), (130, 67)])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_epilogues_are_ours(epilogue, sparse, m, n, activation, out):
    """Bit for bit that of our kernels, from sums as the tensor cores leave them; every output is written once."""
    g = torch.Generator().manual_seed(m + n + activation)
    x, w = (torch.randint(-128, 128, (rows, 32), generator=g, dtype=torch.int8) for rows in (m, n))
    x_scale, w_scale = torch.rand(1 if activation == 1 else m, generator=g) + 0.5, torch.rand(n, generator=g) / 1e4
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    bias = torch.randn(n, generator=g).to(dtypes[activation % 3]) if activation != 3 else None
    residual = torch.randn(m, n + 8, generator=g).to(dtypes[(activation + 1) % 3])[:, 8 - activation :][:, :n]
    residual = residual if activation != 0 else None
    options = {"activation": activation, "out_dtype": DTYPE[out], "out_scale": 0.02 if out == "int8" else None}
    expected = torch.ops.effvit_emu.int8_linear(x, w, x_scale.expand(m), w_scale, bias, residual, **options)
    sums = x.int() @ w.int().t()
    rows = torch.zeros(*(-(-size // 128) * 128 for size in ((n, m) if sparse else (m, n))), dtype=torch.int32)
    rows[: n if sparse else m, : m if sparse else n] = sums.t() if sparse else sums
    found = torch.full((m, n), -1, dtype=expected.dtype)
    tensors = [None if t is None else t.data_ptr() for t in (rows, x_scale, w_scale, bias, residual, found)]
    number = {dtype: i for i, dtype in enumerate(dtypes)}
    of = [0 if t is None else number[t.dtype] for t in (bias, residual)]
    stride = 0 if residual is None else residual.stride(0)
    sizes = [m, n, int(sparse), stride, len(x_scale), DTYPE[out], *of, activation]
    message = ctypes.create_string_buffer(1024)
    epilogue(
        (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_void_p * len(tensors))(*tensors),
        ctypes.c_float(0.02), message, ctypes.c_int64(len(message)),
    )  # fmt: skip
    assert message.value.decode() == ""
    assert_bitwise_equal(found, expected)


# ---- the choice -----------------------------------------------------------------------------------------------------

NAMES = ("M", "N", "K", "x", "x_stride", "w", "w_stride", "last", "out", "dtype")
GOOD = {
    "int8_linear": (1576, 1536, 768, 256, 768, 512, 768, 0, 1024, "float16"),
    "sparse24_int8_linear": (1576, 1536, 768, 256, 768, 512, 384, 768, 1024, "float16"),
}


def numbers(op, **changes):
    call = {**dict(zip(NAMES, GOOD[op], strict=True)), **changes}
    return [_cutlass.OPS.index(op), *list(call.values())[:-1], DTYPE[call["dtype"]]]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("op", _cutlass.OPS)
def test_a_good_call_is_taken(emulated, op, dtype, arch):
    for changes in ({}, {"M": 1577}, {"M": 12345, "x_stride": 1024}):
        assert _cutlass.obstacle(emulated, numbers(op, dtype=dtype, **changes), arch=arch) == ("", arch)


BOTH = (80, 90)
DENSE, SPARSE = ("int8_linear",), ("sparse24_int8_linear",)


@pytest.mark.parametrize(
    ("ops", "archs", "changes", "reason"),
    [
        (_cutlass.OPS, BOTH, {"dtype": "int32"}, "out_dtype is int32"),
        (_cutlass.OPS, BOTH, {"M": 64}, "tiles of 128 x 128 would not occupy the GPU"),
        (_cutlass.OPS, BOTH, {"N": 64, "M": 100000}, "tiles of 128 x 128 would not occupy the GPU"),
        (_cutlass.OPS, BOTH, {"M": 1280, "N": 1280}, "tiles of 128 x 128 would not occupy the GPU"),
        (_cutlass.OPS, BOTH, {"M": 2**22 + 1}, "M or N is above 4194304"),
        (_cutlass.OPS, BOTH, {"x": 264}, "rows of x are not aligned to 16 bytes"),
        (_cutlass.OPS, BOTH, {"x_stride": 776}, "rows of x are not aligned to 16 bytes"),
        (_cutlass.OPS, BOTH, {"x_stride": 0}, "rows of x overlap"),
        (_cutlass.OPS, BOTH, {"w": 520}, "rows of (weight|values) are not aligned to 16 bytes"),
        (DENSE, BOTH, {"w_stride": 776}, "rows of weight are not aligned to 16 bytes"),
        (DENSE, BOTH, {"w_stride": 0}, "rows of weight overlap"),
        (DENSE, BOTH, {"last": 1}, "weight is packed"),
        (DENSE, BOTH, {"K": 760}, "K is not a multiple of 16"),
        (SPARSE, BOTH, {"last": 0}, "values are packed"),
        (SPARSE, BOTH, {"last": 770}, "meta is not aligned to 4 bytes"),
        (SPARSE, BOTH, {"K": 752, "w_stride": 376}, "K is not a multiple of 32"),
        (SPARSE, (90,), {"w_stride": 400}, "values are not contiguous"),
        (SPARSE, (80,), {"w_stride": 392}, "rows of values are not aligned to 16 bytes"),
        (SPARSE, (80,), {"w_stride": 0}, "rows of values overlap"),
        (SPARSE, (80,), {"K": 704, "w_stride": 352}, "K is not a multiple of 128, as sm_80's kernel needs"),
        (SPARSE, (80,), {"N": 1544}, "N is not a multiple of 16, as sm_80's kernel needs"),
        (_cutlass.OPS, (90,), {"N": 1540}, "rows of the output are not multiples of 16 bytes"),
        (_cutlass.OPS, (90,), {"N": 1544, "dtype": "int8"}, "rows of the output are not multiples of 16 bytes"),
        (_cutlass.OPS, (90,), {"out": 1032}, "rows of the output are not multiples of 16 bytes"),
    ],
)  # fmt: skip
def test_obstacles(emulated, ops, archs, changes, reason):
    for op, arch in itertools.product(ops, archs):
        found, _ = _cutlass.obstacle(emulated, numbers(op, **changes), arch=arch)
        assert re.fullmatch(reason, found), (op, arch, found)


@pytest.mark.parametrize("arch", [80, 90])
def test_what_one_architecture_lacks_the_other_takes(emulated, arch):
    other = {80: {"N": 1544}, 90: {"w_stride": 400}}[arch]
    assert _cutlass.obstacle(emulated, numbers("sparse24_int8_linear", **other), arch=170 - arch) == ("", 170 - arch)


def test_calls_are_described_by_their_tensors(emulated):
    x, w = torch.zeros(1024, 800, dtype=torch.int8)[:, :768], torch.zeros(3072, 768, dtype=torch.int8)
    scales = torch.ones(1024), torch.ones(3072)
    options = {"activation": 0, "out_dtype": DTYPE["int8"], "out_scale": 1.0}
    call = _cutlass.described("int8_linear", (x, w, *scales, None, None), options)
    assert call == [0, 1024, 3072, 768, x.data_ptr(), 800, w.data_ptr(), 768, 0, 0, 4]
    assert _cutlass.obstacle(emulated, call) == ("", 90)
    packed = effvit.int8_prepack(w)
    assert _cutlass.described("int8_linear", (x, packed, *scales, None, None), options)[8] == 1
    values, meta = _full_weight(3072, 768)
    call = _cutlass.described("sparse24_int8_linear", (x, values, meta, *scales, None, None), options)
    assert call == [1, 1024, 3072, 768, x.data_ptr(), 800, values.data_ptr(), 384, meta.data_ptr(), 0, 4]
    assert _cutlass.obstacle(emulated, call) == ("", 90)


def test_explain_says_which_kernel(emulated, monkeypatch):
    """As on a GPU, of a library that has no CUTLASS kernels: the emulator's."""
    monkeypatch.setattr(_load.load()["effvit_cuda"], "handle", emulated)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x, w = torch.zeros(8, 32, dtype=torch.int8), torch.zeros(16, 32, dtype=torch.int8)
    args, options = (x, w, torch.ones(8), torch.ones(16), None, None), {"out_dtype": 0}
    expected = "our own kernel, not CUTLASS's: no CUTLASS kernel was built for this GPU and dtype"
    assert _cutlass.explained("int8_linear", args, options) == expected
    try:
        _cutlass.use(False)
        assert _cutlass.explained("int8_linear", args, options) == "our own kernel, not CUTLASS's: EFFVIT_CUTLASS is 0"
    finally:
        _cutlass.use(True)
    assert _cutlass.explained("int8_linear", args, options) == expected


def test_use_needs_the_library(monkeypatch):
    monkeypatch.setattr(_load.load()["effvit_cuda"], "handle", None)
    with pytest.raises(RuntimeError, match="effvit: the CUDA library is not loaded"):
        _cutlass.use(False)


# ---- the library ----------------------------------------------------------------------------------------------------


def built():
    """{architecture: dtypes of outputs} of the CUTLASS kernels of this build."""
    status = _load.build_status("cutlass")
    if not status.startswith("CUTLASS"):
        pytest.skip(f"CUTLASS kernels: {status}")
    found = {}
    if re.search(r", sm_8\d\b", status):
        found[80] = ["float32", "bfloat16", "float16", "int8"]
    if match := re.search(r", sm_90a \(outputs (.*)\)", status):
        found[90] = match[1].split()
    assert found, status
    return found


SCRIPT = """
import ctypes, os, sys
os.environ["EFFVIT_BACKEND"] = "cpu"
import torch, effvit
from effvit import _cutlass
{preload}torch.ops.load_library({path!r})
handle = ctypes.CDLL({path!r})
for call, major in {calls!r}:
    reason, arch = _cutlass.obstacle(handle, call, major=major)
    numbers = (ctypes.c_int64 * len(call))(*call)
    checked = handle.effvit_cuda_cutlass_check(numbers, ctypes.c_int64(arch)) if not reason else None
    print(repr((reason, arch, checked)))
"""


def asked(tmp_path, calls, **env):
    """(reason, architecture, CUTLASS's own check) of each (call, major), from the CUDA library, without a GPU."""
    path = str(library("effvit_cuda"))
    script = SCRIPT.format(preload=preload_cuda(path, tmp_path), path=path, calls=calls)
    assignments = [f"{name}={value}" for name, value in env.items()]
    return [eval(line) for line in output("env", *assignments, sys.executable, "-c", script).splitlines()]


def test_the_library_has_the_kernels_that_the_build_reports(tmp_path):
    archs = built()
    wanted = list(itertools.product(_cutlass.OPS, OUTPUTS, (8, 9)))
    calls = [(numbers(op, dtype=dtype), major) for op, dtype, major in wanted]
    for (op, dtype, major), (reason, arch, checked) in zip(wanted, asked(tmp_path, calls), strict=True):
        expected = 80 if major == 8 else 90
        if dtype in archs.get(expected, ()):
            assert (reason, arch, checked) == ("", expected, 0), (op, dtype, major)
        elif major == 8 or not archs.get(80):
            assert reason == "no CUTLASS kernel was built for this GPU and dtype", (op, dtype, major)
    assert {reason for reason, *_ in asked(tmp_path, calls, EFFVIT_CUTLASS=0)} == {"EFFVIT_CUTLASS is 0"}


def test_the_rule_is_no_weaker_than_cutlass(tmp_path):
    """Calls near every bound of the rule: those that it lets through pass CUTLASS's own checks."""
    outputs, calls = built().get(90), []
    if not outputs:
        pytest.skip("no CUTLASS kernels of sm_90a")
    sizes = (1575, 1576), (1536, 1540, 1544, 1552), (768, 752, 736, 760, 704)
    for dtype, m, n, k in itertools.product(outputs, *sizes):
        for op, w_stride in (("int8_linear", (k + 15) // 16 * 16), ("sparse24_int8_linear", k // 2)):
            shape = {"M": m, "N": n, "K": k, "x_stride": (k + 15) // 16 * 16, "w_stride": w_stride}
            calls.append((numbers(op, dtype=dtype, **shape), 9))
    found = asked(tmp_path, calls)
    taken = [(call, checked) for (call, _), (reason, arch, checked) in zip(calls, found, strict=True) if not reason]
    assert {call[0] for call, _ in taken} == {0, 1} and len(taken) < len(calls)
    assert [call for call, checked in taken if checked != 0] == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_kernels_are_in_the_library():
    """By the names of the functions that launch them: one per op and, of sm_90a, dtype of the output."""
    symbols = [line.split()[-1] for line in output("nm", "--defined-only", library("effvit_cuda")).splitlines()]
    for arch, outputs in built().items():
        entry = re.compile(rf"_ZN7cutlassL?(13device_kernel|6Kernel|7Kernel2)I.*cutlass_sm{arch}\d+Int8EpilogueNode")
        kernels = [s for s in symbols if entry.match(s) and not s.endswith(".cold")]
        assert len(set(kernels)) == 2 * (len(outputs) if arch == 90 else 1), kernels


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize(("m", "n", "k"), [(1577, 1536, 384), (2100, 1552, 416), (1664, 1536, 128)])
@pytest.mark.parametrize("op", _cutlass.OPS)
def test_cutlass_equals_our_kernels_on_cuda(op, m, n, k, activation, out):
    """Bit for bit: sums are exact, the epilogue has one order. Our kernels are compared with the truth elsewhere."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    built()
    g = torch.Generator().manual_seed(m + n + k)
    dtype = torch.float32 if out == "int8" else getattr(torch, out)
    tensors = [torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)]
    tensors += (
        _full_weight(n, k) if "sparse" in op else [torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)]
    )
    tensors += [torch.rand(m, generator=g) + 0.5, (torch.rand(n, generator=g) + 0.5) / (5000 * k**0.5)]
    tensors = [t.cuda() for t in tensors]
    other = torch.bfloat16 if activation == "gelu" else torch.float32
    bias = torch.randn(n, generator=g).cuda().to(other) if activation != "silu" else None
    residual = torch.randn(m, n + 3, generator=g).cuda().to(dtype)[:, 3:] if activation in ("relu", "silu") else None
    options = {"activation": activation, "out_dtype": getattr(torch, out), "out_scale": 0.02 if out == "int8" else None}
    reason = effvit.explain(op, *tensors, bias, residual, rates=RATES, **options).choices[0].reason
    if "CUTLASS's kernel of" not in reason:
        pytest.skip(reason)
    function = getattr(effvit, op)
    found = function(*tensors, bias, residual, **options)
    try:
        _cutlass.use(False)
        expected = function(*tensors, bias, residual, **options)
    finally:
        _cutlass.use(True)
    assert_bitwise_equal(found, expected)


# ---- what is said ---------------------------------------------------------------------------------------------------


def _info_of(tmp_path, status):
    (tmp_path / "build.json").write_text(json.dumps({"cutlass": status}))
    return info(EFFVIT_LIB_DIR=str(tmp_path))


def test_info_says_what_was_built(tmp_path):
    text = _info_of(tmp_path, "CUTLASS 4.2.0, sm_80, sm_90a (outputs float16 int8)")
    assert "  cutlass       in effvit_cuda: CUTLASS 4.2.0, sm_80, sm_90a (outputs float16 int8)\n" in text
    assert "nvidia-cutlass" not in text


@pytest.mark.parametrize(
    ("why", "fix"),
    [
        ("CUTLASS was not found", "pip install --no-deps 'nvidia-cutlass>=4.2', then in effvit's source folder: "),
        ("CUTLASS 3.9.2 is older than 4.2", "pip install --no-deps 'nvidia-cutlass>=4.2', then "),
        ("EFFVIT_CUTLASS is off", "leave -DEFFVIT_CUTLASS=OFF out of EFFVIT_CMAKE_ARGS, then "),
    ],
)
def test_info_says_how_to_build_it(tmp_path, why, fix):
    text = _info_of(tmp_path, f"not built: {why}")
    assert f"  cutlass       not built: {why}\n" in text and f"  cutlass       {fix}" in text


def test_info_has_no_fix_where_there_is_no_cuda_library(tmp_path):
    text = _info_of(tmp_path, "not built: effvit_cuda is not")
    assert "  cutlass       not built: effvit_cuda is not\n" in text and "nvidia-cutlass" not in text
