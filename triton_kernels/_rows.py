"""Row-wise operators in Triton: rows of any strides, one program a block of elements; functions that they need."""

import itertools

import torch

from ._common import MAX_GRID, SCALE, Launch, cdiv, run, tl, triton

BLOCK = 1024


def rows_of(x):
    """((size, stride) of the leading dims, innermost first), with those that lie behind each other made one."""
    dims = []
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    return tuple(n for dim in dims or [(1, 0)] for n in dim)


def launch_rows(kernel, x, args):
    """Launches over all elements of rows of x's shape; `kernel` takes their number as `elements`, the width as `C`."""
    if x.numel() == 0:
        return []
    block = BLOCK * SCALE
    if cdiv(x.numel(), block) > MAX_GRID:
        raise ValueError(f"effvit::{kernel.__name__}: too many elements for one launch, got {x.numel()}")
    args = {**args, "elements": x.numel(), "C": x.shape[-1], "BLOCK": block}
    return [Launch(kernel, cdiv(x.numel(), block), {n: args[n] for n in kernel.arg_names}, num_warps=4, num_stages=1)]


def elementwise(forward_kernel, backward_kernel, **options):
    """(forward, backward, aot_signatures) of an op whose tensors all have the same columns.

    A kernel's arguments are the tensors in the order of the declaration, inputs and then outputs; `elements`; `C`;
    `<input>_rows` for every input; an option `act`, whose values are given here, as the constant `ACT`; `BLOCK`.
    """

    def plan(kernel, tensors, values):
        names = kernel.arg_names[: kernel.arg_names.index("elements")]
        inputs = [n for n in names if f"{n}_rows" in kernel.arg_names]
        args = dict(zip(inputs, tensors, strict=True))
        rows = {f"{n}_rows": rows_of(x) for n, x in args.items()}
        constants = {n.upper(): value for n, value in values.items()}
        x = tensors[0]
        outs = {n: torch.empty(x.shape, dtype=x.dtype, device=x.device) for n in names if n not in inputs}
        return tuple(outs.values()), launch_rows(kernel, x, args | rows | outs | constants)

    def launcher(kernel):
        def launch(*tensors, **values):
            """The arguments must have been validated."""
            outs, launches = plan(kernel, tensors, values)
            run(launches, tensors[0].device)
            return outs[0] if len(outs) == 1 else outs

        return launch

    def aot_signatures():
        """Representative launches for tests/test_triton_aot.py."""
        for values in itertools.product(*options.values()):
            chosen = dict(zip(options, values, strict=True))
            for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
                x = torch.empty((8, 3136, 384), dtype=dtype, device="meta")
                for kernel in (forward_kernel, backward_kernel):
                    inputs = sum(n.endswith("_rows") for n in kernel.arg_names)
                    for launch in plan(kernel, (x,) * inputs, chosen)[1]:
                        yield launch.aot("-".join([*(f"{n}{value}" for n, value in chosen.items()), short]))

    return launcher(forward_kernel), launcher(backward_kernel), aot_signatures


@triton.jit
def _row_offsets(row, dims):
    """Where rows start; `dims` as rows_of returns them."""
    offset = row * 0
    for i in tl.static_range(0, len(dims), 2):
        quotient = row // dims[i]
        offset += (row - quotient * dims[i]) * dims[i + 1]
        row = quotient
    return offset


@triton.jit
def _load_rows(x, rows, e, C, ok):
    """Elements `e` of x, in float32: counted row by row, of C columns, 0 where they are not `ok`."""
    return tl.load(x + _row_offsets(e // C, rows) + e % C, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _exp(x):
    """In two factors, the first a power of 2: exp2(x log2 e) alone has an error that grows with x."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))  # infinity and 0 from there on; a NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.4286068203094173e-06  # ln 2, the first part of 16 bits: products are exact
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def _tanh(x):
    """1 - 2 / (exp(2|x|) + 1) from 1/2 on, below it the odd polynomial that is closest relative to tanh."""
    t = tl.minimum(tl.abs(x), 10.0)
    far = 1.0 - 2.0 / (_exp(2.0 * t) + 1.0)
    z = t * t
    near = t + t * z * (-0.33333327 + z * (0.13332971 + z * (-0.05389997 + z * (0.0213017 + z * -0.00665357))))
    y = tl.where(t < 0.5, near, far)
    return tl.where(x < 0, -y, y)
