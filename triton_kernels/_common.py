"""What the Triton launchers share: a launch as data, so that tests compile exactly what a call launches."""

import contextlib
import dataclasses
import functools
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("effvit.triton_kernels needs triton, which is not installed (pip install triton)") from error

# triton.jit reads the variable once, at decoration.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Blocks of the elementwise reductions grow by this factor under the interpreter, where a program costs milliseconds.
SCALE = 16 if INTERPRETED else 1

MAX_GRID = 2**31 - 1  # CUDA's limit of gridDim.x; the kernels use one-dimensional grids only

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


def cdiv(a, b):
    return -(-a // b)


def next_power_of_two(n):
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _warp_size():
    return 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size


def for_warp_size(options, warp_size):
    """Compile options, chosen for warps of 32 threads, where warps have another size: for as many threads."""
    return {**options, "num_warps": max(1, options["num_warps"] * 32 // warp_size)}


@dataclasses.dataclass
class Launch:
    """One kernel launch: the jit function, the size of its 1-D grid, its arguments by name and the compile options."""

    kernel: Any
    grid: int
    args: dict
    num_warps: int = 4  # of 32 threads
    num_stages: int = 2

    @property
    def options(self):
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def run(self):
        self.kernel[(self.grid,)](**self.args, **for_warp_size(self.options, _warp_size()))

    def aot(self, name):
        """(name, kernel, signature, constexprs, attrs, options) for ``triton.compile(ASTSource(...))``.

        The integer and pointer specialisation is the one the launcher gets from 16-byte aligned tensors.
        """
        signature, constexprs, attrs = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            key, value = parameter.name, self.args[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[key], constexprs[key] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[key], attrs[(index,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[key] = "fp32"
            elif value == 1 and not parameter.do_not_specialize:
                signature[key], constexprs[key] = "constexpr", 1
            else:
                signature[key] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attrs[(index,)] = [["tt.divisibility", 16]]
        return name, self.kernel, signature, constexprs, attrs, self.options


def run(launches, device):
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        for launch in launches:
            launch.run()


if INTERPRETED:

    def device_function(fn):
        """A function that kernels call. The interpreter patches triton.language anew at each call of a jit function,
        which takes longer than its body; inside a kernel it is patched already, so plain Python will do."""
        return fn

    def _loop_bound(n):
        """A scalar as the bound of range(); the interpreter's own conversion fails with NumPy 2.4 and later."""
        return int(n.handle.data.item())

else:
    device_function = triton.jit

    @triton.jit
    def _loop_bound(n):
        return n


@triton.jit(do_not_specialize=["count", "splits"])
def sum_partials_kernel(
    partial,  # [splits, count] float32
    out,  # [count], any float dtype; may be partial[0]: a program reads its columns before it writes them
    count, splits,
    BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = sum over splits of partial[split, i], in a fixed order."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_SPLITS)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, _loop_bound(splits), BLOCK_SPLITS):
        offset = (start + row).to(tl.int64)[:, None] * count + column[None, :]
        mask = (start + row < splits)[:, None] & (column < count)[None, :]
        total += tl.sum(tl.load(partial + offset, mask=mask, other=0.0), axis=0)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < count)


def sum_partials(partial, out, splits):
    """The launch that reduces partial [splits, ...] into out [...]."""
    count, block = out.numel(), 128 * SCALE
    args = {"partial": partial, "out": out, "count": count, "splits": splits, "BLOCK_SPLITS": 16, "BLOCK": block}
    return Launch(sum_partials_kernel, cdiv(count, block), args, num_warps=4, num_stages=1)
