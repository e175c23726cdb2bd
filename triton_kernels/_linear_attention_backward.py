"""Backward kernels of linear attention's linear form; linear_attention.py says how a call goes through them."""

from ._common import _loop_bound, tl, triton
from ._linear_attention_tiles import (
    _NONE,
    SIZES,
    _add_compensated,
    _contiguous_rows,
    _dot,
    _load_den_features,
    _load_features,
    _load_state,
    _numbers_of,
    _operand,
    _program,
    _row_gradients,
    _split_of,
    _store_key_gradients,
    _store_query_gradients,
    _store_state,
    _zero_outside,
)
from ._tiles import _load_numbers, _load_rows, _rows_of, _store_rows


@triton.jit(do_not_specialize=SIZES)
def linear_attention_bwd_dq_kernel(
    grad_out,  # Tokens [B, L, H, V]
    q,  # Tokens [B, L, H, K]
    k,  # Tokens [B, L, H, K]; causal only, like v, k_den and weight
    v,  # Tokens [B, L, H, V]
    q_den,  # Tokens [B, L, H, K], or None: q
    k_den,  # Tokens [B, L, H, K], or None: k
    weight,  # Tokens [B, L, H], or None: 1
    cu_seqlens,  # [N + 1] int32, contiguous, or None
    state,  # [N, H, K, V] float32; causal: [splits, N, H, K, V], before each split
    z,  # [N, H, K] float32; causal: [splits, N, H, K]
    dq,  # [B, L, H, K], contiguous
    dq_den,  # [B, L, H, K], contiguous, or None: part of dq
    partial_dstate,  # [splits, N, H, K, V] float32, or None: not wanted; only where BLOCK_K holds all of K
    partial_dz,  # [splits, N, H, K] float32, or None
    row_scale,  # [B, H, L] float32, scale / denominator, or None: not wanted
    row_grad,  # [B, H, L] float32, gradient of phi(q_den) . z, or None
    row_sums,  # [2, blocks of K, B, H, L] float32: phi(q_den) . z and phi(q) . (grad_out S^T) of the blocks, or None
    heads, sequences, L, M, splits, base,
    eps, clamp_min, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns the queries of a split and BLOCK_K columns of dq; BLOCK_V holds all of V. SUMS: writes only
    row_sums, which a second launch adds up."""
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty
    RELOAD: tl.constexpr = DTYPE == tl.float32
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K

    pid = _program(base)
    block_k = pid % BLOCKS_K
    column_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    column_v = tl.arange(0, BLOCK_V)
    part = _split_of(pid // BLOCKS_K, heads, splits, cu_seqlens, L, BLOCK)
    head, b, first, stop = part.head, part.b, part.first, part.stop
    slot = part.sequence * heads + head
    keys = M
    if cu_seqlens is not None:
        keys = part.end - part.begin
    grad_out = _rows_of(grad_out, b, head)
    q = _rows_of(q, b, head)
    k = _rows_of(k, b, head)
    v = _rows_of(v, b, head)
    q_den = _rows_of(q_den, b, head)
    k_den = _rows_of(k_den, b, head)
    weight = _rows_of(weight, b, head)
    dq_rows = _contiguous_rows(dq, b, L, heads, head, K)
    dq_den_rows = _contiguous_rows(dq_den, b, L, heads, head, K)
    if CAUSAL:
        slot += part.split * sequences * heads
        keep = tl.arange(0, BLOCK)[:, None] >= tl.arange(0, BLOCK)[None, :]

    s = _load_state(state, slot, column_k, column_v, K, V)
    s_operand = _operand(s, DTYPE)
    if NORMALIZE != _NONE:
        z_row = tl.load(z + slot * K + column_k, mask=column_k < K, other=0.0)
        z_low = tl.zeros([BLOCK_K], tl.float32)
    if partial_dstate is not None:
        ds = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        dz = tl.zeros([BLOCK_K], tl.float32)
        dz_low = tl.zeros([BLOCK_K], tl.float32)
    row_offset = (b * heads + head) * L
    tokens = L * heads.to(tl.int64)  # of all batches, times heads
    if cu_seqlens is None:
        tokens = tokens * sequences

    for step in range(0, _loop_bound(part.blocks)):
        row = first + step * BLOCK + tl.arange(0, BLOCK)
        ok = row < stop
        phi_q = _load_features(q, row, ok, column_k, K, FEATURE)
        do = _load_rows(grad_out, row, ok, column_v, V)
        do_operand = _operand(do, DTYPE)
        if RELOAD and not CAUSAL:
            s = _load_state(state, slot, column_k, column_v, K, V)
        if RELOAD or CAUSAL:
            s_operand = _operand(s, DTYPE)
        g = _dot(do_operand, tl.trans(s_operand), None, DTYPE)
        phi_qd = phi_q
        zs = None
        if NORMALIZE != _NONE:
            phi_qd = _load_den_features(phi_q, q_den, row, ok, column_k, K, FEATURE)
            zs = z_row[None, :]
        if CAUSAL:
            phi_k = _load_features(k, row, ok, column_k, K, FEATURE)
            k_operand = _operand(phi_k, DTYPE)
            v_tile = _load_rows(v, row, ok, column_v, V)
            p = tl.where(keep, _dot(do_operand, tl.trans(_operand(v_tile, DTYPE)), None, DTYPE), 0.0)
            w = tl.full([BLOCK], 1.0, tl.float32)
            if weight is not None:
                w = _load_numbers(weight, row, ok)
                p = p * w[None, :]
                v_tile = v_tile * w[:, None]
            g = _dot(_operand(p, DTYPE), k_operand, g, DTYPE)
            s = _dot(tl.trans(k_operand), _operand(v_tile, DTYPE), s, DTYPE)
            if NORMALIZE != _NONE:
                phi_kd = _load_den_features(phi_k, k_den, row, ok, column_k, K, FEATURE)
                ws = _operand(tl.where(keep, w[None, :], 0.0), DTYPE)
                zs = zs + _dot(ws, _operand(phi_kd, DTYPE), None, DTYPE)
                z_row, z_low = _add_compensated(z_row, z_low, tl.sum(phi_kd * w[:, None], axis=0))

        inverse = tl.where(ok, scale, 0.0)
        r = inverse
        if NORMALIZE != _NONE:
            d = tl.sum(phi_qd * zs, axis=1)
            t = tl.sum(phi_q * g, axis=1)
            if row_sums is not None:
                pointers = row_sums + row_offset + row
                if SUMS:
                    tl.store(pointers + block_k * tokens, d, mask=ok)
                    tl.store(pointers + (BLOCKS_K + block_k) * tokens, t, mask=ok)
                else:
                    d = tl.zeros([BLOCK], tl.float32)
                    t = tl.zeros([BLOCK], tl.float32)
                    for block in tl.static_range(BLOCKS_K):
                        d += tl.load(pointers + block * tokens, mask=ok, other=0.0)
                        t += tl.load(pointers + (BLOCKS_K + block) * tokens, mask=ok, other=0.0)
            count = row + 1 - part.begin if CAUSAL else keys
            inverse, r = _row_gradients(d, t, count, ok, eps, clamp_min, scale, NORMALIZE)
        if not SUMS:
            _store_query_gradients(dq_rows, dq_den_rows, row, ok, column_k, g, zs, inverse, r, phi_q, phi_qd, K,
                                   FEATURE)  # fmt: skip
            if row_scale is not None:
                tl.store(row_scale + row_offset + row, inverse, mask=ok & (block_k == 0))
                if NORMALIZE != _NONE:
                    tl.store(row_grad + row_offset + row, r, mask=ok & (block_k == 0))
            if partial_dstate is not None:
                u = _operand(do * inverse[:, None], DTYPE)
                ds = _dot(tl.trans(_operand(phi_q, DTYPE)), u, ds, DTYPE)
                if NORMALIZE != _NONE:
                    dz, dz_low = _add_compensated(dz, dz_low, tl.sum(phi_qd * r[:, None], axis=0))

    if partial_dstate is not None:
        slot = (part.split * sequences + part.sequence) * heads + head
        _store_state(partial_dstate, slot, column_k, column_v, ds, K, V)
        if partial_dz is not None:
            tl.store(partial_dz + slot * K + column_k, dz, mask=column_k < K)
    if cu_seqlens is not None and not SUMS:
        share = part.sequence * splits + part.split
        _zero_outside(dq_rows, cu_seqlens, sequences, share, sequences * splits, L, column_k, K, BLOCK)
        _zero_outside(dq_den_rows, cu_seqlens, sequences, share, sequences * splits, L, column_k, K, BLOCK)


@triton.jit(do_not_specialize=SIZES)
def linear_attention_bwd_dkv_kernel(
    grad_out,  # Tokens [B, L, H, V]; causal only, like q and q_den
    q,  # Tokens [B, L, H, K]
    k,  # Tokens [B, M, H, K]
    v,  # Tokens [B, M, H, V]
    q_den,  # Tokens [B, L, H, K], or None: q
    k_den,  # Tokens [B, M, H, K], or None: k
    weight,  # Tokens [B, M, H], or None: 1
    cu_seqlens,  # [N + 1] int32, contiguous, or None
    row_scale,  # [B, H, L] float32, scale / denominator; causal only, like row_grad
    row_grad,  # [B, H, L] float32, gradient of phi(q_den) . z, or None
    dstate,  # [N, H, K, V] float32; causal: [splits, N, H, K, V], after each split
    dz,  # [N, H, K] float32, or None: 0; causal: [splits, N, H, K]
    dk,  # [B, M, H, K], contiguous; None: not wanted from this launch, like dk_den and dweight
    dv,  # [B, M, H, V], contiguous; None: not wanted from this launch
    dk_den,  # [B, M, H, K], contiguous, or None: part of dk
    dweight,  # [blocks of K, B, M, H], or None
    heads, sequences, M, splits, base,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns the keys of a split and a block of columns. dk: BLOCK_V holds all of V; dv: BLOCK_K all of K."""
    DTYPE: tl.constexpr = k.pointer.dtype.element_ty
    RELOAD: tl.constexpr = DTYPE == tl.float32
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V

    pid = _program(base)
    block_k = pid % BLOCKS_K
    column_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    pid = pid // BLOCKS_K
    column_v = pid % BLOCKS_V * BLOCK_V + tl.arange(0, BLOCK_V)
    part = _split_of(pid // BLOCKS_V, heads, splits, cu_seqlens, M, BLOCK)
    head, b, first, stop = part.head, part.b, part.first, part.stop
    slot = part.sequence * heads + head
    grad_out = _rows_of(grad_out, b, head)
    q = _rows_of(q, b, head)
    k = _rows_of(k, b, head)
    v = _rows_of(v, b, head)
    q_den = _rows_of(q_den, b, head)
    k_den = _rows_of(k_den, b, head)
    weight = _rows_of(weight, b, head)
    row_scale = _numbers_of(row_scale, (b * heads + head) * M)
    row_grad = _numbers_of(row_grad, (b * heads + head) * M)
    dk_rows = _contiguous_rows(dk, b, M, heads, head, K)
    dk_den_rows = _contiguous_rows(dk_den, b, M, heads, head, K)
    dv_rows = _contiguous_rows(dv, b, M, heads, head, V)
    tokens = M * heads.to(tl.int64)
    if cu_seqlens is None:
        tokens = tokens * sequences
    dweight_rows = None
    if dweight is not None:
        dweight_rows = _contiguous_rows(dweight + block_k * tokens, b, M, heads, head, 1)
    if CAUSAL:
        slot += part.split * sequences * heads
        keep = tl.arange(0, BLOCK)[None, :] >= tl.arange(0, BLOCK)[:, None]  # [keys, queries]

    ds = _load_state(dstate, slot, column_k, column_v, K, V)
    ds_operand = _operand(ds, DTYPE)
    if dz is not None:
        dz_row = tl.load(dz + slot * K + column_k, mask=column_k < K, other=0.0)

    for step in range(0, _loop_bound(part.blocks)):
        if CAUSAL:
            row = first + (part.blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        else:
            row = first + step * BLOCK + tl.arange(0, BLOCK)
        ok = row < stop
        phi_k = _load_features(k, row, ok, column_k, K, FEATURE)
        if RELOAD and not CAUSAL:
            ds = _load_state(dstate, slot, column_k, column_v, K, V)
        if RELOAD or CAUSAL:
            ds_operand = _operand(ds, DTYPE)
        if CAUSAL:
            phi_q = _load_features(q, row, ok, column_k, K, FEATURE)
            q_operand = _operand(phi_q, DTYPE)
            u = _load_rows(grad_out, row, ok, column_v, V) * _load_numbers(row_scale, row, ok)[:, None]
            u = _operand(u, DTYPE)
        w = None
        if weight is not None:
            w = _load_numbers(weight, row, ok)

        if dv is not None:
            k_operand = _operand(phi_k, DTYPE)
            g = _dot(k_operand, ds_operand, None, DTYPE)
            if CAUSAL:
                a = tl.where(keep, _dot(k_operand, tl.trans(q_operand), None, DTYPE), 0.0)
                g = _dot(_operand(a, DTYPE), u, g, DTYPE)
            if w is not None:
                g = g * w[:, None]
            _store_rows(dv_rows, row, ok, column_v, g, V)

        if dk is not None:
            v_operand = _operand(_load_rows(v, row, ok, column_v, V), DTYPE)
            g = _dot(v_operand, tl.trans(ds_operand), None, DTYPE)
            if CAUSAL:
                p = tl.where(keep, _dot(v_operand, tl.trans(u), None, DTYPE), 0.0)
                g = _dot(_operand(p, DTYPE), q_operand, g, DTYPE)
            g_den = None
            if dz is not None:
                g_den = dz_row[None, :]
                if CAUSAL and NORMALIZE != _NONE:
                    r = _load_numbers(row_grad, row, ok)
                    phi_qd = _load_den_features(phi_q, q_den, row, ok, column_k, K, FEATURE)
                    rs = _operand(tl.where(keep, r[None, :], 0.0), DTYPE)
                    g_den = g_den + _dot(rs, _operand(phi_qd, DTYPE), None, DTYPE)
                    dz_row += tl.sum(phi_qd * r[:, None], axis=0)
            _store_key_gradients(dk_rows, dk_den_rows, dweight_rows, k_den, w, row, ok, column_k, g, g_den, phi_k, K,
                                 FEATURE)  # fmt: skip
        if CAUSAL:
            ds = _dot(tl.trans(q_operand), u, ds, DTYPE)

    if cu_seqlens is not None:
        share = part.sequence * splits + part.split
        shares = sequences * splits
        _zero_outside(dv_rows, cu_seqlens, sequences, share, shares, M, column_v, V, BLOCK)
        _zero_outside(dk_rows, cu_seqlens, sequences, share, shares, M, column_k, K, BLOCK)
        _zero_outside(dk_den_rows, cu_seqlens, sequences, share, shares, M, column_k, K, BLOCK)
        _zero_outside(dweight_rows, cu_seqlens, sequences, share, shares, M, tl.arange(0, 1), 1, BLOCK)
