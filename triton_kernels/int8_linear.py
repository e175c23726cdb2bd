"""int8_linear in Triton: an int8 product with int32 sums, and its epilogue in registers.

A program computes a tile of the result. Weights are plain: the packed format serves the instructions of CPUs.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, run, tl, triton
from ._gemm import GROUP, _row_pointers, _tile_at, depth_of, tile_of, warps_of
from ._int8_epilogue import _finish, epilogue, sample_epilogues


@triton.jit(do_not_specialize=["M"])
def int8_linear_fwd_kernel(
    x,  # [M, K] int8, last stride 1
    weight,  # [N, K] int8, last stride 1
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
        w_tile = tl.load(w_tiles + start, mask=ok, other=0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
    _finish(acc, e, row, column, M, N, ACT)


def _plan_forward(x, weight, x_scale, w_scale, bias=None, residual=None, *, activation=0, out_dtype=0, out_scale=None):
    """(out, launches). Works on meta tensors."""
    (M, K), N = x.shape, weight.shape[0]
    e = epilogue(x, x_scale, w_scale, bias, residual, out_dtype, out_scale)
    if e.out.numel() == 0:
        return e.out, []
    m, n = tile_of(M, N)
    args = {
        "x": x, "weight": weight, "e": e, "M": M, "N": N, "K": K, "x_stride_m": x.stride(0),
        "weight_stride_n": weight.stride(0), "ACT": activation,
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": depth_of(K, x.stride(0), weight.stride(0)), "GROUP": GROUP,
    }  # fmt: skip
    return e.out, [Launch(int8_linear_fwd_kernel, cdiv(M, m) * cdiv(N, n), args, warps_of(m, n), num_stages=3)]


def forward(x, weight, x_scale, w_scale, bias=None, residual=None, *, activation=0, out_dtype=0, out_scale=None):
    """effvit::int8_linear. The arguments must have been validated; the weight is plain."""
    options = {"activation": activation, "out_dtype": out_dtype, "out_scale": out_scale}
    out, launches = _plan_forward(x, weight, x_scale, w_scale, bias, residual, **options)
    run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (M, N, K) in {"vit": (12608, 1536, 384), "image": (197, 384, 1536), "row": (1, 768, 768),
                            "odd": (3137, 100, 33)}.items():  # fmt: skip
        x, weight = (torch.empty((rows, K), dtype=torch.int8, device="meta") for rows in (M, N))
        for short, arguments in sample_epilogues(M, N):
            for launch in _plan_forward(x, weight, **arguments)[1]:
                yield launch.aot(f"{name}-{short}")
