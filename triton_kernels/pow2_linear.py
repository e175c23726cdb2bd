"""pow2_linear in Triton: products of int8 where codes fit into it, else shifts and additions in int64.

A program computes a tile of the result. The first kernel turns codes into int8 in registers, for tensor cores; the
second shifts a tile of three dims, rows times columns times a few k.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, device_function, run, tl, triton, tuned
from ._gemm import GROUP, _row_pointers, _tile_at, depth_of, tile_of, warps_of
from ._int8_epilogue import _finish, epilogue, sample_epilogues


@device_function
def _size(code):
    return tl.where(code < 0, -code, code)


@triton.jit(do_not_specialize=["M"])
def pow2_linear_product_kernel(
    x,  # [M, K] int8, last stride 1
    weight,  # [N, K] int8 codes between -7 and 7, last stride 1
    e,  # Epilogue
    M, N, K,
    x_stride_m, weight_stride_n,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    x_tiles = _row_pointers(x, row, M, x_stride_m) + k[None, :]
    w_tiles = _row_pointers(weight, column, N, weight_stride_n) + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, _loop_bound(K), BLOCK_K):
        ok = (k < K - start)[None, :]
        x_tile = tl.load(x_tiles + start, mask=ok, other=0)
        code = tl.load(w_tiles + start, mask=ok, other=0).to(tl.int32)
        power = (1 << _size(code)) >> 1  # 0 for code 0
        w_tile = tl.where(code < 0, -power, power).to(tl.int8)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
    _finish(acc, e, row, column, M, N, ACT)


@triton.jit(do_not_specialize=["M"])
def pow2_linear_shift_kernel(
    x,  # [M, K] integers, last stride 1
    weight,  # [N, K] int8 codes, last stride 1
    e,  # Epilogue
    M, N, K,
    x_stride_m, weight_stride_n,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    x_tiles = _row_pointers(x, row, M, x_stride_m) + k[None, :]
    w_tiles = _row_pointers(weight, column, N, weight_stride_n) + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int64)
    for start in range(0, _loop_bound(K), BLOCK_K):
        ok = (k < K - start)[None, :]
        x_tile = tl.load(x_tiles + start, mask=ok, other=0).to(tl.int64) << LEFT
        code = tl.load(w_tiles + start, mask=ok, other=0).to(tl.int64)
        count = LEFT + RIGHT + 1 - _size(code)  # floor(x 2^p) = (x << LEFT) >> (LEFT - p), p = |code| - 1 - RIGHT
        terms = x_tile[:, None, :] >> count[None, :, :]
        terms = tl.where((code == 0)[None, :, :], 0, tl.where((code < 0)[None, :, :], -terms, terms))
        acc += tl.sum(terms, axis=2)
    acc = tl.minimum(tl.maximum(acc, -2147483648), 2147483647).to(tl.int32)
    _finish(acc, e, row, column, M, N, ACT)


def _plan_forward(
    x, weight, x_scale, w_scale, bias=None, residual=None, *, bits=4, right=0, activation=0, out_dtype=0,
    out_scale=None,
):  # fmt: skip
    """(out, launches). Works on meta tensors."""
    (M, K), N = x.shape, weight.shape[0]
    e = epilogue(x, x_scale, w_scale, bias, residual, out_dtype, out_scale)
    if e.out.numel() == 0:
        return e.out, []
    args = {
        "x": x, "weight": weight, "e": e, "M": M, "N": N, "K": K, "x_stride_m": x.stride(0),
        "weight_stride_n": weight.stride(0), "ACT": activation, "GROUP": GROUP,
    }  # fmt: skip
    if x.dtype == torch.int8 and bits <= 4 and right == 0:
        kernel, (m, n) = pow2_linear_product_kernel, tile_of(M, N)
        args["BLOCK_K"] = depth_of(K, x.stride(0), weight.stride(0))
    else:
        kernel, (m, n) = pow2_linear_shift_kernel, tile_of(M, N, most=32)
        args |= {"LEFT": max(0, 2 ** (bits - 1) - 2 - right), "RIGHT": right, "BLOCK_K": tuned(4, small=16)}
    args |= {"BLOCK_M": m, "BLOCK_N": n}
    return e.out, [Launch(kernel, cdiv(M, m) * cdiv(N, n), args, warps_of(m, n), num_stages=3)]


def forward(x, weight, x_scale, w_scale, bias=None, residual=None, **options):
    """effvit::pow2_linear. The arguments must have been validated."""
    out, launches = _plan_forward(x, weight, x_scale, w_scale, bias, residual, **options)
    run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (M, N, K) in {"vit": (12608, 1536, 384), "row": (1, 768, 768), "odd": (3137, 100, 33)}.items():
        for dtype, options in ((torch.int8, {}), (torch.int32, {"bits": 5, "right": 14})):
            x = torch.empty((M, K), dtype=dtype, device="meta")
            weight = torch.empty((N, K), dtype=torch.int8, device="meta")
            for short, arguments in sample_epilogues(M, N):
                for launch in _plan_forward(x, weight, **options, **arguments)[1]:
                    yield launch.aot(f"{name}-{str(dtype)[6:]}-{short}")
