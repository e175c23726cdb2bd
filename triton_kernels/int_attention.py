"""int_attention in Triton: a program has a tile of queries of a head and goes over the keys three times.

For the largest score of each row, for the sum of the exponentials, for the product with the values; scores are computed
again each time. Products are of int8: probabilities are digits of seven bits.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, device_function, next_power_of_two, run, tl, triton, tuned
from ._gemm import depth_of
from ._int_rows import (
    LARGEST,
    OUT_DTYPES,
    SMALLEST,
    _between,
    _rounded_shift,
    _shift_exp,
    check_grid,
    ends,
)


@device_function
def _reciprocal(total):
    """(2^31 - 1) // total, of int64 from 1 on, in int32: bit by bit. Triton 3.6 does not lower the division of a vector
    that a product's rows were reduced to."""
    rest, quotient = total * 0, total * 0
    for _ in range(31):  # every bit of the dividend is 1
        rest = 2 * rest + 1
        fits = rest >= total
        rest = tl.where(fits, rest - total, rest)
        quotient = 2 * quotient + tl.where(fits, 1, 0)
    return quotient.to(tl.int32)


@device_function
def _score_tile(
    q, k, bias, key, K, M, multiplier, shift,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in int64; q, k [.., 1] and bias, [BLOCK_M, 1] or None, point at the start of rows."""
    depth = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, _loop_bound(K), BLOCK_K):
        there = (depth < K - start)[None, :]
        q_tile = tl.load(q + start + depth[None, :], mask=there, other=0)
        k_tile = tl.load(k + start + depth[None, :], mask=there, other=0)
        acc = tl.dot(q_tile, tl.trans(k_tile), acc, out_dtype=tl.int32)
    y = _between(_rounded_shift(acc.to(tl.int64) * multiplier, shift), LOW, HIGH)
    if bias is not None:
        y += tl.load(bias + key[None, :], mask=(key < M)[None, :], other=0)
        y = _between(y, SMALLEST, LARGEST)
    return y


@triton.jit(do_not_specialize=["L", "M", "W", "score_multiplier", "score_shift", "X", "n", "multiplier", "shift"])
def int_attention_fwd_kernel(
    q,  # [B, L, H, K] int8, last stride 1
    k,  # [B, M, H, K] int8, last stride 1
    v,  # [B, M, H, V] int8, last stride 1
    bias,  # [W, H, L, M] int32, last stride 1, or None
    out,  # [B, L, H, V], contiguous
    L, M, H, K, V, W,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    bias_stride_w, bias_stride_h, bias_stride_l,
    score_multiplier, score_shift, X, n, multiplier, shift,
    SCORE_LOW: tl.constexpr, SCORE_HIGH: tl.constexpr, PROB_SHIFT: tl.constexpr, HALF_BIT: tl.constexpr,
    DIGITS: tl.constexpr, RESCALED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    v_tiles, row_tiles = (V + BLOCK_V - 1) // BLOCK_V, (L + BLOCK_M - 1) // BLOCK_M
    channel = program % v_tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    program = program // v_tiles
    row = program % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    program = program // row_tiles
    h, b = (program % H).to(tl.int64), (program // H).to(tl.int64)
    last = tl.minimum(row, L - 1).to(tl.int64)[:, None]  # rows beyond the last one repeat it
    q_rows = q + b * q_stride_b + h * q_stride_h + last * q_stride_l
    k_head = k + b * k_stride_b + h * k_stride_h
    v_head = v + b * v_stride_b + h * v_stride_h
    bias_rows = None
    if bias is not None:
        bias_rows = bias + b % W * bias_stride_w + h * bias_stride_h + last * bias_stride_l
    top = tl.full([BLOCK_M], SMALLEST, tl.int64)
    for start in range(0, _loop_bound(M), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k_rows = k_head + tl.minimum(key, M - 1).to(tl.int64)[:, None] * k_stride_m
        y = _score_tile(q_rows, k_rows, bias_rows, key, K, M, score_multiplier, score_shift, SCORE_LOW, SCORE_HIGH,
                        BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        top = tl.maximum(top, tl.max(tl.where((key < M)[None, :], y, SMALLEST), axis=1))
    total = tl.zeros([BLOCK_M], tl.int64)
    for start in range(0, _loop_bound(M), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k_rows = k_head + tl.minimum(key, M - 1).to(tl.int64)[:, None] * k_stride_m
        y = _score_tile(q_rows, k_rows, bias_rows, key, K, M, score_multiplier, score_shift, SCORE_LOW, SCORE_HIGH,
                        BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        there = (key < M)[None, :]
        e = _shift_exp(tl.where(there, top[:, None] - y, 0), X, n, HALF_BIT)
        total += tl.sum(tl.where(there, e, 0).to(tl.int64), axis=1)
    f = _reciprocal(tl.minimum(total, LARGEST))
    result = tl.zeros([BLOCK_M, BLOCK_V], tl.int64)
    for start in range(0, _loop_bound(M), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        where = tl.minimum(key, M - 1).to(tl.int64)[:, None]
        y = _score_tile(q_rows, k_head + where * k_stride_m, bias_rows, key, K, M, score_multiplier, score_shift,
                        SCORE_LOW, SCORE_HIGH, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        there = (key < M)[None, :]
        e = _shift_exp(tl.where(there, top[:, None] - y, 0), X, n, HALF_BIT)
        p = tl.where(there, (e * f[:, None]) >> PROB_SHIFT, 0)  # e f is at most 2^31 - 1
        v_tile = tl.load(v_head + where * v_stride_m + channel[None, :], mask=(channel < V)[None, :], other=0)
        acc = tl.dot((p & 127).to(tl.int8), v_tile, out_dtype=tl.int32)
        if DIGITS > 1:  # at most BLOCK_N 2^15 2^7
            acc += tl.dot(((p >> 7) & 127).to(tl.int8), v_tile, out_dtype=tl.int32) * 128
        if DIGITS > 2:
            acc += tl.dot((p >> 14).to(tl.int8), v_tile, out_dtype=tl.int32) * 16384
        result += acc
    result = _between(result, SMALLEST, LARGEST)
    if RESCALED:
        result = _rounded_shift(result * multiplier, shift)
    to = out + ((b * L + last) * H + h) * V + channel[None, :]
    there = (row < L)[:, None] & (channel < V)[None, :]
    tl.store(to, _between(result, LOW, HIGH).to(out.dtype.element_ty), mask=there)


def _plan_forward(
    q, k, v, bias=None, *, score_multiplier, score_shift, x0, n=15, bits=8, half_bit=True, score_bits=8, multiplier=0,
    shift=0, out_bits=32, out_dtype=3,
):  # fmt: skip
    """(out, launches). Works on meta tensors."""
    (B, L, H, K), M, V = q.shape, k.shape[1], v.shape[3]
    dtype = OUT_DTYPES[out_dtype]
    out = torch.empty((B, L, H, V), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out, []
    m = max(16, min(tuned(64, small=16), next_power_of_two(L)))
    wide = max(16, min(tuned(64, small=16), next_power_of_two(V)))
    low, high = ends(dtype, out_bits)
    args = {
        "q": q, "k": k, "v": v, "bias": bias, "out": out, "L": L, "M": M, "H": H, "K": K, "V": V,
        "W": 1 if bias is None else bias.shape[0],
        "q_stride_b": q.stride(0), "q_stride_l": q.stride(1), "q_stride_h": q.stride(2),
        "k_stride_b": k.stride(0), "k_stride_m": k.stride(1), "k_stride_h": k.stride(2),
        "v_stride_b": v.stride(0), "v_stride_m": v.stride(1), "v_stride_h": v.stride(2),
        **{f"bias_stride_{d}": 0 if bias is None else bias.stride(i) for i, d in enumerate("whl")},
        "score_multiplier": score_multiplier, "score_shift": score_shift, "X": -x0, "n": n, "multiplier": multiplier,
        "shift": shift, "SCORE_LOW": -(2 ** (score_bits - 1)), "SCORE_HIGH": 2 ** (score_bits - 1) - 1,
        "PROB_SHIFT": 32 - bits, "HALF_BIT": half_bit, "DIGITS": (bits + 5) // 7, "RESCALED": multiplier != 0,
        "LOW": low, "HIGH": high, "BLOCK_M": m, "BLOCK_N": 32,
        "BLOCK_K": max(32, min(depth_of(q.stride(1), k.stride(1)), next_power_of_two(K))), "BLOCK_V": wide,
    }  # fmt: skip
    programs = B * H * cdiv(L, m) * cdiv(V, wide)
    check_grid("int_attention", programs)
    return out, [Launch(int_attention_fwd_kernel, programs, args, num_warps=4, num_stages=2)]


def forward(q, k, v, bias=None, **options):
    """effvit::int_attention. The arguments must have been validated."""
    out, launches = _plan_forward(q, k, v, bias, **options)
    run(launches, q.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    options = {"score_multiplier": 2**30 + 5, "score_shift": 40, "x0": -20, "multiplier": 2**30 + 7, "shift": 36}
    shapes = {"deit": (8, 197, 197, 6, 64, 0), "swin": (64, 49, 49, 3, 32, 64), "odd": (2, 31, 100, 2, 33, 0)}
    for name, (B, L, M, H, K, W) in shapes.items():
        qkv = torch.empty((B, max(L, M), 3, H, K), dtype=torch.int8, device="meta")
        q, k, v = (t[:, :size] for t, size in zip(qkv.unbind(2), (L, M, M), strict=True))
        bias = torch.empty((W, H, L, M), dtype=torch.int32, device="meta") if W else None
        for bits, score_bits, half_bit, out_dtype in ((8, 8, True, 4), (16, 16, False, 4)):
            more = {"bits": bits, "score_bits": score_bits, "half_bit": half_bit, "out_dtype": out_dtype}
            for launch in _plan_forward(q, k, v, bias, **options, **more)[1]:
                yield launch.aot(f"{name}-bits{bits}")
