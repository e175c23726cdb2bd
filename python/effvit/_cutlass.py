"""CUTLASS kernels of the CUDA library: which of them takes a call, or why our own kernel does; and a switch."""

from __future__ import annotations

import ctypes

import torch

from . import _load

OPS = ("int8_linear", "sparse24_int8_linear")


def described(op: str, args: tuple, options: dict, out_address: int = 0) -> list[int]:
    """A call of an op in the numbers that effvit_cuda_cutlass_obstacle reads; csrc/cuda/abi.cu says which they are."""
    sparse = op == "sparse24_int8_linear"
    x, weight, w_scale = args[0], args[1], args[4 if sparse else 3]
    m, k = x.shape
    last = int(weight.shape[1] > k) if not sparse else 0 if args[2] is None else args[2].data_ptr()
    n = w_scale.shape[0]
    numbers = [OPS.index(op), m, n, k, x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), last]
    return [*numbers, out_address, options["out_dtype"]]


def obstacle(handle: ctypes.CDLL, call: list[int], *, major: int = -1, arch: int = 90) -> tuple[str, int]:
    """("", the architecture whose kernel runs) or (why none does, the last one asked).

    major: of a GPU's compute capability, for what this library has; -1: the rule of `arch`, 80 or 90, by itself.
    """
    function = handle.effvit_cuda_cutlass_obstacle
    function.restype = ctypes.c_char_p
    found = ctypes.c_int64(arch)
    numbers = (ctypes.c_int64 * len(call))(*(c if c < 1 << 63 else c - (1 << 64) for c in call))
    reason = function(numbers, ctypes.c_int64(major), ctypes.byref(found))
    return ("" if reason is None else reason.decode()), found.value


def explained(op: str, args: tuple, options: dict) -> str:
    """Which kernel of the CUDA library runs a call of one of `OPS` whose tensors are on a GPU."""
    handle = _load.load()["effvit_cuda"].handle
    major, _ = torch.cuda.get_device_capability(args[0].device)
    reason, arch = obstacle(handle, described(op, args, options), major=major)
    return f"our own kernel, not CUTLASS's: {reason}" if reason else f"CUTLASS's kernel of sm_{arch}"


def use(wanted: bool) -> None:
    """From the next call on, in every thread: CUTLASS's kernels where they apply, or our own. See EFFVIT_CUTLASS."""
    library = _load.load()["effvit_cuda"]
    if library.handle is None:
        raise RuntimeError(f"effvit: the CUDA library is not loaded: {library.reason}")
    library.handle.effvit_cuda_use_cutlass(ctypes.c_int(wanted))
