"""The primitives of csrc/cuda/prim: the same cases in the emulator and, where there is one, on a GPU.

Without the GPU run the emulator is an opinion: it must compute what the hardware computes. What only the emulator can
do, report an undefined access, is tested on it alone.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from effvit.testing import emulator

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "prim_test.cu"
THREADS = 64
CTAS = 3


class Device:
    """Where the cases run. Arrays are NumPy on the outside, torch tensors of the device inside."""

    def __init__(self, library, device):
        self.function = library.effvit_prim_test
        self.function.restype = None
        self.device = device

    def __call__(self, case, inputs, out_shape, out_dtype, argument=0):
        tensors = [torch.from_numpy(np.ascontiguousarray(x).view(np.uint8)).to(self.device) for x in inputs]
        out = np.zeros(out_shape, out_dtype)
        result = torch.from_numpy(out.view(np.uint8)).to(self.device)
        arguments = [case.encode()]
        for t in [*tensors, None, None][:2]:
            pointer = ctypes.c_void_p(t.data_ptr() if t is not None else None)
            arguments += [pointer, ctypes.c_int64(t.numel() if t is not None else 0)]
        message = ctypes.create_string_buffer(1024)
        self.function(
            *arguments, ctypes.c_void_p(result.data_ptr()), ctypes.c_int64(result.numel()), ctypes.c_int(argument),
            message, ctypes.c_int64(len(message)),
        )  # fmt: skip
        if message.value:
            raise RuntimeError(message.value.decode())
        return result.cpu().numpy().view(out_dtype).reshape(out_shape)


@pytest.fixture(scope="module", params=["emulator", "cuda"])
def device(request, tmp_path_factory):
    if request.param == "emulator":
        library, reason = emulator.load()
        if library is None:
            pytest.skip(reason)
        return Device(library, "cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    path = tmp_path_factory.mktemp("prim") / "libprim_test.so"
    major, minor = torch.cuda.get_device_capability()
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC", "-shared", SOURCE, "-o", path],
        check=True,
    )
    return Device(ctypes.CDLL(str(path)), "cuda")


@pytest.fixture(params=[0, 1, 2, 3], ids="seed{}".format)
def seed(request, device):
    """Orders of threads, warps and CTAs; a GPU has its own."""
    if device.device != "cpu":
        if request.param:
            pytest.skip("the order of threads is the GPU's")
        yield
        return
    with emulator.seeded(request.param):
        yield


def rng():
    return np.random.default_rng(7)


def test_ids(device, seed):
    out = device("ids", [], (CTAS, THREADS, 4), np.int32)
    threads = np.arange(THREADS)
    for cta in range(CTAS):
        assert (out[cta, :, 0] == cta).all()
        assert (out[cta, :, 1] == threads).all()
        assert (out[cta, :, 2] == threads // 32 * 100 + threads % 32).all()
    assert (out[..., 3] == CTAS).all()


def test_shared_memory_and_barrier(device, seed):
    x = rng().standard_normal((CTAS, THREADS)).astype(np.float32)
    assert (device("reverse", [x], x.shape, np.float32) == x[:, ::-1]).all()


def test_shared_memory_and_syncwarp(device, seed):
    x = rng().standard_normal((CTAS, THREADS)).astype(np.float32)
    expected = x.reshape(CTAS, 2, 32)[:, :, ::-1].reshape(x.shape)
    assert (device("reverse_warp", [x], x.shape, np.float32) == expected).all()


def test_barrier_with_predicate(device, seed):
    x = np.zeros((CTAS, THREADS), np.int32)
    x[1, 50] = 1
    out = device("any", [x], x.shape, np.int32)
    assert (out == np.array([0, 1, 0])[:, None]).all()


def test_shuffles_and_reductions(device, seed):
    x = rng().integers(-50, 50, THREADS).astype(np.float32)  # integers: sums are exact in any order
    out = device("shuffle", [x], (6, THREADS), np.float32)
    w, lane = x.reshape(2, 32), np.arange(32)
    assert (out[0].reshape(2, 32) == w[:, lane ^ 5]).all()
    assert (out[1].reshape(2, 32) == w[:, np.where(lane + 3 < 32, lane + 3, lane)]).all()
    assert (out[2].reshape(2, 32) == w[:, (lane * 7 + 3) % 32]).all()
    assert (out[3].reshape(2, 32) == w.sum(1, keepdims=True)).all()
    assert (out[4].reshape(2, 32) == w.max(1, keepdims=True)).all()
    assert (out[5].reshape(2, 8, 4) == w.reshape(2, 8, 4).sum(2, keepdims=True)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(device, seed, transposed):
    x = rng().integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    name = "ldmatrix_trans" if transposed else "ldmatrix"
    out = device(name, [x], (32, 4), np.uint32).view(np.uint16).reshape(8, 4, 4, 2)  # row, column pair, matrix, element
    got = out.transpose(2, 0, 1, 3).reshape(4, 8, 8)
    assert (got == (x.transpose(0, 2, 1) if transposed else x)).all()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("through", ["mma", "mma_ldmatrix"])
def test_mma(device, seed, dtype, through):
    torch_dtype = torch.float16 if dtype == "f16" else torch.bfloat16
    a, b = (torch.from_numpy(rng().integers(-9, 9, s).astype(np.float32)) for s in ((16, 16), (16, 8)))
    bits = [x.to(torch_dtype).view(torch.int16).numpy() for x in (a, b)]  # small integers: the product is exact
    out = device(f"{through}_{dtype}", bits, (16, 8), np.float32)
    assert (out == (a @ b + 1).numpy()).all()


INT8 = {
    "random": lambda: (rng().integers(-128, 128, s) for s in ((16, 32), (8, 32))),
    "lowest": lambda: (np.full((16, 32), -128), np.full((8, 32), -128)),
    "both": lambda: (np.full((16, 32), -128), np.where(np.arange(8)[:, None] % 2, 127, -128) + np.zeros((8, 32), int)),
}


@pytest.mark.parametrize("numbers", INT8)
@pytest.mark.parametrize("through", ["mma", "mma_ldmatrix"])
def test_mma_int8(device, seed, numbers, through):
    a, b = (x.astype(np.int8) for x in INT8[numbers]())
    out = device(f"{through}_s8", [a, b], (16, 8), np.int32)
    assert (out == a.astype(np.int64) @ b.astype(np.int64).T + 1).all()


KEPT = np.array([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], np.uint8)  # i0 | i1 << 2 with i0 < i1


def sparse_weight(values, nibbles):
    """Dense [rows, 4 groups] of kept values [rows, 2 groups] and nibbles [rows, groups]."""
    dense = np.zeros((*nibbles.shape, 4), np.int64)
    pairs = values.reshape(*nibbles.shape, 2)
    for i, position in enumerate((nibbles & 3, nibbles >> 2)):
        np.put_along_axis(dense, position[..., None].astype(np.int64), pairs[..., i : i + 1], -1)
    return dense.reshape(len(values), -1)


@pytest.mark.parametrize("numbers", ["random", "lowest"])
@pytest.mark.parametrize("nibble", [None, *KEPT], ids=lambda x: "any" if x is None else f"{x:04b}")
@pytest.mark.parametrize("through", ["mma_sp", "mma_sp_ldmatrix"])
def test_mma_sparse_int8(device, seed, numbers, nibble, through):
    low, high = (-128, 128) if numbers == "random" else (-128, -127)
    random = rng()
    values, b = (random.integers(low, high, s).astype(np.int8) for s in ((16, 32), (8, 64)))
    nibbles = random.choice(KEPT, (16, 16)) if nibble is None else np.full((16, 16), nibble)
    meta = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    out = device(f"{through}_s8", [np.concatenate((values.view(np.uint8).ravel(), meta.ravel())), b], (16, 8), np.int32)
    assert (out == sparse_weight(values, nibbles) @ b.astype(np.int64).T + 1).all()


def test_metadata_layout():
    """A lane's metadata, as mma.cuh has it, are where PyTorch puts them for CUTLASS's sm_80 kernels."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    random = rng()
    nibbles = random.choice(KEPT, (32, 16))
    dense = sparse_weight(random.integers(1, 128, (32, 32)), nibbles).astype(np.int8)
    values, meta = sparse_semi_structured_from_dense_cutlass(torch.from_numpy(dense))
    assert (sparse_weight(values.numpy(), nibbles) == dense).all()
    words = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view("<i4")  # [32, 2], of 32 columns each
    lane = np.arange(32)
    rows, halves = lane // 4 + lane % 2 * 8, lane % 4 // 2
    for block in range(2):
        assert (meta.numpy().reshape(2, 32)[block] == words[16 * block + rows, halves]).all()


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(KEPT.tolist())))
def test_emulator_refuses_metadata(nibble):
    library, reason = emulator.load()
    if library is None:
        pytest.skip(reason)
    a = np.zeros(16 * 32 + 16 * 8, np.uint8)
    a[512:] = 0x44
    a[512 + 37] = 0x40 | nibble
    with pytest.raises(RuntimeError, match=f"mma.sp with metadata nibble {nibble} "):
        Device(library, "cpu")("mma_sp_s8", [a, np.zeros((8, 64), np.int8)], (16, 8), np.int32)


def test_cp_async(device, seed):
    x = rng().integers(1, 256, (2, THREADS, 16)).astype(np.uint8)
    kept = np.arange(16) < (np.arange(THREADS) % 17)[:, None]
    assert (device("cp_async", [x], x.shape, np.uint8) == np.where(kept, x, 0)).all()


def test_conversions(device, seed):
    x = rng().standard_normal(THREADS).astype(np.float32) * 10.0 ** rng().integers(-9, 6, THREADS)
    x[:12] = [0, -0.0, 1, 65504, 65519.99, 65520, 1e38, 6e-8, 2.9e-8, 2**-14, np.inf, 1.00390625]
    x = x.astype(np.float32)
    h, b = (torch.from_numpy(x).to(t) for t in (torch.float16, torch.bfloat16))
    hb, bb = (t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for t in (h, b))
    out = device("convert", [x], (THREADS, 6), np.uint32)
    assert (out[:, 0] == hb).all()
    assert (out[:, 1] == bb).all()
    assert (out[:, 2] == (hb | hb[::-1] << 16)).all()
    assert (out[:, 3] == (bb | bb[::-1] << 16)).all()
    assert (out[:, 4].copy().view(np.float32) == h.float().numpy()).all()
    assert (out[:, 5].copy().view(np.float32) == b.float().numpy()).all()


def test_math(device, seed):
    x = np.linspace(0.01, 80, THREADS).astype(np.float32)
    out = device("math", [x], (4, THREADS), np.float32)
    y = x.astype(np.float64)
    for got, expected, ulps in zip(out, (2.0**-y, np.exp(-y), np.log(y), np.sqrt(y)), (4, 4, 4, 1), strict=True):
        assert (np.abs(got - expected) <= ulps * np.finfo(np.float32).eps * np.abs(expected)).all()


def test_bits(device, seed):
    x, y = rng().integers(0, 2**32, (2, THREADS), dtype=np.uint32)
    y[:4] = [0, 31, 32, 33]
    out = device("bits", [x, y], (2, THREADS), np.uint32)
    assert (out[0] == x >> (y & 31)).all()
    both = np.stack((x, y), -1).view(np.uint8)  # the bytes of x, then those of y, the lowest first
    digits = x[:, None] >> np.array([0, 4, 8, 12], np.uint32) & 7
    assert (out[1] == np.take_along_axis(both, digits.astype(np.int64), 1).copy().view(np.uint32)[:, 0]).all()


def test_product_is_rounded_before_it_is_added_to(device, seed):
    x = rng().standard_normal((2, THREADS)).astype(np.float32)
    exact = x[0].astype(np.float64) * x[1]
    assert (exact.astype(np.float32) != exact).mean() > 0.9  # a multiply-add would leave what rounding took
    out = device("product", [x, -exact.astype(np.float32)], (THREADS,), np.float32)
    assert (out == 0).all()


def test_rounding_to_integers(device, seed):
    x = rng().uniform(-200, 200, THREADS).astype(np.float32)
    x[:9] = [0.5, 1.5, -0.5, -2.5, 126.5, 1e30, -1e30, np.inf, 8388609]
    expected = np.clip(np.rint(x.astype(np.float64)), -(2**31), 2**31 - 1)
    assert (device("round", [x], x.shape, np.int32) == expected).all()
    x[:] = np.nan
    assert (device("round", [x], x.shape, np.int32) == 0).all()


FAULTS = {  # in the order of `Fault` in prim_test.cu
    "shared_overrun": "outside the array",
    "shared_underrun": "outside the array",
    "shared_misaligned": "not aligned",
    "shared_uninitialised": "uninitialised",
    "race": "race|uninitialised",  # whichever thread comes first
    "warp_race": "race|uninitialised",
    "global_overrun": "outside every registered tensor",
    "global_misaligned": "not aligned",
    "write_input": "outside every registered tensor",
    "write_twice": "written twice",
    "leave_hole": "unwritten",
    "divergent_barrier": "divergent barrier",
    "barrier_after_exit": "divergent barrier",
    "divergent_collective": "divergent warp collective",
    "collective_after_exit": "divergent warp collective",
    "read_in_flight": "before its wait",
    "never_waited": "before its cp.async landed",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_emulator_reports(fault):
    library, reason = emulator.load()
    if library is None:
        pytest.skip(reason)
    run = Device(library, "cpu")
    x = rng().standard_normal(THREADS).astype(np.float32)
    for seed in range(4):
        with emulator.seeded(seed):
            with pytest.raises(RuntimeError, match=FAULTS[fault]):
                run("fault", [x], x.shape, np.float32, argument=list(FAULTS).index(fault))
            # The emulator is usable afterwards, and the kernel is right without the fault.
            assert (run("fault", [x], x.shape, np.float32, argument=-1) == x[::-1]).all()


def test_compiles_with_nvcc(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    command = ["nvcc", "-std=c++17", "-O1", "-arch=sm_80", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, SOURCE, "-o", tmp_path / "prim.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert spills and all(" 0 bytes spill stores" in line for line in spills), done.stderr


def test_accesses_of_memory_are_whole(tmp_path):
    """nvcc splits an access whose alignment it forgets into bytes: right, and slow. No kernel here asks for bytes."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    path = tmp_path / "prim.ptx"
    subprocess.run(["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-ptx", SOURCE, "-o", path], check=True)
    found = set(re.findall(r"\b((?:ld|st)\.(?:global|shared)\S*)", path.read_text()))
    assert {"ld.global.v4.u32", "st.global.v4.b32"} <= found, found
    assert not [access for access in found if re.search(r"\.[bsu]8$", access)], found
