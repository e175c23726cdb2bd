"""The attention-free transformer's weighted means in Triton: forward and backward.

exp(k_jc + w_ij) is taken as the product of exp(k_jc - a_c) and exp(w_ij - b_i), a and b the largest of each, so that
sums over keys are matrix products. Tiles in which that leaves next to nothing of a sum are computed again, key by key,
from exp(k_jc + w_ij - top_ic). Backward likewise with P = exp(k_jc - a_c) exp(w_ij - b_i) f_ic and f = exp(a_c + b_i -
lse_ic), a and b of a tile; elements with f too large go term by term. Products of bfloat16 inputs are bfloat16's,
others float32's: float16 does not have the range.

Without a bias nothing depends on the query but the gate: a program has channels of one batch item.
"""

import torch

from ._common import (
    INTERPRETED,
    MAX_GRID,
    Launch,
    _loop_bound,
    cdiv,
    device_function,
    next_power_of_two,
    run,
    tl,
    triton,
    tuned,
)
from ._tiles import _rounded, _share_of

LEAST = tl.constexpr(2.0**-60)
MOST = tl.constexpr(41.0)  # e^41 < 2^60
LOW = tl.constexpr(-1e30)  # stands in for -infinity where two are subtracted
LARGE_LSE = tl.constexpr(8.0)  # from there on its rounding is more than two of a weight's own

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["B", "L", "M", "l_blocks", "m_blocks", "c_blocks", "units", "walk"]


@device_function
def _load(pointer, row, rows, stride, column, columns):
    """Rows and columns of a matrix with last stride 1 in float32, zeros beyond."""
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer + offset, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)


@device_function
def _load_row(pointer, column, columns):
    return tl.load(pointer + column, mask=column < columns, other=0.0).to(tl.float32)


@device_function
def _load_bias(bias, row, L, key, M, stride_l, stride_m, window):
    """w, LOW beyond the keys."""
    there = (row < L)[:, None] & (key < M)[None, :]
    offset = row.to(tl.int64)[:, None] * stride_l + key.to(tl.int64)[None, :] * stride_m
    w = tl.load(bias + offset, mask=there, other=0.0).to(tl.float32)
    distance = row[:, None] - key[None, :]
    w = tl.where((window == 0) | (tl.abs(distance) < window), w, 0.0)
    return tl.where(there, w, LOW)


@device_function
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@device_function
def _exp_k(k, key, M, top):
    """exp(k - top), zeros beyond the keys."""
    return tl.where((key < M)[:, None], tl.exp(k - top[None, :]), 0.0)


@device_function
def _exact_sum(a, b):
    """a + b, and what rounding took off: keys and biases in the hundreds may cancel."""
    high = a + b
    part = high - a
    return high, (a - (high - part)) + (b - part)


@device_function
def _exponent(k, w, lse):
    """k + w - lse, and what rounding took off."""
    both, low = _exact_sum(k, w)
    high, more = _exact_sum(both, -lse)
    return high, low + more


@device_function
def _exp(high, low):
    """exp(high + low). A term that does not count has no low part: an infinity less itself."""
    e = tl.exp(high)
    return tl.where(e > 0.0, e + e * low, e)


@device_function
def _gradients(
    grad_out, grad_mean, grad_lse, q, mean, lse, row, L, column, grad_out_stride_l, q_stride_l, C: tl.constexpr,
    HAS_GRAD_MEAN: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """gy, gy mean - glse, lse; zeros beyond."""
    gy = _load(grad_out, row, L, grad_out_stride_l, column, C) * _sigmoid(_load(q, row, L, q_stride_l, column, C))
    if HAS_GRAD_MEAN:
        gy += _load(grad_mean, row, L, C, column, C)
    gm = gy * _load(mean, row, L, C, column, C)
    if HAS_GRAD_LSE:
        gm -= _load(grad_lse, row, L, C, column, C)
    return gy, gm, _load(lse, row, L, C, column, C)


@triton.jit(do_not_specialize=[*_SIZES, "window"])
def aft_fwd_kernel(
    q,  # [B, L, C], last stride 1
    k,  # [B, M, C], last stride 1
    v,  # [B, M, C], last stride 1
    bias,  # [L, M], any strides
    out, mean, lse,  # [B, L, C], contiguous, the last two float32
    L, M, l_blocks, c_blocks, units, walk, window,
    q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l, bias_stride_l, bias_stride_m,
    C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % c_blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
        unit = unit // c_blocks
        row = (unit % l_blocks).to(tl.int32) * BLOCK_L + tl.arange(0, BLOCK_L)
        b = (unit // l_blocks).to(tl.int64)
        k_item, v_item = k + b * k_stride_b, v + b * v_stride_b
        w_top = tl.full([BLOCK_L], LOW, tl.float32)
        k_top = tl.full([BLOCK_C], LOW, tl.float32)
        for start in range(0, _loop_bound(M), BLOCK_M):
            key = start + tl.arange(0, BLOCK_M)
            w = _load_bias(bias, row, L, key, M, bias_stride_l, bias_stride_m, window)
            w_top = tl.maximum(w_top, tl.max(w, axis=1))
            k_tile = tl.where((key < M)[:, None], _load(k_item, key, M, k_stride_l, column, C), LOW)
            k_top = tl.maximum(k_top, tl.max(k_tile, axis=0))
        den = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        num = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        for start in range(0, _loop_bound(M), BLOCK_M):
            key = start + tl.arange(0, BLOCK_M)
            w = _load_bias(bias, row, L, key, M, bias_stride_l, bias_stride_m, window)
            ew = _rounded(tl.exp(w - w_top[:, None]), DTYPE)
            e = _exp_k(_load(k_item, key, M, k_stride_l, column, C), key, M, k_top)
            ev = e * _load(v_item, key, M, v_stride_l, column, C)
            den = tl.dot(ew, _rounded(e, DTYPE), den, input_precision="ieee")
            num = tl.dot(ew, _rounded(ev, DTYPE), num, input_precision="ieee")
        there = (row < L)[:, None] & (column < C)[None, :]
        lost = (den < LEAST) & there
        total, low = _exact_sum(k_top[None, :], w_top[:, None])
        if tl.max(lost.to(tl.int32)) > 0:
            top = tl.full([BLOCK_L, BLOCK_C], float("-inf"), tl.float32)
            for j in range(0, _loop_bound(M)):
                w_j = tl.max(_load_bias(bias, row, L, j + tl.arange(0, 1), M, bias_stride_l, bias_stride_m, window), 1)
                k_j = _load_row(k_item + tl.cast(j, tl.int64) * k_stride_l, column, C)
                top = tl.maximum(top, k_j[None, :] + w_j[:, None])
            own_den = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
            own_num = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
            for j in range(0, _loop_bound(M)):
                w_j = tl.max(_load_bias(bias, row, L, j + tl.arange(0, 1), M, bias_stride_l, bias_stride_m, window), 1)
                k_j = _load_row(k_item + tl.cast(j, tl.int64) * k_stride_l, column, C)
                v_j = _load_row(v_item + tl.cast(j, tl.int64) * v_stride_l, column, C)
                x_j, low_j = _exact_sum(k_j[None, :], w_j[:, None])
                e_j = _exp(x_j - top, low_j)
                own_den += e_j
                own_num += e_j * v_j[None, :]
            den = tl.where(lost, own_den, den)
            num = tl.where(lost, own_num, num)
            total = tl.where(lost, top, total)
            low = tl.where(lost, 0.0, low)
        result = num / den
        offset = (b * L + row)[:, None] * C + column[None, :]
        tl.store(mean + offset, result, mask=there)
        tl.store(lse + offset, total + (tl.log(den) + low), mask=there)
        gate = _sigmoid(_load(q + b * q_stride_b, row, L, q_stride_l, column, C))
        tl.store(out + offset, (gate * result).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def aft_bwd_dq_kernel(
    grad_out,  # [B, L, C], last stride 1
    q,  # [B, L, C], last stride 1
    mean,  # [B, L, C] or, where ONE, [B, 1, C], contiguous float32
    dq,  # [B, L, C], contiguous
    L, l_blocks, c_blocks, units, walk,
    grad_out_stride_b, grad_out_stride_l, q_stride_b, q_stride_l,
    C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, ONE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % c_blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
        unit = unit // c_blocks
        row = (unit % l_blocks).to(tl.int32) * BLOCK_L + tl.arange(0, BLOCK_L)
        b = (unit // l_blocks).to(tl.int64)
        x = _load(q + b * q_stride_b, row, L, q_stride_l, column, C)
        e = tl.exp(-tl.abs(x))
        slope = e / ((1.0 + e) * (1.0 + e))
        means = 1 if ONE else L
        m = _load(mean + b * means * C, 0 * row if ONE else row, L, C, column, C)
        result = _load(grad_out + b * grad_out_stride_b, row, L, grad_out_stride_l, column, C) * m * slope
        offset = (b * L + row)[:, None] * C + column[None, :]
        tl.store(dq + offset, result.to(dq.dtype.element_ty), mask=(row < L)[:, None] & (column < C)[None, :])


@triton.jit(do_not_specialize=[*_SIZES, "window"])
def aft_bwd_dkv_kernel(
    grad_out,  # [B, L, C], last stride 1
    grad_mean, grad_lse,  # [B, L, C], contiguous float32, or anything
    q,  # [B, L, C], last stride 1
    k,  # [B, M, C], last stride 1
    v,  # [B, M, C], last stride 1
    mean, lse,  # [B, L, C], contiguous float32
    bias,  # [L, M], any strides
    dk, dv,  # [B, M, C], contiguous
    L, M, m_blocks, c_blocks, units, walk, window,
    grad_out_stride_b, grad_out_stride_l, q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l,
    bias_stride_l, bias_stride_m,
    C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_GRAD_MEAN: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % c_blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
        unit = unit // c_blocks
        key = (unit % m_blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        b = (unit // m_blocks).to(tl.int64)
        item = b * L * C
        k_tile = _load(k + b * k_stride_b, key, M, k_stride_l, column, C)
        k_top = tl.max(tl.where((key < M)[:, None], k_tile, LOW), axis=0)
        k_top = tl.maximum(k_top, LOW)
        e = _exp_k(k_tile, key, M, k_top)
        dv_acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        dk_acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        dv_rest = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        dk_rest = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in range(0, _loop_bound(L), BLOCK_L):
            row = start + tl.arange(0, BLOCK_L)
            w = _load_bias(bias, row, L, key, M, bias_stride_l, bias_stride_m, window)
            w_top = tl.maximum(tl.max(w, axis=1), LOW)
            gy, gm, lse_tile = _gradients(
                grad_out + b * grad_out_stride_b, grad_mean + item, grad_lse + item, q + b * q_stride_b, mean + item,
                lse + item, row, L, column, grad_out_stride_l, q_stride_l, C, HAS_GRAD_MEAN, HAS_GRAD_LSE)  # fmt: skip
            x, low = _exponent(k_top[None, :], w_top[:, None], lse_tile)
            there = (row < L)[:, None] & (column < C)[None, :]
            far = (x > MOST) & there
            f = tl.where(there & (x <= MOST), _exp(tl.minimum(x, MOST), low), 0.0)
            f = tl.where(x == x, f, x)
            ew = tl.trans(_rounded(tl.exp(w - w_top[:, None]), DTYPE))
            dv_acc = tl.dot(ew, _rounded(gy * f, DTYPE), dv_acc, input_precision="ieee")
            dk_acc = tl.dot(ew, _rounded(gm * f, DTYPE), dk_acc, input_precision="ieee")
            if tl.max(far.to(tl.int32)) > 0:
                for i in range(0, BLOCK_L):
                    one = start + i + tl.arange(0, 1)
                    w_i = tl.max(_load_bias(bias, one, L, key, M, bias_stride_l, bias_stride_m, window), 0)
                    gy_i, gm_i, lse_i = _gradients(
                        grad_out + b * grad_out_stride_b, grad_mean + item, grad_lse + item, q + b * q_stride_b,
                        mean + item, lse + item, one, L, column, grad_out_stride_l, q_stride_l, C, HAS_GRAD_MEAN,
                        HAS_GRAD_LSE)  # fmt: skip
                    x_i, _ = _exponent(k_top[None, :], tl.maximum(tl.max(w_i, 0), LOW), lse_i)
                    here = (x_i > MOST) & (one < L)[:, None]
                    x_ij, low_ij = _exponent(k_tile, w_i[:, None], lse_i)
                    p = _exp(x_ij, low_ij)
                    p = tl.where(here & (key < M)[:, None], p, 0.0)
                    dv_rest += p * gy_i
                    dk_rest += p * gm_i
        dv_tile = e * dv_acc + dv_rest
        v_tile = _load(v + b * v_stride_b, key, M, v_stride_l, column, C)
        dk_tile = v_tile * dv_tile - (e * dk_acc + dk_rest)
        offset = (b * M + key)[:, None] * C + column[None, :]
        there = (key < M)[:, None] & (column < C)[None, :]
        tl.store(dv + offset, dv_tile.to(dv.dtype.element_ty), mask=there)
        tl.store(dk + offset, dk_tile.to(dk.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*_SIZES, "window"])
def aft_bwd_dbias_kernel(
    grad_out,  # [B, L, C], last stride 1
    grad_mean, grad_lse,  # [B, L, C], contiguous float32, or anything
    q,  # [B, L, C], last stride 1
    k,  # [B, M, C], last stride 1
    v,  # [B, M, C], last stride 1
    mean, lse,  # [B, L, C], contiguous float32
    bias,  # [L, M], any strides
    dbias,  # [L, M], contiguous
    B, L, M, m_blocks, units, walk, window,
    grad_out_stride_b, grad_out_stride_l, q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l,
    bias_stride_l, bias_stride_m,
    C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_GRAD_MEAN: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        key = (unit % m_blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = (unit // m_blocks).to(tl.int32) * BLOCK_L + tl.arange(0, BLOCK_L)
        w = _load_bias(bias, row, L, key, M, bias_stride_l, bias_stride_m, window)
        w_top = tl.maximum(tl.max(w, axis=1), LOW)
        acc = tl.zeros([BLOCK_L, BLOCK_M], tl.float32)
        rest = tl.zeros([BLOCK_L, BLOCK_M], tl.float32)
        for b_index in range(0, _loop_bound(B)):
            b = tl.cast(b_index, tl.int64)
            item = b * L * C
            for start in range(0, C, BLOCK_C):
                column = start + tl.arange(0, BLOCK_C)
                k_tile = _load(k + b * k_stride_b, key, M, k_stride_l, column, C)
                k_top = tl.maximum(tl.max(tl.where((key < M)[:, None], k_tile, LOW), axis=0), LOW)
                e = _exp_k(k_tile, key, M, k_top)
                ev = e * _load(v + b * v_stride_b, key, M, v_stride_l, column, C)
                gy, gm, lse_tile = _gradients(
                    grad_out + b * grad_out_stride_b, grad_mean + item, grad_lse + item, q + b * q_stride_b,
                    mean + item, lse + item, row, L, column, grad_out_stride_l, q_stride_l, C, HAS_GRAD_MEAN,
                    HAS_GRAD_LSE)  # fmt: skip
                x, low = _exponent(k_top[None, :], w_top[:, None], lse_tile)
                there = (row < L)[:, None] & (column < C)[None, :]
                far = (x > MOST) & there
                f = tl.where(there & (x <= MOST), _exp(tl.minimum(x, MOST), low), 0.0)
                f = tl.where(x == x, f, x)
                acc = tl.dot(_rounded(gy * f, DTYPE), tl.trans(_rounded(ev, DTYPE)), acc, input_precision="ieee")
                acc = tl.dot(_rounded(-gm * f, DTYPE), tl.trans(_rounded(e, DTYPE)), acc, input_precision="ieee")
                if tl.max(far.to(tl.int32)) > 0:
                    for c in range(0, BLOCK_C):
                        one = start + c + tl.arange(0, 1)
                        k_c = _load(k + b * k_stride_b, key, M, k_stride_l, one, C)
                        v_c = _load(v + b * v_stride_b, key, M, v_stride_l, one, C)
                        gy_c, gm_c, lse_c = _gradients(
                            grad_out + b * grad_out_stride_b, grad_mean + item, grad_lse + item, q + b * q_stride_b,
                            mean + item, lse + item, row, L, one, grad_out_stride_l, q_stride_l, C, HAS_GRAD_MEAN,
                            HAS_GRAD_LSE)  # fmt: skip
                        top_c = tl.maximum(tl.max(tl.where((key < M)[:, None], k_c, LOW), 0), LOW)
                        x_c, _ = _exponent(top_c[None, :], w_top[:, None], lse_c)
                        here = (x_c > MOST) & (row < L)[:, None] & (one < C)[None, :]
                        x_ij, low_ij = _exponent(tl.trans(k_c), w, lse_c)
                        p = _exp(x_ij, low_ij)
                        p = tl.where(here & (key < M)[None, :], p, 0.0)
                        rest += p * (gy_c * tl.trans(v_c) - gm_c)
        result = tl.exp(w - w_top[:, None]) * acc + rest
        distance = row[:, None] - key[None, :]
        result = tl.where((window == 0) | (tl.abs(distance) < window), result, 0.0)
        target = dbias + row.to(tl.int64)[:, None] * M + key[None, :]
        tl.store(target, result.to(dbias.dtype.element_ty), mask=(row < L)[:, None] & (key < M)[None, :])


# ---------------------------------------------------------------------------------------------------- without a bias


@triton.jit(do_not_specialize=_SIZES)
def aft_simple_fwd_kernel(
    q,  # [B, L, C], last stride 1
    k,  # [B, M, C], last stride 1
    v,  # [B, M, C], last stride 1
    out,  # [B, L, C], contiguous
    mean, lse,  # [B, 1, C], contiguous float32
    L, M, c_blocks, units, walk,
    q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % c_blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
        b = (unit // c_blocks).to(tl.int64)
        k_item, v_item = k + b * k_stride_b, v + b * v_stride_b
        top = tl.full([BLOCK_C], float("-inf"), tl.float32)
        for start in range(0, _loop_bound(M), BLOCK_M):
            key = start + tl.arange(0, BLOCK_M)
            k_tile = _load(k_item, key, M, k_stride_l, column, C)
            top = tl.maximum(top, tl.max(tl.where((key < M)[:, None], k_tile, float("-inf")), axis=0))
        den = tl.zeros([BLOCK_C], tl.float32)
        num = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, _loop_bound(M), BLOCK_M):
            key = start + tl.arange(0, BLOCK_M)
            e = _exp_k(_load(k_item, key, M, k_stride_l, column, C), key, M, top)
            den += tl.sum(e, axis=0)
            num += tl.sum(e * _load(v_item, key, M, v_stride_l, column, C), axis=0)
        result = num / den
        tl.store(mean + b * C + column, result, mask=column < C)
        tl.store(lse + b * C + column, top + tl.log(den), mask=column < C)
        for start in range(0, _loop_bound(L), BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            gate = _sigmoid(_load(q + b * q_stride_b, row, L, q_stride_l, column, C))
            target = out + (b * L + row)[:, None] * C + column[None, :]
            value = (gate * result[None, :]).to(out.dtype.element_ty)
            tl.store(target, value, mask=(row < L)[:, None] & (column < C)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def aft_simple_bwd_kernel(
    grad_out,  # [B, L, C], last stride 1
    grad_mean, grad_lse,  # [B, 1, C], contiguous float32, or anything
    q,  # [B, L, C], last stride 1
    k,  # [B, M, C], last stride 1
    v,  # [B, M, C], last stride 1
    mean, lse,  # [B, 1, C], contiguous float32
    dk, dv,  # [B, M, C], contiguous
    L, M, c_blocks, units, walk,
    grad_out_stride_b, grad_out_stride_l, q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, HAS_GRAD_MEAN: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % c_blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
        b = (unit // c_blocks).to(tl.int64)
        gy = tl.zeros([BLOCK_C], tl.float32)
        if HAS_GRAD_MEAN:
            gy += _load_row(grad_mean + b * C, column, C)
        glse = tl.zeros([BLOCK_C], tl.float32)
        if HAS_GRAD_LSE:
            glse += _load_row(grad_lse + b * C, column, C)
        for start in range(0, _loop_bound(L), BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            gate = _sigmoid(_load(q + b * q_stride_b, row, L, q_stride_l, column, C))
            grad = _load(grad_out + b * grad_out_stride_b, row, L, grad_out_stride_l, column, C)
            gy += tl.sum(gate * grad, axis=0)
        m = _load_row(mean + b * C, column, C)
        s = _load_row(lse + b * C, column, C)
        large = tl.abs(s) > LARGE_LSE
        if tl.max(large.to(tl.int32)) > 0:  # its rounding is in the sum of the weights
            total = tl.zeros([BLOCK_C], tl.float32)
            for start in range(0, _loop_bound(M), BLOCK_M):
                key = start + tl.arange(0, BLOCK_M)
                total += tl.sum(_exp_k(_load(k + b * k_stride_b, key, M, k_stride_l, column, C), key, M, s), axis=0)
            scale = tl.where(large, 1.0 / total, 1.0)
            gy = gy * scale
            glse = glse * scale
        for start in range(0, _loop_bound(M), BLOCK_M):
            key = start + tl.arange(0, BLOCK_M)
            p = tl.exp(_load(k + b * k_stride_b, key, M, k_stride_l, column, C) - s[None, :])
            v_tile = _load(v + b * v_stride_b, key, M, v_stride_l, column, C)
            offset = (b * M + key)[:, None] * C + column[None, :]
            there = (key < M)[:, None] & (column < C)[None, :]
            tl.store(dv + offset, (p * gy[None, :]).to(dv.dtype.element_ty), mask=there)
            dk_tile = p * (gy[None, :] * (v_tile - m[None, :]) + glse[None, :])
            tl.store(dk + offset, dk_tile.to(dk.dtype.element_ty), mask=there)


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, the arguments that all kernels share, and the block sizes."""

    def __init__(self, q, k, v, bias, window):
        (self.B, self.L, self.C), self.M = q.shape, k.shape[1]
        limit = tuned(32, small=16)
        self.block_l, self.block_m, self.block_c = (
            max(16, min(limit, next_power_of_two(n))) for n in (self.L, self.M, self.C)
        )  # fmt: skip
        if bias is None:
            self.block_c = max(16, min(tuned(64, small=16), next_power_of_two(self.C)))
        self.l_blocks, self.m_blocks = cdiv(self.L, self.block_l), cdiv(self.M, self.block_m)
        self.c_blocks = cdiv(self.C, self.block_c)
        self.shared = {
            "B": self.B, "L": self.L, "M": self.M, "C": self.C, "window": window, "l_blocks": self.l_blocks,
            "m_blocks": self.m_blocks, "c_blocks": self.c_blocks, "BLOCK_L": self.block_l, "BLOCK_M": self.block_m,
            "BLOCK_C": self.block_c, "DTYPE": tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32,
        }  # fmt: skip
        if INTERPRETED:
            self.shared["DTYPE"] = tl.float32
        self.add(q=q, k=k, v=v)
        if bias is not None:
            self.shared |= {"bias": bias, "bias_stride_l": bias.stride(0), "bias_stride_m": bias.stride(1)}

    def add(self, **tensors):
        for name, t in tensors.items():
            self.shared |= {name: t, f"{name}_stride_b": t.stride(0), f"{name}_stride_l": t.stride(1)}

    def launch(self, kernel, units, **extra):
        """A launch of `kernel` with the shared arguments that it names, and `extra`."""
        walk = cdiv(units, tuned(MAX_GRID, small=8))
        index = tl.int64 if units + walk > MAX_GRID else tl.int32
        available = self.shared | extra | {"units": units, "walk": walk, "INDEX": index}
        return Launch(kernel, cdiv(units, walk), {name: available[name] for name in kernel.arg_names}, 4, 2)


def _plan_forward(q, k, v, bias=None, *, window=0):
    """((out, mean, lse), launches). Works on meta tensors."""
    p = _Problem(q, k, v, bias, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    means = p.L if bias is not None else min(p.L, 1)
    mean, lse = (torch.empty((p.B, means, p.C), dtype=torch.float32, device=q.device) for _ in range(2))
    results = {"out": out, "mean": mean, "lse": lse}
    if out.numel() == 0:
        return tuple(results.values()), []
    if bias is None:
        launches = [p.launch(aft_simple_fwd_kernel, p.B * p.c_blocks, **results)]
    else:
        launches = [p.launch(aft_fwd_kernel, p.B * p.l_blocks * p.c_blocks, **results)]
    return tuple(results.values()), launches


def _plan_backward(grad_out, grad_mean, grad_lse, q, k, v, mean, lse, bias=None, *, window=0):
    """((dq, dk, dv, dbias), launches). Works on meta tensors."""
    p = _Problem(q, k, v, bias, window)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if bias is None:
        dbias = torch.empty(0, dtype=torch.float32, device=q.device)
    else:
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device)
    results = dq, dk, dv, dbias
    if dq.numel() == 0:
        return tuple(t.zero_() for t in results), []
    p.add(grad_out=grad_out)
    p.shared |= {"mean": mean, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias, "ONE": bias is None}
    for name, t in (("mean", grad_mean), ("lse", grad_lse)):
        p.shared |= {f"grad_{name}": mean if t is None else t, f"HAS_GRAD_{name.upper()}": t is not None}
    launches = [p.launch(aft_bwd_dq_kernel, p.B * p.l_blocks * p.c_blocks)]
    if bias is None:
        launches.append(p.launch(aft_simple_bwd_kernel, p.B * p.c_blocks))
    else:
        launches.append(p.launch(aft_bwd_dkv_kernel, p.B * p.m_blocks * p.c_blocks))
        launches.append(p.launch(aft_bwd_dbias_kernel, p.l_blocks * p.m_blocks))
    return results, launches


def forward(q, k, v, bias=None, *, window=0):
    """effvit::aft: (out, mean, lse). The arguments must have been validated."""
    results, launches = _plan_forward(q, k, v, bias, window=window)
    run(launches, q.device)
    return results


def backward(grad_out, grad_mean, grad_lse, q, k, v, mean, lse, bias=None, *, window=0):
    """effvit::aft_backward: (dq, dk, dv, dbias)."""
    grad_mean, grad_lse = (None if t is None else t.contiguous() for t in (grad_mean, grad_lse))
    results, launches = _plan_backward(grad_out, grad_mean, grad_lse, q, k, v, mean, lse, bias, window=window)
    run(launches, q.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (B, L, C), biased, window in (
        ("full", (8, 196, 384), True, 0),
        ("local", (8, 784, 192), True, 32),
        ("simple", (8, 3136, 96), False, 0),
    ):
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
            q, k, v = (torch.empty((B, L, C), dtype=dtype, device="meta") for _ in range(3))
            bias = torch.empty((L, L), dtype=dtype, device="meta") if biased else None
            (out, mean, lse), launches = _plan_forward(q, k, v, bias, window=window)
            _, backward_launches = _plan_backward(out, None, lse, q, k, v, mean, lse, bias, window=window)
            for launch in launches + backward_launches:
                yield launch.aot(f"{name}-{short}")
