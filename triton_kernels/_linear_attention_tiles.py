"""What the kernels of linear attention share: a program's tokens, tiles, feature maps, normalisers, gradients' ends.

Operands of the products: float32 as it is, bfloat16 for bfloat16. For float16 they are float32 with TF32 precision,
which has float16's significand and float32's exponent: phi(q) phi(k)^T, the state, and exp overflow float16 long before
float32, and u and dS fall below float16's smallest numbers. Sums and states are always float32.
"""

from typing import Any, NamedTuple

from ._common import INTERPRETED, _loop_bound, device_function, tl, triton
from ._tiles import Rows, _load_rows, _rounded, _store_numbers, _store_rows, _tile_mask

_INTERPRETED = tl.constexpr(INTERPRETED)
# Values of the schema's ints; python/effvit/ops/linear_attention.py has the same lists.
_RELU, _ELU1, _EXP = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_NONE, _SUM, _MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E, _LOG2E_LOW = tl.constexpr(1.4426950216293335), tl.constexpr(1.9259629911266175e-8)

# Sizes that change from call to call; specialising on their values would only recompile.
SIZES = ["heads", "sequences", "L", "M", "splits", "count_state", "count_z", "base"]


# ------------------------------------------------------------------------------------------------- tokens of a program


@device_function
def _program(base):
    pid = tl.program_id(0)
    if base is not None:
        pid = pid.to(tl.int64) + base
    return pid


@device_function
def _sequence(cu_seqlens, n, size):
    """(batch, first token, end) of sequence n. Offsets outside of the tokens or out of order are cut: they could not
    be checked without waiting for the GPU."""
    b = n
    begin = n * 0
    end = begin + size
    if cu_seqlens is not None:
        b = n * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), size)
        end = tl.maximum(tl.minimum(tl.load(cu_seqlens + n + 1).to(tl.int64), size), begin)
    return b, begin, end


@device_function
def _cut(begin, end, split, splits, BLOCK: tl.constexpr):
    """(first token, end, number of blocks) of a split; whole blocks, so that every kernel cuts at the same tokens."""
    blocks = (end - begin + (BLOCK - 1)) // BLOCK
    walk = (blocks + splits - 1) // splits
    first = tl.minimum(begin + split * walk * BLOCK, end)
    stop = tl.minimum(first + walk * BLOCK, end)
    return first, stop, ((stop - first + (BLOCK - 1)) // BLOCK).to(tl.int32)


class Split(NamedTuple):
    """A program's share of a sequence."""

    head: Any
    split: Any
    sequence: Any
    b: Any
    begin: Any  # first token and end of the sequence
    end: Any
    first: Any  # first token, end and number of blocks of the split
    stop: Any
    blocks: Any


@device_function
def _split_of(pid, heads, splits, cu_seqlens, size, BLOCK: tl.constexpr):
    """The Split of the program that owns it; programs are [sequences, splits, heads]."""
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    split = (pid % splits).to(tl.int64)
    sequence = (pid // splits).to(tl.int64)
    b, begin, end = _sequence(cu_seqlens, sequence, size)
    first, stop, blocks = _cut(begin, end, split, splits, BLOCK)
    return Split(head, split, sequence, b, begin, end, first, stop, blocks)


@device_function
def _tile_place(pid, heads, size, BLOCK: tl.constexpr):
    """(head, tile, batch) of the program that owns a tile of the quadratic form."""
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    tiles = (size + (BLOCK - 1)) // BLOCK
    return head, pid % tiles, (pid // tiles).to(tl.int64)


@device_function
def _contiguous_rows(x, b, size, heads, head, D: tl.constexpr):
    """Rows of a contiguous tensor [B, size, heads, D]; None where it is. Strides that are known when compiling, in
    part, take fewer registers than those of Tokens."""
    if x is not None:
        return Rows(x + (b * size * heads + head) * D, heads.to(tl.int64) * D)


@device_function
def _numbers_of(x, first):
    """One number per token, from x + first on; None where x is."""
    if x is not None:
        return Rows(x + first, 1)


@device_function
def _zero_outside(x, cu_seqlens, sequences, share, shares, size, column, D: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros to the Rows of tokens that belong to no sequence; a program writes one of `shares`."""
    if x is not None:
        before = tl.minimum(tl.maximum(tl.load(cu_seqlens).to(tl.int64), 0), size)
        after = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequences).to(tl.int64), 0), size)
        first, stop, blocks = _cut(before * 0, before + size - after, share, shares, BLOCK)
        for step in range(0, _loop_bound(blocks)):
            token = first + step * BLOCK + tl.arange(0, BLOCK)
            ok = token < stop
            token = tl.where(token < before, token, token - before + after)
            zero = (token[:, None] * 0 + column[None, :] * 0).to(tl.float32)
            _store_rows(x, token, ok, column, zero, D)


# --------------------------------------------------------------------------------------------------------------- tiles


@device_function
def _load_state(pointer, slot, row, column, K: tl.constexpr, V: tl.constexpr):
    """Rows and columns of a state [K, V]."""
    mask = (row < K)[:, None] & (column < V)[None, :]
    return tl.load(pointer + slot * K * V + row[:, None] * V + column[None, :], mask=mask, other=0.0)


@device_function
def _store_state(pointer, slot, row, column, x, K: tl.constexpr, V: tl.constexpr):
    mask = (row < K)[:, None] & (column < V)[None, :]
    tl.store(pointer + slot * K * V + row[:, None] * V + column[None, :], x, mask=mask)


@device_function
def _operand(x, DTYPE: tl.constexpr):
    """A float32 tile as an operand of _dot. The interpreter computes in float32, with the values that tensor cores
    see: they read a float32 operand of TF32 precision without its last 13 bits."""
    if DTYPE == tl.bfloat16:
        x = _rounded(x, DTYPE)
    elif DTYPE == tl.float16 and _INTERPRETED:
        x = (x.to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)
    return x


@device_function
def _dot(a, b, acc, DTYPE: tl.constexpr):
    """a b + acc (or None: 0) of two operands, in float32."""
    PRECISION: tl.constexpr = "tf32" if DTYPE == tl.float16 else "ieee"
    return tl.dot(a, b, acc, input_precision=PRECISION)


if INTERPRETED:

    def _exp(x, ACCURATE):
        return tl.exp(x)

else:

    @triton.jit
    def _exp(x, ACCURATE: tl.constexpr):
        """e^x. ACCURATE: tl.exp rounds x * log2(e) before the exponential, which |x| makes worse; add it back."""
        if ACCURATE:
            t = x * _LOG2E
            lost = tl.fma(x, _LOG2E, -t) + x * _LOG2E_LOW
            lost = tl.where(tl.abs(t) < 256.0, lost, 0.0)  # infinity minus infinity
            y = tl.exp2(t)
            y = tl.where(y < float("inf"), tl.fma(y, lost * _LN2, y), y)
        else:
            y = tl.exp(x)
        return y


@device_function
def _add_compensated(total, low, x):
    """(total + x, what rounding takes off): however many terms, the sum is off by the rounding of one. An infinite
    total stays."""
    y = x + low
    after = total + y
    lost = y - (after - total)
    return after, tl.where(lost - lost == 0.0, lost, 0.0)


@device_function
def _load_features(x, row, ok, column, D: tl.constexpr, FEATURE: tl.constexpr):
    """phi(x), 0 outside of the tile. NaN stays NaN."""
    ACCURATE: tl.constexpr = x.pointer.dtype.element_ty == tl.float32
    phi = _load_rows(x, row, ok, column, D)
    if FEATURE == _RELU:
        phi = tl.where(phi < 0.0, 0.0, phi)
    elif FEATURE == _ELU1:
        phi = tl.where(phi > 0.0, phi + 1.0, _exp(phi, ACCURATE))
    elif FEATURE == _EXP:
        phi = _exp(phi, ACCURATE)
    if FEATURE >= _ELU1:  # phi(0) is not 0
        phi = tl.where(_tile_mask(ok, column, D), phi, 0.0)
    return phi


@device_function
def _load_den_features(phi, x_den, row, ok, column, D: tl.constexpr, FEATURE: tl.constexpr):
    """The features of the denominator: phi where it has no tensor of its own."""
    if x_den is not None:
        phi = _load_features(x_den, row, ok, column, D, FEATURE)
    return phi


@device_function
def _feature_backward(g, phi, FEATURE: tl.constexpr):
    """g * phi'(x), from phi(x): one tile less in registers."""
    if FEATURE == _RELU:
        g = tl.where(phi > 0.0, g, 0.0)
    elif FEATURE == _ELU1:
        g = g * tl.where(phi > 1.0, 1.0, phi)
    elif FEATURE == _EXP:
        g = g * phi
    return g


@device_function
def _denominator(d, count, eps, clamp_min, NORMALIZE: tl.constexpr):
    """phi(q_den) . z -> what the numerator is divided by; count: the number of keys in the sums."""
    if NORMALIZE == _SUM:
        d = d + eps
    elif NORMALIZE == _MEAN:
        d = d + count.to(tl.float32) * eps
    else:
        d = tl.where(d < clamp_min, clamp_min, d)
    return d


@device_function
def _row_gradients(d, t, count, ok, eps, clamp_min, scale, NORMALIZE: tl.constexpr):
    """(scale / denominator, gradient of phi(q_den) . z) of rows, from d = phi(q_den) . z and t = phi(q) . (grad_out
    S^T); 0 in rows that do not exist, whose denominator may be 0."""
    denominator = _denominator(d, count, eps, clamp_min, NORMALIZE)
    inverse = tl.where(ok, scale / denominator, 0.0)
    r = tl.where(ok, -(t * inverse) / denominator, 0.0)
    if NORMALIZE > _MEAN:
        r = tl.where(d >= clamp_min, r, 0.0)
    return inverse, r


@device_function
def _store_out(
    out, row, ok, column, o, d, count, eps, clamp_min, scale, V: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    factor = scale
    if NORMALIZE != _NONE:
        factor = (scale / _denominator(d, count, eps, clamp_min, NORMALIZE))[:, None]
    _store_rows(out, row, ok, column, o * factor, V)


@device_function
def _store_query_gradients(
    dq, dq_den, row, ok, column, g, zs, inverse, r, phi, phi_den, K: tl.constexpr, FEATURE: tl.constexpr
):  # fmt: skip
    """dq and dq_den from g = grad_out S^T, and zs: the row's z, or None."""
    g = g * inverse[:, None]
    if zs is not None:
        g_den = r[:, None] * zs
        if dq_den is None:
            g += g_den
        else:
            _store_rows(dq_den, row, ok, column, _feature_backward(g_den, phi_den, FEATURE), K)
    _store_rows(dq, row, ok, column, _feature_backward(g, phi, FEATURE), K)


@device_function
def _store_key_gradients(
    dk, dk_den, dweight, k_den, w, row, ok, column, g, g_den, phi, K: tl.constexpr, FEATURE: tl.constexpr
):  # fmt: skip
    """dk, dk_den and dweight from the gradients g and g_den (or None: 0) of w phi(k) and w phi(k_den); w or None: 1."""
    if w is not None:
        dw = tl.sum(phi * g, axis=1)
        g = g * w[:, None]
    if g_den is not None:
        phi_den = _load_den_features(phi, k_den, row, ok, column, K, FEATURE)
        if w is not None:
            dw += tl.sum(phi_den * g_den, axis=1)
            g_den = g_den * w[:, None]
        if dk_den is None:
            g += g_den
        else:
            g_den = g_den + tl.zeros([row.shape[0], 1], tl.float32)  # a row of dz: the same for all
            _store_rows(dk_den, row, ok, column, _feature_backward(g_den, phi_den, FEATURE), K)
    _store_rows(dk, row, ok, column, _feature_backward(g, phi, FEATURE), K)
    if dweight is not None:
        _store_numbers(dweight, row, ok, dw)
