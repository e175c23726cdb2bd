"""int8_attention in Triton: keys and values are quantised by three small kernels, then one or two attend.

The rows of a program are the queries of all the heads that share keys: row l * E + e is query l of the e-th of them. So
keys are read once for all, and a single query of grouped heads fills a tile. Few rows and many keys are split along the
keys; a last kernel merges.

Integers must be those of the definition, so that what leads to one is rounded after every operation: no kernel here
fuses a product with a sum (Launch.fp_fusion), but for those that say fma, and divisions are IEEE ones.
"""

import math
from typing import Any, NamedTuple

import torch

from ._common import (
    INTERPRETED,
    MAX_GRID,
    SCALE,
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
from ._int8_epilogue import _round_half_even
from ._tiles import _divide, _tile_mask, tokens

KEYS = 64  # of a block: they share a scale and a maximum
LOG2E, LN2 = math.log2(math.e), math.log(2)
LIMITS = (65535.0, 45589.0)  # of exp2 and shiftmax, in steps of 2^-13 below the maximum
TARGET_PROGRAMS = 264  # two for each SM: fewer rows split the keys
LEAST_BLOCKS = 4  # of keys, of a program of a split

_KEYS = KEYS if INTERPRETED else tl.constexpr(KEYS)  # the interpreter's loops count in plain ints
_LOG2E, _LN2 = tl.constexpr(LOG2E), tl.constexpr(LN2)
_SMALLEST = tl.constexpr(2.0**-100)


class Cached(NamedTuple):
    """Integers [B, M, G, D] of keys or values: the first of a kernel's copies is at `pointer`."""

    pointer: Any
    stride_b: Any
    stride_m: Any
    stride_h: Any
    stride_d: Any


class Bias(NamedTuple):
    """[W, H, L, M], last stride 1."""

    pointer: Any
    stride_w: Any
    stride_h: Any
    stride_l: Any


class Partial(NamedTuple):
    """What the programs of a split leave behind, in float32."""

    out: Any  # [splits, B, G, rows, V]
    stats: Any  # [3, splits, B, G, rows]: the maximum, the sum of weights, the scores' part of the keys' mean


# ------------------------------------------------------------------------------------------------------------ integers


@device_function
def _quantised(x, largest):
    """x in steps of a 127th of the largest, which is given in bits and has the rank of x."""
    size = largest.to(tl.float32, bitcast=True)
    inverse = tl.where(size >= _SMALLEST, tl.div_rn(size * 0.0 + 127.0, size), 0.0)
    steps = x * inverse
    steps = tl.where(steps == steps, steps, 0.0)  # infinity times 0
    return _round_half_even(steps).to(tl.int8)


@device_function
def _bits(x):
    """Those of |x|: ordered like the numbers, a NaN above them all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@device_function
def _step_of(largest):
    return tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)


@device_function
def _exp2_steps(t):
    """127 * 2^(-t / 2^13), rounded, of integers below 2^16. With f in steps of 2^-13 the definition's
    c - ((a f + 2^14) >> 15) is (c 2^13 + 2^12 - 1 - a f) >> 13; the second one is kept negative."""
    f = t & 8191
    e = (61394943 - 1273 * f) >> 13  # 7494 * 2^13 + 4095
    e = (e * f - 184135680) >> 13  # 8191 - (22478 * 2^13 + 4095)
    e = (e * f + 266342399) >> 13  # 32512 * 2^13 + 4095
    return ((e >> (7 + (t >> 13))) + 1) >> 1


@device_function
def _shiftmax_steps(t):
    """I-ViT's shift exponential of -t / 2^13 in steps of a 127th, rounded. 127 * 2^21 is below 2^31."""
    u = tl.minimum(t + ((t + 1) >> 1) - ((t + 15) >> 4), 65536)
    q = u >> 13
    r = 16384 - (u & 8191)
    return (127 * ((r << (8 - q)) >> 1) + (1 << 20)) >> 21


# -------------------------------------------------------------------------------------------------- keys and values


@triton.jit(do_not_specialize=["M", "N"])
def int8_attention_sums_kernel(
    k,  # Tokens [B, M, G, K]
    out,  # [B, N, G, K] float32: sums of blocks; where there is one block only, the mean
    M, N, columns,  # columns: G * K
    K: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of a block of keys, key by key."""
    chunks = (columns + BLOCK - 1) // BLOCK
    block = (tl.program_id(0) // chunks).to(tl.int64)
    column = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    b = block // N
    first = (block - b * N) * _KEYS
    head, d = column // K, column % K
    source = k.pointer + (b * k.stride_b + first * k.stride_l) + head.to(tl.int64) * k.stride_h + d
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.minimum(M - first, _KEYS).to(tl.int32)
    for start in range(0, _KEYS, 8):
        for i in tl.static_range(8):
            key = start + i
            x = tl.load(source + key * k.stride_l, mask=(column < columns) & (key < count), other=0.0)
            total += x.to(tl.float32)
    if ONE_BLOCK:
        total = tl.div_rn(total, total * 0.0 + M.to(tl.float32))
    tl.store(out + block * columns + column, total, mask=column < columns)


@triton.jit(do_not_specialize=["M", "N", "count"])
def int8_attention_means_kernel(
    sums,  # [B, N, G, K] float32
    mean,  # [B, G, K] float32
    M, N, columns, count,  # count: B * G * K
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of the blocks, one by one, over M."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < count
    b = i // columns
    source = sums + b * columns * N + (i - b * columns)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, _loop_bound(N)):
        total += tl.load(source, mask=ok, other=0.0)
        source += columns
    tl.store(mean + i, tl.div_rn(total, total * 0.0 + M.to(tl.float32)), mask=ok)


@device_function
def _load_block(x, b, head, first, M, column, D: tl.constexpr):
    """(a block of keys in float32, zeros beyond M; which of its rows there are)."""
    key = first + tl.arange(0, _KEYS)
    ok = key < M
    row = x.pointer + (b * x.stride_b + head * x.stride_h) + key.to(tl.int64) * x.stride_l
    tile = tl.load(row[:, None] + column[None, :], mask=_tile_mask(ok, column, D), other=0.0)
    return tile.to(tl.float32), ok


@triton.jit(do_not_specialize=["M", "N", "G"])
def int8_attention_quantise_kernel(
    k, v,  # Tokens
    mean,  # [B, G, K] float32, or None
    k8,  # [B, G, N * 64, K_ROW] int8
    v8,  # [B, G, V, N * 64] int8
    k_scale,  # [B, N, G] float32
    v_scale,  # [B, N, G, V] float32
    M, N, G,
    K: tl.constexpr, K_ROW: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program does one block of keys of one head, and its values."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid // N  # b * G + g
    n = pid - head * N
    b = head // G
    g = head - b * G
    first = n * _KEYS
    key = tl.arange(0, _KEYS)
    scales = (b * N + n) * G + g

    column = tl.arange(0, BLOCK_K)
    x, ok = _load_block(k, b, g, first, M, column, K)
    if mean is not None:
        m = tl.load(mean + head * K + column, mask=column < K, other=0.0)
        x = tl.where(ok[:, None], x - m[None, :], 0.0)
    largest = tl.max(tl.max(_bits(x), axis=1), axis=0)
    target = k8 + (head * N * _KEYS + first) * K_ROW + key[:, None] * K_ROW + column[None, :]
    tl.store(target, _quantised(x, largest), mask=_tile_mask(key < _KEYS, column, K_ROW))
    tl.store(k_scale + scales, _step_of(largest))

    channel = tl.arange(0, BLOCK_V)
    x, ok = _load_block(v, b, g, first, M, channel, V)
    largest = tl.max(_bits(x), axis=0)
    target = v8 + (head * V * N * _KEYS + first) + channel.to(tl.int64)[:, None] * (N * _KEYS) + key[None, :]
    steps = tl.trans(_quantised(x, largest[None, :]))
    tl.store(target, steps, mask=channel[:, None] < V)
    tl.store(v_scale + scales * V + channel, _step_of(largest), mask=channel < V)


@triton.jit(do_not_specialize=["M", "N", "G"])
def int8_attention_transpose_kernel(
    v,  # Tokens, int8
    v8,  # [B, G, V, N * 64] int8
    M, N, G,
    V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Values with the keys last, as the tensor cores want them: worth it where many programs read them."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid // N
    first = (pid - head * N) * _KEYS
    b = head // G
    key, channel = tl.arange(0, _KEYS), tl.arange(0, BLOCK_V)
    row = v.pointer + (b * v.stride_b + (head - b * G) * v.stride_h) + (first + key) * v.stride_l
    tile = tl.load(row[:, None] + channel[None, :], mask=_tile_mask(first + key < M, channel, V), other=0)
    target = v8 + (head * V * N * _KEYS + first) + channel.to(tl.int64)[:, None] * (N * _KEYS) + key[None, :]
    tl.store(target, tl.trans(tile), mask=channel[:, None] < V)


# ----------------------------------------------------------------------------------------------------------- attention


@device_function
def _add_block(
    state, n, q8, q_scale, last, k_rows, k_stride, v_rows, v_stride_m, v_stride_d, k_scale, v_scale, bias_rows, G, M,
    step, K_ROW: tl.constexpr, V: tl.constexpr, SHIFTMAX: tl.constexpr, LIMIT: tl.constexpr, MASKED: tl.constexpr,
    BY_CHANNEL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(sum of weighted values, maximum, sum of weights) with the n-th block of keys added. last: of the keys a row
    sees."""
    out, top, total = state
    first = n * _KEYS
    key = first + tl.arange(0, _KEYS)
    depth, channel = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    ok = key < M
    at = key.to(tl.int64)
    k_tile = tl.load(k_rows + at[:, None] * k_stride + depth[None, :], mask=_tile_mask(ok, depth, K_ROW), other=0)
    acc = tl.dot(q8, tl.trans(k_tile), out_dtype=tl.int32)
    c = q_scale * tl.load(k_scale + G.to(tl.int64) * n)
    visible = key[None, :] <= last[:, None]
    if bias_rows is None:
        if MASKED:
            seen = tl.max(tl.where(visible, acc, -(2**30)), axis=1)
            any_key = first <= last
            seen = tl.where(any_key, seen, 0)
            maximum = tl.where(any_key, seen.to(tl.float32) * c, float("-inf"))
        else:
            seen = tl.max(acc, axis=1)
            maximum = seen.to(tl.float32) * c
        below = (0x4B000000 + seen[:, None] - acc).to(tl.float32, bitcast=True) - 8388608.0  # of 0 <= x < 2^23
        t = below * (c * step)[:, None]
    else:
        b = tl.load(bias_rows[:, None] + at[None, :], mask=visible, other=0.0).to(tl.float32) * _LOG2E
        y = ((0x4B400000 + acc).to(tl.float32, bitcast=True) - 12582912.0) * c[:, None] + b  # |acc| < 2^22
        y = tl.where(visible, y, float("-inf"))  # such calls are always MASKED
        maximum = tl.max(tl.where(y == y, y, float("-inf")), axis=1)
        not_a_number = tl.max((y != y).to(tl.int32), axis=1)
        maximum = tl.where(not_a_number > 0, float("nan"), maximum)
        t = (tl.where(maximum == float("-inf"), 0.0, maximum)[:, None] - y) * step
    t = tl.where(t <= LIMIT, t, LIMIT)  # a NaN is at the limit
    t = (t + 8388608.0).to(tl.int32, bitcast=True) & 0x7FFFFF  # from 2^23 on float32 has steps of 1
    p = _shiftmax_steps(t) if SHIFTMAX else _exp2_steps(t)
    if MASKED:
        p = tl.where(visible, p, 0)

    if BY_CHANNEL:
        v_tile = tl.load(v_rows + channel.to(tl.int64)[:, None] * v_stride_d + at[None, :],
                         mask=(channel < V)[:, None] & ok[None, :], other=0)  # fmt: skip
        v_tile = tl.trans(v_tile)
    else:
        v_tile = tl.load(v_rows + at[:, None] * v_stride_m + channel[None, :], mask=_tile_mask(ok, channel, V), other=0)
    # Integers as bits of floats: 1.5 * 2^23 + x of |x| < 2^22.
    sums = tl.dot(p.to(tl.int8), v_tile, tl.full(out.shape, 0x4B400000, tl.int32), out_dtype=tl.int32)
    sums = sums.to(tl.float32, bitcast=True) - 12582912.0
    v_step = tl.load(v_scale + G.to(tl.int64) * V * n + channel, mask=channel < V, other=0.0)

    new_top = tl.maximum(top, maximum)
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    w, correction = tl.exp2(maximum - finite), tl.exp2(top - finite)
    total = tl.fma(total, correction, w * tl.sum(p, axis=1).to(tl.float32))
    weighted = sums * w[:, None] * v_step[None, :]
    return tl.fma(out, tl.broadcast_to(correction[:, None], out.shape), weighted), new_top, total


@triton.jit(do_not_specialize=["L", "M", "N", "G", "W", "row_blocks", "walk"])
def int8_attention_fwd_kernel(
    q,  # Tokens
    k, v,  # Cached
    k_scale,  # [B, N, G] float32
    v_scale,  # [B, N, G, V] float32
    mean,  # [B, G, K] float32, or None
    bias,  # Bias, or None
    out,  # [B, L, H, V], contiguous; None where the keys are split
    lse,  # [B, H, L] float32, contiguous; likewise
    partial,  # Partial, or None
    L, M, N, G, W, row_blocks, walk,  # walk: blocks of keys of a program of a split
    scale, base2_scale, step,
    E: tl.constexpr, K: tl.constexpr, K_ROW: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr,
    SHIFTMAX: tl.constexpr, LIMIT: tl.constexpr, BY_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program owns a block of rows of one head of the keys, and all their blocks or, split, `walk` of them."""
    pid = tl.program_id(0)
    place = pid // row_blocks
    row = (row_blocks - 1 - pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)  # long rows of causal calls first
    splits = (N + walk - 1) // walk
    pair = (place // splits).to(tl.int64)  # b * G + g
    split = place % splits
    b, g = _divide(pair, G)
    ok = row < L * E
    l, e = row // E, row % E
    at = l.to(tl.int64)
    head = g * E + e

    depth, channel = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    q_rows = q.pointer + b * q.stride_b + at * q.stride_l + head * q.stride_h
    x = tl.load(q_rows[:, None] + depth[None, :], mask=_tile_mask(ok, depth, K), other=0.0).to(tl.float32)
    largest = tl.max(_bits(x), axis=1)
    q8 = _quantised(x, largest[:, None])
    q_scale = _step_of(largest) * base2_scale
    part = tl.zeros([BLOCK_M], tl.float32)
    if mean is not None:
        m = tl.load(mean + pair * K + depth, mask=depth < K, other=0.0)
        part = scale * tl.sum(x * m[None, :], axis=1)

    last = tl.zeros([BLOCK_M], tl.int32) + M - 1
    stop = tl.minimum(split * walk + walk, N)
    whole = M // _KEYS  # blocks of which every row sees all
    if CAUSAL:
        last = l + (M - L)
        first_row = (row_blocks - 1 - pid % row_blocks) * BLOCK_M
        last_row = tl.minimum(first_row + BLOCK_M, L * E) - 1
        whole = tl.maximum(first_row // E + M - L + 1, 0) // _KEYS
        stop = tl.minimum(stop, (tl.maximum(last_row // E + M - L + 1, 0) + _KEYS - 1) // _KEYS)
    start = split * walk
    whole = tl.maximum(tl.minimum(whole, stop), start) if bias is None else start

    k_rows = k.pointer + (b * k.stride_b + g * k.stride_h)
    v_rows = v.pointer + (b * v.stride_b + g * v.stride_h)
    k_steps = k_scale + (b * N * G + g)
    v_steps = v_scale + (b * N * G + g) * V
    bias_rows = None
    if bias is not None:
        bias_rows = bias.pointer + b % W * bias.stride_w + head * bias.stride_h + tl.where(ok, at, 0) * bias.stride_l
        bias_rows = tl.where(ok, bias_rows, bias.pointer)

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if bias is None:
        for n in range(_loop_bound(start), _loop_bound(whole)):
            acc, top, total = _add_block(
                (acc, top, total), n, q8, q_scale, last, k_rows, k.stride_m, v_rows, v.stride_m, v.stride_d, k_steps,
                v_steps, bias_rows, G, M, step, K_ROW, V, SHIFTMAX, LIMIT, False, BY_CHANNEL, BLOCK_K, BLOCK_V,
            )  # fmt: skip
    for n in range(_loop_bound(whole), _loop_bound(stop)):
        acc, top, total = _add_block(
            (acc, top, total), n, q8, q_scale, last, k_rows, k.stride_m, v_rows, v.stride_m, v.stride_d, k_steps,
            v_steps, bias_rows, G, M, step, K_ROW, V, SHIFTMAX, LIMIT, True, BY_CHANNEL, BLOCK_K, BLOCK_V,
        )  # fmt: skip

    H = G * E
    if partial is None:
        none = total == 0.0
        acc = tl.where(none[:, None], 0.0, acc / tl.where(none, 1.0, total)[:, None])
        target = out + ((b * L + at) * H + head) * V
        tl.store(target[:, None] + channel[None, :], acc.to(out.dtype.element_ty), mask=_tile_mask(ok, channel, V))
        tl.store(lse + (b * H + head) * L + at, (top + tl.log2(total / 127.0)) * _LN2 + part, mask=ok)
    else:
        rows = L * E
        pairs = tl.num_programs(0) // (row_blocks * splits)
        slot = (split * pairs.to(tl.int64) + pair) * rows + row
        tl.store(partial.out + slot[:, None] * V + channel[None, :], acc, mask=_tile_mask(ok, channel, V))
        kind = pairs.to(tl.int64) * rows * splits
        tl.store(partial.stats + slot, top, mask=ok)
        tl.store(partial.stats + kind + slot, total, mask=ok)
        tl.store(partial.stats + 2 * kind + slot, part, mask=ok)


@triton.jit(do_not_specialize=["L", "G", "splits", "count"])
def int8_attention_merge_kernel(
    partial,  # Partial
    out,  # [B, L, H, V], contiguous
    lse,  # [B, H, L] float32, contiguous
    L, G, splits, count,  # count: B * G * rows
    E: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Merges the programs of a split, in their order."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = slot < count
    channel = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    kind = splits * count.to(tl.int64)
    for i in range(0, _loop_bound(splits)):
        at = slot + count.to(tl.int64) * i
        maximum = tl.load(partial.stats + at, mask=ok, other=float("-inf"))
        new_top = tl.maximum(top, maximum)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        w, correction = tl.exp2(maximum - finite), tl.exp2(top - finite)
        total = tl.fma(total, correction, w * tl.load(partial.stats + kind + at, mask=ok, other=0.0))
        x = tl.load(partial.out + at[:, None] * V + channel[None, :], mask=_tile_mask(ok, channel, V), other=0.0)
        acc = acc * correction[:, None] + x * w[:, None]
        top = new_top
    part = tl.load(partial.stats + 2 * kind + slot, mask=ok, other=0.0)
    none = total == 0.0
    acc = tl.where(none[:, None], 0.0, acc / tl.where(none, 1.0, total)[:, None])
    pair, row = _divide(slot, L * E)
    b, g = _divide(pair, G)
    l, e = _divide(row, E)
    head = g * E + e
    target = out + ((b * L + l) * (G * E) + head) * V
    tl.store(target[:, None] + channel[None, :], acc.to(out.dtype.element_ty), mask=_tile_mask(ok, channel, V))
    tl.store(lse + (b * (G * E) + head) * L + l, (top + tl.log2(total / 127.0)) * _LN2 + part, mask=ok)


# -------------------------------------------------------------------------------------------------------------- launch


def _empty(like, *shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=like.device)


def _launch(kernel, grid, args, *, num_warps=4, num_stages=1):
    if grid > MAX_GRID:
        raise ValueError(f"effvit::{kernel.__name__}: too many programs for one launch, got {grid}")
    return Launch(kernel, grid, args, num_warps=num_warps, num_stages=num_stages, fp_fusion=False)


def _plan_mean(k):
    """(the mean of the keys [B, G, K], launches)."""
    B, M, G, K = k.shape
    N, columns = cdiv(M, KEYS), G * K
    sums = _empty(k, B, N, G, K)
    block = tuned(128 * SCALE, small=16)
    args = {"k": tokens(k), "out": sums, "M": M, "N": N, "columns": columns, "K": K, "ONE_BLOCK": N == 1}
    launches = [
        _launch(int8_attention_sums_kernel, B * N * cdiv(columns, block), {**args, "BLOCK": block}, num_warps=2)
    ]
    if N == 1:
        return sums[:, 0], launches
    mean = _empty(k, B, G, K)
    args = {"sums": sums, "mean": mean, "M": M, "N": N, "columns": columns, "count": mean.numel(), "BLOCK": block}
    return mean, [*launches, _launch(int8_attention_means_kernel, cdiv(mean.numel(), block), args, num_warps=2)]


def _block_of(D, least):
    return max(least, next_power_of_two(D))


def _plan_quantise(k, v, mean):
    """(k Cached, its row, v Cached, k_scale, v_scale, launches)."""
    (B, M, G, K), V = k.shape, v.shape[-1]
    N = cdiv(M, KEYS)
    row = cdiv(K, 16) * 16
    k8, v8 = _empty(k, B, G, N * KEYS, row, dtype=torch.int8), _empty(k, B, G, V, N * KEYS, dtype=torch.int8)
    k_scale, v_scale = _empty(k, B, N, G), _empty(k, B, N, G, V)
    args = {
        "k": tokens(k), "v": tokens(v), "mean": mean, "k8": k8, "v8": v8, "k_scale": k_scale, "v_scale": v_scale,
        "M": M, "N": N, "G": G, "K": K, "K_ROW": row, "V": V, "BLOCK_K": _block_of(K, 16), "BLOCK_V": _block_of(V, 16),
    }  # fmt: skip
    warps = 8 if max(K, V) > 128 else 4
    launches = [_launch(int8_attention_quantise_kernel, B * G * N, args, num_warps=warps)]
    return _keys(k8.transpose(1, 2)), row, _values(v8), k_scale, v_scale, launches


def _keys(k8):
    return Cached(k8, *k8.stride())


def _values(v8):
    """Of [B, G, V, keys]."""
    b, g, d, m = v8.stride()
    return Cached(v8, b, m, g, d)


def _plan_transpose(v):
    (B, M, G, V), N = v.shape, cdiv(v.shape[1], KEYS)
    v8 = _empty(v, B, G, V, N * KEYS, dtype=torch.int8)
    args = {"v": tokens(v), "v8": v8, "M": M, "N": N, "G": G, "V": V, "BLOCK_V": _block_of(V, 16)}
    return _values(v8), [_launch(int8_attention_transpose_kernel, B * G * N, args)]


def _tile_of(rows, pairs, width, bias):
    """Rows of a program and warps: 128, fewer where there are fewer or registers are short, or to have more
    programs."""
    m = max(16, min(tuned(128 if width <= 64 and not bias else 64, small=16), next_power_of_two(rows)))
    while m > 32 and cdiv(rows, m) * pairs < TARGET_PROGRAMS // 2:
        m //= 2
    return m, 8 if m * max(width, KEYS) > 64 * 64 or (bias and m == 64) else 4


def _walk_of(N, programs):
    """Blocks of keys of a program, so that there are TARGET_PROGRAMS. It follows from shapes alone."""
    splits = min(max(TARGET_PROGRAMS // max(programs, 1), 1), cdiv(N, LEAST_BLOCKS))
    return tuned(cdiv(N, splits), small=1)


def _plan_forward(
    q, k, v, k_scale=None, v_scale=None, k_mean=None, bias=None,
    *, scale=None, causal=False, smooth_k=True, exponential=0,
):  # fmt: skip
    """((out, lse), launches). Works on meta tensors."""
    (B, L, H, K), (M, G), V = q.shape, k.shape[1:3], v.shape[-1]
    out, lse = _empty(q, B, L, H, V, dtype=q.dtype), _empty(q, B, H, L)
    if lse.numel() == 0:
        return (out, lse), []
    N, E = cdiv(M, KEYS), H // G
    rows, pairs = L * E, B * G
    width = _block_of(max(K, V), 32)
    block_m, warps = _tile_of(rows, pairs, width, bias is not None)
    row_blocks = cdiv(rows, block_m)
    launches, by_channel = [], True
    if k.dtype == torch.int8:
        keys, row = _keys(k), K
        by_channel = row_blocks > 1
        if by_channel:
            values, launches = _plan_transpose(v)
        else:
            values = Cached(v, *v.stride())
    else:
        if k_mean is None and smooth_k:
            k_mean, launches = _plan_mean(k)
        keys, row, values, k_scale, v_scale, more = _plan_quantise(k, v, k_mean)
        launches = [*launches, *more]
    walk = _walk_of(N, pairs * row_blocks)
    splits = cdiv(N, walk)
    partial = Partial(_empty(q, splits, pairs, rows, V), _empty(q, 3, splits, pairs, rows)) if splits > 1 else None
    scale = K**-0.5 if scale is None else scale
    args = {
        "q": tokens(q), "k": keys, "v": values, "k_scale": k_scale, "v_scale": v_scale, "mean": k_mean,
        "bias": None if bias is None else Bias(bias, *bias.stride()[:3]),
        "out": None if partial else out, "lse": None if partial else lse, "partial": partial,
        "L": L, "M": M, "N": N, "G": G, "W": 1 if bias is None else bias.shape[0], "row_blocks": row_blocks,
        "walk": walk, "scale": float(scale), "base2_scale": scale * LOG2E, "step": 8192.0 * (LN2 if exponential else 1),
        "E": E, "K": K, "K_ROW": row, "V": V, "CAUSAL": causal, "SHIFTMAX": exponential == 1,
        "LIMIT": LIMITS[exponential], "BY_CHANNEL": by_channel,
        "BLOCK_M": block_m, "BLOCK_K": _block_of(K, 32), "BLOCK_V": _block_of(V, 16),
    }  # fmt: skip
    stages = 3 if width <= 128 else 2
    grid = pairs * splits * row_blocks
    launches = [*launches, _launch(int8_attention_fwd_kernel, grid, args, num_warps=warps, num_stages=stages)]
    if partial:
        block = tuned(4 * SCALE, small=2)
        args = {"partial": partial, "out": out, "lse": lse, "L": L, "G": G, "splits": splits, "count": pairs * rows}
        args |= {"E": E, "V": V, "BLOCK_M": block, "BLOCK_V": _block_of(V, 16)}
        launches.append(_launch(int8_attention_merge_kernel, cdiv(pairs * rows, block), args))
    return (out, lse), launches


def forward(
    q, k, v, k_scale=None, v_scale=None, k_mean=None, bias=None,
    *, scale=None, causal=False, smooth_k=True, exponential=0,
):  # fmt: skip
    """effvit::int8_attention. The arguments must have been validated."""
    results, launches = _plan_forward(
        q, k, v, k_scale, v_scale, k_mean, bias, scale=scale, causal=causal, smooth_k=smooth_k, exponential=exponential
    )  # fmt: skip
    run(launches, q.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    calls = (  # B, L, H, K, M, G, V, int8, bias, causal, exponential
        ("vit", 64, 197, 6, 64, 197, 6, 64, False, False, False, 0),
        ("image", 1, 4096, 8, 128, 4096, 8, 128, False, False, True, 0),
        ("swin", 64, 49, 3, 32, 49, 3, 32, False, True, False, 1),
        ("decode", 2, 1, 32, 128, 4000, 8, 128, True, False, True, 0),
        ("cache", 2, 300, 8, 64, 4000, 2, 64, True, False, True, 1),
        ("wide", 2, 577, 4, 256, 577, 4, 256, False, False, False, 0),
        ("odd", 2, 33, 3, 33, 333, 3, 20, False, True, True, 0),
    )
    for name, B, L, H, K, M, G, V, int8, bias, causal, exponential in calls:
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            if name not in ("vit", "decode") and short != "bf16":
                continue

            def meta(*shape, of=dtype):
                return torch.empty(shape, dtype=of, device="meta")

            kv = torch.int8 if int8 else dtype
            scales = (meta(B, cdiv(M, KEYS), G, of=torch.float32), meta(B, cdiv(M, KEYS), G, V, of=torch.float32))
            tensors = [meta(B, L, H, K), meta(B, M, G, K, of=kv), meta(B, M, G, V, of=kv)]
            tensors += [*scales, meta(B, G, K, of=torch.float32)] if int8 else [None, None, None]
            tensors.append(meta(1, H, L, M) if bias else None)
            for launch in _plan_forward(*tensors, causal=causal, exponential=exponential)[1]:
                yield launch.aot(f"{name}-{short}")
