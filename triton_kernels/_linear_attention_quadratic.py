"""The quadratic form of linear attention in Triton: forward and backward from the scores of all pairs.

A program owns a block of queries and walks the keys, or the other way round; nothing is kept but a number or two per
query, which the keys' gradients need again.
"""

from ._common import _loop_bound, tl, triton
from ._linear_attention_tiles import (
    _NONE,
    SIZES,
    _add_compensated,
    _contiguous_rows,
    _dot,
    _load_den_features,
    _load_features,
    _numbers_of,
    _operand,
    _program,
    _row_gradients,
    _store_key_gradients,
    _store_out,
    _store_query_gradients,
    _tile_place,
)
from ._tiles import _load_numbers, _load_rows, _rows_of, _store_rows


@triton.jit(do_not_specialize=SIZES)
def linear_attention_quadratic_fwd_kernel(
    q, q_den,  # Tokens [B, L, H, K]; q_den or None: q
    k, v, k_den, weight,  # Tokens [B, M, H, K or V] or [B, M, H]; k_den or None: k, weight or None: 1
    out,  # [B, L, H, V], contiguous
    heads, L, M, base,
    eps, clamp_min, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns a block of queries and BLOCK_V columns of out, and walks the keys."""
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V

    pid = _program(base)
    column_k = tl.arange(0, BLOCK_K)
    column_v = pid % BLOCKS_V * BLOCK_V + tl.arange(0, BLOCK_V)
    head, tile, b = _tile_place(pid // BLOCKS_V, heads, L, BLOCK)
    q = _rows_of(q, b, head)
    k = _rows_of(k, b, head)
    v = _rows_of(v, b, head)
    q_den = _rows_of(q_den, b, head)
    k_den = _rows_of(k_den, b, head)
    weight = _rows_of(weight, b, head)

    row = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = row < L
    q_operand = _operand(_load_features(q, row, ok, column_k, K, FEATURE), DTYPE)
    qd_operand = q_operand
    if q_den is not None:
        qd_operand = _operand(_load_features(q_den, row, ok, column_k, K, FEATURE), DTYPE)
    o = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    d_low = tl.zeros([BLOCK], tl.float32)
    steps = (M + (BLOCK - 1)) // BLOCK
    keys = M
    if CAUSAL:
        steps = tile + 1
        keys = row + 1
    for step in range(0, _loop_bound(steps)):
        key = step * tl.full([], BLOCK, tl.int64) + tl.arange(0, BLOCK)
        key_ok = key < M
        k_operand = _operand(_load_features(k, key, key_ok, column_k, K, FEATURE), DTYPE)
        a = _dot(q_operand, tl.trans(k_operand), None, DTYPE)
        if CAUSAL:
            a = tl.where(row[:, None] >= key[None, :], a, 0.0)
        if weight is not None:
            w = _load_numbers(weight, key, key_ok)
            a = a * w[None, :]
        v_tile = _operand(_load_rows(v, key, key_ok, column_v, V), DTYPE)
        o = _dot(_operand(a, DTYPE), v_tile, o, DTYPE)
        if NORMALIZE != _NONE:
            if q_den is not None or k_den is not None:
                if k_den is not None:
                    k_operand = _operand(_load_features(k_den, key, key_ok, column_k, K, FEATURE), DTYPE)
                a = _dot(qd_operand, tl.trans(k_operand), None, DTYPE)
                if CAUSAL:
                    a = tl.where(row[:, None] >= key[None, :], a, 0.0)
                if weight is not None:
                    a = a * w[None, :]
            d, d_low = _add_compensated(d, d_low, tl.sum(a, axis=1))
    out_rows = _contiguous_rows(out, b, L, heads, head, V)
    _store_out(out_rows, row, ok, column_v, o, d, keys, eps, clamp_min, scale, V, NORMALIZE)


@triton.jit(do_not_specialize=SIZES)
def linear_attention_quadratic_bwd_dq_kernel(
    grad_out, q, q_den,  # Tokens [B, L, H, V or K]; q_den or None: q
    k, v, k_den, weight,  # Tokens [B, M, H, K or V] or [B, M, H]; k_den or None: k, weight or None: 1
    dq, dq_den,  # [B, L, H, K], contiguous; dq_den or None: part of dq
    row_scale, row_grad,  # [B, H, L] float32: scale / denominator, gradient of phi(q_den) . z; row_grad or None
    heads, L, M, base,
    eps, clamp_min, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns a block of queries and walks the keys; BLOCK_K holds all of K, BLOCK_V all of V."""
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty

    column_k = tl.arange(0, BLOCK_K)
    column_v = tl.arange(0, BLOCK_V)
    head, tile, b = _tile_place(_program(base), heads, L, BLOCK)
    grad_out = _rows_of(grad_out, b, head)
    q = _rows_of(q, b, head)
    k = _rows_of(k, b, head)
    v = _rows_of(v, b, head)
    q_den = _rows_of(q_den, b, head)
    k_den = _rows_of(k_den, b, head)
    weight = _rows_of(weight, b, head)
    dq = _contiguous_rows(dq, b, L, heads, head, K)
    dq_den = _contiguous_rows(dq_den, b, L, heads, head, K)

    row = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = row < L
    do_operand = _operand(_load_rows(grad_out, row, ok, column_v, V), DTYPE)
    g = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    zs = None
    if NORMALIZE != _NONE:
        z = tl.zeros([BLOCK_K], tl.float32)  # of the keys before
        z_low = tl.zeros([BLOCK_K], tl.float32)
        if CAUSAL:
            zs = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    steps = (M + (BLOCK - 1)) // BLOCK
    keys = M
    if CAUSAL:
        steps = tile + 1
        keys = row + 1
    for step in range(0, _loop_bound(steps)):
        key = step * tl.full([], BLOCK, tl.int64) + tl.arange(0, BLOCK)
        key_ok = key < M
        phi_k = _load_features(k, key, key_ok, column_k, K, FEATURE)
        v_tile = _load_rows(v, key, key_ok, column_v, V)
        p = _dot(do_operand, tl.trans(_operand(v_tile, DTYPE)), None, DTYPE)
        w = tl.full([BLOCK], 1.0, tl.float32)
        if weight is not None:
            w = _load_numbers(weight, key, key_ok)
            p = p * w[None, :]
        if CAUSAL:
            p = tl.where(row[:, None] >= key[None, :], p, 0.0)
        g = _dot(_operand(p, DTYPE), _operand(phi_k, DTYPE), g, DTYPE)
        if NORMALIZE != _NONE:
            phi_k = _load_den_features(phi_k, k_den, key, key_ok, column_k, K, FEATURE)
            if CAUSAL:
                ws = _operand(tl.where(row[:, None] >= key[None, :], w[None, :], 0.0), DTYPE)
                zs = z[None, :] + _dot(ws, _operand(phi_k, DTYPE), None, DTYPE)
            z, z_low = _add_compensated(z, z_low, tl.sum(phi_k * w[:, None], axis=0))

    phi_q = _load_features(q, row, ok, column_k, K, FEATURE)
    row_offset = (b * heads + head) * L + row
    inverse = tl.where(ok, scale, 0.0)
    r = inverse
    phi_qd = phi_q
    if NORMALIZE != _NONE:
        phi_qd = _load_den_features(phi_q, q_den, row, ok, column_k, K, FEATURE)
        if not CAUSAL:
            zs = z[None, :]
        d = tl.sum(phi_qd * zs, axis=1)
        t = tl.sum(phi_q * g, axis=1)
        inverse, r = _row_gradients(d, t, keys, ok, eps, clamp_min, scale, NORMALIZE)
        tl.store(row_grad + row_offset, r, mask=ok)
    tl.store(row_scale + row_offset, inverse, mask=ok)
    _store_query_gradients(dq, dq_den, row, ok, column_k, g, zs, inverse, r, phi_q, phi_qd, K, FEATURE)


@triton.jit(do_not_specialize=SIZES)
def linear_attention_quadratic_bwd_dkv_kernel(
    grad_out, q, q_den,  # Tokens [B, L, H, V or K]; q_den or None: q
    k, v, k_den, weight,  # Tokens [B, M, H, K or V] or [B, M, H]; k_den or None: k, weight or None: 1
    row_scale, row_grad,  # [B, H, L] float32: scale / denominator, gradient of phi(q_den) . z; row_grad or None
    dk, dv, dk_den,  # [B, M, H, K or V], contiguous; dk_den or None: part of dk
    dweight,  # [B, M, H], contiguous, or None
    heads, L, M, base,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns a block of keys and walks the queries; BLOCK_K holds all of K, BLOCK_V all of V."""
    DTYPE: tl.constexpr = k.pointer.dtype.element_ty

    column_k = tl.arange(0, BLOCK_K)
    column_v = tl.arange(0, BLOCK_V)
    head, tile, b = _tile_place(_program(base), heads, M, BLOCK)
    grad_out = _rows_of(grad_out, b, head)
    q = _rows_of(q, b, head)
    k = _rows_of(k, b, head)
    v = _rows_of(v, b, head)
    q_den = _rows_of(q_den, b, head)
    k_den = _rows_of(k_den, b, head)
    weight = _rows_of(weight, b, head)
    row_scale = _numbers_of(row_scale, (b * heads + head) * L)
    row_grad = _numbers_of(row_grad, (b * heads + head) * L)
    dk = _contiguous_rows(dk, b, M, heads, head, K)
    dk_den = _contiguous_rows(dk_den, b, M, heads, head, K)
    dv = _contiguous_rows(dv, b, M, heads, head, V)
    dweight = _contiguous_rows(dweight, b, M, heads, head, 1)

    key = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key_ok = key < M
    phi_k = _load_features(k, key, key_ok, column_k, K, FEATURE)
    k_operand = _operand(phi_k, DTYPE)
    v_operand = _operand(_load_rows(v, key, key_ok, column_v, V), DTYPE)
    g_k = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    g_v = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    g_den = None
    if NORMALIZE != _NONE:
        dz = tl.zeros([BLOCK_K], tl.float32)
        dz_low = tl.zeros([BLOCK_K], tl.float32)
        if CAUSAL:
            g_den = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    start = tile * 0
    if CAUSAL:
        start = tile
    steps = (L + (BLOCK - 1)) // BLOCK - start
    for step in range(0, _loop_bound(steps)):
        row = (start + step) * tl.full([], BLOCK, tl.int64) + tl.arange(0, BLOCK)
        ok = row < L
        phi_q = _load_features(q, row, ok, column_k, K, FEATURE)
        q_operand = _operand(phi_q, DTYPE)
        u = _load_rows(grad_out, row, ok, column_v, V) * _load_numbers(row_scale, row, ok)[:, None]
        u = _operand(u, DTYPE)
        a = _dot(k_operand, tl.trans(q_operand), None, DTYPE)
        p = _dot(v_operand, tl.trans(u), None, DTYPE)
        if CAUSAL:
            keep = row[None, :] >= key[:, None]
            a = tl.where(keep, a, 0.0)
            p = tl.where(keep, p, 0.0)
        g_v = _dot(_operand(a, DTYPE), u, g_v, DTYPE)
        g_k = _dot(_operand(p, DTYPE), q_operand, g_k, DTYPE)
        if NORMALIZE != _NONE:
            r = _load_numbers(row_grad, row, ok)
            phi_q = _load_den_features(phi_q, q_den, row, ok, column_k, K, FEATURE)
            if CAUSAL:
                rs = _operand(tl.where(keep, r[None, :], 0.0), DTYPE)
                g_den = _dot(rs, _operand(phi_q, DTYPE), g_den, DTYPE)
            else:
                dz, dz_low = _add_compensated(dz, dz_low, tl.sum(phi_q * r[:, None], axis=0))

    if NORMALIZE != _NONE and not CAUSAL:
        g_den = dz[None, :]
    w = None
    if weight is not None:
        w = _load_numbers(weight, key, key_ok)
        g_v = g_v * w[:, None]
    _store_key_gradients(dk, dk_den, dweight, k_den, w, key, key_ok, column_k, g_k, g_den, phi_k, K, FEATURE)
    _store_rows(dv, key, key_ok, column_v, g_v, V)
