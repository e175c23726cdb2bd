"""sparse24_int8_linear in Triton: int8_linear with a weight that is expanded in registers, tile by tile.

Triton has no sparse product: this one saves memory traffic, not arithmetic. Weights are in the canonical form.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, run, tl, triton
from ._gemm import GROUP, _row_pointers, _tile_at, depth_of, tile_of, warps_of
from ._int8_epilogue import _finish, epilogue, sample_epilogues
from ._sparse24_tiles import _expand, _load_positions, _load_values


@triton.jit(do_not_specialize=["M"])
def sparse24_int8_linear_fwd_kernel(
    x,  # [M, K] int8, last stride 1
    values,  # [N, K2] int8, last stride 1; K2 = K / 2
    meta,  # [N, K8] uint8, last stride 1; K8 = K / 8, rounded up
    e,  # Epilogue
    M, N, K, K2, K8,
    x_stride_m, values_stride_n, meta_stride_n,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    index = tl.arange(0, BLOCK_K // 2)
    byte = tl.arange(0, BLOCK_K // 8)
    x_tiles = _row_pointers(x, row, M, x_stride_m) + k[None, :]
    values_rows = _row_pointers(values, column, N, values_stride_n)
    meta_rows = _row_pointers(meta, column, N, meta_stride_n)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for step in range(0, _loop_bound(tl.cdiv(K, BLOCK_K))):
        x_tile = tl.load(x_tiles + step * BLOCK_K, mask=(k < K - step * BLOCK_K)[None, :], other=0)
        kept = _load_values(values_rows, step * (BLOCK_K // 2) + index, K2)
        i0, i1 = _load_positions(meta_rows, step * (BLOCK_K // 8) + byte, K8)
        acc = tl.dot(x_tile, tl.trans(_expand(kept, i0, i1)), acc, out_dtype=tl.int32)
    _finish(acc, e, row, column, M, N, ACT)


def _plan_forward(
    x, values, meta, x_scale, w_scale, bias=None, residual=None, *, activation=0, out_dtype=0, out_scale=None
):
    """(out, launches). Works on meta tensors."""
    (M, K), N = x.shape, values.shape[0]
    e = epilogue(x, x_scale, w_scale, bias, residual, out_dtype, out_scale)
    if e.out.numel() == 0:
        return e.out, []
    meta = meta.contiguous()
    m, n = tile_of(M, N)
    args = {
        "x": x, "values": values, "meta": meta, "e": e, "M": M, "N": N, "K": K, "K2": K // 2, "K8": cdiv(K, 8),
        "x_stride_m": x.stride(0), "values_stride_n": values.stride(0), "meta_stride_n": meta.stride(0),
        "ACT": activation, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": depth_of(K, x.stride(0), values.stride(0)),
        "GROUP": GROUP,
    }  # fmt: skip
    tiles = cdiv(M, m) * cdiv(N, n)
    return e.out, [Launch(sparse24_int8_linear_fwd_kernel, tiles, args, warps_of(m, n), num_stages=3)]


def forward(x, values, meta, x_scale, w_scale, bias=None, residual=None, *, activation=0, out_dtype=0, out_scale=None):
    """effvit::sparse24_int8_linear. The arguments must have been validated; values are in the canonical form."""
    options = {"activation": activation, "out_dtype": out_dtype, "out_scale": out_scale}
    out, launches = _plan_forward(x, values, meta, x_scale, w_scale, bias, residual, **options)
    run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (M, N, K) in {"vit": (12608, 1536, 384), "image": (197, 384, 1536), "row": (1, 768, 768),
                            "odd": (3137, 100, 36)}.items():  # fmt: skip
        x, values, meta = (
            torch.empty(shape, dtype=dtype, device="meta")
            for *shape, dtype in ((M, K, torch.int8), (N, K // 2, torch.int8), (N, cdiv(K, 8), torch.uint8))
        )
        for short, arguments in sample_epilogues(M, N):
            for launch in _plan_forward(x, values, meta, **arguments)[1]:
                yield launch.aot(f"{name}-{short}")
