"""Backward kernels of windowed attention; window_attention.py says which of them a call takes."""

from ._common import _loop_bound, tl, triton
from ._tiles import _divide, _rounded
from ._window_attention_tiles import (
    SIZES,
    Geometry,
    Inputs,
    Outputs,
    Place,
    Window,
    _add_bias,
    _attended,
    _bias_tile,
    _inverse_norm,
    _key_position,
    _load_key_pair,
    _load_keys,
    _load_places,
    _load_queries,
    _load_scale,
    _locate,
    _normalize_backward,
    _program,
    _score_gradients,
    _scores,
    _statistic,
    _store_gradient,
    _store_pad_sums,
    _window,
)


@triton.jit(do_not_specialize=SIZES)
def window_attention_bwd_fused_kernel(
    q, k, v, bias_table, logit_scale, pad_k, pad_v,  # Inputs
    lse, grad_out, grad_lse,  # of Outputs
    gradients,  # Gradients
    partial_bias,  # [splits, h, BLOCK, BLOCK] float32, or None
    partial_scale,  # [splits, h] float32, or None
    partial_pad_k,  # [splits, h, d] float32, or None
    partial_pad_v,  # [splits, h, dv] float32, or None
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x,
    total_windows, tiles, walk, scale, mask_value,
    S: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every gradient of windows without a halo that fit in one tile."""
    N: tl.constexpr = S.WINDOW_Y * S.WINDOW_X
    BLOCK_D: tl.constexpr = S.BLOCK_D
    BLOCK_DV: tl.constexpr = S.BLOCK_DV
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty

    g = Geometry(heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x)
    head, slot, block, first, count = _program(heads, tiles, walk, 1, S)
    row = tl.arange(0, BLOCK)
    pack, local = _divide(row, N)
    local_y, local_x = _divide(local, S.WINDOW_X)
    in_tile = row < PACK * N
    pair = in_tile[:, None] & in_tile[None, :]
    if PACK > 1:
        pair = pair & (pack[:, None] == pack[None, :])
    factor, scale_is_free = _load_scale(logit_scale, head, scale)

    bias = _bias_tile(bias_table, head, local_y, local_x, local_y, local_x, pair, S)
    if bias_table is not None:
        bias_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    if logit_scale is not None:
        scale_sum = tl.zeros([BLOCK], tl.float32)
    if pad_k is not None:
        pad_k_sum = tl.zeros([BLOCK_D], tl.float32)
        pad_v_sum = tl.zeros([BLOCK_DV], tl.float32)

    for step in range(0, _loop_bound(count)):
        flat = (first + step) * PACK
        if PACK > 1:
            flat = flat + pack
        at = _locate(_window(flat, g, S), local_y, local_x, g, S)
        exists = in_tile & (flat < total_windows)
        inside = exists & at.inside
        outside = exists & (at.inside == 0)
        q_tile = _load_places(q, at, inside, head, S.D, S.BLOCK_D)
        k_tile = _load_keys(k, pad_k, at, exists, head, S.D, S.BLOCK_D)
        v_tile = _load_keys(v, pad_v, at, exists, head, S.DV, S.BLOCK_DV)
        do_tile = _load_places(grad_out, at, inside, head, S.DV, S.BLOCK_DV)

        q_norm, q_free = _inverse_norm(q_tile, logit_scale)
        k_norm, k_free = _inverse_norm(k_tile, logit_scale)
        s = _scores(q_tile, k_tile, q_norm, k_norm, factor, logit_scale is not None)
        logits = _add_bias(s, bias, at.region, at.region, mask_value, S.SHIFTED)
        valid = pair & inside[:, None] & _attended(exists, at, pad_k)[None, :]
        if logit_scale is None:
            row_lse = tl.load(_statistic(lse, at, head, g), mask=inside, other=0.0)
            p = tl.where(valid, tl.exp(logits - row_lse[:, None]), 0.0)
        else:
            # Cosine logits reach 100, where the rounding of lse shows: the whole row is here, so normalise it anew.
            logits = tl.where(valid, logits, float("-inf"))
            maximum = tl.max(logits, axis=1)
            p = tl.exp(logits - tl.where(maximum == float("-inf"), 0.0, maximum)[:, None])
            total = tl.sum(p, axis=1)
            p = p * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        # Summing P dP over the row in float32 beats grad_out * out, whose out is rounded.
        delta = tl.sum(p * dp, axis=1)
        if grad_lse is not None:
            delta -= tl.load(_statistic(grad_lse, at, head, g), mask=inside, other=0.0)
        ds = p * (dp - delta[:, None])
        if bias_table is not None:
            bias_sum += ds
        if logit_scale is not None:
            scale_sum += tl.sum(ds * s, axis=1)

        dv_tile = tl.dot(tl.trans(_rounded(p, DTYPE)), do_tile, input_precision="ieee")
        ds_operand = _rounded(ds, DTYPE)
        if logit_scale is None:
            dq_tile = tl.dot(ds_operand, k_tile, input_precision="ieee") * factor
            dk_tile = tl.dot(tl.trans(ds_operand), q_tile, input_precision="ieee") * factor
        else:
            k_hat = _rounded(k_tile.to(tl.float32) * k_norm[:, None], DTYPE)
            q_hat = _rounded(q_tile.to(tl.float32) * q_norm[:, None], DTYPE)
            dq_tile = tl.dot(ds_operand, k_hat, input_precision="ieee") * factor
            dk_tile = tl.dot(tl.trans(ds_operand), q_hat, input_precision="ieee") * factor
            dq_tile = _normalize_backward(dq_tile, q_tile, q_norm, q_free)
            dk_tile = _normalize_backward(dk_tile, k_tile, k_norm, k_free)

        _store_gradient(gradients, "dq", head, at, inside, dq_tile, g, S)
        _store_gradient(gradients, "dk", head, at, inside, dk_tile, g, S)
        _store_gradient(gradients, "dv", head, at, inside, dv_tile, g, S)
        if pad_k is not None:
            pad_k_sum += tl.sum(tl.where(outside[:, None], dk_tile, 0.0), axis=0)
            pad_v_sum += tl.sum(tl.where(outside[:, None], dv_tile, 0.0), axis=0)

    slot = slot.to(tl.int64) * heads + head
    if bias_table is not None:
        tl.store(partial_bias + slot * BLOCK * BLOCK + row[:, None] * BLOCK + row[None, :], bias_sum)
    if logit_scale is not None:
        tl.store(partial_scale + slot, tl.sum(scale_sum, axis=0) * scale_is_free)
    if pad_k is not None:
        _store_pad_sums(partial_pad_k, partial_pad_v, slot, pad_k_sum, pad_v_sum, S)


@triton.jit(do_not_specialize=SIZES)
def window_attention_bwd_dq_kernel(
    q, k, v, bias_table, logit_scale, pad_k, pad_v,  # Inputs
    out, lse, grad_out, grad_lse,  # Outputs
    gradients,  # Gradients
    partial_scale,  # [splits, blocks of queries, h] float32, or None
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x, tiles, walk, scale, mask_value,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq and the partial sums of d logit_scale: a program owns a head, a block of queries and a run of windows."""
    N: tl.constexpr = S.WINDOW_Y * S.WINDOW_X
    M: tl.constexpr = (S.WINDOW_Y + 2 * S.HALO_Y) * (S.WINDOW_X + 2 * S.HALO_X)
    BLOCK_D: tl.constexpr = S.BLOCK_D
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty

    inputs = Inputs(q, k, v, bias_table, logit_scale, pad_k, pad_v)
    outputs = Outputs(out, lse, grad_out, grad_lse)
    g = Geometry(heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x)
    head, slot, block, first, count = _program(heads, tiles, walk, (N + BLOCK_M - 1) // BLOCK_M, S)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_y, query_x = _divide(row, S.WINDOW_X)
    column = tl.arange(0, BLOCK_N)
    factor, scale_is_free = _load_scale(logit_scale, head, scale)
    if logit_scale is not None:
        scale_sum = tl.zeros([BLOCK_M], tl.float32)

    for step in range(0, _loop_bound(count)):
        window = _window(first + step, g, S)
        query_at = _locate(window, query_y, query_x, g, S)
        query_ok = query_at.inside & (row < N)
        queries = _load_queries(inputs, outputs, query_at, query_ok, head, g, S)

        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if logit_scale is not None:
            row_ds = tl.zeros([BLOCK_M], tl.float32)
            row_ps = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, M, BLOCK_N):
            key_y, key_x = _key_position(start + column, S)
            key_exists = start + column < M
            key_at = _locate(window, key_y, key_x, g, S)
            keys = _load_key_pair(inputs, key_at, key_exists, head, S)
            valid = query_ok[:, None] & _attended(key_exists, key_at, pad_k)[None, :]
            s, p, ds = _score_gradients(inputs, queries, query_at, keys, key_at, valid, head, factor, mask_value, S)
            k_tile = keys.k
            if logit_scale is not None:
                scale_sum += tl.sum(ds * s, axis=1)
                row_ds += tl.sum(ds, axis=1)
                row_ps += tl.sum(p * s, axis=1)
                k_tile = _rounded(k_tile.to(tl.float32) * keys.norm[:, None], DTYPE)
            acc = tl.dot(_rounded(ds, DTYPE), k_tile, acc, input_precision="ieee")

        acc *= factor
        if logit_scale is not None:
            # A row of dS sums to grad_lse; what it sums to beyond that is the rounding of out in delta: take it out.
            scale_sum -= (row_ds - queries.grad_lse) * row_ps
            acc = _normalize_backward(acc, queries.q, queries.norm, queries.free)
        _store_gradient(gradients, "dq", head, query_at, query_ok, acc, g, S)

    if logit_scale is not None:
        tl.store(partial_scale + slot.to(tl.int64) * heads + head, tl.sum(scale_sum, axis=0) * scale_is_free)


@triton.jit(do_not_specialize=SIZES)
def window_attention_bwd_dkv_kernel(
    q, k, v, bias_table, logit_scale, pad_k, pad_v,  # Inputs
    out, lse, grad_out, grad_lse,  # Outputs
    gradients,  # Gradients
    partial_pad_k,  # [splits, blocks of keys, h, d] float32, or None
    partial_pad_v,  # [splits, blocks of keys, h, dv] float32, or None
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x, tiles, walk, scale, mask_value,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk, dv and the partial sums of d pad_k, d pad_v: a program owns a head, a block of keys and a run of windows.

    Keys are named by the window whose core (the part without halo) holds them, so every map position is owned once; the
    program then visits the queries of the windows around that one. With pads, a ring of windows beyond the map's border
    owns the halo tokens out there.
    """
    N: tl.constexpr = S.WINDOW_Y * S.WINDOW_X
    M_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    REACH_Y: tl.constexpr = (S.HALO_Y + S.WINDOW_Y - 1) // S.WINDOW_Y
    REACH_X: tl.constexpr = (S.HALO_X + S.WINDOW_X - 1) // S.WINDOW_X
    RING_Y: tl.constexpr = REACH_Y if pad_k is not None else 0
    RING_X: tl.constexpr = REACH_X if pad_k is not None else 0
    SPAN_X: tl.constexpr = 2 * REACH_X + 1
    VISITS: tl.constexpr = (2 * REACH_Y + 1) * SPAN_X * M_BLOCKS
    BLOCK_D: tl.constexpr = S.BLOCK_D
    BLOCK_DV: tl.constexpr = S.BLOCK_DV
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty

    inputs = Inputs(q, k, v, bias_table, logit_scale, pad_k, pad_v)
    outputs = Outputs(out, lse, grad_out, grad_lse)
    g = Geometry(heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x)
    head, slot, block, first, count = _program(heads, tiles, walk, (N + BLOCK_N - 1) // BLOCK_N, S)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    core_y, core_x = _divide(column, S.WINDOW_X)
    key_exists = column < N
    row = tl.arange(0, BLOCK_M)
    factor, scale_is_free = _load_scale(logit_scale, head, scale)
    if pad_k is not None:
        pad_k_sum = tl.zeros([BLOCK_D], tl.float32)
        pad_v_sum = tl.zeros([BLOCK_DV], tl.float32)

    for step in range(0, _loop_bound(count)):
        window = _window(first + step, g, S, RING_Y, RING_X)
        core_at = _locate(window, core_y, core_x, g, S)
        inside = key_exists & core_at.inside
        keys = _load_key_pair(inputs, core_at, key_exists, head, S)

        dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for visit in range(0, VISITS):
            step_y = visit // M_BLOCKS // SPAN_X - REACH_Y
            step_x = visit // M_BLOCKS % SPAN_X - REACH_X
            local = visit % M_BLOCKS * BLOCK_M + row
            query_y, query_x = _divide(local, S.WINDOW_X)
            key_y = core_y - step_y * S.WINDOW_Y
            key_x = core_x - step_x * S.WINDOW_X
            # Windows beyond the border have no queries: _locate finds them outside of the padded map.
            visited = Window(window.b, window.block_y + step_y, window.phase_y, window.block_x + step_x, window.phase_x)
            query_at = _locate(visited, query_y, query_x, g, S)
            query_ok = query_at.inside & (local < N)
            key_at = Place(core_at.b, core_at.y, core_at.x, core_at.inside, core_at.region, key_y, key_x)
            key_ok = (key_y >= -S.HALO_Y) & (key_y < S.WINDOW_Y + S.HALO_Y)
            key_ok = key_ok & (key_x >= -S.HALO_X) & (key_x < S.WINDOW_X + S.HALO_X)
            key_ok = key_ok & _attended(key_exists, core_at, pad_k)
            queries = _load_queries(inputs, outputs, query_at, query_ok, head, g, S)
            valid = query_ok[:, None] & key_ok[None, :]
            s, p, ds = _score_gradients(inputs, queries, query_at, keys, key_at, valid, head, factor, mask_value, S)
            dv_tile = tl.dot(tl.trans(_rounded(p, DTYPE)), queries.grad_out, dv_tile, input_precision="ieee")
            q_tile = queries.q
            if logit_scale is not None:
                q_tile = _rounded(q_tile.to(tl.float32) * queries.norm[:, None], DTYPE)
            dk_tile = tl.dot(tl.trans(_rounded(ds, DTYPE)), q_tile, dk_tile, input_precision="ieee")

        dk_tile *= factor
        if logit_scale is not None:
            dk_tile = _normalize_backward(dk_tile, keys.k, keys.norm, keys.free)
        _store_gradient(gradients, "dk", head, core_at, inside, dk_tile, g, S)
        _store_gradient(gradients, "dv", head, core_at, inside, dv_tile, g, S)
        if pad_k is not None:
            outside = key_exists & (core_at.inside == 0)
            pad_k_sum += tl.sum(tl.where(outside[:, None], dk_tile, 0.0), axis=0)
            pad_v_sum += tl.sum(tl.where(outside[:, None], dv_tile, 0.0), axis=0)

    if pad_k is not None:
        _store_pad_sums(partial_pad_k, partial_pad_v, slot.to(tl.int64) * heads + head, pad_k_sum, pad_v_sum, S)


@triton.jit(do_not_specialize=SIZES)
def window_attention_bwd_bias_kernel(
    q, k, v, bias_table, logit_scale, pad_k, pad_v,  # Inputs
    out, lse, grad_out, grad_lse,  # Outputs
    partial_bias,  # [splits, h, OFFSETS_Y, OFFSETS_X, BLOCK, BLOCK] float32
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x, tiles, walk, scale, mask_value,
    S: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Sums dS over a run of windows and over all pairs of rectangles (BLOCK_Y x BLOCK_X tokens) with one offset."""
    KEY_Y: tl.constexpr = S.WINDOW_Y + 2 * S.HALO_Y
    KEY_X: tl.constexpr = S.WINDOW_X + 2 * S.HALO_X
    QUERY_RECTS_Y: tl.constexpr = (S.WINDOW_Y + BLOCK_Y - 1) // BLOCK_Y
    QUERY_RECTS_X: tl.constexpr = (S.WINDOW_X + BLOCK_X - 1) // BLOCK_X
    KEY_RECTS_Y: tl.constexpr = (KEY_Y + BLOCK_Y - 1) // BLOCK_Y
    KEY_RECTS_X: tl.constexpr = (KEY_X + BLOCK_X - 1) // BLOCK_X
    OFFSETS_X: tl.constexpr = QUERY_RECTS_X + KEY_RECTS_X - 1
    OFFSETS: tl.constexpr = (QUERY_RECTS_Y + KEY_RECTS_Y - 1) * OFFSETS_X

    inputs = Inputs(q, k, v, bias_table, logit_scale, pad_k, pad_v)
    outputs = Outputs(out, lse, grad_out, grad_lse)
    g = Geometry(heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x)
    head, slot, block, first, count = _program(heads, tiles, walk, OFFSETS, S)
    offset_y = block // OFFSETS_X - (KEY_RECTS_Y - 1)
    offset_x = block % OFFSETS_X - (KEY_RECTS_X - 1)
    # Query rectangles whose key rectangle (query - offset) exists.
    first_y = tl.maximum(offset_y, 0)
    first_x = tl.maximum(offset_x, 0)
    rects_y = tl.minimum(QUERY_RECTS_Y, KEY_RECTS_Y + offset_y) - first_y
    rects_x = tl.minimum(QUERY_RECTS_X, KEY_RECTS_X + offset_x) - first_x
    rects = rects_y * rects_x

    row = tl.arange(0, BLOCK)
    rect_y, rect_x = _divide(row, BLOCK_X)
    factor, scale_is_free = _load_scale(logit_scale, head, scale)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)

    for step in range(0, _loop_bound(count * rects)):
        passed, rect = _divide(step, rects)
        window = _window(first + passed, g, S)
        query_rect_y = first_y + rect // rects_x
        query_rect_x = first_x + rect % rects_x
        query_y = query_rect_y * BLOCK_Y + rect_y
        query_x = query_rect_x * BLOCK_X + rect_x
        key_y = (query_rect_y - offset_y) * BLOCK_Y + rect_y
        key_x = (query_rect_x - offset_x) * BLOCK_X + rect_x
        query_ok = (rect_y < BLOCK_Y) & (query_y < S.WINDOW_Y) & (query_x < S.WINDOW_X)
        key_exists = (rect_y < BLOCK_Y) & (key_y < KEY_Y) & (key_x < KEY_X)

        query_at = _locate(window, query_y, query_x, g, S)
        query_ok = query_ok & query_at.inside
        queries = _load_queries(inputs, outputs, query_at, query_ok, head, g, S)
        key_at = _locate(window, key_y - S.HALO_Y, key_x - S.HALO_X, g, S)
        keys = _load_key_pair(inputs, key_at, key_exists, head, S)
        valid = query_ok[:, None] & _attended(key_exists, key_at, pad_k)[None, :]
        s, p, ds = _score_gradients(inputs, queries, query_at, keys, key_at, valid, head, factor, mask_value, S)
        acc += ds

    split, offset = _divide(slot, OFFSETS)
    slot = (split * heads + head) * OFFSETS + offset
    tl.store(partial_bias + slot * BLOCK * BLOCK + row[:, None] * BLOCK + row[None, :], acc)


@triton.jit
def window_attention_bwd_table_kernel(
    tiles,  # [h, OFFSETS_Y, OFFSETS_X, BLOCK, BLOCK] float32: dS summed over windows and rectangles
    dbias_table,  # [h, TABLE_Y, TABLE_X], contiguous
    heads,
    TABLE_Y: tl.constexpr, TABLE_X: tl.constexpr, KEY_Y: tl.constexpr, KEY_X: tl.constexpr,
    KEY_RECTS_Y: tl.constexpr, KEY_RECTS_X: tl.constexpr, OFFSETS_Y: tl.constexpr, OFFSETS_X: tl.constexpr,
    PACK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TABLE: tl.constexpr,
):  # fmt: skip
    """Sums the tiles along their diagonals: all pairs with one (query - key) offset meet in one table entry."""
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    entry = (pid // heads) * BLOCK_TABLE + tl.arange(0, BLOCK_TABLE)
    # Query index - key index, both counted from 0. The +KEY_Y, +KEY_X keep the divisions below on positive numbers.
    delta_y = entry // TABLE_X - (KEY_Y - 1)
    delta_x = entry % TABLE_X - (KEY_X - 1)
    base_y = (delta_y + KEY_Y * BLOCK_Y) // BLOCK_Y - KEY_Y
    base_x = (delta_x + KEY_X * BLOCK_X) // BLOCK_X - KEY_X
    head_tiles = tiles + head * (OFFSETS_Y * OFFSETS_X * BLOCK * BLOCK)
    total = tl.zeros([BLOCK_TABLE], tl.float32)
    # The delta of two tokens is BLOCK * (rectangle offset) + a remainder in (-BLOCK, BLOCK): two offsets an axis fit.
    # With one rectangle an axis its offset is 0.
    SPAN_Y: tl.constexpr = 2 if OFFSETS_Y > 1 else 1
    SPAN_X: tl.constexpr = 2 if OFFSETS_X > 1 else 1
    for corner in tl.static_range(0, SPAN_Y * SPAN_X):
        offset_y = base_y * (SPAN_Y - 1) + corner // SPAN_X
        offset_x = base_x * (SPAN_X - 1) + corner % SPAN_X
        rect_y = offset_y + KEY_RECTS_Y - 1
        rect_x = offset_x + KEY_RECTS_X - 1
        entry_ok = (entry < TABLE_Y * TABLE_X) & (rect_y >= 0) & (rect_y < OFFSETS_Y)
        entry_ok = entry_ok & (rect_x >= 0) & (rect_x < OFFSETS_X)
        tile = (rect_y * OFFSETS_X + rect_x) * (BLOCK * BLOCK)
        for start in range(0, BLOCK, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            pack = row // (BLOCK_Y * BLOCK_X)
            local = row % (BLOCK_Y * BLOCK_X)
            key_y = (local // BLOCK_X)[:, None] + (offset_y * BLOCK_Y - delta_y)[None, :]
            key_x = (local % BLOCK_X)[:, None] + (offset_x * BLOCK_X - delta_x)[None, :]
            ok = entry_ok[None, :] & (pack < PACK)[:, None]
            ok = ok & (key_y >= 0) & (key_y < BLOCK_Y) & (key_x >= 0) & (key_x < BLOCK_X)
            column = pack[:, None] * (BLOCK_Y * BLOCK_X) + key_y * BLOCK_X + key_x
            ds = tl.load(head_tiles + tile[None, :] + row[:, None] * BLOCK + column, mask=ok, other=0.0)
            total += tl.sum(ds, axis=0)
    tl.store(dbias_table + head * (TABLE_Y * TABLE_X) + entry, total.to(dbias_table.dtype.element_ty),
             mask=entry < TABLE_Y * TABLE_X)  # fmt: skip
