"""block_sparse_int8_linear in Triton: int8 products of the blocks that are there, and the epilogue in registers.

A program computes a tile of rows by one row of blocks. The products of tensor cores are 32 deep: blocks of 16 go in
pairs. Offsets in x are below K, so columns that lie outside of it read nothing.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, run, tl, triton
from ._gemm import _row_pointers
from ._int8_epilogue import _finish, epilogue, sample_epilogues
from .block_sparse_linear import _range_of, rows_of_tile

DEPTH = 32


@triton.jit(do_not_specialize=["M", "Z"])
def block_sparse_int8_linear_fwd_kernel(
    x,  # [M, K] int8, last stride 1
    values,  # [Z, B, B] int8, last stride 1
    crow,  # [N / B + 1] int32
    columns,  # [Z] int32
    e,  # Epilogue
    M, N, K, Z, x_stride_m, values_stride_z, values_stride_i,
    ACT: tl.constexpr,
    B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    down = N // B
    block = tl.program_id(0) % down
    row = tl.program_id(0) // down * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, B)
    k = tl.arange(0, BLOCK_K)
    inner = k % B
    x_rows = _row_pointers(x, row, M, x_stride_m)
    w_rows = values + (i * values_stride_i)[:, None]
    acc = tl.zeros([BLOCK_M, B], tl.int32)
    first, last = _range_of(crow, block, Z)
    for t in range(_loop_bound(first), _loop_bound(last), BLOCK_K // B):
        at = t + k // B
        offset = tl.max_contiguous(tl.load(columns + at, mask=at < last, other=-1) * B + inner, 16)
        x_tile = tl.load(x_rows + offset[None, :], mask=((offset >= 0) & (offset < K))[None, :], other=0)
        w_offset = at.to(tl.int64) * values_stride_z + inner
        w_tile = tl.load(w_rows + w_offset[None, :], mask=(at < last)[None, :], other=0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
    _finish(acc, e, row, block * B + i, M, N, ACT)


def _plan_forward(
    x, values, crow, columns, x_scale, w_scale, bias=None, residual=None, *, activation=0, out_dtype=0, out_scale=None
):
    """(out, launches). Works on meta tensors."""
    (M, K), N, block = x.shape, w_scale.shape[0], values.shape[-1]
    e = epilogue(x, x_scale, w_scale, bias, residual, out_dtype, out_scale)
    if e.out.numel() == 0:
        return e.out, []
    m = rows_of_tile(M, N // block)
    args = {
        "x": x, "values": values, "crow": crow.contiguous(), "columns": columns.contiguous(), "e": e, "M": M, "N": N,
        "K": K, "Z": values.shape[0], "x_stride_m": x.stride(0), "values_stride_z": values.stride(0),
        "values_stride_i": values.stride(1), "ACT": activation, "B": block, "BLOCK_M": m, "BLOCK_K": DEPTH,
    }  # fmt: skip
    return e.out, [Launch(block_sparse_int8_linear_fwd_kernel, cdiv(M, m) * (N // block), args)]


def forward(
    x, values, crow, columns, x_scale, w_scale, bias=None, residual=None, *, activation=0, out_dtype=0, out_scale=None
):
    """effvit::block_sparse_int8_linear. The arguments must have been validated."""
    options = {"activation": activation, "out_dtype": out_dtype, "out_scale": out_scale}
    out, launches = _plan_forward(x, values, crow, columns, x_scale, w_scale, bias, residual, **options)
    run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    make = lambda *shape, dtype=torch.int8: torch.empty(shape, dtype=dtype, device="meta")
    for name, (M, N, K, block) in {"vit": (12608, 1536, 384, 32), "image": (197, 384, 1536, 16),
                                   "row": (1, 768, 768, 32)}.items():  # fmt: skip
        z = N * K // block**2 // 2
        places = make(N // block + 1, dtype=torch.int32), make(z, dtype=torch.int32)
        for short, arguments in sample_epilogues(M, N):
            for launch in _plan_forward(make(M, K), make(z, block, block), *places, **arguments)[1]:
                yield launch.aot(f"{name}-{short}")
