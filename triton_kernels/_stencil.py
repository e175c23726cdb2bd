"""Depthwise convolutions of channels-last maps in Triton, forward and backward: the kernels of dwconv and dwconv_glu.

A program computes a block of pixels x channels; neighbours come from the cache, of which taps after the first mostly
hit. Backward: the convolution again where an activation or a gate needs it, for the gates' gradient and the gradient dz
of the convolution, kept in float32; the gradient of x, the same stencil on dz turned round; and dweight, a program per
tap, block of channels and share of the pixels. How many shares follows from the shape alone; `sum_partials` adds them
in a fixed order.
"""

from typing import Any, NamedTuple

import torch

from ._common import (
    MAX_GRID,
    SCALE,
    Launch,
    _loop_bound,
    cdiv,
    device_function,
    next_power_of_two,
    sum_partials,
    tl,
    triton,
    tuned,
)
from ._tiles import _load_vector
from .glu import NONE, _activation

TARGET_PROGRAMS = 1024
MAX_SPLITS = 64
MAX_PARTIALS = 2**24  # floats

# Sizes that change from call to call; specialising on their values would only recompile. Programs walk the pixels of a
# map of map_h x map_w; H x W is the size of windows or, without, of the map that taps meet.
_SIZES = ["pixels", "map_h", "map_w", "H", "W", "C", "G", "c_blocks", "split_blocks"]


class Map(NamedTuple):
    """[B, H, W, C] with a last stride of 1."""

    pointer: Any
    stride_b: Any
    stride_y: Any
    stride_x: Any


def _map(x):
    return None if x is None else Map(x, *x.stride()[:3])


@device_function
def _pixel(p, H, W):
    """(image, row, column) of pixel p."""
    row = p // W
    b = row // H
    return b, row - b * H, p - row * W


@device_function
def _block(pixels, map_h, map_w, c_blocks, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's channels and pixels of a map: (channel, ok, image, row, column)."""
    program = tl.program_id(0)
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program // c_blocks).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    b, row, column = _pixel(p, map_h, map_w)
    return channel, p < pixels, b, row, column


@device_function
def _window(row, column, H, W, WINDOWED: tl.constexpr):
    """Of a pixel of a map: row and column in its window of H x W, and the window's first row and column."""
    first_row, first_column = row * 0, column * 0
    if WINDOWED:
        first_row, first_column = row // H * H, column // W * W
    return row - first_row, column - first_column, first_row, first_column


@device_function
def _pointers(x, b, row, column, channel):
    offset = b.to(tl.int64) * x.stride_b + row.to(tl.int64) * x.stride_y + column.to(tl.int64) * x.stride_x
    return x.pointer + offset[:, None] + channel[None, :]


@device_function
def _load(x, b, row, column, ok, channel, C, other=0.0):
    """Channels below C of the pixels of a Map that are `ok`, in float32."""
    mask = ok[:, None] & (channel < C)[None, :]
    return tl.load(_pointers(x, b, row, column, channel), mask=mask, other=other).to(tl.float32)


@device_function
def _store(x, b, row, column, ok, channel, C, value):
    mask = ok[:, None] & (channel < C)[None, :]
    tl.store(_pointers(x, b, row, column, channel), value.to(x.pointer.dtype.element_ty), mask=mask)


@device_function
def _input(x, pregate, state, b, row, in_rows, first_column, at, channel, W, C, PX: tl.constexpr):
    """x times its gate in a row of the map, column `at` of a window; the state left of it, zeros elsewhere."""
    inside = in_rows & (at >= 0) & (at < W)
    u = _load(x, b, row, first_column + at, inside, channel, C)
    if pregate is not None:
        u *= _load(pregate, b, row, first_column + at, inside, channel, C)
    if state is not None:
        u += _load(state, b, row, at + PX, in_rows & (at < 0), channel, C)
    return u


@device_function
def _stencil(
    x, pregate, state, weight, b, first_row, first_column, row, column, ok, channel, H, W, C,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
):  # fmt: skip
    """Sum over i, j of weight[:, i, j] u[row + i * DY - PY, column + j * DX - PX], u being _input of a window of
    H x W. With DY, DX, PY and PX negative it is turned round."""
    acc = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    for i in range(KH):
        y = row + (i * DY - PY)
        in_rows = ok & (y >= 0) & (y < H)
        for j in range(KW):
            at = column + (j * DX - PX)
            place = channel * (KH * KW) + (i * KW + j)
            w = tl.load(weight + place, mask=channel < C, other=0.0).to(tl.float32)
            u = _input(x, pregate, state, b, first_row + y, in_rows, first_column, at, channel, W, C, PX)
            acc += u * w[None, :]
    return acc


@device_function
def _convolution(
    x, pregate, state, weight, bias, b, row, column, ok, channel, H, W, C,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """What the activation is of."""
    row, column, first_row, first_column = _window(row, column, H, W, WINDOWED)
    z = _stencil(
        x, pregate, state, weight, b, first_row, first_column, row, column, ok, channel, H, W, C, KH, KW, DY, DX, PY, PX
    )
    if bias is not None:
        z += _load_vector(bias, channel, C)[None, :]
    return z


@triton.jit(do_not_specialize=_SIZES)
def dwconv_fwd_kernel(
    x,  # Map [B, H, W, C] of windows
    pregate,  # like x, or None
    postgate,  # Map [B, P, Q, G] of windows, ones behind G; or None
    state,  # Map [B, H, PX, C], or None
    weight,  # [C, KH, KW]
    bias,  # [C] or None
    out,  # Map [B, P, Q, C] of windows
    pixels, map_h, map_w, H, W, C, G, c_blocks,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    WINDOWED: tl.constexpr, ACT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel, ok, b, row, column = _block(pixels, map_h, map_w, c_blocks, INDEX, BLOCK_P, BLOCK_C)
    z = _convolution(
        x, pregate, state, weight, bias, b, row, column, ok, channel, H, W, C, KH, KW, DY, DX, PY, PX, WINDOWED
    )
    y, _ = _activation(z, ACT)
    if postgate is not None:
        y *= _load(postgate, b, row, column, ok, channel, G, 1.0)
    _store(out, b, row, column, ok, channel, C, y)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_bwd_gate_kernel(
    grad_out,  # Map [B, P, Q, C] of windows
    x,  # Map [B, H, W, C] of windows
    pregate,  # like x, or None
    postgate,  # Map [B, P, Q, G] of windows, ones behind G; or None
    state,  # Map [B, H, PX, C], or None
    weight,  # [C, KH, KW]
    bias,  # [C] or None
    dz,  # like grad_out, float32
    dpostgate,  # like postgate
    pixels, map_h, map_w, H, W, C, G, c_blocks,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    WINDOWED: tl.constexpr, ACT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel, ok, b, row, column = _block(pixels, map_h, map_w, c_blocks, INDEX, BLOCK_P, BLOCK_C)
    z = _convolution(
        x, pregate, state, weight, bias, b, row, column, ok, channel, H, W, C, KH, KW, DY, DX, PY, PX, WINDOWED
    )
    y, slope = _activation(z, ACT)
    grad = _load(grad_out, b, row, column, ok, channel, C)
    if postgate is not None:
        _store(dpostgate, b, row, column, ok, channel, G, grad * y)
        grad *= _load(postgate, b, row, column, ok, channel, G, 1.0)
    _store(dz, b, row, column, ok, channel, C, grad * slope)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_bwd_dx_kernel(
    dz,  # Map [B, P, Q, C] of windows
    x,  # Map [B, H, W, C] of windows, or None
    pregate,  # like x, or None
    weight,  # [C, KH, KW]
    dx,  # Map of map_h x map_w pixels: like x, or the state's, whose columns lie SHIFT left of x
    dpregate,  # like x, or None
    pixels, map_h, map_w, H, W, C, c_blocks,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    WINDOWED: tl.constexpr, SHIFT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel, ok, b, row, column = _block(pixels, map_h, map_w, c_blocks, INDEX, BLOCK_P, BLOCK_C)
    y, at, first_row, first_column = _window(row, column, H, W, WINDOWED)
    du = _stencil(
        dz, None, None, weight, b, first_row, first_column, y, at, ok, channel, H, W, C, KH, KW, -DY, -DX, -PY,
        SHIFT - PX,
    )  # fmt: skip
    if pregate is not None:
        _store(dpregate, b, row, column, ok, channel, C, du * _load(x, b, row, column, ok, channel, C))
        du *= _load(pregate, b, row, column, ok, channel, C)
    _store(dx, b, row, column, ok, channel, C, du)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_bwd_weight_kernel(
    dz,  # Map [B, P, Q, C] of windows
    x,  # Map [B, H, W, C] of windows
    pregate,  # like x, or None
    state,  # Map [B, H, PX, C], or None
    dweight,  # [splits, C, KH, KW] float32, or [C, KH, KW] in any dtype where there is one split
    dbias,  # [splits, C] float32, or [C] in any dtype; None: not asked for
    pixels, map_h, map_w, H, W, C, c_blocks, split_blocks,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    WINDOWED: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tap = program % (KH * KW)
    channel = program // (KH * KW) % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // (KH * KW * c_blocks)
    total = tl.zeros([BLOCK_C], tl.float32)
    total_bias = tl.zeros([BLOCK_C], tl.float32)
    first = split.to(INDEX) * split_blocks * BLOCK_P
    for block in range(0, _loop_bound(split_blocks)):
        p = first + block * BLOCK_P + tl.arange(0, BLOCK_P)
        ok = p < pixels
        b, row, column = _pixel(p, map_h, map_w)
        grad = _load(dz, b, row, column, ok, channel, C)
        y, at, first_row, first_column = _window(row, column, H, W, WINDOWED)
        y += tap // KW * DY - PY
        at += tap % KW * DX - PX
        in_rows = ok & (y >= 0) & (y < H)
        u = _input(x, pregate, state, b, first_row + y, in_rows, first_column, at, channel, W, C, PX)
        total += tl.sum(grad * u, axis=0)
        total_bias += tl.sum(grad, axis=0)
    target = dweight + (split.to(tl.int64) * C + channel) * (KH * KW) + tap
    tl.store(target, total.to(dweight.dtype.element_ty), mask=channel < C)
    if dbias is not None:
        target = dbias + split.to(tl.int64) * C + channel
        tl.store(target, total_bias.to(dbias.dtype.element_ty), mask=(channel < C) & (tap == 0))


# ------------------------------------------------------------------------------------------------------------ launchers


def gradient_of(t, x, dtype=None):
    """An empty tensor like t; where t is None one without elements, of this dtype or that of x."""
    if t is None:
        return torch.empty(0, dtype=dtype or x.dtype, device=x.device)
    return torch.empty(t.shape, dtype=t.dtype, device=x.device)


class Problem:
    """The sizes of a call, and the arguments that all kernels share. A postgate of fewer channels has ones behind."""

    def __init__(self, op, x, weight, bias, pregate, postgate, state, *, before, after, dilation, window, act):
        B, H, W, self.C = x.shape
        self.op, self.x, self.weight, self.bias = op, x, weight, bias
        self.pregate, self.postgate = pregate, postgate
        self.state = None if state is None or state.shape[2] == 0 else state
        kernel = weight.shape[1:]
        self.window = (*window,) if window[0] else None
        P, Q = (
            n + b + a - d * (k - 1) for n, b, a, d, k in zip((H, W), before, after, dilation, kernel, strict=True)
        )  # fmt: skip
        self.out_shape = (B, P, Q, self.C)
        self.has_dz = postgate is not None or act != NONE.value  # else it is grad_out
        self.block_c = min(tuned(64, small=16), next_power_of_two(self.C))
        self.block_p = tuned(32 * SCALE, small=16)
        self.c_blocks = cdiv(self.C, self.block_c)
        self.shared = {
            "x": _map(x), "pregate": _map(pregate), "postgate": _map(postgate), "state": _map(self.state),
            "weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous(), "C": self.C,
            "G": self.C if postgate is None else postgate.shape[3],
            "c_blocks": self.c_blocks, "KH": kernel[0], "KW": kernel[1], "DY": dilation[0], "DX": dilation[1],
            "PY": before[0], "PX": before[1], "WINDOWED": self.window is not None, "ACT": act,
            "BLOCK_P": self.block_p, "BLOCK_C": self.block_c,
        }  # fmt: skip

    def _blocks(self, shape):
        """Of pixels of a map."""
        return cdiv(shape[0] * shape[1] * shape[2], self.block_p)

    def _launch(self, kernel, shape, source, programs=None, **extra):
        """A program for every block of the pixels of a map of this shape, or so many; `source` is the shape of the map
        whose pixels meet the taps."""
        pixels = shape[0] * shape[1] * shape[2]
        programs = self._blocks(shape) * self.c_blocks if programs is None else programs
        if programs > MAX_GRID:
            raise ValueError(f"effvit::{self.op}: x must have fewer elements for one launch, got {pixels * self.C}")
        index = tl.int64 if pixels + self.block_p > MAX_GRID else tl.int32
        H, W = self.window or source[1:3]
        available = {
            **self.shared, "pixels": pixels, "map_h": shape[1], "map_w": shape[2], "H": H, "W": W,
            "INDEX": index, **extra,
        }  # fmt: skip
        return Launch(kernel, programs, {name: available[name] for name in kernel.arg_names}, 4, 2)

    def forward(self, out):
        """Launches; out has elements."""
        return [self._launch(dwconv_fwd_kernel, out.shape, self.x.shape, out=_map(out))]

    def backward(self, grad_out, dx, dweight, dbias, dpregate, dpostgate, dstate):
        """Launches; grad_out has elements. Gradients of what is None are not looked at."""
        launches, dz, device = [], grad_out, self.x.device
        if self.has_dz:
            dz = torch.empty(self.out_shape, dtype=torch.float32, device=device)
            gate = None if self.postgate is None else _map(dpostgate)
            launches.append(self._launch(
                dwconv_bwd_gate_kernel, dz.shape, self.x.shape, grad_out=_map(grad_out), dz=_map(dz), dpostgate=gate
            ))  # fmt: skip
        dz_map = _map(dz)
        if self.x.numel():
            gate = None if self.pregate is None else _map(dpregate)
            launches.append(self._launch(
                dwconv_bwd_dx_kernel, self.x.shape, dz.shape, dz=dz_map, dx=_map(dx), dpregate=gate, SHIFT=0
            ))  # fmt: skip
        if self.state is not None:
            launches.append(self._launch(
                dwconv_bwd_dx_kernel, self.state.shape, dz.shape, dz=dz_map, x=None, pregate=None,
                dx=_map(dstate), dpregate=None, SHIFT=self.shared["PX"],
            ))  # fmt: skip

        blocks = self._blocks(dz.shape)
        programs = self.c_blocks * self.weight.shape[1] * self.weight.shape[2]
        splits = min(
            MAX_SPLITS, blocks, cdiv(TARGET_PROGRAMS, programs), max(1, MAX_PARTIALS // dweight.numel()),
            tuned(MAX_SPLITS, small=3),
        )  # fmt: skip
        split_blocks = cdiv(blocks, splits)
        splits = cdiv(blocks, split_blocks)
        sums = [dweight, None if self.bias is None else dbias]
        partials = sums
        if splits > 1:
            partials = [
                None if t is None else torch.empty((splits, *t.shape), dtype=torch.float32, device=device) for t in sums
            ]
        launches.append(self._launch(
            dwconv_bwd_weight_kernel, dz.shape, self.x.shape, programs * splits, dz=dz_map, dweight=partials[0],
            dbias=partials[1], split_blocks=split_blocks,
        ))  # fmt: skip
        if splits > 1:
            pairs = zip(partials, sums, strict=True)
            launches += [sum_partials(partial, t, splits) for partial, t in pairs if t is not None]
        return launches
