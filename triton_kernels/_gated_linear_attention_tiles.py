"""What the kernels of gated linear attention share: chunks of the sequences, sums of gates, states at a token.

A chunk is a run of C tokens of one sequence; a position is a token's place in the walk over its chunk, which begins at
the chunk's last token where STEP is -1. Every exponent is a sum of gates over a range of positions and is added up
from those gates alone: never as the difference of two sums, which would lose small gates beside large ones, and never
negated, so that nothing overflows.
"""

from typing import Any, NamedTuple

from ._common import INTERPRETED, _loop_bound, device_function, tl
from ._linear_attention_tiles import _dot, _exp, _operand
from ._tiles import _load_numbers, _load_rows, _tile_mask

_INTERPRETED = tl.constexpr(INTERPRETED)

# Sizes that change from call to call; specialising on their values would only recompile.
SIZES = ["heads", "sequences", "L", "chunks", "search", "base"]


# --------------------------------------------------------------------------------------------------------------- chunks


class Chunk(NamedTuple):
    """`count` tokens of batch b; the walk begins at token `origin`."""

    b: Any
    origin: Any
    count: Any


@device_function
def _program(base):
    pid = tl.program_id(0)
    if base is not None:
        pid = pid.to(tl.int64) + base
    return pid


@device_function
def _offset(cu_seqlens, n, size):
    """Offsets outside of the tokens are cut: they could not be checked without waiting for the GPU."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), size)


@device_function
def _slots_of(cu_seqlens, n, size, chunks, C: tl.constexpr):
    """(first slot, chunks) of sequence n. Slots count chunks over all sequences: with cu_seqlens, whose lengths the
    host does not know, a sequence that begins at token t has those from t // C + n on, so that at most one slot a
    sequence is nobody's."""
    if cu_seqlens is None:
        first = n * chunks
        count = n * 0 + chunks
    else:
        begin = _offset(cu_seqlens, n, size)
        end = tl.maximum(_offset(cu_seqlens, n + 1, size), begin)
        first = begin // C + n
        count = (end - begin + (C - 1)) // C
    return first, count.to(tl.int32)


@device_function
def _chunk_of(slot, cu_seqlens, sequences, size, chunks, search, STEP: tl.constexpr, C: tl.constexpr):
    """The Chunk of a slot, of no tokens where the slot is nobody's. `search`: bits of the number of sequences."""
    if cu_seqlens is None:
        b = slot // chunks
        first = (slot - b * chunks) * C
        count = tl.minimum(size - first, C)
    else:
        b = slot * 0
        n = slot * 0
        stop = n + sequences
        for _ in range(0, _loop_bound(search)):
            middle = (n + stop) // 2
            after = _offset(cu_seqlens, middle, size) // C + middle > slot
            stop = tl.where(after, middle, stop)
            n = tl.where(after, n, middle)
        begin = _offset(cu_seqlens, n, size)
        end = tl.maximum(_offset(cu_seqlens, n + 1, size), begin)
        chunk = slot - (begin // C + n)
        first = begin + chunk * C
        count = tl.where(chunk < 0, 0, tl.maximum(tl.minimum(end - first, C), 0))
    origin = first
    if STEP < 0:
        origin = first + count - 1
    return Chunk(b, origin, count.to(tl.int32))


# ---------------------------------------------------------------------------------------------------------------- gates


@device_function
def _load_row(x, row, column, mask):
    """One row of Rows in float32."""
    return tl.load(x.pointer + (row * x.stride + column), mask=mask, other=0.0).to(tl.float32)


@device_function
def _gates(g, row, ok, column, K: tl.constexpr, CHANNEL: tl.constexpr):
    """[rows, columns], or [rows] where all channels share a gate; 0 where not `ok`."""
    return _load_rows(g, row, ok, column, K) if CHANNEL else _load_numbers(g, row, ok)


@device_function
def _as_factor(x, CHANNEL: tl.constexpr, ACCURATE: tl.constexpr):
    """e^x of sums of gates, as a factor of [rows, columns]."""
    e = _exp(x, ACCURATE)
    if not CHANNEL:
        e = e[:, None]
    return e


@device_function
def _lead(g, row, ok, column, K: tl.constexpr, CHANNEL: tl.constexpr, ACCURATE: tl.constexpr):
    """For every row e to the sum of the gates up to it."""
    return _as_factor(tl.cumsum(_gates(g, row, ok, column, K, CHANNEL), axis=0), CHANNEL, ACCURATE)


@device_function
def _trail(g, row, ok, column, K: tl.constexpr, CHANNEL: tl.constexpr, ACCURATE: tl.constexpr):
    """For every row e to the sum of the gates from it on."""
    return _as_factor(tl.cumsum(_gates(g, row, ok, column, K, CHANNEL), axis=0, reverse=True), CHANNEL, ACCURATE)


@device_function
def _whole(g, row, ok, column, K: tl.constexpr, CHANNEL: tl.constexpr, ACCURATE: tl.constexpr):
    """e to the sum of all gates: [columns], or a number."""
    return _exp(tl.sum(_gates(g, row, ok, column, K, CHANNEL), axis=0), ACCURATE)


@device_function
def _pair_decay(g, row, ok, R: tl.constexpr, ACCURATE: tl.constexpr):
    """[R, R]: e to the sum of the gates (one for all channels) after row j up to row i."""
    x = _load_numbers(g, row, ok)
    r = tl.arange(0, R)
    later = r[:, None] > r[None, :]
    return _exp(tl.cumsum(tl.where(later, x[:, None], 0.0), axis=0), ACCURATE)


# --------------------------------------------------------------------------------------------------------------- states


@device_function
def _updates(
    x, y, g, origin, before, scale, column_k, column_v,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, OWN: tl.constexpr, CHANNEL: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """What the positions below `before` add to the state: the sum of (scale e^G x)^T y, G the gates that follow a
    position, and its own if OWN."""
    ACCURATE: tl.constexpr = DTYPE == tl.float32
    i = tl.arange(0, C)
    ok = i < before
    row = origin + i * STEP
    x_tile = _load_rows(x, row, ok, column_k, K) * scale
    if g is not None:
        if OWN:
            x_tile = x_tile * _trail(g, row, ok, column_k, K, CHANNEL, ACCURATE)
        else:
            x_tile = x_tile * _trail(g, row + STEP, i + 1 < before, column_k, K, CHANNEL, ACCURATE)
    y_tile = _load_rows(y, row, ok, column_v, V)
    return _dot(tl.trans(_operand(x_tile, DTYPE)), _operand(y_tile, DTYPE), None, DTYPE)


@device_function
def _state_at(
    states, slot, x, y, g, origin, before, count, scale, column_k, column_v,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, OWN: tl.constexpr,
    CHANNEL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The state that meets position `before` of a chunk, from the one that meets the chunk."""
    ACCURATE: tl.constexpr = DTYPE == tl.float32
    mask = ((column_k < K) & (count > 0))[:, None] & (column_v < V)[None, :]  # nobody's slot was not written
    s = tl.load(states + slot * K * V + column_k[:, None] * V + column_v[None, :], mask=mask, other=0.0)
    if R < C:
        if g is not None:
            i = tl.arange(0, C)
            factor = _whole(g, origin + i * STEP, i < before, column_k, K, CHANNEL, ACCURATE)
            if CHANNEL:
                factor = factor[:, None]
            s = s * factor
        s += _updates(x, y, g, origin, before, scale, column_k, column_v, K, V, C, STEP, OWN, CHANNEL, DTYPE)
    return s


@device_function
def _pair_scores(
    q_tile, k, g, origin, before, count, column,
    K: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, OWN: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """[R, R] for gates of channels: sum over channels of q_i k_j e^G, G the gates after row j up to row i, or, if OWN,
    from row j to before row i. Not masked."""
    SHIFT: tl.constexpr = 0 if OWN else 1
    r = tl.arange(0, R)
    mask = column < K
    last = tl.minimum(before + R, count) - 1
    scores = tl.zeros([R, R], tl.float32)
    sums = tl.zeros_like(q_tile)
    for step in range(0, _loop_bound(last + 1 - before)):
        at = last - step
        j = at - before
        # Behind the last row there is none that sees this gate: any will do.
        gate = _load_row(g, origin + tl.minimum(at + SHIFT, last) * STEP, column, mask)
        sums += tl.where((r > j)[:, None], gate[None, :], 0.0)
        key = _load_row(k, origin + at * STEP, column, mask)
        score = tl.sum(q_tile * key[None, :] * _exp(sums, ACCURATE), axis=1)
        scores += tl.where((r == j)[None, :], score[:, None], 0.0)
    return scores


@device_function
def _store_at(pointer, offset, row_stride, row, ok, column, value, D: tl.constexpr):
    """Rows of a contiguous tensor."""
    pointers = pointer + offset + row[:, None] * row_stride + column[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=_tile_mask(ok, column, D))


@device_function
def _add_at(value, pointer, offset, row_stride, row, ok, column, D: tl.constexpr):
    """value plus rows of a contiguous float32 tensor, or of None."""
    if pointer is not None:
        pointers = pointer + offset + row[:, None] * row_stride + column[None, :]
        value += tl.load(pointers, mask=_tile_mask(ok, column, D), other=0.0)
    return value
