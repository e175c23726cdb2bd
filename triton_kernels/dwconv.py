"""dwconv in Triton: forward and backward.

A program computes a block of pixels x channels; neighbours come from the cache, of which taps after the first mostly
hit. Backward: the convolution again where an activation or a gate needs it, for the gates' gradient and the gradient dz
of the convolution, kept in float32; the gradient of x, the same stencil on dz turned round; and dweight, a program per
tap, block of channels and share of the pixels. How many shares follows from the shape alone; `sum_partials` adds them
in a fixed order.
"""

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
from .dwconv_glu import _activate, _load, _load_vector, _map, _pixel, _store

NONE = 5  # of act
TARGET_PROGRAMS = 1024
MAX_SPLITS = 64
MAX_PARTIALS = 2**24  # floats

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["pixels", "map_h", "map_w", "H", "W", "P", "Q", "C", "c_blocks", "split_blocks"]


@device_function
def _input(x, pregate, state, b, first_row, first_column, y, at, ok, channel, H, W, C, PX: tl.constexpr):
    """x times its gate at row y and column `at` of a window, the state left of it, zeros elsewhere."""
    in_rows = ok & (y >= 0) & (y < H)
    inside = in_rows & (at >= 0) & (at < W)
    u = _load(x, b, first_row + y, first_column + at, inside, channel, C, 0.0)
    if pregate is not None:
        u *= _load(pregate, b, first_row + y, first_column + at, inside, channel, C, 0.0)
    if state is not None:
        u += _load(state, b, first_row + y, at + PX, in_rows & (at < 0), channel, C, 0.0)
    return u


@device_function
def _convolution(
    x, pregate, state, weight, bias, b, row, column, ok, channel, H, W, P, Q, C,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
):  # fmt: skip
    """bias + sum over i, j of weight[:, i, j] u[row + i * DY - PY, column + j * DX - PX], in the pixel's window."""
    acc = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    window_row, window_column = row // P, column // Q
    for i in range(KH):
        y = row - window_row * P + (i * DY - PY)
        for j in range(KW):
            at = column - window_column * Q + (j * DX - PX)
            w = tl.load(weight + channel * (KH * KW) + i * KW + j, mask=channel < C, other=0.0).to(tl.float32)
            u = _input(x, pregate, state, b, window_row * H, window_column * W, y, at, ok, channel, H, W, C, PX)
            acc += u * w[None, :]
    if bias is not None:
        acc += _load_vector(bias, channel, C)[None, :]
    return acc


@triton.jit(do_not_specialize=_SIZES)
def dwconv_fwd_kernel(
    x,  # Map [B, H, W, C] of windows
    pregate,  # like x, or None
    postgate,  # Map [B, P, Q, C] of windows, or None
    state,  # Map [B, H, PX, C], or None
    weight,  # [C, KH, KW]
    bias,  # [C] or None
    out,  # like postgate
    pixels, map_h, map_w, H, W, P, Q, C, c_blocks,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    ACT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program // c_blocks).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = p < pixels
    b, row, column = _pixel(p, map_h, map_w)
    z = _convolution(
        x, pregate, state, weight, bias, b, row, column, ok, channel, H, W, P, Q, C, KH, KW, DY, DX, PY, PX
    )
    y, _ = _activate(z, ACT)
    if postgate is not None:
        y *= _load(postgate, b, row, column, ok, channel, C, 0.0)
    _store(out, b, row, column, ok, channel, C, y)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_bwd_gate_kernel(
    grad_out,  # Map [B, P, Q, C] of windows
    x,  # Map [B, H, W, C] of windows
    pregate,  # like x, or None
    postgate,  # like grad_out, or None
    state,  # Map [B, H, PX, C], or None
    weight,  # [C, KH, KW]
    bias,  # [C] or None
    dz,  # like grad_out, float32
    dpostgate,  # like grad_out, or None
    pixels, map_h, map_w, H, W, P, Q, C, c_blocks,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    ACT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program // c_blocks).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = p < pixels
    b, row, column = _pixel(p, map_h, map_w)
    z = _convolution(
        x, pregate, state, weight, bias, b, row, column, ok, channel, H, W, P, Q, C, KH, KW, DY, DX, PY, PX
    )
    y, slope = _activate(z, ACT)
    grad = _load(grad_out, b, row, column, ok, channel, C, 0.0)
    if postgate is not None:
        _store(dpostgate, b, row, column, ok, channel, C, grad * y)
        grad *= _load(postgate, b, row, column, ok, channel, C, 0.0)
    _store(dz, b, row, column, ok, channel, C, grad * slope)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_bwd_dx_kernel(
    dz,  # Map [B, P, Q, C] of windows
    x,  # Map [B, H, W, C] of windows, or None
    pregate,  # like x, or None
    weight,  # [C, KH, KW]
    dx,  # Map of map_h x map_w pixels: like x, or the state's, whose columns lie SHIFT left of x
    dpregate,  # like x, or None
    pixels, map_h, map_w, H, W, P, Q, C, c_blocks,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    SHIFT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program // c_blocks).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = p < pixels
    b, row, column = _pixel(p, map_h, map_w)
    window_row, window_column = row // H, column // W
    if SHIFT > 0:
        window_column *= 0
    du = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in range(KH):
        y = row - window_row * H + (PY - i * DY)
        in_rows = ok & (y >= 0) & (y < P)
        for j in range(KW):
            at = column - window_column * W + (PX - SHIFT - j * DX)
            inside = in_rows & (at >= 0) & (at < Q)
            w = tl.load(weight + channel * (KH * KW) + i * KW + j, mask=channel < C, other=0.0).to(tl.float32)
            du += _load(dz, b, window_row * P + y, window_column * Q + at, inside, channel, C, 0.0) * w[None, :]
    if pregate is not None:
        _store(dpregate, b, row, column, ok, channel, C, du * _load(x, b, row, column, ok, channel, C, 0.0))
        du *= _load(pregate, b, row, column, ok, channel, C, 0.0)
    _store(dx, b, row, column, ok, channel, C, du)


@triton.jit(do_not_specialize=_SIZES)
def dwconv_bwd_weight_kernel(
    dz,  # Map [B, P, Q, C] of windows
    x,  # Map [B, H, W, C] of windows
    pregate,  # like x, or None
    state,  # Map [B, H, PX, C], or None
    dweight,  # [splits, C, KH, KW] float32, or [C, KH, KW] in any dtype where there is one split
    dbias,  # [splits, C] float32, or [C] in any dtype; None: not asked for
    pixels, map_h, map_w, H, W, P, Q, C, c_blocks, split_blocks,
    KH: tl.constexpr, KW: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
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
        window_row, window_column = row // P, column // Q
        grad = _load(dz, b, row, column, ok, channel, C, 0.0)
        y = row - window_row * P + (tap // KW * DY - PY)
        at = column - window_column * Q + (tap % KW * DX - PX)
        u = _input(x, pregate, state, b, window_row * H, window_column * W, y, at, ok, channel, H, W, C, PX)
        total += tl.sum(grad * u, axis=0)
        total_bias += tl.sum(grad, axis=0)
    target = dweight + (split.to(tl.int64) * C + channel) * (KH * KW) + tap
    tl.store(target, total.to(dweight.dtype.element_ty), mask=channel < C)
    if dbias is not None:
        target = dbias + split.to(tl.int64) * C + channel
        tl.store(target, total_bias.to(dbias.dtype.element_ty), mask=(channel < C) & (tap == 0))


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, and the arguments that all kernels share."""

    def __init__(self, x, weight, bias, pregate, postgate, state, *, before, after, dilation, window, act):
        B, H, W, C = x.shape
        kernel = weight.shape[1:]
        P, Q = (
            n + b + a - d * (k - 1) for n, b, a, d, k in zip((H, W), before, after, dilation, kernel, strict=True)
        )  # fmt: skip
        self.C, self.out_shape = C, (B, P, Q, C)
        if state is not None and state.shape[2] == 0:
            state = None
        self.block_c = min(tuned(64, small=16), next_power_of_two(C))
        self.block_p = tuned(32 * SCALE, small=16)
        self.c_blocks = cdiv(C, self.block_c)
        self.shared = {
            "x": _map(x), "pregate": _map(pregate), "postgate": _map(postgate), "state": _map(state),
            "weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous(), "C": C,
            "H": window[0] or H, "W": window[1] or W, "P": window[0] or P, "Q": window[1] or Q,
            "c_blocks": self.c_blocks, "KH": kernel[0], "KW": kernel[1], "DY": dilation[0], "DX": dilation[1],
            "PY": before[0], "PX": before[1], "ACT": act, "BLOCK_P": self.block_p, "BLOCK_C": self.block_c,
        }  # fmt: skip

    def blocks(self, shape):
        """Of pixels of a map."""
        return cdiv(shape[0] * shape[1] * shape[2], self.block_p)

    def launch(self, kernel, shape, programs=None, **extra):
        """A program for every block of the pixels of a map of this shape, or so many."""
        pixels = shape[0] * shape[1] * shape[2]
        programs = self.blocks(shape) * self.c_blocks if programs is None else programs
        if programs > MAX_GRID:
            raise ValueError(f"effvit::dwconv: x must have fewer elements for one launch, got {pixels * self.C}")
        index = tl.int64 if pixels + self.block_p > MAX_GRID else tl.int32
        available = {**self.shared, "pixels": pixels, "map_h": shape[1], "map_w": shape[2], "INDEX": index, **extra}
        return Launch(kernel, programs, {name: available[name] for name in kernel.arg_names}, 4, 2)


def _plan_forward(x, weight, bias=None, pregate=None, postgate=None, state=None, **options):
    """(out, launches). Works on meta tensors."""
    p = _Problem(x, weight, bias, pregate, postgate, state, **options)
    out = torch.empty(p.out_shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, []
    return out, [p.launch(dwconv_fwd_kernel, out.shape, out=_map(out))]


def _plan_backward(grad_out, x, weight, bias=None, pregate=None, postgate=None, state=None, **options):
    """((dx, dweight, dbias, dpregate, dpostgate, dstate), launches). Works on meta tensors."""
    p = _Problem(x, weight, bias, pregate, postgate, state, **options)
    given = (x, weight, bias, pregate, postgate, state)
    dx, dweight, dbias, dpregate, dpostgate, dstate = results = tuple(
        torch.empty(0 if t is None else t.shape, dtype=x.dtype if t is None else t.dtype, device=x.device)
        for t in given
    )
    if bias is None:
        dbias = dbias.float()
        results = (dx, dweight, dbias, dpregate, dpostgate, dstate)
    if grad_out.numel() == 0:
        return tuple(t.zero_() for t in results), []
    launches, dz = [], grad_out
    if postgate is not None or options["act"] != NONE:
        dz = torch.empty(p.out_shape, dtype=torch.float32, device=x.device)
        gate = None if postgate is None else _map(dpostgate)
        launches.append(p.launch(
            dwconv_bwd_gate_kernel, dz.shape, grad_out=_map(grad_out), dz=_map(dz), dpostgate=gate
        ))  # fmt: skip
    p.shared["dz"] = _map(dz)
    if x.numel():
        gate = None if pregate is None else _map(dpregate)
        launches.append(p.launch(dwconv_bwd_dx_kernel, x.shape, dx=_map(dx), dpregate=gate, SHIFT=0))
    if dstate.numel():
        launches.append(p.launch(
            dwconv_bwd_dx_kernel, state.shape, x=None, pregate=None, dx=_map(dstate), dpregate=None,
            SHIFT=p.shared["PX"],
        ))  # fmt: skip

    blocks = p.blocks(dz.shape)
    programs = p.c_blocks * weight.shape[1] * weight.shape[2]
    splits = min(
        MAX_SPLITS, blocks, cdiv(TARGET_PROGRAMS, programs), max(1, MAX_PARTIALS // dweight.numel()),
        tuned(MAX_SPLITS, small=3),
    )  # fmt: skip
    split_blocks = cdiv(blocks, splits)
    splits = cdiv(blocks, split_blocks)
    sums = [dweight, None if bias is None else dbias]
    partials = sums
    if splits > 1:
        partials = [
            None if t is None else torch.empty((splits, *t.shape), dtype=torch.float32, device=x.device) for t in sums
        ]
    launches.append(p.launch(
        dwconv_bwd_weight_kernel, dz.shape, programs * splits, dweight=partials[0], dbias=partials[1],
        split_blocks=split_blocks,
    ))  # fmt: skip
    if splits > 1:
        pairs = zip(partials, sums, strict=True)
        launches += [sum_partials(partial, t, splits) for partial, t in pairs if t is not None]
    return results, launches


_DEFAULTS = {"before": (0, 0), "after": (0, 0), "dilation": (1, 1), "window": (0, 0), "act": NONE}


def forward(x, weight, bias=None, pregate=None, postgate=None, state=None, **options):
    """effvit::dwconv. The arguments must have been validated."""
    out, launches = _plan_forward(x, weight, bias, pregate, postgate, state, **_DEFAULTS | options)
    run(launches, x.device)
    return out


def backward(grad_out, x, weight, bias=None, pregate=None, postgate=None, state=None, **options):
    """effvit::dwconv_backward: dx, dweight, dbias, dpregate, dpostgate, dstate."""
    results, launches = _plan_backward(
        grad_out, x, weight, bias, pregate, postgate, state, **_DEFAULTS | options
    )  # fmt: skip
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    cases = {  # shape, k, before, after, gates, state, act
        "7x7-bf16": (torch.bfloat16, (8, 56, 56, 96), (7, 7), (3, 3), (3, 3), False, False, NONE),
        "causal-gated-fp32": (torch.float32, (8, 1, 2048, 768), (1, 3), (0, 2), (0, 0), True, False, NONE),
        "state-silu-fp16": (torch.float16, (8, 1, 100, 1536), (1, 4), (0, 3), (0, 0), False, True, 2),
    }
    for name, (dtype, shape, k, before, after, gated, has_state, act) in cases.items():
        x = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty((shape[3], *k), dtype=torch.float32, device="meta")
        state = x.new_empty(shape[0], shape[1], before[1], shape[3]) if has_state else None
        gates = (x, x) if gated else (None, None)
        options = _DEFAULTS | {"before": before, "after": after, "act": act}
        args = (x, weight, weight.new_empty(shape[3]), *gates, state)
        out, launches = _plan_forward(*args, **options)
        _, backward_launches = _plan_backward(out, *args, **options)
        for launch in launches + backward_launches:
            yield launch.aot(name)
