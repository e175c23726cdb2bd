"""dwconv_glu in Triton: forward and backward.

A program computes a block of pixels x channels; neighbours come from the cache, k x k loads of which most hit.
Backward is three kernels: the convolution again, for dv and the gradient dz of the convolution, which is kept in
float32; dx, the same stencil on dz with the flipped weights; and dweight, a program per tap, block of channels and
share of the pixels. How many shares follows from the shape alone; `sum_partials` adds them in a fixed order.
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
    run,
    sum_partials,
    tl,
    triton,
    tuned,
)
from .glu import _activation

NONE = tl.constexpr(5)
TARGET_PROGRAMS = 1024
MAX_SPLITS = 64

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["pixels", "H", "W", "C", "G", "c_blocks", "split_blocks"]


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
def _load(x, b, row, column, ok, channel, C, other):
    """Channels of the pixels of a Map that are `ok`, in float32."""
    offset = b.to(tl.int64) * x.stride_b + row.to(tl.int64) * x.stride_y + column.to(tl.int64) * x.stride_x
    mask = ok[:, None] & (channel < C)[None, :]
    return tl.load(x.pointer + offset[:, None] + channel[None, :], mask=mask, other=other).to(tl.float32)


@device_function
def _store(x, b, row, column, ok, channel, C, value):
    offset = b.to(tl.int64) * x.stride_b + row.to(tl.int64) * x.stride_y + column.to(tl.int64) * x.stride_x
    mask = ok[:, None] & (channel < C)[None, :]
    tl.store(x.pointer + offset[:, None] + channel[None, :], value.to(x.pointer.dtype.element_ty), mask=mask)


@device_function
def _load_vector(x, channel, C):
    return tl.load(x + channel, mask=channel < C, other=0.0).to(tl.float32)


@device_function
def _stencil(x, b, row, column, ok, channel, H, W, C, weight, K: tl.constexpr, FLIPPED: tl.constexpr):
    """sum over i, j of weight[:, i, j] x[row + i - K // 2, column + j - K // 2], zeros outside of the map."""
    R: tl.constexpr = K // 2
    acc = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    for i in range(K):
        y = row + (i - R)
        in_rows = ok & (y >= 0) & (y < H)
        for j in range(K):
            at = column + (j - R)
            inside = in_rows & (at >= 0) & (at < W)
            tap = i * K + j
            if FLIPPED:
                tap = K * K - 1 - tap
            w = tl.load(weight + channel * (K * K) + tap, mask=channel < C, other=0.0).to(tl.float32)
            acc += _load(x, b, y, at, inside, channel, C, 0.0) * w[None, :]
    return acc


@triton.jit
def _activate(z, ACT: tl.constexpr):
    """(act(z), its derivative)"""
    if ACT == NONE:
        return z, tl.full(z.shape, 1.0, tl.float32)
    return _activation(z, ACT)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_glu_fwd_kernel(
    x,  # Map [B, H, W, C]
    v,  # Map [B, H, W, G], or None where G is 0
    weight,  # [C, K, K]
    bias,  # [C] or None
    out,  # Map [B, H, W, C]
    pixels, H, W, C, G, c_blocks,
    K: tl.constexpr, ACT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program // c_blocks).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = p < pixels
    b, row, column = _pixel(p, H, W)
    z = _stencil(x, b, row, column, ok, channel, H, W, C, weight, K, False)
    if bias is not None:
        z += _load_vector(bias, channel, C)[None, :]
    y, _ = _activate(z, ACT)
    if v is not None:
        y *= _load(v, b, row, column, ok, channel, G, 1.0)
    _store(out, b, row, column, ok, channel, C, y)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_glu_bwd_gate_kernel(
    grad_out,  # Map [B, H, W, C]
    x,  # Map [B, H, W, C]
    v,  # Map [B, H, W, G], or None where G is 0
    weight,  # [C, K, K]
    bias,  # [C] or None
    dz,  # Map [B, H, W, C], float32
    dv,  # Map [B, H, W, G], or None where G is 0
    pixels, H, W, C, G, c_blocks,
    K: tl.constexpr, ACT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program // c_blocks).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = p < pixels
    b, row, column = _pixel(p, H, W)
    z = _stencil(x, b, row, column, ok, channel, H, W, C, weight, K, False)
    if bias is not None:
        z += _load_vector(bias, channel, C)[None, :]
    y, slope = _activate(z, ACT)
    grad = _load(grad_out, b, row, column, ok, channel, C, 0.0)
    if v is not None:
        _store(dv, b, row, column, ok, channel, G, grad * y)
        grad *= _load(v, b, row, column, ok, channel, G, 1.0)
    _store(dz, b, row, column, ok, channel, C, grad * slope)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_glu_bwd_dx_kernel(
    dz,  # Map [B, H, W, C], float32
    weight,  # [C, K, K]
    dx,  # Map [B, H, W, C]
    pixels, H, W, C, c_blocks,
    K: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program // c_blocks).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = p < pixels
    b, row, column = _pixel(p, H, W)
    result = _stencil(dz, b, row, column, ok, channel, H, W, C, weight, K, True)
    _store(dx, b, row, column, ok, channel, C, result)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_glu_bwd_weight_kernel(
    dz,  # Map [B, H, W, C], float32
    x,  # Map [B, H, W, C]
    dweight,  # [splits, C, K, K] float32, or [C, K, K] in any dtype where there is one split
    dbias,  # [splits, C] float32, or [C] in any dtype; None: not asked for
    pixels, H, W, C, c_blocks, split_blocks,
    K: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tap = program % (K * K)
    channel = program // (K * K) % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // (K * K * c_blocks)
    total = tl.zeros([BLOCK_C], tl.float32)
    total_bias = tl.zeros([BLOCK_C], tl.float32)
    first = split.to(INDEX) * split_blocks * BLOCK_P
    for block in range(0, _loop_bound(split_blocks)):
        p = first + block * BLOCK_P + tl.arange(0, BLOCK_P)
        ok = p < pixels
        b, row, column = _pixel(p, H, W)
        grad = _load(dz, b, row, column, ok, channel, C, 0.0)
        y = row + (tap // K - K // 2)
        at = column + (tap % K - K // 2)
        inside = ok & (y >= 0) & (y < H) & (at >= 0) & (at < W)
        total += tl.sum(grad * _load(x, b, y, at, inside, channel, C, 0.0), axis=0)
        total_bias += tl.sum(grad, axis=0)
    target = dweight + (split.to(tl.int64) * C + channel) * (K * K) + tap
    tl.store(target, total.to(dweight.dtype.element_ty), mask=channel < C)
    if dbias is not None:
        target = dbias + split.to(tl.int64) * C + channel
        tl.store(target, total_bias.to(dbias.dtype.element_ty), mask=(channel < C) & (tap == 0))


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, what its tensors hold, and the arguments that all kernels share."""

    def __init__(self, x, v, weight, bias, act, gate_first):
        self.C, self.K = weight.shape[0], weight.shape[-1]
        self.B, self.H, self.W, _ = x.shape
        self.packed, self.gate_first = v is None, gate_first
        x, v = self.halves(x) if v is None else (x, v)
        self.G = v.shape[-1]
        self.x, self.v = x, v if self.G else None
        self.pixels = self.B * self.H * self.W
        self.block_c = min(tuned(64, small=16), next_power_of_two(self.C))
        self.block_p = tuned(32 * SCALE, small=16)
        self.c_blocks = cdiv(self.C, self.block_c)
        self.p_blocks = cdiv(self.pixels, self.block_p)
        self.shared = {
            "x": _map(self.x), "v": _map(self.v), "weight": weight.contiguous(),
            "bias": None if bias is None else bias.contiguous(), "pixels": self.pixels, "H": self.H, "W": self.W,
            "C": self.C, "G": self.G, "c_blocks": self.c_blocks, "K": self.K, "ACT": act,
            "BLOCK_P": self.block_p, "BLOCK_C": self.block_c,
            "INDEX": tl.int64 if self.pixels + self.block_p > MAX_GRID else tl.int32,
        }  # fmt: skip

    def halves(self, t):
        """(x, v) of a tensor that holds both."""
        gates = t.shape[-1] - self.C
        return t.split((gates, self.C), -1)[::-1] if self.gate_first else t.split((self.C, gates), -1)

    def launch(self, kernel, programs, **extra):
        if programs > MAX_GRID:
            raise ValueError(f"effvit::dwconv_glu: x must have fewer elements for one launch, got {self.x.numel()}")
        available = {**self.shared, **extra}
        return Launch(kernel, programs, {name: available[name] for name in kernel.arg_names}, 4, 2)


def _plan_forward(x, v, weight, bias=None, *, act=1, gate_first=False):
    """(out, launches). Works on meta tensors."""
    p = _Problem(x, v, weight, bias, act, gate_first)
    out = torch.empty(p.x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, []
    return out, [p.launch(dwconv_glu_fwd_kernel, p.p_blocks * p.c_blocks, out=_map(out))]


def _plan_backward(grad_out, x, weight, v=None, bias=None, *, act=1, gate_first=False):
    """((dx, dv, dweight, dbias), launches). Works on meta tensors."""
    p = _Problem(x, v, weight, bias, act, gate_first)
    dx, dv, dweight, dbias = (
        torch.empty(0 if t is None else t.shape, dtype=x.dtype if t is None else t.dtype, device=x.device)
        for t in (x, v, weight, bias)
    )
    if bias is None:
        dbias = dbias.float()
    if grad_out.numel() == 0:
        return tuple(t.zero_() for t in (dx, dv, dweight, dbias)), []
    to_x, to_v = p.halves(dx) if p.packed else (dx, dv)
    dz = torch.empty(p.x.shape, dtype=torch.float32, device=x.device)
    units = p.p_blocks * p.c_blocks
    p.shared.update(grad_out=_map(grad_out), dz=_map(dz), dx=_map(to_x), dv=_map(to_v if p.G else None))
    launches = [p.launch(dwconv_glu_bwd_gate_kernel, units), p.launch(dwconv_glu_bwd_dx_kernel, units)]

    programs = p.c_blocks * p.K * p.K
    splits = min(MAX_SPLITS, p.p_blocks, cdiv(TARGET_PROGRAMS, programs), tuned(MAX_SPLITS, small=3))
    split_blocks = cdiv(p.p_blocks, splits)
    splits = cdiv(p.p_blocks, split_blocks)
    results = [dweight, None if bias is None else dbias]
    partials = results
    if splits > 1:
        partials = [
            None if t is None else torch.empty((splits, *t.shape), dtype=torch.float32, device=x.device)
            for t in results
        ]
    launches.append(p.launch(
        dwconv_glu_bwd_weight_kernel, programs * splits, dweight=partials[0], dbias=partials[1],
        split_blocks=split_blocks,
    ))  # fmt: skip
    if splits > 1:
        pairs = zip(partials, results, strict=True)
        launches += [sum_partials(partial, t, splits) for partial, t in pairs if t is not None]
    return (dx, dv, dweight, dbias), launches


def forward(x, v, weight, bias=None, *, act=1, gate_first=False):
    """effvit::dwconv_glu. The arguments must have been validated."""
    out, launches = _plan_forward(x, v, weight, bias, act=act, gate_first=gate_first)
    run(launches, x.device)
    return out


def backward(grad_out, x, weight, v=None, bias=None, *, act=1, gate_first=False):
    """effvit::dwconv_glu_backward: dx, dv, dweight, dbias."""
    results, launches = _plan_backward(grad_out, x, weight, v, bias, act=act, gate_first=gate_first)
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    cases = {
        "convglu-bf16": (torch.bfloat16, (8, 56, 56, 768), (384, 3, 3), 1, False),
        "gnconv-fp32": (torch.float32, (8, 56, 56, 128), (96, 7, 7), 5, True),
        "silu-fp16": (torch.float16, (8, 28, 28, 200), (100, 5, 5), 2, False),
    }
    for name, (dtype, shape, weight_shape, act, gate_first) in cases.items():
        x = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty(weight_shape, dtype=torch.float32, device="meta")
        bias = weight.new_empty(weight_shape[0])
        out, launches = _plan_forward(x, None, weight, bias, act=act, gate_first=gate_first)
        _, backward_launches = _plan_backward(out, x, weight, None, bias, act=act, gate_first=gate_first)
        for launch in launches + backward_launches:
            yield launch.aot(name)
