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

import torch

from ._common import MAX_GRID, SCALE, Launch, _loop_bound, cdiv, next_power_of_two, run, sum_partials, tl, triton, tuned
from ._tiles import _divide, _rounded, _store_tile, feature_map
from ._window_attention_backward import (
    window_attention_bwd_bias_kernel,
    window_attention_bwd_dkv_kernel,
    window_attention_bwd_dq_kernel,
    window_attention_bwd_fused_kernel,
    window_attention_bwd_table_kernel,
)
from ._window_attention_tiles import (
    SIZES,
    Geometry,
    Gradients,
    Inputs,
    Outputs,
    Statics,
    Table,
    _add_bias,
    _attended,
    _bias_tile,
    _inverse_norm,
    _key_position,
    _load_keys,
    _load_places,
    _load_scale,
    _locate,
    _position,
    _program,
    _scores,
    _statistic,
    _window,
)

# Scratch of the backward: enough for 512 register tiles of 64 x 64.
PARTIAL_BYTES = 8 << 20
# About this many programs fill any GPU a few times over; beyond it a program walks several windows.
TARGET_PROGRAMS = 4096
# A forward program walks at most this many tiles: enough to amortise the bias tile, short enough to balance the tail.
MAX_FORWARD_WALK = 8


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SIZES)
def window_attention_fwd_kernel(
    q, k, v, bias_table, logit_scale, pad_k, pad_v,  # Inputs
    out,  # [B, H, W, h, dv], contiguous
    lse,  # [B, h, H, W] float32, contiguous
    heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x,
    total_windows, tiles, walk, scale, mask_value,
    S: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a head, a block of queries and a run of tiles of PACK windows."""
    N: tl.constexpr = S.WINDOW_Y * S.WINDOW_X
    M: tl.constexpr = (S.WINDOW_Y + 2 * S.HALO_Y) * (S.WINDOW_X + 2 * S.HALO_X)
    ONE_KEY_BLOCK: tl.constexpr = PACK * M <= BLOCK_N
    BLOCK_DV: tl.constexpr = S.BLOCK_DV
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty

    g = Geometry(heads, H, W, windows_y, windows_x, shift_y, shift_x, dilation_y, dilation_x)
    head, slot, block, first, count = _program(heads, tiles, walk, (PACK * N + BLOCK_M - 1) // BLOCK_M, S)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_pack, query_local = _divide(row, N)
    query_y, query_x = _divide(query_local, S.WINDOW_X)
    query_in_tile = row < PACK * N
    factor, scale_is_free = _load_scale(logit_scale, head, scale)

    column = tl.arange(0, BLOCK_N)
    if ONE_KEY_BLOCK:
        key_pack, key_local = _divide(column, M)
        key_y, key_x = _key_position(key_local, S)
        key_in_tile = column < PACK * M
        pair = query_in_tile[:, None] & key_in_tile[None, :]
        if PACK > 1:
            pair = pair & (query_pack[:, None] == key_pack[None, :])
        bias = _bias_tile(bias_table, head, query_y, query_x, key_y, key_x, pair, S)

    for step in range(0, _loop_bound(count)):
        tile = first + step
        flat = tile * PACK
        if PACK > 1:
            flat = flat + query_pack
        window = _window(flat, g, S)
        query_at = _locate(window, query_y, query_x, g, S)
        query_ok = query_in_tile & query_at.inside & (flat < total_windows)
        q_tile = _load_places(q, query_at, query_ok, head, S.D, S.BLOCK_D)
        q_norm, q_free = _inverse_norm(q_tile, logit_scale)

        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for start in range(0, PACK * M, BLOCK_N):
            if not ONE_KEY_BLOCK:
                key_y, key_x = _key_position(start + column, S)
                key_in_tile = start + column < M
                pair = query_in_tile[:, None] & key_in_tile[None, :]
                bias = _bias_tile(bias_table, head, query_y, query_x, key_y, key_x, pair, S)
            key_exists = key_in_tile
            if PACK > 1:
                key_flat = tile * PACK + key_pack
                key_at = _locate(_window(key_flat, g, S), key_y, key_x, g, S)
                key_exists = key_exists & (key_flat < total_windows)
            else:
                key_at = _locate(window, key_y, key_x, g, S)
            k_tile = _load_keys(k, pad_k, key_at, key_exists, head, S.D, S.BLOCK_D)
            k_norm, k_free = _inverse_norm(k_tile, logit_scale)
            s = _scores(q_tile, k_tile, q_norm, k_norm, factor, logit_scale is not None)
            s = _add_bias(s, bias, query_at.region, key_at.region, mask_value, S.SHIFTED)
            s = tl.where(pair & _attended(key_exists, key_at, pad_k)[None, :], s, float("-inf"))

            # A row without any key so far (a padding query, or one whose first key blocks are outside) stays finite.
            new_maximum = tl.maximum(maximum, tl.max(s, axis=1))
            finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            p = tl.exp(s - finite[:, None])
            correction = tl.exp(maximum - finite)
            total = total * correction + tl.sum(p, axis=1)
            maximum = new_maximum
            v_tile = _load_keys(v, pad_v, key_at, key_exists, head, S.DV, S.BLOCK_DV)
            acc = acc * correction[:, None]
            acc = tl.dot(_rounded(p, DTYPE), v_tile, acc, input_precision="ieee")

        safe = tl.where(total == 0.0, 1.0, total)
        offset = (_position(query_at, g) * heads + head) * S.DV
        _store_tile(out, offset, query_ok, tl.arange(0, S.BLOCK_DV), acc / safe[:, None], S.DV)
        tl.store(_statistic(lse, query_at, head, g), maximum + tl.log(safe), mask=query_ok)


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
    return tuned(max(16, min(64, next_power_of_two(64 * 256 // max(row_bytes, 1)))), small=16)


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

    def __init__(self, q, k, v, bias_table=None, logit_scale=None, pad_k=None, pad_v=None, *, window, shift=0,
                 dilation=1, halo=0, scale=None, mask_value=-100.0, roll_before_pad=False):  # fmt: skip
        (self.window_y, self.window_x), shift = _pair(window), _pair(shift)
        self.dilation, (self.halo_y, self.halo_x) = _pair(dilation), _pair(halo)
        self.B, self.H, self.W, self.heads, self.d = q.shape
        self.dv, self.device, self.element_size = v.shape[-1], q.device, q.element_size()
        self.has_bias, self.has_pad, self.is_cosine = bias_table is not None, pad_k is not None, logit_scale is not None
        self.windows_y = cdiv(self.H, self.window_y * self.dilation[0]) * self.dilation[0]
        self.windows_x = cdiv(self.W, self.window_x * self.dilation[1]) * self.dilation[1]
        self.total_windows = self.B * self.windows_y * self.windows_x
        self.queries = self.window_y * self.window_x
        self.key_y, self.key_x = self.window_y + 2 * self.halo_y, self.window_x + 2 * self.halo_x
        self.keys = self.key_y * self.key_x
        self.table = self.window_y + self.key_y - 1, self.window_x + self.key_x - 1

        limit, has_halo = _tile_limit(q, v), self.halo_y > 0 or self.halo_x > 0
        self.pack = 1 if has_halo else max(1, 16 // self.queries)
        self.block_m = max(16, min(limit, next_power_of_two(self.pack * self.queries)))
        self.block_n = max(16, min(limit, next_power_of_two(self.pack * self.keys)))
        self.fused = not has_halo and self.queries <= limit

        def small(x):
            return None if x is None else x.contiguous()

        if self.has_bias:
            if sum(n * s for n, s in zip(self.table, bias_table.stride()[1:], strict=True)) > tuned(MAX_GRID, 0):
                bias_table = bias_table.contiguous()  # see _bias_tile
            bias_table = Table(bias_table, *bias_table.stride())
        geometry = Geometry(self.heads, self.H, self.W, self.windows_y, self.windows_x, *shift, *self.dilation)
        block_d, block_dv = (max(16, next_power_of_two(n)) for n in (self.d, self.dv))
        # The walk may run past the last window by a tile.
        index = tl.int64 if 4 * self.total_windows > tuned(MAX_GRID, 64) else tl.int32
        self.shared = {
            **Inputs(*map(feature_map, (q, k, v)), bias_table, *map(small, (logit_scale, pad_k, pad_v)))._asdict(),
            **geometry._asdict(), "total_windows": self.total_windows,
            "scale": float(self.d**-0.5 if scale is None else scale), "mask_value": float(mask_value),
            "S": Statics(self.d, self.dv, block_d, block_dv, self.window_y, self.window_x, self.halo_y, self.halo_x,
                         max(shift) > 0, bool(roll_before_pad), index),
        }  # fmt: skip

    def scratch(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.device)

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
        splits = tuned(max(1, min(splits, tiles, MAX_GRID // (self.heads * programs_per_split))), small=cdiv(tiles, 2))
        walk = cdiv(tiles, splits)
        return cdiv(tiles, walk), walk


def _plan_forward(*tensors, **options):
    """((out, lse), launches). Works on meta tensors."""
    p = _Problem(*tensors, **options)
    q = tensors[0]
    out = torch.empty((p.B, p.H, p.W, p.heads, p.dv), dtype=q.dtype, device=q.device)
    lse = p.scratch(p.B, p.heads, p.H, p.W)
    if lse.numel() == 0:
        return (out, lse), []
    tiles = cdiv(p.total_windows, p.pack)
    m_blocks = cdiv(p.pack * p.queries, p.block_m)
    splits, walk = p.split(tiles, m_blocks, max_walk=MAX_FORWARD_WALK)
    launch = p.launch(
        window_attention_fwd_kernel, splits * m_blocks, out=out, lse=lse,
        tiles=tiles, walk=walk, PACK=p.pack, BLOCK_M=p.block_m, BLOCK_N=p.block_n,
    )  # fmt: skip
    return (out, lse), [launch]


def _plan_backward(grad_out, grad_lse, q, k, v, out, lse, *optionals, packed=False, **options):
    """((dq, dk, dv, dbias_table, dlogit_scale, dpad_k, dpad_v), launches). Works on meta tensors."""
    p = _Problem(q, k, v, *optionals, **options)
    widths = p.d, p.d, p.dv
    sizes = [p.heads * d for d in widths]
    if packed:  # side by side: gradients of slices of one projection need no copy
        whole = torch.empty((p.B, p.H, p.W, sum(sizes)), dtype=q.dtype, device=q.device)
        parts, gradients = whole.split(sizes, -1), Gradients(whole, None, None)
    else:
        parts = [torch.empty((p.B, p.H, p.W, size), dtype=q.dtype, device=q.device) for size in sizes]
        gradients = Gradients(*parts)
    dq, dk, dv = (x.unflatten(-1, (p.heads, d)) for x, d in zip(parts, widths, strict=True))

    def gradient(x, dtype):
        return q.new_empty(0, dtype=dtype) if x is None else q.new_empty(x.shape, dtype=x.dtype)

    optionals = (*optionals, *(None,) * (4 - len(optionals)))
    absent = (torch.float32, torch.float32, q.dtype, q.dtype)
    results = [gradient(x, dtype) for x, dtype in zip(optionals, absent, strict=True)]
    dbias_table, dlogit_scale, dpad_k, dpad_v = results
    results = dq, dk, dv, *results
    if lse.numel() == 0:
        for x in results:
            x.zero_()
        return results, []

    out, lse, grad_lse = (None if x is None else x.contiguous() for x in (out, lse, grad_lse))
    shared = {"gradients": gradients, **Outputs(out, lse, feature_map(grad_out), grad_lse)._asdict()}
    launches = []
    pad_bytes, scale_bytes = 4 * (p.d + p.dv) * p.has_pad, 4 * p.is_cosine

    def scratch(wanted, *shape):
        return p.scratch(*shape) if wanted else None

    if p.fused:
        tiles, block = cdiv(p.total_windows, p.pack), p.block_m
        rect_y, rect_x, offsets_y, offsets_x, key_rects_y, key_rects_x = p.window_y, p.window_x, 1, 1, 1, 1
        splits, walk = p.split(tiles, 1, 4 * block * block * p.has_bias + scale_bytes + pad_bytes)
        partial_bias = scratch(p.has_bias, splits, p.heads, block, block)
        partial_scale = scratch(p.is_cosine, splits, p.heads)
        partial_pad_k, partial_pad_v = (scratch(p.has_pad, splits, p.heads, n) for n in (p.d, p.dv))
        launches.append(p.launch(
            window_attention_bwd_fused_kernel, splits, **shared, partial_bias=partial_bias,
            partial_scale=partial_scale, partial_pad_k=partial_pad_k, partial_pad_v=partial_pad_v, tiles=tiles,
            walk=walk, PACK=p.pack, BLOCK=block,
        ))  # fmt: skip
    else:
        block_m = max(16, min(p.block_m, next_power_of_two(p.queries)))
        m_blocks = cdiv(p.queries, block_m)
        splits, walk = p.split(p.total_windows, m_blocks, m_blocks * scale_bytes)
        partial_scale = scratch(p.is_cosine, splits * m_blocks, p.heads)
        launches.append(p.launch(
            window_attention_bwd_dq_kernel, splits * m_blocks, **shared, partial_scale=partial_scale,
            tiles=p.total_windows, walk=walk, BLOCK_M=block_m, BLOCK_N=p.block_n,
        ))  # fmt: skip

        # With pads, the ring of windows around the map owns the halo tokens out there.
        ring_y = 2 * cdiv(p.halo_y, p.window_y) * p.dilation[0] * p.has_pad
        ring_x = 2 * cdiv(p.halo_x, p.window_x) * p.dilation[1] * p.has_pad
        tiles = p.B * (p.windows_y + ring_y) * (p.windows_x + ring_x)
        splits, walk = p.split(tiles, m_blocks, m_blocks * pad_bytes)
        partial_pad_k, partial_pad_v = (scratch(p.has_pad, splits * m_blocks, p.heads, n) for n in (p.d, p.dv))
        launches.append(p.launch(
            window_attention_bwd_dkv_kernel, splits * m_blocks, **shared, partial_pad_k=partial_pad_k,
            partial_pad_v=partial_pad_v, tiles=tiles, walk=walk, BLOCK_M=block_m, BLOCK_N=block_m,
        ))  # fmt: skip

        if p.has_bias:
            block = max(p.block_m, p.block_n)
            rect_x = min(p.window_x, block)
            rect_y = min(p.window_y, block // rect_x)
            key_rects_y, key_rects_x = cdiv(p.key_y, rect_y), cdiv(p.key_x, rect_x)
            offsets_y = cdiv(p.window_y, rect_y) + key_rects_y - 1
            offsets_x = cdiv(p.window_x, rect_x) + key_rects_x - 1
            offsets = offsets_y * offsets_x
            splits, walk = p.split(p.total_windows, offsets, 4 * offsets * block * block)
            partial_bias = p.scratch(splits, p.heads, offsets_y, offsets_x, block, block)
            launches.append(p.launch(
                window_attention_bwd_bias_kernel, splits * offsets, **shared, partial_bias=partial_bias,
                tiles=p.total_windows, walk=walk, BLOCK=block, BLOCK_Y=rect_y, BLOCK_X=rect_x,
            ))  # fmt: skip

    if p.has_bias:
        if len(partial_bias) > 1:
            launches.append(sum_partials(partial_bias, partial_bias[0], len(partial_bias)))
        table_block = tuned(64 * SCALE, small=64)
        args = {
            "tiles": partial_bias, "dbias_table": dbias_table, "heads": p.heads,
            "TABLE_Y": p.table[0], "TABLE_X": p.table[1], "KEY_Y": p.key_y, "KEY_X": p.key_x,
            "KEY_RECTS_Y": key_rects_y, "KEY_RECTS_X": key_rects_x, "OFFSETS_Y": offsets_y, "OFFSETS_X": offsets_x,
            "PACK": p.pack, "BLOCK": block, "BLOCK_Y": rect_y, "BLOCK_X": rect_x,
            "BLOCK_ROWS": min(tuned(16 * SCALE, small=8), block), "BLOCK_TABLE": table_block,
        }  # fmt: skip
        grid = p.heads * cdiv(p.table[0] * p.table[1], table_block)
        launches.append(Launch(window_attention_bwd_table_kernel, grid, args, num_warps=4, num_stages=1))
    sums = (partial_scale, dlogit_scale), (partial_pad_k, dpad_k), (partial_pad_v, dpad_v)
    launches += [sum_partials(partial, x, len(partial)) for partial, x in sums if partial is not None]
    return results, launches


def forward(q, *tensors, **options):
    """effvit::window_attention: (out, lse). The arguments must have been validated."""
    results, launches = _plan_forward(q, *tensors, **options)
    run(launches, q.device)
    return results


def backward(grad_out, *tensors, packed=False, **options):
    """effvit::window_attention_backward: (dq, dk, dv, dbias_table, dlogit_scale, dpad_k, dpad_v); packed: dq is all of
    dq, dk and dv, [B, H, W, 1, h*(2*d+dv)], and dk and dv are empty."""
    (dq, dk, dv, *others), launches = _plan_backward(grad_out, *tensors, packed=packed, **options)
    run(launches, grad_out.device)
    if packed:
        channels = dq.shape[3] * (2 * dq.shape[4] + dv.shape[4])
        whole = dq.as_strided((*dq.shape[:3], 1, channels), (*dq.stride()[:3], channels, 1))
        dq, dk, dv = whole, *(torch.empty((0, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in (dk, dv))
    return dq, dk, dv, *others


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""

    def case(name, dtype, side, window, *, shift=0, halo=0, heads=4, d=32, cosine=False, pads=False, packed=True):
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
        _, backward_launches = _plan_backward(out, None, q, k, v, out, lse, *optional, packed=packed, **geometry)
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        for launch in launches + backward_launches:
            yield launch.aot(f"{name}-{short}")

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        yield from case("window7-shift", dtype, 56, 7, shift=3)
        yield from case("window16", dtype, 64, 16)
    yield from case("window7-apart", torch.bfloat16, 56, 7, shift=3, packed=False)
    for dtype in (torch.bfloat16, torch.float32):
        yield from case("window7-cosine-pads", dtype, 60, 7, shift=3, cosine=True, pads=True)
        yield from case("window8-halo2-pads", dtype, 64, 8, halo=2, pads=True)
