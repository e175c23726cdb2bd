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
