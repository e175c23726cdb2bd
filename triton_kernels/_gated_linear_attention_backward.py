"""Gradients of q, k and the gates; gated_linear_attention.py says how a call goes through the kernels."""

from ._common import _loop_bound, tl, triton
from ._gated_linear_attention_tiles import (
    SIZES,
    _add_at,
    _chunk_of,
    _lead,
    _load_row,
    _pair_decay,
    _program,
    _state_at,
    _store_at,
    _trail,
    _whole,
)
from ._linear_attention_tiles import _dot, _exp, _operand
from ._tiles import _load_rows, _rows_of


@triton.jit(do_not_specialize=SIZES)
def gated_linear_attention_grad_kernel(
    grad_out,  # Tokens [B, L, H, V]
    q,  # Tokens [B, L, H, K]
    k,  # Tokens [B, L, H, K]
    v,  # Tokens [B, L, H, V]
    g,  # Tokens [B, L, H, K] or [B, L, H], or None: 0
    cu_seqlens,  # [N + 1] int32, contiguous, or None
    states,  # [slots, H, K, V] float32, the states that meet the chunks
    dstates,  # [slots, H, K, V] float32, the gradients of those that leave them
    prior_dq,  # [B, L, H, K] float32, what is added to dq, or None
    prior_dk,  # [B, L, H, K] float32, or None
    prior_dg,  # [B, L, H, K] float32, or None
    dq,  # [B, L, H, K], contiguous
    dk,  # [B, L, H, K], contiguous
    dg,  # CHANNEL: [B, L, H, K]; PER_HEAD: [programs of a head, H] float32; else [blocks of K, B, L, H]; or None
    heads, sequences, L, chunks, search, base, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, STRICT: tl.constexpr, CHANNEL: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """A program owns R tokens of a chunk and BLOCK_K channels. A gate's gradient is the sum over pairs of a token at or
    after it and one before it; the chunk's ends stand for what lies beyond. Each such sum has terms of its own: as the
    running sum of q dq - k dk it would cancel.

    STRICT: a token does not see itself."""
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty
    ACCURATE: tl.constexpr = DTYPE == tl.float32
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    SUBS: tl.constexpr = C // R

    pid = _program(base)
    block_k = pid % BLOCKS_K
    column_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    pid = pid // BLOCKS_K
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    part = pid % SUBS
    slot = (pid // SUBS).to(tl.int64)
    chunk = _chunk_of(slot, cu_seqlens, sequences, L, chunks, search, STEP, C)
    origin, count = chunk.origin, chunk.count
    grad_out = _rows_of(grad_out, chunk.b, head)
    q = _rows_of(q, chunk.b, head)
    k = _rows_of(k, chunk.b, head)
    v = _rows_of(v, chunk.b, head)
    g = _rows_of(g, chunk.b, head)
    place = slot * heads + head

    r = tl.arange(0, R)
    before = (part * R).to(tl.int32)
    ok = before + r < count
    row = origin + (before + r) * STEP
    after = count - tl.minimum(before + R, count)  # tokens of the chunk behind these
    last = origin + (count - 1) * STEP
    i, j = r[:, None], r[None, :]

    pairs = tl.zeros([R, R], tl.float32)  # grad_out . v
    dq_state = tl.zeros([R, BLOCK_K], tl.float32)
    dk_state = tl.zeros([R, BLOCK_K], tl.float32)
    through = tl.zeros([BLOCK_K], tl.float32)
    for block_v in range(0, BLOCKS_V):
        column_v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        do = _operand(_load_rows(grad_out, row, ok, column_v, V), DTYPE)
        v_tile = _operand(_load_rows(v, row, ok, column_v, V), DTYPE)
        pairs = _dot(do, tl.trans(v_tile), pairs, DTYPE)
        s = _state_at(states, place, k, v, g, origin, tl.minimum(before, count), count, 1.0, column_k, column_v, K, V,
                      C, R, STEP, False, CHANNEL, DTYPE)  # fmt: skip
        ds = _state_at(dstates, place, q, grad_out, g, last, after, count, scale, column_k, column_v, K, V, C, R,
                       -STEP, True, CHANNEL, DTYPE)  # fmt: skip
        dq_state = _dot(do, tl.trans(_operand(s, DTYPE)), dq_state, DTYPE)
        dk_state = _dot(v_tile, tl.trans(_operand(ds, DTYPE)), dk_state, DTYPE)
        if dg is not None:
            through += tl.sum(s * ds, axis=1)

    sees = (i > j) if STRICT else (i >= j)
    pairs = tl.where(sees, pairs * scale, 0.0)
    q_tile = _load_rows(q, row, ok, column_k, K)
    k_tile = _load_rows(k, row, ok, column_k, K)
    dq_state = dq_state * scale
    if g is not None:
        dq_state = dq_state * _lead(g, row, ok, column_k, K, CHANNEL, ACCURATE)
        dk_state = dk_state * _trail(g, row + STEP, (before + r + 1 < count) & (r < R - 1), column_k, K, CHANNEL,
                                     ACCURATE)  # fmt: skip

    if CHANNEL:
        lower = tl.where(i > j, 1.0, 0.0)
        dg_tile = tl.dot(lower, k_tile * dk_state, input_precision="ieee")
        dg_tile += tl.cumsum(q_tile * dq_state, axis=0, reverse=True)
        dg_tile += (_whole(g, row, ok, column_k, K, CHANNEL, ACCURATE) * through)[None, :]
        sums = tl.zeros([R, BLOCK_K], tl.float32)
        rows = tl.minimum(count - before, R)
        mask = column_k < K
        for step in range(0, _loop_bound(rows)):
            at = rows - 1 - step
            gate = _load_row(g, origin + tl.minimum(before + at + 1, count - 1) * STEP, column_k, mask)
            behind = (r > at)[:, None]
            sums += tl.where(behind, gate[None, :], 0.0)
            pair = tl.sum(tl.where(j == at, pairs, 0.0), axis=1)
            term = pair[:, None] * _exp(sums, ACCURATE)
            key = _load_row(k, origin + (before + at) * STEP, column_k, mask)[None, :]
            dq_state += term * key
            term = term * q_tile
            dk_state += tl.where((r == at)[:, None], tl.sum(term, axis=0)[None, :], 0.0)
            dg_tile += tl.where(behind, tl.cumsum(tl.where(behind, term * key, 0.0), axis=0, reverse=True), 0.0)
    else:
        if dg is not None:
            of_rows, of_keys = tl.sum(q_tile * dq_state, axis=1), tl.sum(k_tile * dk_state, axis=1)
        if g is not None:
            pairs = pairs * _pair_decay(g, row, ok, R, ACCURATE)
        operand = _operand(pairs, DTYPE)
        dq_state = _dot(operand, _operand(k_tile, DTYPE), dq_state, DTYPE)
        dk_state = _dot(tl.trans(operand), _operand(q_tile, DTYPE), dk_state, DTYPE)
        if dg is not None:
            q_operand, k_operand = _operand(q_tile, DTYPE), _operand(k_tile, DTYPE)
            terms = pairs * _dot(q_operand, tl.trans(k_operand), None, DTYPE)
            # Gate j sees rows at or behind it and keys before it: a sum up to the key before.
            up_to = tl.sum(tl.where(i > j, tl.cumsum(terms, axis=1), 0.0), axis=0) + tl.cumsum(of_keys, axis=0)
            dg_row = tl.sum(tl.where(i + 1 == j, up_to[:, None], 0.0), axis=0)
            dg_row += tl.cumsum(of_rows, axis=0, reverse=True)
            dg_row += _whole(g, row, ok, column_k, K, CHANNEL, ACCURATE) * tl.sum(through, axis=0)

    first = (chunk.b * L * heads + head) * K
    dq_state = _add_at(dq_state, prior_dq, first, heads.to(tl.int64) * K, row, ok, column_k, K)
    dk_state = _add_at(dk_state, prior_dk, first, heads.to(tl.int64) * K, row, ok, column_k, K)
    _store_at(dq, first, heads.to(tl.int64) * K, row, ok, column_k, dq_state, K)
    _store_at(dk, first, heads.to(tl.int64) * K, row, ok, column_k, dk_state, K)
    if dg is not None:
        if CHANNEL:
            dg_tile = _add_at(dg_tile, prior_dg, first, heads.to(tl.int64) * K, row, ok, column_k, K)
            _store_at(dg, first, heads.to(tl.int64) * K, row, ok, column_k, dg_tile, K)
        elif PER_HEAD:
            programs = (slot * SUBS + part) * BLOCKS_K + block_k
            tl.store(dg + programs * heads + head, tl.sum(tl.where(ok, dg_row, 0.0), axis=0))
        else:
            tokens = L * heads.to(tl.int64)  # of all batches, times heads
            if cu_seqlens is None:
                tokens = tokens * sequences
            pointers = dg + block_k * tokens + (chunk.b * L + row) * heads + head
            tl.store(pointers, dg_row.to(dg.dtype.element_ty), mask=ok)
