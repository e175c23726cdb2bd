"""Windowed softmax attention in Triton: forward, and the backward with every gradient of the contract.

All kernels gather a window from the feature map by index arithmetic, read the bias from the table by relative offset,
and write straight back to the map: no rolled, padded or partitioned copy, no N x N bias and no mask exists in memory.

Forward: a program owns a head, a block of a window's queries and a run of windows; it loops over blocks of keys with an
online softmax. Windows of at most 8 tokens are packed, several to a 16-row tile.

Backward, no float atomics anywhere:
- No halo and a window that fits in one tile (N <= 64): one fused kernel computes the scores once for all gradients.
- Otherwise three passes: dq; dk and dv, where a program owns keys and walks all windows that reach them, so that each
  key is written exactly once even with a halo; and the bias table.
- Bias table: a pair's table entry depends on its window-local positions only, so dS is summed over windows in a
  register tile, and a last kernel sums the tile along its diagonals. Windows of more than one tile are cut into
  rectangles of BLOCK_Y x BLOCK_X tokens, and a program owns one offset (query rectangle - key rectangle): all pairs of
  rectangles with that offset share one register tile, so the scratch memory grows with the table and not with N x N.
- d bias_table, d logit_scale, d pad_k, d pad_v: each program writes its float32 partial sum, `sum_partials` adds them
  in a fixed order. The number of partial sums follows from the shapes alone, never from the device, and their memory is
  bounded by PARTIAL_BYTES, or one partial sum where that is larger: every run gives the same bits on every device.
"""

import math

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
    sum_partials,
    tl,
    triton,
)

# Scratch of the backward: enough for 512 register tiles of 64 x 64.
PARTIAL_BYTES = 8 << 20
# About this many programs fill any GPU a few times over; beyond it a program walks several windows.
TARGET_PROGRAMS = 4096
# A forward program walks at most this many tiles: enough to amortise the bias tile, short enough to balance the tail.
MAX_FORWARD_WALK = 8

_LOGIT_SCALE_MAX = tl.constexpr(math.log(100.0))

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = [
    "heads", "H", "W", "windows_y", "windows_x", "shift_y", "shift_x", "dilation_y", "dilation_x",
    "total_windows", "tiles", "walk",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- index arithmetic


@device_function
def _split_window(flat, windows_y, windows_x, dilation_y, dilation_x, INDEX: tl.constexpr):
    """Window number over batch and map -> (image, block and dilation phase in y, block and dilation phase in x)."""
    flat = flat.to(INDEX)
    per_image = windows_y.to(INDEX) * windows_x
    b = flat // per_image
    window = flat - b * per_image
    wy = window // windows_x
    wx = window - wy * windows_x
    block_y = wy // dilation_y
    block_x = wx // dilation_x
    return b, block_y, wy - block_y * dilation_y, block_x, wx - block_x * dilation_x


@device_function
def _axis_token(
    block, phase, local, size, windows, shift, dilation, WINDOW: tl.constexpr, ROLL_BEFORE_PAD: tl.constexpr
):
    """Token `local` of a window of one axis -> (position on the map or -1 outside of it, shift region)."""
    extent = WINDOW * dilation
    padded = windows * WINDOW
    i = block * extent + phase + local * dilation
    inside = (i >= 0) & (i < padded)
    position = i + shift
    if ROLL_BEFORE_PAD:
        inside = inside & (i < size)
        position = position % size
    else:
        position = tl.where(position >= padded, position - padded, position)
        inside = inside & (position < size)
    region = (i >= padded - extent).to(tl.int32) + (i >= padded - shift).to(tl.int32)
    return tl.where(inside, position, -1), tl.where(shift > 0, region, 0)


@device_function
def _tokens(
    block_y, phase_y, block_x, phase_x, local_y, local_x,
    H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, ROLL_BEFORE_PAD: tl.constexpr,
):  # fmt: skip
    """Window-local tokens -> (y, x, inside the map, shift region); y and x are int64."""
    y, region_y = _axis_token(block_y, phase_y, local_y, H, windows_y, shift_y, dilation_y, WINDOW_Y, ROLL_BEFORE_PAD)
    x, region_x = _axis_token(block_x, phase_x, local_x, W, windows_x, shift_x, dilation_x, WINDOW_X, ROLL_BEFORE_PAD)
    return y.to(tl.int64), x.to(tl.int64), (y >= 0) & (x >= 0), region_y * 3 + region_x


# --------------------------------------------------------------------------------------------------------------- tiles


@device_function
def _load_rows(pointer, offset, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    x = tl.load(pointer + offset[:, None] + column[None, :], mask=mask[:, None] & (column < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@device_function
def _load_keys(
    pointer, offset, inside, outside, pad, head, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows of k or v; rows `outside` the map hold pad[head], where there is a pad."""
    x = _load_rows(pointer, offset, inside, D, BLOCK_D, UPCAST)
    if pad is not None:
        column = tl.arange(0, BLOCK_D)
        row = tl.load(pad + head * D + column, mask=column < D, other=0.0)
        if UPCAST:
            row = row.to(tl.float32)
        x = tl.where(outside[:, None], row[None, :], x)
    return x


@device_function
def _store_rows(pointer, offset, mask, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    pointers = pointer + offset[:, None] + column[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=mask[:, None] & (column < D)[None, :])


@device_function
def _operand(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """A float32 tile as an operand of tl.dot: rounded to the input dtype, kept in float32 for the interpreter."""
    x = x.to(DTYPE)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@device_function
def _inverse_norm(x):
    """1 / max(|row|, 1e-12), and whether the norm was not clamped."""
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    return 1.0 / tl.maximum(norm, 1e-12), norm > 1e-12


@device_function
def _normalize_backward(dx_hat, x, inverse_norm, free):
    """Gradient of x from that of x / max(|x|, 1e-12); a clamped norm is a constant."""
    x_hat = x.to(tl.float32) * inverse_norm[:, None]
    along = tl.where(free, tl.sum(x_hat * dx_hat, axis=1), 0.0)
    return (dx_hat - x_hat * along[:, None]) * inverse_norm[:, None]


@device_function
def _load_scale(logit_scale, head, scale):
    """(factor of the logits, whether the gradient reaches the log-temperature)."""
    if logit_scale is None:
        factor = scale
        free = 1.0
    else:
        tau = tl.load(logit_scale + head).to(tl.float32)
        factor = tl.exp(tl.minimum(tau, _LOGIT_SCALE_MAX))
        free = tl.where(tau > _LOGIT_SCALE_MAX, 0.0, 1.0)
    return factor, free


@device_function
def _bias_tile(
    bias_table, head, query_y, query_x, key_y, key_x, valid, bias_stride_h, bias_stride_y, bias_stride_x,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr,
):  # fmt: skip
    """bias_table[head, query - key] for window-local positions; 0 where not `valid`."""
    # 32-bit offsets inside a head (the launcher sees to it): a tile of 64-bit ones would take half of the registers.
    q_offset = (query_y + (WINDOW_Y - 1 + HALO_Y)) * bias_stride_y + (query_x + (WINDOW_X - 1 + HALO_X)) * bias_stride_x
    k_offset = key_y * bias_stride_y + key_x * bias_stride_x
    pointers = bias_table + head * bias_stride_h + (q_offset[:, None] - k_offset[None, :])
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@device_function
def _scores(q, k, q_norm, k_norm, scale, NORMALIZED: tl.constexpr):
    """scale * q kᵀ in float32, or scale * q̂ k̂ᵀ: normalising after the product keeps the operands exact."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    return s * (q_norm * scale)[:, None] * k_norm[None, :] if NORMALIZED else s * scale


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=_SIZES)
def window_attention_fwd_kernel(
    q,  # [B, H, W, h, d], last stride 1
    k,  # [B, H, W, h, d], last stride 1
    v,  # [B, H, W, h, dv], last stride 1
    bias_table,  # [h, 2*wh-1+2*halo_h, 2*ww-1+2*halo_w], any strides, or None
    logit_scale,  # [h], contiguous, or None
    pad_k,  # [h, d], contiguous, or None
    pad_v,  # [h, dv], contiguous, or None
    out,  # [B, H, W, h, dv], contiguous
    lse,  # [B, h, H, W], float32, contiguous
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x, total_windows, tiles, walk,
    q_stride_b, q_stride_y, q_stride_x, q_stride_h,
    k_stride_b, k_stride_y, k_stride_x, k_stride_h,
    v_stride_b, v_stride_y, v_stride_x, v_stride_h,
    bias_stride_h, bias_stride_y, bias_stride_x,
    scale, mask_value,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_BEFORE_PAD: tl.constexpr,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    KEY_X: tl.constexpr = WINDOW_X + 2 * HALO_X
    M: tl.constexpr = (WINDOW_Y + 2 * HALO_Y) * KEY_X
    M_BLOCKS: tl.constexpr = (PACK * N + BLOCK_M - 1) // BLOCK_M
    ONE_KEY_BLOCK: tl.constexpr = PACK * M <= BLOCK_N
    DTYPE: tl.constexpr = q.dtype.element_ty

    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    first = (pid // M_BLOCKS).to(INDEX) * walk
    count = tl.minimum(tiles - first, walk).to(tl.int32)
    row = (pid % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_pack = row // N
    query_local = row - query_pack * N
    query_y = query_local // WINDOW_X
    query_x = query_local - query_y * WINDOW_X
    query_in_tile = row < PACK * N
    factor, scale_is_free = _load_scale(logit_scale, head, scale)

    column = tl.arange(0, BLOCK_N)
    if ONE_KEY_BLOCK:
        key_pack = column // M
        key_y = (column - key_pack * M) // KEY_X - HALO_Y
        key_x = (column - key_pack * M) % KEY_X - HALO_X
        key_in_tile = column < PACK * M
        pair = query_in_tile[:, None] & key_in_tile[None, :]
        if PACK > 1:
            pair = pair & (query_pack[:, None] == key_pack[None, :])
        if bias_table is not None:
            bias = _bias_tile(bias_table, head, query_y, query_x, key_y, key_x, pair, bias_stride_h, bias_stride_y,
                              bias_stride_x, WINDOW_Y, WINDOW_X, HALO_Y, HALO_X)  # fmt: skip

    for step in range(0, _loop_bound(count)):
        tile = first + step
        flat = tile * PACK
        if PACK > 1:
            flat = flat + query_pack
        b, block_y, phase_y, block_x, phase_x = _split_window(
            flat, windows_y, windows_x, dilation_y, dilation_x, INDEX)  # fmt: skip
        y, x, inside, query_region = _tokens(
            block_y, phase_y, block_x, phase_x, query_y, query_x, H, W, windows_y, windows_x, shift_y, shift_x,
            dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
        b = b.to(tl.int64)
        query_ok = query_in_tile & inside & (flat < total_windows)
        offset = b * q_stride_b + y * q_stride_y + x * q_stride_x + head * q_stride_h
        q_tile = _load_rows(q, offset, query_ok, D, BLOCK_D, UPCAST)
        q_norm = 1.0
        if logit_scale is not None:
            q_norm, q_free = _inverse_norm(q_tile)

        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for start in range(0, PACK * M, BLOCK_N):
            if not ONE_KEY_BLOCK:
                key_y = (start + column) // KEY_X - HALO_Y
                key_x = (start + column) % KEY_X - HALO_X
                key_in_tile = start + column < M
                pair = query_in_tile[:, None] & key_in_tile[None, :]
                if bias_table is not None:
                    bias = _bias_tile(bias_table, head, query_y, query_x, key_y, key_x, pair, bias_stride_h,
                                      bias_stride_y, bias_stride_x, WINDOW_Y, WINDOW_X, HALO_Y, HALO_X)  # fmt: skip
            key_b, key_block_y, key_phase_y, key_block_x, key_phase_x = b, block_y, phase_y, block_x, phase_x
            key_ok = key_in_tile
            if PACK > 1:
                key_flat = tile * PACK + key_pack
                key_b, key_block_y, key_phase_y, key_block_x, key_phase_x = _split_window(
                    key_flat, windows_y, windows_x, dilation_y, dilation_x, INDEX)  # fmt: skip
                key_b = key_b.to(tl.int64)
                key_ok = key_ok & (key_flat < total_windows)
            y_k, x_k, key_inside, key_region = _tokens(
                key_block_y, key_phase_y, key_block_x, key_phase_x, key_y, key_x, H, W, windows_y, windows_x, shift_y,
                shift_x, dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
            key_outside = key_ok & (key_inside == 0)
            key_inside = key_ok & key_inside
            offset = key_b * k_stride_b + y_k * k_stride_y + x_k * k_stride_x + head * k_stride_h
            k_tile = _load_keys(k, offset, key_inside, key_outside, pad_k, head, D, BLOCK_D, UPCAST)
            k_norm = 1.0
            if logit_scale is not None:
                k_norm, k_free = _inverse_norm(k_tile)
            s = _scores(q_tile, k_tile, q_norm, k_norm, factor, logit_scale is not None)
            if bias_table is not None:
                s += bias
            if SHIFTED:
                s += tl.where(query_region[:, None] != key_region[None, :], mask_value, 0.0)
            if pad_k is None:
                s = tl.where(pair & key_inside[None, :], s, float("-inf"))
            else:
                s = tl.where(pair & key_ok[None, :], s, float("-inf"))

            # A row without any key so far (a padding query, or one whose first key blocks are outside) stays finite.
            new_maximum = tl.maximum(maximum, tl.max(s, axis=1))
            finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            p = tl.exp(s - finite[:, None])
            correction = tl.exp(maximum - finite)
            total = total * correction + tl.sum(p, axis=1)
            maximum = new_maximum
            offset = key_b * v_stride_b + y_k * v_stride_y + x_k * v_stride_x + head * v_stride_h
            v_tile = _load_keys(v, offset, key_inside, key_outside, pad_v, head, DV, BLOCK_DV, UPCAST)
            acc = acc * correction[:, None]
            acc = tl.dot(_operand(p, DTYPE, UPCAST), v_tile, acc, input_precision="ieee")

        safe = tl.where(total == 0.0, 1.0, total)
        offset = (((b * H + y) * W + x) * heads + head) * DV
        _store_rows(out, offset, query_ok, acc / safe[:, None], DV, BLOCK_DV)
        tl.store(lse + ((b * heads + head) * H + y) * W + x, maximum + tl.log(safe), mask=query_ok)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=_SIZES)
def window_attention_bwd_fused_kernel(
    grad_out,  # [B, H, W, h, dv], last stride 1
    grad_lse,  # [B, h, H, W], float32, contiguous, or None
    q, k, v, bias_table, logit_scale, pad_k, pad_v,  # as in the forward
    lse,  # [B, h, H, W], float32, contiguous
    dqkv,  # [B, H, W, h*(2*d+dv)], contiguous
    partial_bias,  # [splits, h, BLOCK, BLOCK] float32, or None
    partial_scale,  # [splits, h] float32, or None
    partial_pad_k,  # [splits, h, d] float32, or None
    partial_pad_v,  # [splits, h, dv] float32, or None
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x, total_windows, tiles, walk,
    q_stride_b, q_stride_y, q_stride_x, q_stride_h,
    k_stride_b, k_stride_y, k_stride_x, k_stride_h,
    v_stride_b, v_stride_y, v_stride_x, v_stride_h,
    grad_out_stride_b, grad_out_stride_y, grad_out_stride_x, grad_out_stride_h,
    bias_stride_h, bias_stride_y, bias_stride_x,
    scale, mask_value,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_BEFORE_PAD: tl.constexpr,
    PACK: tl.constexpr, BLOCK: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every gradient of windows without a halo that fit in one tile."""
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    DTYPE: tl.constexpr = q.dtype.element_ty

    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    split = pid // heads
    first = split.to(INDEX) * walk
    count = tl.minimum(tiles - first, walk).to(tl.int32)
    row = tl.arange(0, BLOCK)
    pack = row // N
    local = row - pack * N
    local_y = local // WINDOW_X
    local_x = local - local_y * WINDOW_X
    in_tile = row < PACK * N
    pair = in_tile[:, None] & in_tile[None, :]
    if PACK > 1:
        pair = pair & (pack[:, None] == pack[None, :])
    factor, scale_is_free = _load_scale(logit_scale, head, scale)
    channels = heads * (2 * D + DV)

    if bias_table is not None:
        bias = _bias_tile(bias_table, head, local_y, local_x, local_y, local_x, pair, bias_stride_h, bias_stride_y,
                          bias_stride_x, WINDOW_Y, WINDOW_X, 0, 0)  # fmt: skip
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
        b, block_y, phase_y, block_x, phase_x = _split_window(
            flat, windows_y, windows_x, dilation_y, dilation_x, INDEX)  # fmt: skip
        y, x, inside, region = _tokens(
            block_y, phase_y, block_x, phase_x, local_y, local_x, H, W, windows_y, windows_x, shift_y, shift_x,
            dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
        b = b.to(tl.int64)
        exists = in_tile & (flat < total_windows)
        outside = exists & (inside == 0)
        inside = exists & inside
        offset = b * q_stride_b + y * q_stride_y + x * q_stride_x + head * q_stride_h
        q_tile = _load_rows(q, offset, inside, D, BLOCK_D, UPCAST)
        offset = b * k_stride_b + y * k_stride_y + x * k_stride_x + head * k_stride_h
        k_tile = _load_keys(k, offset, inside, outside, pad_k, head, D, BLOCK_D, UPCAST)
        offset = b * v_stride_b + y * v_stride_y + x * v_stride_x + head * v_stride_h
        v_tile = _load_keys(v, offset, inside, outside, pad_v, head, DV, BLOCK_DV, UPCAST)
        offset = b * grad_out_stride_b + y * grad_out_stride_y + x * grad_out_stride_x + head * grad_out_stride_h
        do_tile = _load_rows(grad_out, offset, inside, DV, BLOCK_DV, UPCAST)

        q_norm = 1.0
        k_norm = 1.0
        if logit_scale is not None:
            q_norm, q_free = _inverse_norm(q_tile)
            k_norm, k_free = _inverse_norm(k_tile)
        s = _scores(q_tile, k_tile, q_norm, k_norm, factor, logit_scale is not None)
        logits = s
        if bias_table is not None:
            logits += bias
        if SHIFTED:
            logits += tl.where(region[:, None] != region[None, :], mask_value, 0.0)
        valid = pair & inside[:, None]
        valid = valid & (inside if pad_k is None else exists)[None, :]
        row_offset = ((b * heads + head) * H + y) * W + x
        if logit_scale is None:
            row_lse = tl.load(lse + row_offset, mask=inside, other=0.0)
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
            delta -= tl.load(grad_lse + row_offset, mask=inside, other=0.0)
        ds = p * (dp - delta[:, None])
        if bias_table is not None:
            bias_sum += ds
        if logit_scale is not None:
            scale_sum += tl.sum(ds * s, axis=1)

        dv_tile = tl.dot(tl.trans(_operand(p, DTYPE, UPCAST)), do_tile, input_precision="ieee")
        ds_operand = _operand(ds, DTYPE, UPCAST)
        if logit_scale is None:
            dq_tile = tl.dot(ds_operand, k_tile, input_precision="ieee") * factor
            dk_tile = tl.dot(tl.trans(ds_operand), q_tile, input_precision="ieee") * factor
        else:
            k_hat = _operand(k_tile.to(tl.float32) * k_norm[:, None], DTYPE, UPCAST)
            q_hat = _operand(q_tile.to(tl.float32) * q_norm[:, None], DTYPE, UPCAST)
            dq_tile = tl.dot(ds_operand, k_hat, input_precision="ieee") * factor
            dk_tile = tl.dot(tl.trans(ds_operand), q_hat, input_precision="ieee") * factor
            dq_tile = _normalize_backward(dq_tile, q_tile, q_norm, q_free)
            dk_tile = _normalize_backward(dk_tile, k_tile, k_norm, k_free)

        offset = ((b * H + y) * W + x) * channels
        _store_rows(dqkv, offset + head * D, inside, dq_tile, D, BLOCK_D)
        _store_rows(dqkv, offset + (heads + head) * D, inside, dk_tile, D, BLOCK_D)
        _store_rows(dqkv, offset + heads * 2 * D + head * DV, inside, dv_tile, DV, BLOCK_DV)
        if pad_k is not None:
            pad_k_sum += tl.sum(tl.where(outside[:, None], dk_tile, 0.0), axis=0)
            pad_v_sum += tl.sum(tl.where(outside[:, None], dv_tile, 0.0), axis=0)

    slot = split.to(tl.int64) * heads + head
    if bias_table is not None:
        tl.store(partial_bias + slot * BLOCK * BLOCK + row[:, None] * BLOCK + row[None, :], bias_sum)
    if logit_scale is not None:
        tl.store(partial_scale + slot, tl.sum(scale_sum, axis=0) * scale_is_free)
    if pad_k is not None:
        column = tl.arange(0, BLOCK_D)
        tl.store(partial_pad_k + slot * D + column, pad_k_sum, mask=column < D)
        column = tl.arange(0, BLOCK_DV)
        tl.store(partial_pad_v + slot * DV + column, pad_v_sum, mask=column < DV)


@triton.jit(do_not_specialize=_SIZES)
def window_attention_bwd_dq_kernel(
    grad_out, grad_lse, q, k, v, bias_table, logit_scale, pad_k, pad_v, lse, dqkv,  # as above
    out,  # [B, H, W, h, dv], contiguous
    partial_scale,  # [splits, M_BLOCKS, h] float32, or None
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x, tiles, walk,
    q_stride_b, q_stride_y, q_stride_x, q_stride_h,
    k_stride_b, k_stride_y, k_stride_x, k_stride_h,
    v_stride_b, v_stride_y, v_stride_x, v_stride_h,
    grad_out_stride_b, grad_out_stride_y, grad_out_stride_x, grad_out_stride_h,
    bias_stride_h, bias_stride_y, bias_stride_x,
    scale, mask_value,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_BEFORE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq and the partial sums of d logit_scale: a program owns a head, a block of queries and a run of windows."""
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    KEY_X: tl.constexpr = WINDOW_X + 2 * HALO_X
    M: tl.constexpr = (WINDOW_Y + 2 * HALO_Y) * KEY_X
    M_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    DTYPE: tl.constexpr = q.dtype.element_ty

    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    slot = pid // heads
    first = (slot // M_BLOCKS).to(INDEX) * walk
    count = tl.minimum(tiles - first, walk).to(tl.int32)
    row = (slot % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_y = row // WINDOW_X
    query_x = row - query_y * WINDOW_X
    column = tl.arange(0, BLOCK_N)
    factor, scale_is_free = _load_scale(logit_scale, head, scale)
    if logit_scale is not None:
        scale_sum = tl.zeros([BLOCK_M], tl.float32)

    for step in range(0, _loop_bound(count)):
        b, block_y, phase_y, block_x, phase_x = _split_window(
            first + step, windows_y, windows_x, dilation_y, dilation_x, INDEX)  # fmt: skip
        b = b.to(tl.int64)
        y, x, query_ok, query_region = _tokens(
            block_y, phase_y, block_x, phase_x, query_y, query_x, H, W, windows_y, windows_x, shift_y, shift_x,
            dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
        query_ok = query_ok & (row < N)
        offset = b * q_stride_b + y * q_stride_y + x * q_stride_x + head * q_stride_h
        q_tile = _load_rows(q, offset, query_ok, D, BLOCK_D, UPCAST)
        offset = b * grad_out_stride_b + y * grad_out_stride_y + x * grad_out_stride_x + head * grad_out_stride_h
        do_tile = _load_rows(grad_out, offset, query_ok, DV, BLOCK_DV, UPCAST)
        offset = (((b * H + y) * W + x) * heads + head) * DV
        out_tile = _load_rows(out, offset, query_ok, DV, BLOCK_DV, UPCAST)
        delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
        row_offset = ((b * heads + head) * H + y) * W + x
        row_lse = tl.load(lse + row_offset, mask=query_ok, other=0.0)
        row_grad_lse = tl.zeros([BLOCK_M], tl.float32)
        if grad_lse is not None:
            row_grad_lse = tl.load(grad_lse + row_offset, mask=query_ok, other=0.0)
        delta -= row_grad_lse
        q_norm = 1.0
        if logit_scale is not None:
            q_norm, q_free = _inverse_norm(q_tile)

        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if logit_scale is not None:
            row_ds = tl.zeros([BLOCK_M], tl.float32)
            row_ps = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, M, BLOCK_N):
            key_y = (start + column) // KEY_X - HALO_Y
            key_x = (start + column) % KEY_X - HALO_X
            key_ok = start + column < M
            y_k, x_k, inside, key_region = _tokens(
                block_y, phase_y, block_x, phase_x, key_y, key_x, H, W, windows_y, windows_x, shift_y, shift_x,
                dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
            outside = key_ok & (inside == 0)
            inside = key_ok & inside
            if pad_k is None:
                key_ok = inside
            offset = b * k_stride_b + y_k * k_stride_y + x_k * k_stride_x + head * k_stride_h
            k_tile = _load_keys(k, offset, inside, outside, pad_k, head, D, BLOCK_D, UPCAST)
            offset = b * v_stride_b + y_k * v_stride_y + x_k * v_stride_x + head * v_stride_h
            v_tile = _load_keys(v, offset, inside, outside, pad_v, head, DV, BLOCK_DV, UPCAST)
            valid = query_ok[:, None] & key_ok[None, :]
            k_norm = 1.0
            if logit_scale is not None:
                k_norm, k_free = _inverse_norm(k_tile)
            s = _scores(q_tile, k_tile, q_norm, k_norm, factor, logit_scale is not None)
            logits = s
            if bias_table is not None:
                logits += _bias_tile(bias_table, head, query_y, query_x, key_y, key_x, valid, bias_stride_h,
                                     bias_stride_y, bias_stride_x, WINDOW_Y, WINDOW_X, HALO_Y, HALO_X)  # fmt: skip
            if SHIFTED:
                logits += tl.where(query_region[:, None] != key_region[None, :], mask_value, 0.0)
            p = tl.where(valid, tl.exp(logits - row_lse[:, None]), 0.0)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            if logit_scale is not None:
                scale_sum += tl.sum(ds * s, axis=1)
                row_ds += tl.sum(ds, axis=1)
                row_ps += tl.sum(p * s, axis=1)
                k_tile = _operand(k_tile.to(tl.float32) * k_norm[:, None], DTYPE, UPCAST)
            acc = tl.dot(_operand(ds, DTYPE, UPCAST), k_tile, acc, input_precision="ieee")

        acc *= factor
        if logit_scale is not None:
            # A row of dS sums to grad_lse; what it sums to beyond that is the rounding of out in delta: take it out.
            scale_sum -= (row_ds - row_grad_lse) * row_ps
            acc = _normalize_backward(acc, q_tile, q_norm, q_free)
        offset = ((b * H + y) * W + x) * (heads * (2 * D + DV)) + head * D
        _store_rows(dqkv, offset, query_ok, acc, D, BLOCK_D)

    if logit_scale is not None:
        tl.store(partial_scale + slot.to(tl.int64) * heads + head, tl.sum(scale_sum, axis=0) * scale_is_free)


@triton.jit(do_not_specialize=_SIZES)
def window_attention_bwd_dkv_kernel(
    grad_out, grad_lse, q, k, v, bias_table, logit_scale, pad_k, pad_v, lse, dqkv, out,  # as in the dq kernel
    partial_pad_k,  # [splits, N_BLOCKS, h, d] float32, or None
    partial_pad_v,  # [splits, N_BLOCKS, h, dv] float32, or None
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x, tiles, walk,
    q_stride_b, q_stride_y, q_stride_x, q_stride_h,
    k_stride_b, k_stride_y, k_stride_x, k_stride_h,
    v_stride_b, v_stride_y, v_stride_x, v_stride_h,
    grad_out_stride_b, grad_out_stride_y, grad_out_stride_x, grad_out_stride_h,
    bias_stride_h, bias_stride_y, bias_stride_x,
    scale, mask_value,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_BEFORE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv and the partial sums of d pad_k, d pad_v: a program owns a head, a block of keys and a run of windows.

    Keys are named by the window whose core (the part without halo) holds them, so every map position is owned once; the
    program then visits the queries of the windows around that one. With pads, a ring of windows beyond the map's border
    owns the halo tokens out there.
    """
    N: tl.constexpr = WINDOW_Y * WINDOW_X
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    M_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    REACH_Y: tl.constexpr = (HALO_Y + WINDOW_Y - 1) // WINDOW_Y
    REACH_X: tl.constexpr = (HALO_X + WINDOW_X - 1) // WINDOW_X
    RING_Y: tl.constexpr = REACH_Y if pad_k is not None else 0
    RING_X: tl.constexpr = REACH_X if pad_k is not None else 0
    SPAN_X: tl.constexpr = 2 * REACH_X + 1
    VISITS: tl.constexpr = (2 * REACH_Y + 1) * SPAN_X * M_BLOCKS
    DTYPE: tl.constexpr = q.dtype.element_ty

    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    slot = pid // heads
    first = (slot // N_BLOCKS).to(INDEX) * walk
    count = tl.minimum(tiles - first, walk).to(tl.int32)
    column = (slot % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    core_y = column // WINDOW_X
    core_x = column - core_y * WINDOW_X
    row = tl.arange(0, BLOCK_M)
    factor, scale_is_free = _load_scale(logit_scale, head, scale)
    if pad_k is not None:
        pad_k_sum = tl.zeros([BLOCK_D], tl.float32)
        pad_v_sum = tl.zeros([BLOCK_DV], tl.float32)

    for step in range(0, _loop_bound(count)):
        b, block_y, phase_y, block_x, phase_x = _split_window(
            first + step, windows_y + 2 * RING_Y * dilation_y, windows_x + 2 * RING_X * dilation_x,
            dilation_y, dilation_x, INDEX)  # fmt: skip
        b = b.to(tl.int64)
        block_y -= RING_Y
        block_x -= RING_X
        y_k, x_k, inside, key_region = _tokens(
            block_y, phase_y, block_x, phase_x, core_y, core_x, H, W, windows_y, windows_x, shift_y, shift_x,
            dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
        outside = (column < N) & (inside == 0)
        inside = (column < N) & inside
        offset = b * k_stride_b + y_k * k_stride_y + x_k * k_stride_x + head * k_stride_h
        k_tile = _load_keys(k, offset, inside, outside, pad_k, head, D, BLOCK_D, UPCAST)
        offset = b * v_stride_b + y_k * v_stride_y + x_k * v_stride_x + head * v_stride_h
        v_tile = _load_keys(v, offset, inside, outside, pad_v, head, DV, BLOCK_DV, UPCAST)
        k_norm = 1.0
        if logit_scale is not None:
            k_norm, k_free = _inverse_norm(k_tile)

        dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for visit in range(0, VISITS):
            neighbour = visit // M_BLOCKS
            step_y = neighbour // SPAN_X - REACH_Y
            step_x = neighbour % SPAN_X - REACH_X
            local = (visit % M_BLOCKS) * BLOCK_M + row
            query_y = local // WINDOW_X
            query_x = local - query_y * WINDOW_X
            key_y = core_y - step_y * WINDOW_Y
            key_x = core_x - step_x * WINDOW_X
            # Windows beyond the border have no queries: _tokens finds them outside of the padded map.
            y, x, query_ok, query_region = _tokens(
                block_y + step_y, phase_y, block_x + step_x, phase_x, query_y, query_x, H, W, windows_y, windows_x,
                shift_y, shift_x, dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
            query_ok = query_ok & (local < N)
            key_ok = (key_y >= -HALO_Y) & (key_y < WINDOW_Y + HALO_Y)
            key_ok = key_ok & (key_x >= -HALO_X) & (key_x < WINDOW_X + HALO_X)
            key_ok = key_ok & (inside if pad_k is None else column < N)
            valid = query_ok[:, None] & key_ok[None, :]
            offset = b * q_stride_b + y * q_stride_y + x * q_stride_x + head * q_stride_h
            q_tile = _load_rows(q, offset, query_ok, D, BLOCK_D, UPCAST)
            offset = b * grad_out_stride_b + y * grad_out_stride_y + x * grad_out_stride_x + head * grad_out_stride_h
            do_tile = _load_rows(grad_out, offset, query_ok, DV, BLOCK_DV, UPCAST)
            offset = (((b * H + y) * W + x) * heads + head) * DV
            out_tile = _load_rows(out, offset, query_ok, DV, BLOCK_DV, UPCAST)
            delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
            row_offset = ((b * heads + head) * H + y) * W + x
            row_lse = tl.load(lse + row_offset, mask=query_ok, other=0.0)
            if grad_lse is not None:
                delta -= tl.load(grad_lse + row_offset, mask=query_ok, other=0.0)
            q_norm = 1.0
            if logit_scale is not None:
                q_norm, q_free = _inverse_norm(q_tile)
            logits = _scores(q_tile, k_tile, q_norm, k_norm, factor, logit_scale is not None)
            if bias_table is not None:
                logits += _bias_tile(bias_table, head, query_y, query_x, key_y, key_x, valid, bias_stride_h,
                                     bias_stride_y, bias_stride_x, WINDOW_Y, WINDOW_X, HALO_Y, HALO_X)  # fmt: skip
            if SHIFTED:
                logits += tl.where(query_region[:, None] != key_region[None, :], mask_value, 0.0)
            p = tl.where(valid, tl.exp(logits - row_lse[:, None]), 0.0)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dv_tile = tl.dot(tl.trans(_operand(p, DTYPE, UPCAST)), do_tile, dv_tile, input_precision="ieee")
            if logit_scale is not None:
                q_tile = _operand(q_tile.to(tl.float32) * q_norm[:, None], DTYPE, UPCAST)
            dk_tile = tl.dot(tl.trans(_operand(ds, DTYPE, UPCAST)), q_tile, dk_tile, input_precision="ieee")

        dk_tile *= factor
        if logit_scale is not None:
            dk_tile = _normalize_backward(dk_tile, k_tile, k_norm, k_free)
        offset = ((b * H + y_k) * W + x_k) * (heads * (2 * D + DV))
        _store_rows(dqkv, offset + (heads + head) * D, inside, dk_tile, D, BLOCK_D)
        _store_rows(dqkv, offset + heads * 2 * D + head * DV, inside, dv_tile, DV, BLOCK_DV)
        if pad_k is not None:
            pad_k_sum += tl.sum(tl.where(outside[:, None], dk_tile, 0.0), axis=0)
            pad_v_sum += tl.sum(tl.where(outside[:, None], dv_tile, 0.0), axis=0)

    if pad_k is not None:
        slot = slot.to(tl.int64) * heads + head
        column_d = tl.arange(0, BLOCK_D)
        tl.store(partial_pad_k + slot * D + column_d, pad_k_sum, mask=column_d < D)
        column_dv = tl.arange(0, BLOCK_DV)
        tl.store(partial_pad_v + slot * DV + column_dv, pad_v_sum, mask=column_dv < DV)


@triton.jit(do_not_specialize=_SIZES)
def window_attention_bwd_bias_kernel(
    grad_out, grad_lse, q, k, v, bias_table, logit_scale, pad_k, pad_v, lse, out,  # as in the dq kernel
    partial_bias,  # [splits, h, OFFSETS_Y, OFFSETS_X, BLOCK, BLOCK] float32
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x, tiles, walk,
    q_stride_b, q_stride_y, q_stride_x, q_stride_h,
    k_stride_b, k_stride_y, k_stride_x, k_stride_h,
    v_stride_b, v_stride_y, v_stride_x, v_stride_h,
    grad_out_stride_b, grad_out_stride_y, grad_out_stride_x, grad_out_stride_h,
    bias_stride_h, bias_stride_y, bias_stride_x,
    scale, mask_value,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_BEFORE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums dS over a run of windows and over all pairs of rectangles (BLOCK_Y x BLOCK_X tokens) with one offset."""
    KEY_Y: tl.constexpr = WINDOW_Y + 2 * HALO_Y
    KEY_X: tl.constexpr = WINDOW_X + 2 * HALO_X
    QUERY_RECTS_Y: tl.constexpr = (WINDOW_Y + BLOCK_Y - 1) // BLOCK_Y
    QUERY_RECTS_X: tl.constexpr = (WINDOW_X + BLOCK_X - 1) // BLOCK_X
    KEY_RECTS_Y: tl.constexpr = (KEY_Y + BLOCK_Y - 1) // BLOCK_Y
    KEY_RECTS_X: tl.constexpr = (KEY_X + BLOCK_X - 1) // BLOCK_X
    OFFSETS_Y: tl.constexpr = QUERY_RECTS_Y + KEY_RECTS_Y - 1
    OFFSETS_X: tl.constexpr = QUERY_RECTS_X + KEY_RECTS_X - 1

    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    offset_x = pid % OFFSETS_X - (KEY_RECTS_X - 1)
    pid = pid // OFFSETS_X
    offset_y = pid % OFFSETS_Y - (KEY_RECTS_Y - 1)
    split = pid // OFFSETS_Y
    first = split.to(INDEX) * walk
    count = tl.minimum(tiles - first, walk).to(tl.int32)
    # Query rectangles whose key rectangle (query - offset) exists.
    first_y = tl.maximum(offset_y, 0)
    first_x = tl.maximum(offset_x, 0)
    rects_y = tl.minimum(QUERY_RECTS_Y, KEY_RECTS_Y + offset_y) - first_y
    rects_x = tl.minimum(QUERY_RECTS_X, KEY_RECTS_X + offset_x) - first_x
    rects = rects_y * rects_x

    row = tl.arange(0, BLOCK)
    rect_y = row // BLOCK_X
    rect_x = row - rect_y * BLOCK_X
    factor, scale_is_free = _load_scale(logit_scale, head, scale)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)

    for step in range(0, _loop_bound(count * rects)):
        window = step // rects
        rect = step - window * rects
        b, block_y, phase_y, block_x, phase_x = _split_window(
            first + window, windows_y, windows_x, dilation_y, dilation_x, INDEX)  # fmt: skip
        b = b.to(tl.int64)
        query_rect_y = first_y + rect // rects_x
        query_rect_x = first_x + rect % rects_x
        query_y = query_rect_y * BLOCK_Y + rect_y
        query_x = query_rect_x * BLOCK_X + rect_x
        key_y = (query_rect_y - offset_y) * BLOCK_Y + rect_y
        key_x = (query_rect_x - offset_x) * BLOCK_X + rect_x
        query_ok = (rect_y < BLOCK_Y) & (query_y < WINDOW_Y) & (query_x < WINDOW_X)
        key_ok = (rect_y < BLOCK_Y) & (key_y < KEY_Y) & (key_x < KEY_X)
        key_y -= HALO_Y
        key_x -= HALO_X

        y, x, inside, query_region = _tokens(
            block_y, phase_y, block_x, phase_x, query_y, query_x, H, W, windows_y, windows_x, shift_y, shift_x,
            dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
        query_ok = query_ok & inside
        offset = b * q_stride_b + y * q_stride_y + x * q_stride_x + head * q_stride_h
        q_tile = _load_rows(q, offset, query_ok, D, BLOCK_D, UPCAST)
        offset = b * grad_out_stride_b + y * grad_out_stride_y + x * grad_out_stride_x + head * grad_out_stride_h
        do_tile = _load_rows(grad_out, offset, query_ok, DV, BLOCK_DV, UPCAST)
        offset = (((b * H + y) * W + x) * heads + head) * DV
        out_tile = _load_rows(out, offset, query_ok, DV, BLOCK_DV, UPCAST)
        delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
        row_offset = ((b * heads + head) * H + y) * W + x
        row_lse = tl.load(lse + row_offset, mask=query_ok, other=0.0)
        if grad_lse is not None:
            delta -= tl.load(grad_lse + row_offset, mask=query_ok, other=0.0)

        y, x, inside, key_region = _tokens(
            block_y, phase_y, block_x, phase_x, key_y, key_x, H, W, windows_y, windows_x, shift_y, shift_x,
            dilation_y, dilation_x, WINDOW_Y, WINDOW_X, ROLL_BEFORE_PAD)  # fmt: skip
        outside = key_ok & (inside == 0)
        inside = key_ok & inside
        if pad_k is None:
            key_ok = inside
        offset = b * k_stride_b + y * k_stride_y + x * k_stride_x + head * k_stride_h
        k_tile = _load_keys(k, offset, inside, outside, pad_k, head, D, BLOCK_D, UPCAST)
        offset = b * v_stride_b + y * v_stride_y + x * v_stride_x + head * v_stride_h
        v_tile = _load_keys(v, offset, inside, outside, pad_v, head, DV, BLOCK_DV, UPCAST)

        q_norm = 1.0
        k_norm = 1.0
        if logit_scale is not None:
            q_norm, q_free = _inverse_norm(q_tile)
            k_norm, k_free = _inverse_norm(k_tile)
        valid = query_ok[:, None] & key_ok[None, :]
        logits = _scores(q_tile, k_tile, q_norm, k_norm, factor, logit_scale is not None)
        logits += _bias_tile(bias_table, head, query_y, query_x, key_y, key_x, valid, bias_stride_h, bias_stride_y,
                             bias_stride_x, WINDOW_Y, WINDOW_X, HALO_Y, HALO_X)  # fmt: skip
        if SHIFTED:
            logits += tl.where(query_region[:, None] != key_region[None, :], mask_value, 0.0)
        p = tl.where(valid, tl.exp(logits - row_lse[:, None]), 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        acc += p * (dp - delta[:, None])

    slot = tl.program_id(0) // heads  # (split, offset_y, offset_x)
    slot = (slot // (OFFSETS_Y * OFFSETS_X) * heads + head) * (OFFSETS_Y * OFFSETS_X) + slot % (OFFSETS_Y * OFFSETS_X)
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


# ------------------------------------------------------------------------------------------------------------ launchers


def _pair(value):
    """int, [int] or (int, int) -> (int, int)."""
    if isinstance(value, int):
        return value, value
    value = tuple(value)
    return value * 2 if len(value) == 1 else value


def _tile_limit(q, v):
    """Largest tile side: 64 rows of at most 256 bytes, fewer of longer rows: four tiles fit in shared memory."""
    row_bytes = max(next_power_of_two(q.shape[-1]), next_power_of_two(v.shape[-1])) * q.element_size()
    return max(16, min(64, next_power_of_two(64 * 256 // max(row_bytes, 1))))


def _compile_options(kernel, block_m, block_n, element_size, key_blocks):
    """(num_warps, num_stages), chosen by what ahead-of-time compilation reports as spills.

    16 scores a thread of a 64 x 64 tile; float32 runs on the FMA units with its operands in registers, so it takes 8
    unless the program loops over key blocks. Loads are pipelined where one loop carries few registers.
    """
    loops = kernel is window_attention_bwd_dq_kernel or (kernel is window_attention_fwd_kernel and key_blocks > 1)
    if element_size == 4:
        scores, num_stages = (512, 2) if loops else (256, 1)
    else:
        scores, num_stages = 512, 2 if kernel is window_attention_fwd_kernel else 1
    return max(1, block_m * block_n // scores), num_stages


class _Problem:
    """The sizes of a call, the arguments that all kernels share, and the block sizes."""

    def __init__(self, q, k, v, bias_table, logit_scale, pad_k, pad_v, window, shift, dilation, halo, scale, mask_value,
                 roll_before_pad):  # fmt: skip
        (self.window_y, self.window_x), (shift_y, shift_x) = _pair(window), _pair(shift)
        (dilation_y, dilation_x), (self.halo_y, self.halo_x) = _pair(dilation), _pair(halo)
        self.B, self.H, self.W, self.heads, self.d = q.shape
        self.dv = v.shape[-1]
        self.has_pad = pad_k is not None
        self.has_bias = bias_table is not None
        self.dilation = dilation_y, dilation_x
        self.windows_y = cdiv(self.H, self.window_y * dilation_y) * dilation_y
        self.windows_x = cdiv(self.W, self.window_x * dilation_x) * dilation_x
        self.total_windows = self.B * self.windows_y * self.windows_x
        self.queries = self.window_y * self.window_x
        self.key_y, self.key_x = self.window_y + 2 * self.halo_y, self.window_x + 2 * self.halo_x
        self.keys = self.key_y * self.key_x
        self.table = self.window_y + self.key_y - 1, self.window_x + self.key_x - 1
        self.element_size = q.element_size()

        limit = _tile_limit(q, v)
        has_halo = self.halo_y > 0 or self.halo_x > 0
        self.pack = 1 if has_halo else max(1, 16 // self.queries)
        self.block_m = max(16, min(limit, next_power_of_two(self.pack * self.queries)))
        self.block_n = max(16, min(limit, next_power_of_two(self.pack * self.keys)))
        self.fused = not has_halo and self.queries <= limit

        self.shared = {
            "q": q, "k": k, "v": v, "bias_table": bias_table,
            "logit_scale": logit_scale if logit_scale is None else logit_scale.contiguous(),
            "pad_k": pad_k if pad_k is None else pad_k.contiguous(),
            "pad_v": pad_v if pad_v is None else pad_v.contiguous(),
            "heads": self.heads, "H": self.H, "W": self.W, "windows_y": self.windows_y, "windows_x": self.windows_x,
            "shift_y": shift_y, "shift_x": shift_x, "dilation_y": dilation_y, "dilation_x": dilation_x,
            "scale": float(self.d**-0.5 if scale is None else scale), "mask_value": float(mask_value),
            "D": self.d, "DV": self.dv,
            "BLOCK_D": max(16, next_power_of_two(self.d)), "BLOCK_DV": max(16, next_power_of_two(self.dv)),
            "WINDOW_Y": self.window_y, "WINDOW_X": self.window_x,
            "SHIFTED": shift_y > 0 or shift_x > 0, "ROLL_BEFORE_PAD": bool(roll_before_pad),
            # The walk may run past the last window by a tile.
            "INDEX": tl.int64 if 4 * self.total_windows > MAX_GRID else tl.int32, "UPCAST": INTERPRETED,
        }  # fmt: skip
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            self._add_strides(name, tensor)
        if self.has_bias and sum(n * s for n, s in zip(self.table, bias_table.stride()[1:], strict=True)) > MAX_GRID:
            bias_table = self.shared["bias_table"] = bias_table.contiguous()  # see _bias_tile
        names = "bias_stride_h", "bias_stride_y", "bias_stride_x"
        strides = bias_table.stride() if self.has_bias else (0, 0, 0)
        self.shared.update(zip(names, strides, strict=True))

    def _add_strides(self, name, tensor):
        for axis, stride in zip("byxh", tensor.stride(), strict=False):
            self.shared[f"{name}_stride_{axis}"] = stride

    def launch(self, kernel, programs_per_head, **extra):
        """A launch of `kernel` with the shared arguments it names, and `extra`."""
        available = {**self.shared, **extra}
        args = {name: available[name] for name in kernel.arg_names}
        block_m = extra.get("BLOCK", extra.get("BLOCK_M"))
        block_n = extra.get("BLOCK", extra.get("BLOCK_N"))
        num_warps, num_stages = _compile_options(
            kernel, block_m, block_n, self.element_size, cdiv(self.pack * self.keys, self.block_n))  # fmt: skip
        return Launch(kernel, programs_per_head * self.heads, args, num_warps, num_stages)

    def split(self, tiles, programs_per_split=1, partial_bytes=0, max_walk=None):
        """(splits, walk): cuts `tiles` into runs, so many that `programs_per_split` programs per run and head make
        TARGET_PROGRAMS together, unless their partial sums, `partial_bytes` per run and head, would pass PARTIAL_BYTES.
        """
        splits = cdiv(TARGET_PROGRAMS, self.heads * programs_per_split)
        if max_walk is not None:
            splits = max(splits, cdiv(tiles, max_walk))
        if partial_bytes:
            splits = min(splits, max(1, PARTIAL_BYTES // (self.heads * partial_bytes)))
        splits = max(1, min(splits, tiles, MAX_GRID // (self.heads * programs_per_split)))
        walk = cdiv(tiles, splits)
        return cdiv(tiles, walk), walk


def _plan_forward(
    q, k, v, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, *,
    window, shift=0, dilation=1, halo=0, scale=None, mask_value=-100.0, roll_before_pad=False,
):  # fmt: skip
    """((out, lse), launches). Works on meta tensors."""
    problem = _Problem(q, k, v, bias_table, logit_scale, pad_k, pad_v, window, shift, dilation, halo, scale, mask_value,
                       roll_before_pad)  # fmt: skip
    p = problem
    out = torch.empty((p.B, p.H, p.W, p.heads, p.dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((p.B, p.heads, p.H, p.W), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return (out, lse), []
    tiles = cdiv(p.total_windows, p.pack)
    m_blocks = cdiv(p.pack * p.queries, p.block_m)
    splits, walk = p.split(tiles, m_blocks, max_walk=MAX_FORWARD_WALK)
    launch = p.launch(
        window_attention_fwd_kernel, splits * m_blocks, out=out, lse=lse, total_windows=p.total_windows, tiles=tiles,
        walk=walk, HALO_Y=p.halo_y, HALO_X=p.halo_x, PACK=p.pack, BLOCK_M=p.block_m, BLOCK_N=p.block_n,
    )  # fmt: skip
    return (out, lse), [launch]


def _plan_backward(
    grad_out, grad_lse, q, k, v, out, lse, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, *,
    window, shift=0, dilation=1, halo=0, scale=None, mask_value=-100.0, roll_before_pad=False,
):  # fmt: skip
    """((dqkv, dbias_table, dlogit_scale, dpad_k, dpad_v), launches). Works on meta tensors."""
    problem = _Problem(q, k, v, bias_table, logit_scale, pad_k, pad_v, window, shift, dilation, halo, scale, mask_value,
                       roll_before_pad)  # fmt: skip
    p = problem
    dqkv = torch.empty((p.B, p.H, p.W, p.heads * (2 * p.d + p.dv)), dtype=q.dtype, device=q.device)

    def gradient(x, dtype):
        return q.new_empty(0, dtype=dtype) if x is None else q.new_empty(x.shape, dtype=x.dtype)

    optional = [gradient(bias_table, torch.float32), gradient(logit_scale, torch.float32), gradient(pad_k, q.dtype),
                gradient(pad_v, q.dtype)]  # fmt: skip
    dbias_table, dlogit_scale, dpad_k, dpad_v = optional
    if lse.numel() == 0:
        for x in optional:
            x.zero_()
        return (dqkv, *optional), []

    p._add_strides("grad_out", grad_out)
    shared = {
        "grad_out": grad_out, "grad_lse": None if grad_lse is None else grad_lse.contiguous(), "lse": lse.contiguous(),
        "dqkv": dqkv,
    }  # fmt: skip

    def scratch(*shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    launches = []
    partial_scale = partial_pad_k = partial_pad_v = partial_bias = None
    pad_bytes = 4 * (p.d + p.dv) if p.has_pad else 0
    scale_bytes = 4 if logit_scale is not None else 0
    if p.fused:
        tiles = cdiv(p.total_windows, p.pack)
        block = p.block_m
        rect_y, rect_x, offsets_y, offsets_x, key_rects_y, key_rects_x = p.window_y, p.window_x, 1, 1, 1, 1
        bias_bytes = 4 * block * block if p.has_bias else 0
        splits, walk = p.split(tiles, 1, bias_bytes + scale_bytes + pad_bytes)
        bias_splits = scale_slots = pad_slots = splits
        if p.has_bias:
            partial_bias = scratch(splits, p.heads, block, block)
        if logit_scale is not None:
            partial_scale = scratch(splits, p.heads)
        if p.has_pad:
            partial_pad_k, partial_pad_v = scratch(splits, p.heads, p.d), scratch(splits, p.heads, p.dv)
        launches.append(p.launch(
            window_attention_bwd_fused_kernel, splits, **shared, partial_bias=partial_bias,
            partial_scale=partial_scale, partial_pad_k=partial_pad_k,
            partial_pad_v=partial_pad_v, total_windows=p.total_windows, tiles=tiles, walk=walk,
            PACK=p.pack, BLOCK=block,
        ))  # fmt: skip
    else:
        shared["out"] = out.contiguous()
        blocks = {"HALO_Y": p.halo_y, "HALO_X": p.halo_x}
        block_m = max(16, min(p.block_m, next_power_of_two(p.queries)))

        m_blocks = cdiv(p.queries, block_m)
        splits, walk = p.split(p.total_windows, m_blocks, m_blocks * scale_bytes)
        scale_slots = splits * m_blocks
        if logit_scale is not None:
            partial_scale = scratch(scale_slots, p.heads)
        launches.append(p.launch(
            window_attention_bwd_dq_kernel, splits * m_blocks, **shared, partial_scale=partial_scale,
            tiles=p.total_windows, walk=walk, **blocks, BLOCK_M=block_m, BLOCK_N=p.block_n,
        ))  # fmt: skip

        # With pads, the ring of windows around the map owns the halo tokens out there.
        ring = [0, 0]
        if p.has_pad:
            ring = [2 * cdiv(p.halo_y, p.window_y) * p.dilation[0], 2 * cdiv(p.halo_x, p.window_x) * p.dilation[1]]
        tiles = p.B * (p.windows_y + ring[0]) * (p.windows_x + ring[1])
        splits, walk = p.split(tiles, m_blocks, m_blocks * pad_bytes)
        pad_slots = splits * m_blocks
        if p.has_pad:
            partial_pad_k, partial_pad_v = scratch(pad_slots, p.heads, p.d), scratch(pad_slots, p.heads, p.dv)
        launches.append(p.launch(
            window_attention_bwd_dkv_kernel, splits * m_blocks, **shared, partial_pad_k=partial_pad_k,
            partial_pad_v=partial_pad_v, tiles=tiles, walk=walk, **blocks, BLOCK_M=block_m, BLOCK_N=block_m,
        ))  # fmt: skip

        if p.has_bias:
            block = max(p.block_m, p.block_n)
            rect_x = min(p.window_x, block)
            rect_y = min(p.window_y, block // rect_x)
            key_rects_y, key_rects_x = cdiv(p.key_y, rect_y), cdiv(p.key_x, rect_x)
            offsets_y = cdiv(p.window_y, rect_y) + key_rects_y - 1
            offsets_x = cdiv(p.window_x, rect_x) + key_rects_x - 1
            offsets = offsets_y * offsets_x
            bias_splits, walk = p.split(p.total_windows, offsets, 4 * offsets * block * block)
            partial_bias = scratch(bias_splits, p.heads, offsets_y, offsets_x, block, block)
            launches.append(p.launch(
                window_attention_bwd_bias_kernel, bias_splits * offsets, **shared, partial_bias=partial_bias,
                tiles=p.total_windows, walk=walk, **blocks, BLOCK=block, BLOCK_Y=rect_y, BLOCK_X=rect_x,
            ))  # fmt: skip

    if p.has_bias:
        if bias_splits > 1:
            launches.append(sum_partials(partial_bias, partial_bias[0], bias_splits))
        table_block = 64 * SCALE
        args = {
            "tiles": partial_bias, "dbias_table": dbias_table, "heads": p.heads,
            "TABLE_Y": p.table[0], "TABLE_X": p.table[1], "KEY_Y": p.key_y, "KEY_X": p.key_x,
            "KEY_RECTS_Y": key_rects_y, "KEY_RECTS_X": key_rects_x, "OFFSETS_Y": offsets_y, "OFFSETS_X": offsets_x,
            "PACK": p.pack, "BLOCK": block, "BLOCK_Y": rect_y, "BLOCK_X": rect_x,
            "BLOCK_ROWS": min(16 * SCALE, block), "BLOCK_TABLE": table_block,
        }  # fmt: skip
        grid = p.heads * cdiv(p.table[0] * p.table[1], table_block)
        launches.append(Launch(window_attention_bwd_table_kernel, grid, args, num_warps=4, num_stages=1))
    if logit_scale is not None:
        launches.append(sum_partials(partial_scale, dlogit_scale, scale_slots))
    if p.has_pad:
        launches.append(sum_partials(partial_pad_k, dpad_k, pad_slots))
        launches.append(sum_partials(partial_pad_v, dpad_v, pad_slots))
    return (dqkv, dbias_table, dlogit_scale, dpad_k, dpad_v), launches


def forward(
    q, k, v, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, *,
    window, shift=0, dilation=1, halo=0, scale=None, mask_value=-100.0, roll_before_pad=False,
):  # fmt: skip
    """effvit::window_attention: (out, lse). The arguments must have been validated."""
    results, launches = _plan_forward(
        q, k, v, bias_table, logit_scale, pad_k, pad_v, window=window, shift=shift, dilation=dilation, halo=halo,
        scale=scale, mask_value=mask_value, roll_before_pad=roll_before_pad)  # fmt: skip
    run(launches, q.device)
    return results


def backward(
    grad_out, grad_lse, q, k, v, out, lse, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, *,
    window, shift=0, dilation=1, halo=0, scale=None, mask_value=-100.0, roll_before_pad=False,
):  # fmt: skip
    """effvit::window_attention_backward: (dqkv, dbias_table, dlogit_scale, dpad_k, dpad_v)."""
    results, launches = _plan_backward(
        grad_out, grad_lse, q, k, v, out, lse, bias_table, logit_scale, pad_k, pad_v, window=window, shift=shift,
        dilation=dilation, halo=halo, scale=scale, mask_value=mask_value, roll_before_pad=roll_before_pad)  # fmt: skip
    run(launches, q.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""

    def case(name, dtype, side, window, *, shift=0, halo=0, heads=4, d=32, cosine=False, pads=False):
        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        geometry = {"window": window, "shift": shift, "halo": halo}
        q, k, v = meta(8, side, side, 3, heads, d).unbind(3)
        sides = [2 * (window + halo) - 1] * 2
        optional = (
            meta(heads, *sides, dtype=torch.float32), meta(heads, dtype=torch.float32) if cosine else None,
            meta(heads, d) if pads else None, meta(heads, d) if pads else None,
        )  # fmt: skip
        (out, lse), launches = _plan_forward(q, k, v, *optional, **geometry)
        _, backward_launches = _plan_backward(out, None, q, k, v, out, lse, *optional, **geometry)
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        for launch in launches + backward_launches:
            yield launch.aot(f"{name}-{short}")

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        yield from case("window7-shift", dtype, 56, 7, shift=3)
        yield from case("window16", dtype, 64, 16)
    for dtype in (torch.bfloat16, torch.float32):
        yield from case("window7-cosine-pads", dtype, 60, 7, shift=3, cosine=True, pads=True)
        yield from case("window8-halo2-pads", dtype, 64, 8, halo=2, pads=True)
