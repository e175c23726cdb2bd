"""pam_matmul in Triton: products by integer additions on ordinary cores, tiles of rows times columns times a few k."""

import torch

from ._common import Launch, _loop_bound, cdiv, device_function, run, tl, triton, tuned
from ._gemm import GROUP, _row_pointers, _tile_at, tile_of, warps_of


@device_function
def _pam(a, b):
    """Bits, as int64: of normal finite numbers and zeros. kOne = 0x3f800000."""
    x, w = a & 0x7FFFFFFF, b & 0x7FFFFFFF
    size = x + w - 0x3F800000
    size = tl.minimum(size, 0x7F800000)
    there = (x >= 0x00800000) & (w >= 0x00800000) & (size >= 0x00800000)
    bits = tl.where(there, size, 0) | ((a ^ b) & 0x80000000)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@device_function
def _bits(pointers, ok):
    """Of numbers as float32, without a sign extension."""
    value = tl.load(pointers, mask=ok, other=0.0).to(tl.float32)
    return value.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit(do_not_specialize=["M"])
def pam_matmul_fwd_kernel(
    x,  # [M, K], last stride 1
    weight,  # [N, K], last stride 1
    out,  # [M, N], contiguous
    M, N, K,
    x_stride_m, weight_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    x_tiles = _row_pointers(x, row, M, x_stride_m) + k[None, :]
    w_tiles = _row_pointers(weight, column, N, weight_stride_n) + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_wrong = tl.zeros([BLOCK_M], tl.int32)
    w_wrong = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, _loop_bound(K), BLOCK_K):
        ok = (k < K - start)[None, :]
        a = _bits(x_tiles + start, ok)
        b = _bits(w_tiles + start, ok)
        x_wrong += tl.sum(((a & 0x7FFFFFFF) >= 0x7F800000).to(tl.int32), axis=1)
        w_wrong += tl.sum(((b & 0x7FFFFFFF) >= 0x7F800000).to(tl.int32), axis=1)
        acc += tl.sum(_pam(a[:, None, :], b[None, :, :]), axis=2)
    acc = tl.where((x_wrong > 0)[:, None] | (w_wrong > 0)[None, :], float("nan"), acc)
    target = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


def _plan_forward(x, weight):
    """(out, launches). Works on meta tensors."""
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, []
    m, n = tile_of(M, N, most=32)
    args = {
        "x": x, "weight": weight, "out": out, "M": M, "N": N, "K": K, "x_stride_m": x.stride(0),
        "weight_stride_n": weight.stride(0), "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": tuned(8, small=16), "GROUP": GROUP,
    }  # fmt: skip
    return out, [Launch(pam_matmul_fwd_kernel, cdiv(M, m) * cdiv(N, n), args, warps_of(m, n), num_stages=3)]


def forward(x, weight):
    """effvit::pam_matmul. The arguments must have been validated."""
    out, launches = _plan_forward(x, weight)
    run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (M, N, K) in {"vit": (12608, 1536, 384), "row": (1, 768, 768), "odd": (3137, 100, 33)}.items():
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            x, weight = (torch.empty((rows, K), dtype=dtype, device="meta") for rows in (M, N))
            for launch in _plan_forward(x, weight)[1]:
                yield launch.aot(f"{name}-{short}")
