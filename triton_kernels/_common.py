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

_small = False

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int8: "*i8",
    torch.uint8: "*u8", torch.int16: "*i16",
}  # fmt: skip


@contextlib.contextmanager
def small_tiles():
    """Launchers choose the smallest legal tiles, short walks, many splits and small grids: small shapes then take every
    path that large ones take. For tests."""
    global _small
    before, _small = _small, True
    try:
        yield
    finally:
        _small = before


def tuned(value, small):
    """`value`, but `small` within small_tiles()."""
    return small if _small else value


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
    """One kernel launch: the jit function, the size of its 1-D grid, its arguments by name and the compile options.

    An argument may be a tuple of pointers and numbers, best a named one (see _tiles.py), with two limits of Triton 3.6:
    - It specialises the ints in a tuple on being 1 or a multiple of 16, whatever do_not_specialize says. Strides belong
      in tuples; sizes that change from call to call do not, or every shape would be compiled anew.
    - Tuples in tuples lose their constants, None or a stride of 1, inside loops. The kernel can nest them itself.
    """

    kernel: Any
    grid: int
    args: dict
    num_warps: int = 4  # of 32 threads
    num_stages: int = 2
    fp_fusion: bool = True  # a product and a sum may become one operation with one rounding

    @property
    def options(self):
        fusion = {} if self.fp_fusion else {"enable_fp_fusion": False}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **fusion}

    def run(self):
        self.kernel[(self.grid,)](**self.args, **for_warp_size(self.options, _warp_size()))

    def aot(self, name):
        """(name, kernel, signature, constexprs, attrs, options) for ``triton.compile(ASTSource(...))``.

        The integer and pointer specialisation is the one the launcher gets from 16-byte aligned tensors.
        """
        signature, constexprs, attrs = {}, {}, {}

        def type_of(value, path, constexpr, specialize):
            if isinstance(value, tuple) and not constexpr:
                assert len(path) == 1, f"{key}: a tuple in a tuple"
                types = [type_of(x, (*path, i), False, True) for i, x in enumerate(value)]
                return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
            if constexpr or value is None or (specialize and type(value) is int and value == 1):
                constexprs[path] = value
                return "constexpr"
            if isinstance(value, float):
                return "fp32"
            if isinstance(value, torch.Tensor) or (specialize and value % 16 == 0):
                attrs[path] = [["tt.divisibility", 16]]
            if isinstance(value, torch.Tensor):
                return _POINTERS[value.dtype]
            return "i32" if -(2**31) <= value < 2**31 else "i64"

        for index, parameter in enumerate(self.kernel.params):
            key = parameter.name
            signature[key] = type_of(self.args[key], (index,), parameter.is_constexpr, not parameter.do_not_specialize)
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
    count, block = out.numel(), tuned(128 * SCALE, small=16)
    args = {"partial": partial, "out": out, "count": count, "splits": splits, "BLOCK_SPLITS": tuned(16, small=2)}
    args["BLOCK"] = block
    return Launch(sum_partials_kernel, cdiv(count, block), args, num_warps=4, num_stages=1)
