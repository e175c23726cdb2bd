"""The integer-only operators in int64 NumPy, row by row from the papers' formulas: what every backend must equal.

Nothing here comes from effvit. Shifts are arithmetic, // rounds down.
"""

import math

import numpy as np

LARGEST = 2**31 - 1


def shift_exp(d, x0, n, half_bit):
    """d int64 of any sign; saturates at 2^31 - 1."""
    p = np.maximum(d + (d >> 1) - (d >> 4), n * x0)
    q = p // x0
    r = p - q * x0
    left = np.minimum(n - q, 33)  # 2^33 saturates in any case
    e = ((r - 2 * x0) << left) >> 1 if half_bit else ((r >> 1) - x0) << left
    return np.minimum(np.maximum(e, 0), LARGEST)


def saturate(y, dtype):
    info = np.iinfo(dtype)
    return np.clip(y, info.min, info.max).astype(dtype)


def shiftmax(x, x0, n, bits, half_bit, dtype):
    x = x.astype(np.int64)
    e = shift_exp(x - x.max(-1, keepdims=True), x0, n, half_bit)
    s = np.minimum(e.sum(-1, keepdims=True), LARGEST)
    return saturate((e * (LARGEST // s)) >> (32 - bits), dtype)


def rescaled(z, m, c):
    """z m / 2^c to the nearest, ties to even."""
    t = z.astype(np.int64) * m
    half = np.int64(1) << (np.asarray(c, np.int64) - 1)
    return (t + half - 1 + ((t >> c) & 1)) >> c


def shift_gelu(x, x0, n, bits, half_bit, safe_max, multiplier, shift, dtype):
    x = x.astype(np.int64)
    top = x.max(-1, keepdims=True)
    if safe_max:
        top = np.maximum(top, 0)
    e = shift_exp(x - top, x0, n, half_bit)
    s = np.minimum(e + shift_exp(-top, x0, n, half_bit), LARGEST)
    y = x * ((e * (LARGEST // s)) >> (32 - bits))
    if multiplier:
        y = rescaled(saturate(y, np.int32), multiplier, shift)
    return saturate(y, dtype)


def int_layer_norm(x, bias, multiplier, shift, offset, exact, truncate, dtype):
    x, columns = x.astype(np.int64), x.shape[-1]
    total = x.sum(-1, keepdims=True)
    if truncate:
        mean = np.sign(total) * (np.abs(total) // columns)
    else:
        mean, rest = total // columns, total % columns
        mean = mean + ((2 * rest > columns) | ((2 * rest == columns) & (mean % 2 == 1)))
    y = np.clip(x - mean, -46340, 46340)
    v = (y * y).sum(-1, keepdims=True)
    if exact:
        k = np.vectorize(math.isqrt, otypes=[np.int64])(v)
        k = np.maximum(k, 1)
    else:
        k = np.full_like(v, 2**16)
        for _ in range(10):
            k = (k + v // k) >> 1
    t = y * (LARGEST // k)
    y = np.sign(t) * (np.abs(t) >> 1) if truncate else t >> 1
    if bias is not None:
        y = np.clip(y + bias.astype(np.int64), -LARGEST - 1, LARGEST)
    if multiplier is not None:
        y = rescaled(y, multiplier.astype(np.int64), shift.astype(np.int64))
    if offset is not None:
        y = np.clip(y, -LARGEST - 1, LARGEST) + offset
    return saturate(y, dtype)


def int_add_layer_norm(x, residual, x_multiplier, x_shift, residual_multiplier, residual_shift, bias, multiplier, shift,
                       offset, exact, truncate, bits, dtype):  # fmt: skip
    """(norm, sum)."""
    terms = ((x, x_multiplier, x_shift), (residual, residual_multiplier, residual_shift))
    y = sum(rescaled(z, m.astype(np.int64), c.astype(np.int64)) for z, m, c in terms)
    y = np.clip(y, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int16)
    return int_layer_norm(y, bias, multiplier, shift, offset, exact, truncate, dtype), y


def requantize(x, multiplier, shift, residual, residual_multiplier, residual_shift, bits, dtype):
    y = rescaled(x, multiplier.astype(np.int64), shift.astype(np.int64))
    if residual is not None:
        y = y + rescaled(residual, residual_multiplier.astype(np.int64), residual_shift.astype(np.int64))
    ends = (0, 2**bits - 1) if dtype == np.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return saturate(np.clip(y, *ends), dtype)


def unpacked(weight, n, k):
    """[N, K] int64 of blocks of 16 channels, [ceil(K / 4)][16][4] bytes of weight + 128 and a label of 64."""
    groups = -(-k // 4)
    blocks = weight.view(np.uint8)[:, : 64 * groups].astype(np.int64).reshape(len(weight), groups, 16, 4) - 128
    return blocks.transpose(0, 2, 1, 3).reshape(16 * len(weight), 4 * groups)[:n, :k]


def int_linear(x, weight, multiplier, shift, bias, residual, residual_multiplier, residual_shift, bits, dtype):
    if weight.shape[1] != x.shape[1]:
        weight = unpacked(weight, len(multiplier if bias is None else bias), x.shape[1])
    y = x.astype(np.int64) @ weight.astype(np.int64).T
    if bias is not None:
        y = np.clip(y + bias, -LARGEST - 1, LARGEST)
    if multiplier is None:
        return saturate(y, dtype)
    return requantize(y, multiplier, shift, residual, residual_multiplier, residual_shift, bits, dtype)


def saturate_bits(y, bits, dtype):
    """Within what `bits` hold, and the dtype."""
    ends = (0, 2**bits - 1) if dtype == np.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return saturate(np.clip(y, *ends), dtype)


def int8_matmul(a, b, transpose_b, multiplier, shift, bits, dtype):
    a, b = a.astype(np.int64), b.astype(np.int64)
    y = np.matmul(a, np.swapaxes(b, -1, -2) if transpose_b else b)
    y = np.clip(y, -LARGEST - 1, LARGEST)
    if multiplier:
        y = rescaled(y, multiplier, shift)
    return saturate_bits(y, bits, dtype)


def int_attention(
    q, k, v, bias, score_multiplier, score_shift, x0, n, bits, half_bit, score_bits, multiplier, shift, out_bits, dtype
):
    """Head by head, sample by sample."""
    out = np.zeros((*q.shape[:3], v.shape[3]), dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h].astype(np.int64) @ k[b, :, h].astype(np.int64).T
            scores = rescaled(scores, score_multiplier, score_shift)
            scores = np.clip(scores, -(2 ** (score_bits - 1)), 2 ** (score_bits - 1) - 1)
            if bias is not None:
                scores = np.clip(scores + bias[b % bias.shape[0], h].astype(np.int64), -LARGEST - 1, LARGEST)
            p = shiftmax(scores, x0, n, bits, half_bit, np.int64)
            out[b, :, h] = int8_matmul(p, v[b, :, h], False, multiplier, shift, out_bits, dtype)
    return out


def binary_product(x, weight, depth, unipolar):
    """Of bits, the little end of a byte first: -1 and 1, those of x perhaps 0 and 1."""
    x, weight = (np.unpackbits(t, axis=-1, count=depth, bitorder="little").astype(np.int64) for t in (x, weight))
    return (x if unipolar else 2 * x - 1) @ (2 * weight - 1).T


def shift_linear(x, codes, right):
    """Sums of +-floor(x 2^(|code| - 1 - right)), term by term; saturates at int32."""
    sums = np.zeros((x.shape[0], codes.shape[0]), np.int64)
    for n, row in enumerate(codes):
        for k, code in enumerate(row.tolist()):
            if code:
                p = abs(code) - 1 - right
                column = x[:, k].astype(np.int64)
                sums[:, n] += (1 if code > 0 else -1) * (column << p if p >= 0 else column >> -p)
    return saturate(sums, np.int32)


# ---- int8_attention: float32 as IEEE has it until a number is rounded to an integer, then int64 ----------------------


def exp2_weights(t):
    """127 * 2^(-t / 2^13) of int64 0 <= t < 2^16 by a polynomial in 16-bit arithmetic."""
    f = 4 * (t % 8192)
    y = np.full_like(t, 1273)
    for c in (7494, 22478, 32512):
        y = c - ((y * f + 16384) >> 15)
    shift = 8 + t // 8192
    return (y + (1 << (shift - 1))) >> shift


def shiftmax_weights(t):
    return (127 * shift_exp(-t, -8192, 8, True) + 2**20) >> 21


def int8_steps(x, axis):
    """(int64, float32 scale) of x in steps of its largest along axes, which are kept."""
    top = np.abs(x).max(axis, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(top >= np.float32(2.0**-100), np.float32(127) / top, np.float32(0))
    return np.rint(x * inverse).astype(np.int64), top / np.float32(127)


def key_mean(k):
    """[M, K] float32: the sums of blocks of 64 one after the other, each key by key."""
    total = None
    for j in range(0, len(k), 64):
        sums = k[j]
        for row in k[j + 1 : j + 64]:
            sums = sums + row
        total = sums if total is None else total + sums
    return total / np.float32(len(k))


def int8_attention_head(q, k, v, scales, mean, bias, scale, causal, smooth, natural):
    """q [L, K], k [M, K], v [M, V] of one head, float32 or int8 with scales = ([N], [N, V]); bias [L, M] float32.

    (out [L, V], lse [L]) in float64, the integers exact.
    """
    L, M = len(q), len(k)
    f = np.float32
    if mean is None and smooth and scales is None:
        mean = key_mean(k)
    q8, q_scale = int8_steps(q, -1)
    tops, totals, sums = [], [], []
    for n, j in enumerate(range(0, M, 64)):
        rows = slice(j, min(j + 64, M))
        if scales is None:
            x = k[rows] if mean is None else k[rows] - mean
            (k8, k_scale), (v8, v_scale) = int8_steps(x, (0, 1)), int8_steps(v[rows], 0)
        else:
            k8, v8, k_scale, v_scale = k[rows].astype(np.int64), v[rows].astype(np.int64), scales[0][n], scales[1][n]
        acc = q8 @ k8.T
        c = (q_scale * f(scale * math.log2(math.e))) * k_scale.astype(f)
        seen = np.arange(rows.start, rows.stop) <= (np.arange(L) + M - L if causal else np.full(L, M))[:, None]
        step = f(8192 * math.log(2)) if natural else f(8192)
        with np.errstate(invalid="ignore"):
            if bias is None:
                top = np.where(seen, acc, np.iinfo(np.int64).min).max(-1, keepdims=True)
                highest = np.where(seen.any(-1, keepdims=True), top.astype(f) * c, -np.inf)
                t = (top - acc).astype(f) * (c * step)
            else:
                y = np.where(seen, acc.astype(f) * c + bias[:, rows] * f(math.log2(math.e)), f(-np.inf))
                highest = y.max(-1, keepdims=True)
                t = (highest - y) * step
        limit = f(45589 if natural else 65535)
        t = np.rint(np.where(seen & (t <= limit), t, limit)).astype(np.int64)
        p = np.where(seen, (shiftmax_weights if natural else exp2_weights)(t), 0)
        tops.append(highest[:, 0].astype(np.float64))
        totals.append(p.sum(-1))
        sums.append((p @ v8) * v_scale.astype(np.float64).reshape(1, -1))
    top = np.max(tops, 0)
    w = [np.exp2(x - top) for x in tops]
    total = sum(a * b for a, b in zip(w, totals, strict=True))
    out = sum(a[:, None] * b for a, b in zip(w, sums, strict=True)) / total[:, None]
    lse = (top + np.log2(total / 127)) * math.log(2)
    return out, lse if mean is None else lse + scale * (q.astype(np.float64) @ mean.astype(np.float64))


def int8_attention(q, k, v, k_scale, v_scale, k_mean, bias, scale, causal, smooth_k, natural):
    """NumPy arrays as the operator takes them -> out [B, L, H, V], lse [B, H, L] in float64."""
    B, L, H, K = q.shape
    G = k.shape[2]
    out, lse = np.zeros((B, L, H, v.shape[-1])), np.zeros((B, H, L))
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            out[b, :, h], lse[b, h] = int8_attention_head(
                q[b, :, h], k[b, :, g], v[b, :, g], None if k_scale is None else (k_scale[b, :, g], v_scale[b, :, g]),
                None if k_mean is None else k_mean[b, g], None if bias is None else bias[b % len(bias), h],
                K**-0.5 if scale is None else scale, causal, smooth_k, natural,
            )  # fmt: skip
    return out, lse


def pam(a, b):
    """Piecewise affine products of finite float32 numbers, of their bits in int64, elementwise."""
    a, b = (np.asarray(t, np.float32).view(np.uint32).astype(np.int64) for t in np.broadcast_arrays(a, b))
    x, y = a & 0x7FFFFFFF, b & 0x7FFFFFFF
    size = np.minimum(x + y - 0x3F800000, 0x7F800000)
    size = np.where((x < 0x00800000) | (y < 0x00800000) | (size < 0x00800000), 0, size)
    return (size | ((a ^ b) & 0x80000000)).astype(np.uint32).view(np.float32)
