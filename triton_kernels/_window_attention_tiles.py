"""What the kernels of windowed attention share: where a window's tokens lie, their tiles, the scores and gradients."""

import math
from typing import Any, NamedTuple

from ._common import device_function, tl
from ._tiles import _divide, _load_tile, _load_vector, _map_offset, _share_of, _store_tile

_LOGIT_SCALE_MAX = tl.constexpr(math.log(100.0))


class Inputs(NamedTuple):
    """The tensor arguments of the op."""

    q: Any  # FeatureMap [B, H, W, h, d]
    k: Any  # FeatureMap [B, H, W, h, d]
    v: Any  # FeatureMap [B, H, W, h, dv]
    bias_table: Any  # Table, or None
    logit_scale: Any  # [h], contiguous, or None
    pad_k: Any  # [h, d], contiguous, or None
    pad_v: Any  # [h, dv], contiguous, or None


class Outputs(NamedTuple):
    """Results of the forward and their gradients."""

    out: Any  # [B, H, W, h, dv], contiguous
    lse: Any  # [B, h, H, W] float32, contiguous
    grad_out: Any  # FeatureMap [B, H, W, h, dv]
    grad_lse: Any  # [B, h, H, W] float32, contiguous, or None


class Gradients(NamedTuple):
    """dq, dk and dv, contiguous: [B, H, W, h, d or dv] each; or dq is all of them, [B, H, W, h*(2*d+dv)], side by
    side, and the others are None. Strides that are known in part when compiled save registers."""

    dq: Any
    dk: Any
    dv: Any


class Table(NamedTuple):
    """The bias table [h, 2*wh-1+2*halo_h, 2*ww-1+2*halo_w]."""

    pointer: Any
    stride_h: Any
    stride_y: Any
    stride_x: Any


class Geometry(NamedTuple):
    """The map and its windows; changes from call to call."""

    heads: Any
    H: Any
    W: Any
    windows_y: Any  # over all dilation phases
    windows_x: Any
    shift_y: Any
    shift_x: Any
    dilation_y: Any
    dilation_x: Any


# Sizes that change from call to call; specialising on their values would only recompile.
SIZES = [*Geometry._fields, "total_windows", "tiles", "walk"]


class Statics(NamedTuple):
    """What is compiled in."""

    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    WINDOW_Y: int
    WINDOW_X: int
    HALO_Y: int
    HALO_X: int
    SHIFTED: bool
    ROLL_BEFORE_PAD: bool
    INDEX: Any  # type of window numbers


class Window(NamedTuple):
    """A window's image, and its block and dilation phase along each axis."""

    b: Any
    block_y: Any
    phase_y: Any
    block_x: Any
    phase_x: Any


class Place(NamedTuple):
    """Tokens of a window on the map. b, y and x are int64; a shift's mask is between tokens of different regions."""

    b: Any
    y: Any
    x: Any
    inside: Any  # the map
    region: Any
    local_y: Any  # position in the window of the queries, counted from its first query
    local_x: Any


class Queries(NamedTuple):
    """Tiles of a block of queries in the backward; norm and free: see _inverse_norm."""

    q: Any
    grad_out: Any
    delta: Any  # sum of P dP of every row
    lse: Any
    grad_lse: Any
    norm: Any
    free: Any


class Keys(NamedTuple):
    """Tiles of a block of keys in the backward."""

    k: Any
    v: Any
    norm: Any
    free: Any


# ---------------------------------------------------------------------------------------------------- index arithmetic


@device_function
def _program(heads, tiles, walk, BLOCKS: tl.constexpr, S: tl.constexpr):
    """(head, slot, block, first tile, number of tiles) of this program, one of [splits, BLOCKS, heads]; slot numbers
    (split, block)."""
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    slot = pid // heads
    first, count = _share_of(tiles, walk, slot // BLOCKS, S.INDEX)
    return head, slot, slot % BLOCKS, first, count


@device_function
def _window(flat, g, S: tl.constexpr, RING_Y: tl.constexpr = 0, RING_X: tl.constexpr = 0):
    """The window of a number over batch and map; RING: so many blocks beyond each border are counted too."""
    windows_x = g.windows_x + 2 * RING_X * g.dilation_x
    per_image = (g.windows_y + 2 * RING_Y * g.dilation_y).to(S.INDEX) * windows_x
    b, window = _divide(flat.to(S.INDEX), per_image)
    window_y, window_x = _divide(window, windows_x)
    block_y, phase_y = _divide(window_y, g.dilation_y)
    block_x, phase_x = _divide(window_x, g.dilation_x)
    return Window(b.to(tl.int64), block_y - RING_Y, phase_y, block_x - RING_X, phase_x)


@device_function
def _locate_on_axis(
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
def _locate(window, local_y, local_x, g, S: tl.constexpr):
    """Where tokens of a window lie; those of its halo have positions below 0 or beyond its size."""
    y, region_y = _locate_on_axis(window.block_y, window.phase_y, local_y, g.H, g.windows_y, g.shift_y, g.dilation_y,
                                  S.WINDOW_Y, S.ROLL_BEFORE_PAD)  # fmt: skip
    x, region_x = _locate_on_axis(window.block_x, window.phase_x, local_x, g.W, g.windows_x, g.shift_x, g.dilation_x,
                                  S.WINDOW_X, S.ROLL_BEFORE_PAD)  # fmt: skip
    return Place(
        window.b, y.to(tl.int64), x.to(tl.int64), (y >= 0) & (x >= 0), region_y * 3 + region_x, local_y, local_x
    )


@device_function
def _key_position(key, S: tl.constexpr):
    """Number of a window's key, halo included -> its position in the window."""
    KEY_X: tl.constexpr = S.WINDOW_X + 2 * S.HALO_X
    return key // KEY_X - S.HALO_Y, key % KEY_X - S.HALO_X


# --------------------------------------------------------------------------------------------------------------- tiles


@device_function
def _load_places(x, at, ok, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return _load_tile(x.pointer, _map_offset(x, at.b, at.y, at.x, head), ok, tl.arange(0, BLOCK_D), D)


@device_function
def _position(at, g):
    """Number of a place over batch and map. Rows of contiguous tensors are found by it: strides that are known when
    compiling, in part, take fewer registers."""
    return (at.b * g.H + at.y) * g.W + at.x


@device_function
def _store_gradient(gradients, name: tl.constexpr, head, at, ok, value, g, S: tl.constexpr):
    """Rows of dq, dk or dv, which `name` says."""
    D: tl.constexpr = S.DV if name == "dv" else S.D
    BLOCK_D: tl.constexpr = S.BLOCK_DV if name == "dv" else S.BLOCK_D
    if gradients.dk is None:
        first = head * D if name == "dq" else (g.heads + head) * D if name == "dk" else g.heads * 2 * S.D + head * D
        offset = _position(at, g) * (g.heads * (2 * S.D + S.DV)) + first
        _store_tile(gradients.dq, offset, ok, tl.arange(0, BLOCK_D), value, D)
    else:
        pointer = gradients.dq if name == "dq" else gradients.dk if name == "dk" else gradients.dv
        _store_tile(pointer, _position(at, g) * (g.heads * D) + head * D, ok, tl.arange(0, BLOCK_D), value, D)


@device_function
def _statistic(x, at, head, g):
    """Pointers into lse or its gradient."""
    return x + ((at.b * g.heads + head) * g.H + at.y) * g.W + at.x


@device_function
def _load_keys(x, pad, at, exists, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of k or v. Keys that exist outside of the map hold pad[head], where there is a pad."""
    tile = _load_places(x, at, exists & at.inside, head, D, BLOCK_D)
    if pad is not None:
        row = _load_vector(pad + head * D, tl.arange(0, BLOCK_D), D)
        tile = tl.where((exists & (at.inside == 0))[:, None], row[None, :], tile)
    return tile


@device_function
def _attended(exists, at, pad):
    """Keys that queries see: without a pad those on the map."""
    return exists & at.inside if pad is None else exists


# -------------------------------------------------------------------------------------------------------------- scores


@device_function
def _inverse_norm(x, logit_scale):
    """1 / max(|row|, 1e-12), and whether the norm was not clamped; of cosine attention only."""
    if logit_scale is None:
        return 1.0, 1.0
    else:
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
        return scale, 1.0
    else:
        tau = tl.load(logit_scale + head).to(tl.float32)
        return tl.exp(tl.minimum(tau, _LOGIT_SCALE_MAX)), tl.where(tau > _LOGIT_SCALE_MAX, 0.0, 1.0)


@device_function
def _bias_tile(table, head, query_y, query_x, key_y, key_x, valid, S: tl.constexpr):
    """table[head, query - key] for positions in the window; 0 where not `valid`. None without a table."""
    if table is not None:
        # 32-bit offsets inside a head (the launcher sees to it): a tile of 64-bit ones takes half of the registers.
        q_offset = (query_y + (S.WINDOW_Y - 1 + S.HALO_Y)) * table.stride_y
        q_offset = q_offset + (query_x + (S.WINDOW_X - 1 + S.HALO_X)) * table.stride_x
        k_offset = key_y * table.stride_y + key_x * table.stride_x
        pointers = table.pointer + head * table.stride_h + (q_offset[:, None] - k_offset[None, :])
        return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@device_function
def _scores(q, k, q_norm, k_norm, factor, NORMALIZED: tl.constexpr):
    """factor * q kᵀ in float32, or factor * q̂ k̂ᵀ: normalising after the product keeps the operands exact."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    return s * (q_norm * factor)[:, None] * k_norm[None, :] if NORMALIZED else s * factor


@device_function
def _add_bias(s, bias, query_region, key_region, mask_value, SHIFTED: tl.constexpr):
    """Scores -> logits."""
    if bias is not None:
        s += bias
    if SHIFTED:
        s += tl.where(query_region[:, None] != key_region[None, :], mask_value, 0.0)
    return s


# ------------------------------------------------------------------------------------------------------------ gradients


@device_function
def _load_queries(x, y, at, ok, head, g, S: tl.constexpr):
    """Queries of Inputs x and Outputs y."""
    q = _load_places(x.q, at, ok, head, S.D, S.BLOCK_D)
    grad_out = _load_places(y.grad_out, at, ok, head, S.DV, S.BLOCK_DV)
    offset = (_position(at, g) * g.heads + head) * S.DV
    out = _load_tile(y.out, offset, ok, tl.arange(0, S.BLOCK_DV), S.DV)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(_statistic(y.lse, at, head, g), mask=ok, other=0.0)
    grad_lse = 0.0
    if y.grad_lse is not None:
        grad_lse = tl.load(_statistic(y.grad_lse, at, head, g), mask=ok, other=0.0)
        delta -= grad_lse
    norm, free = _inverse_norm(q, x.logit_scale)
    return Queries(q, grad_out, delta, lse, grad_lse, norm, free)


@device_function
def _load_key_pair(x, at, exists, head, S: tl.constexpr):
    """Keys of Inputs x."""
    k = _load_keys(x.k, x.pad_k, at, exists, head, S.D, S.BLOCK_D)
    v = _load_keys(x.v, x.pad_v, at, exists, head, S.DV, S.BLOCK_DV)
    norm, free = _inverse_norm(k, x.logit_scale)
    return Keys(k, v, norm, free)


@device_function
def _score_gradients(x, queries, query_at, keys, key_at, valid, head, factor, mask_value, S: tl.constexpr):
    """(scores, probabilities, gradients of the scores) of a block of queries and a block of keys."""
    s = _scores(queries.q, keys.k, queries.norm, keys.norm, factor, x.logit_scale is not None)
    bias = _bias_tile(x.bias_table, head, query_at.local_y, query_at.local_x, key_at.local_y, key_at.local_x, valid, S)
    logits = _add_bias(s, bias, query_at.region, key_at.region, mask_value, S.SHIFTED)
    p = tl.where(valid, tl.exp(logits - queries.lse[:, None]), 0.0)
    dp = tl.dot(queries.grad_out, tl.trans(keys.v), input_precision="ieee")
    return s, p, p * (dp - queries.delta[:, None])


@device_function
def _store_pad_sums(partial_pad_k, partial_pad_v, slot, k_sum, v_sum, S: tl.constexpr):
    """The sums of a program, numbered by slot, over the gradients of keys outside of the map."""
    column = tl.arange(0, S.BLOCK_D)
    tl.store(partial_pad_k + slot * S.D + column, k_sum, mask=column < S.D)
    column = tl.arange(0, S.BLOCK_DV)
    tl.store(partial_pad_v + slot * S.DV + column, v_sum, mask=column < S.DV)
