"""Recurrent scans (LSTM, GRU, sLSTM) in Triton: forward and backward through time, a launch for every token.

Within a launch Triton does not promise that a store is visible to other threads, and a token needs all of the state
before; launches on one stream follow each other. A program has some batch items and some channels of one head.
Backward: dh of a token is what the next token's gates pass back through the weights; gates are computed again. The
gradients of all pre-activations stay in float32 until the one launch that makes the gradients of weights and bias.
"""

import torch

from effvit.reference.rnn_scan import CELLS, GATES, STATES

from ._common import MAX_GRID, Launch, _loop_bound, cdiv, device_function, next_power_of_two, run, tl, triton, tuned
from ._tiles import _share_of

LSTM, GRU, SLSTM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["B", "L", "H", "b_blocks", "d_blocks", "units", "walk", "t"]


@device_function
def _tanh(x):
    y = tl.abs(x)
    e = tl.exp(-2.0 * y)
    z = x * x
    p = -0.00665357 * z + 0.0213017
    p = p * z - 0.05389997
    p = p * z + 0.13332971
    p = p * z - 0.33333327
    far = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0.5, x + x * z * p, tl.where(x < 0.0, -far, far))


@device_function
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@device_function
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@device_function
def _load(pointer, row, rows, stride, column, columns):
    """Rows and columns of a matrix with last stride 1 in float32, zeros beyond."""
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer + offset, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)


@device_function
def _store(pointer, row, rows, stride, column, columns, value):
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@device_function
def _bias_of(bias, gate, stride_g, column, D: tl.constexpr, HAS_BIAS: tl.constexpr):
    b = tl.zeros([1, column.shape[0]], tl.float32)
    if HAS_BIAS:
        b += tl.load(bias + gate * stride_g + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return b


@device_function
def _recurrent(
    before, weight, bias, row, B, before_stride_b, weight_stride_g, weight_stride_o, bias_stride_g, column,
    D: tl.constexpr, G: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The recurrent part of up to four gates, of channels `column`, from h before."""
    BLOCK_B: tl.constexpr = row.shape[0]
    BLOCK_D: tl.constexpr = column.shape[0]
    r0 = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    r1 = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    r2 = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    r3 = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    if HAS_BEFORE:
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            h = _load(before, row, B, before_stride_b, k, D)
            w = weight
            r0 = tl.dot(h, tl.trans(_load(w, column, D, weight_stride_o, k, D)), r0, input_precision="ieee")
            w += weight_stride_g
            r1 = tl.dot(h, tl.trans(_load(w, column, D, weight_stride_o, k, D)), r1, input_precision="ieee")
            w += weight_stride_g
            r2 = tl.dot(h, tl.trans(_load(w, column, D, weight_stride_o, k, D)), r2, input_precision="ieee")
            if G == 4:
                w += weight_stride_g
                r3 = tl.dot(h, tl.trans(_load(w, column, D, weight_stride_o, k, D)), r3, input_precision="ieee")
    r0 += _bias_of(bias, 0, bias_stride_g, column, D, HAS_BIAS)
    r1 += _bias_of(bias, 1, bias_stride_g, column, D, HAS_BIAS)
    r2 += _bias_of(bias, 2, bias_stride_g, column, D, HAS_BIAS)
    if G == 4:
        r3 += _bias_of(bias, 3, bias_stride_g, column, D, HAS_BIAS)
    return r0, r1, r2, r3


@device_function
def _place(unit, d_blocks, b_blocks, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """(head, batch items, channels) of a piece of work."""
    column = (unit % d_blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    unit = unit // d_blocks
    row = (unit % b_blocks).to(tl.int32) * BLOCK_B + tl.arange(0, BLOCK_B)
    return (unit // b_blocks).to(tl.int64), row, column


@triton.jit(do_not_specialize=_SIZES)
def rnn_scan_fwd_kernel(
    x,  # [B, L, G, H, D], last stride 1
    weight,  # [H, G, D, D], last stride 1
    bias,  # [G, H, D], last stride 1, or anything
    before,  # the states before: [B, S, H, D] at a stride of the batch, or anything
    out,  # [B, L, H, D], contiguous
    trace,  # [B, L, S, H, D], contiguous float32
    B, L, H, b_blocks, d_blocks, units, walk, t,
    x_stride_b, x_stride_l, x_stride_g, x_stride_h, weight_stride_h, weight_stride_g, weight_stride_o,
    bias_stride_g, bias_stride_h, before_stride_b, before_offset,
    D: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Token t."""
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        head, row, column = _place(first + step, d_blocks, b_blocks, BLOCK_B, BLOCK_D)
        old = before + (before_offset + head * D)
        r0, r1, r2, r3 = _recurrent(
            old, weight + head * weight_stride_h, bias + head * bias_stride_h, row, B, before_stride_b, weight_stride_g,
            weight_stride_o, bias_stride_g, column, D, G, BLOCK_K, HAS_BEFORE, HAS_BIAS)  # fmt: skip
        x_t = x + (tl.cast(t, tl.int64) * x_stride_l + head * x_stride_h)
        x0 = _load(x_t, row, B, x_stride_b, column, D)
        x1 = _load(x_t + x_stride_g, row, B, x_stride_b, column, D)
        x2 = _load(x_t + 2 * x_stride_g, row, B, x_stride_b, column, D)
        new = trace + (tl.cast(t, tl.int64) * S * H + head) * D
        tokens = tl.cast(L, tl.int64)
        new_stride = tokens * S * H * D
        if CELL == GRU:
            reset = _sigmoid(x0 + r0)
            z = _sigmoid(x1 + r1)
            h = (1.0 - z) * _tanh(x2 + reset * r2)
            if HAS_BEFORE:
                h += z * _load(old, row, B, before_stride_b, column, D)
        else:
            i = x0 + r0
            f = x1 + r1
            n = _tanh(x2 + r2)
            o = _sigmoid(_load(x_t + 3 * x_stride_g, row, B, x_stride_b, column, D) + r3)
            if CELL == LSTM:
                c = _sigmoid(i) * n
                if HAS_BEFORE:
                    c += _sigmoid(f) * _load(old + H * D, row, B, before_stride_b, column, D)
                h = o * _tanh(c)
            else:
                top = i
                norm = tl.exp(i - top)  # 1; NaN where i is no number
                c = norm * n
                if HAS_BEFORE:
                    kept = _log_sigmoid(f) + _load(old + 3 * H * D, row, B, before_stride_b, column, D)
                    top = tl.maximum(kept, i)
                    into = tl.exp(i - top)
                    forget = tl.exp(kept - top)
                    c = forget * _load(old + H * D, row, B, before_stride_b, column, D) + into * n
                    norm = forget * _load(old + 2 * H * D, row, B, before_stride_b, column, D) + into
                h = o * c / norm
                _store(new + 2 * H * D, row, B, new_stride, column, D, norm)
                _store(new + 3 * H * D, row, B, new_stride, column, D, top)
            _store(new + H * D, row, B, new_stride, column, D, c)
        _store(new, row, B, new_stride, column, D, h)
        _store(out + (tl.cast(t, tl.int64) * H + head) * D, row, B, tokens * H * D, column, D, h)


@device_function
def _passed_back(
    drec, weight, row, B, drec_stride_b, drec_stride_g, weight_stride_g, weight_stride_o, column,
    D: tl.constexpr, G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the recurrent part of all gates times the weights."""
    dh = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for gate in range(0, G):
        for start in range(0, D, BLOCK_K):
            o = start + tl.arange(0, BLOCK_K)
            d = _load(drec + gate * drec_stride_g, row, B, drec_stride_b, o, D)
            w = _load(weight + gate * weight_stride_g, o, D, weight_stride_o, column, D)
            dh = tl.dot(d, w, dh, input_precision="ieee")
    return dh


@triton.jit(do_not_specialize=_SIZES)
def rnn_scan_bwd_kernel(
    grad_out,  # [B, L, H, D], last stride 1
    grad_trace,  # [B, L, S, H, D], contiguous float32, or anything
    x,  # [B, L, G, H, D], last stride 1
    weight,  # [H, G, D, D], last stride 1
    bias,  # [G, H, D], last stride 1, or anything
    before,  # the states before: [B, S, H, D] at a stride of the batch, or anything
    trace,  # [B, L, S, H, D], contiguous float32
    carried,  # [B, S, H, D], contiguous float32: gradients of states, of h what passes the weights by
    drec,  # [B, L, G, H, D], contiguous float32: gradients of the recurrent part
    dx,  # [B, L, G, H, D], contiguous
    dinitial,  # [B, S, H, D], contiguous float32, or anything
    B, L, H, b_blocks, d_blocks, units, walk, t,
    grad_out_stride_b, grad_out_stride_l, grad_out_stride_h, x_stride_b, x_stride_l, x_stride_g, x_stride_h,
    weight_stride_h, weight_stride_g, weight_stride_o, bias_stride_g, bias_stride_h, before_stride_b, before_offset,
    D: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GRAD_TRACE: tl.constexpr, LAST: tl.constexpr, FINAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Token t; LAST: nothing comes after it; FINAL: t is -1, and what arrives is the gradient of the initial states."""
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        head, row, column = _place(first + step, d_blocks, b_blocks, BLOCK_B, BLOCK_D)
        t64 = tl.cast(t, tl.int64)
        tokens = tl.cast(L, tl.int64)
        own = carried + head * D
        dh = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        if not LAST:
            dh = _passed_back(
                drec + ((t64 + 1) * G * H + head) * D, weight + head * weight_stride_h, row, B, tokens * G * H * D,
                H * D, weight_stride_g, weight_stride_o, column, D, G, BLOCK_K)  # fmt: skip
            if CELL == GRU:
                dh += _load(own, row, B, S * H * D, column, D)
        if FINAL:
            _store(dinitial + head * D, row, B, S * H * D, column, D, dh)
            for s in range(1, S):
                value = _load(own + s * H * D, row, B, S * H * D, column, D)
                _store(dinitial + (head + s * H) * D, row, B, S * H * D, column, D, value)
        else:
            old = before + (before_offset + head * D)
            r0, r1, r2, r3 = _recurrent(
                old, weight + head * weight_stride_h, bias + head * bias_stride_h, row, B, before_stride_b,
                weight_stride_g, weight_stride_o, bias_stride_g, column, D, G, BLOCK_K, HAS_BEFORE,
                HAS_BIAS)  # fmt: skip
            x_t = x + (t64 * x_stride_l + head * x_stride_h)
            x0 = _load(x_t, row, B, x_stride_b, column, D)
            x1 = _load(x_t + x_stride_g, row, B, x_stride_b, column, D)
            x2 = _load(x_t + 2 * x_stride_g, row, B, x_stride_b, column, D)
            now = trace + (t64 * S * H + head) * D
            moved = grad_trace + (t64 * S * H + head) * D
            stride = tokens * S * H * D
            dh += _load(
                grad_out + (t64 * grad_out_stride_l + head * grad_out_stride_h), row, B, grad_out_stride_b, column, D
            )
            if HAS_GRAD_TRACE:
                dh += _load(moved, row, B, stride, column, D)
            rec = drec + (t64 * G * H + head) * D
            to = dx + (t64 * G * H + head) * D
            g_stride = tokens * G * H * D
            if CELL == GRU:
                reset = _sigmoid(x0 + r0)
                z = _sigmoid(x1 + r1)
                n = _tanh(x2 + reset * r2)
                h = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
                if HAS_BEFORE:
                    h = _load(old, row, B, before_stride_b, column, D)
                d2 = dh * (1.0 - z) * (1.0 - n * n)
                d1 = dh * (h - n) * z * (1.0 - z)
                d0 = d2 * r2 * reset * (1.0 - reset)
                _store(own, row, B, S * H * D, column, D, dh * z)
                _store(rec + 2 * H * D, row, B, g_stride, column, D, d2 * reset)
            else:
                i = x0 + r0
                f = x1 + r1
                n = _tanh(x2 + r2)
                o = _sigmoid(_load(x_t + 3 * x_stride_g, row, B, x_stride_b, column, D) + r3)
                dc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
                c_old = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
                if not LAST:
                    dc += _load(own + H * D, row, B, S * H * D, column, D)
                if HAS_GRAD_TRACE:
                    dc += _load(moved + H * D, row, B, stride, column, D)
                if HAS_BEFORE:
                    c_old += _load(old + H * D, row, B, before_stride_b, column, D)
                c = _load(now + H * D, row, B, stride, column, D)
                if CELL == LSTM:
                    i = _sigmoid(i)
                    f = _sigmoid(f)
                    y = _tanh(c)
                    dc += dh * o * (1.0 - y * y)
                    d0 = dc * n * i * (1.0 - i)
                    d1 = dc * c_old * f * (1.0 - f)
                    d2 = dc * i * (1.0 - n * n)
                    d3 = dh * y * o * (1.0 - o)
                    _store(own + H * D, row, B, S * H * D, column, D, dc * f)
                else:
                    norm = _load(now + 2 * H * D, row, B, stride, column, D)
                    norm = tl.where((row < B)[:, None] & (column < D)[None, :], norm, 1.0)
                    top = _load(now + 3 * H * D, row, B, stride, column, D)
                    dn = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
                    dm = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
                    if not LAST:
                        dn += _load(own + 2 * H * D, row, B, S * H * D, column, D)
                        dm += _load(own + 3 * H * D, row, B, S * H * D, column, D)
                    if HAS_GRAD_TRACE:
                        dn += _load(moved + 2 * H * D, row, B, stride, column, D)
                        dm += _load(moved + 3 * H * D, row, B, stride, column, D)
                    ratio = c / norm
                    dy = dh * o
                    dc += dy / norm
                    dn -= dy * ratio / norm
                    into = tl.exp(i - top)
                    din = (dc * n + dn) * into
                    if HAS_BEFORE:
                        n_old = _load(old + 2 * H * D, row, B, before_stride_b, column, D)
                        kept = _log_sigmoid(f) + _load(old + 3 * H * D, row, B, before_stride_b, column, D)
                        forget = tl.exp(kept - top)
                        dforget = (dc * c_old + dn * n_old) * forget
                        dm -= din + dforget
                        share = tl.where(kept > i, 1.0, 0.0)
                        dkept = dforget + dm * share
                        d0 = din + dm * (1.0 - share)
                        d1 = dkept * _sigmoid(-f)
                        _store(own + H * D, row, B, S * H * D, column, D, dc * forget)
                        _store(own + 2 * H * D, row, B, S * H * D, column, D, dn * forget)
                        _store(own + 3 * H * D, row, B, S * H * D, column, D, dkept)
                    else:
                        d0 = dm
                        d1 = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
                    d2 = dc * into * (1.0 - n * n)
                    d3 = dh * ratio * o * (1.0 - o)
                _store(rec + 2 * H * D, row, B, g_stride, column, D, d2)
                _store(rec + 3 * H * D, row, B, g_stride, column, D, d3)
                _store(to + 3 * H * D, row, B, g_stride, column, D, d3)
            _store(rec, row, B, g_stride, column, D, d0)
            _store(rec + H * D, row, B, g_stride, column, D, d1)
            _store(to, row, B, g_stride, column, D, d0)
            _store(to + H * D, row, B, g_stride, column, D, d1)
            _store(to + 2 * H * D, row, B, g_stride, column, D, d2)


@triton.jit(do_not_specialize=[*_SIZES, "r_blocks"])
def rnn_scan_bwd_weight_kernel(
    drec,  # [B, L, G, H, D], contiguous float32
    initial,  # [B, S, H, D], contiguous float32, or anything
    trace,  # [B, L, S, H, D], contiguous float32
    dweight,  # [H, G, D, D], contiguous
    dbias,  # [G, H, D], contiguous, or anything
    B, L, H, d_blocks, units, walk,
    D: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_BIAS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dR of a gate and a block of rows and columns: sums over batch and tokens, in their order."""
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        i_block = (unit % d_blocks).to(tl.int32)
        i = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
        unit = unit // d_blocks
        o = (unit % d_blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
        unit = (unit // d_blocks).to(tl.int64)
        gate = unit % G
        head = unit // G
        acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, _loop_bound(B * L), BLOCK_R):
            row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
            b = row // L
            t = row - b * L
            there = row < tl.cast(B, tl.int64) * L
            d_offset = ((row * G + gate) * H + head) * D
            d = tl.load(drec + d_offset[:, None] + o[None, :], mask=there[:, None] & (o < D)[None, :], other=0.0)
            h_offset = ((row - 1) * S * H + head) * D
            inside = (there & (t > 0))[:, None] & (i < D)[None, :]
            h = tl.load(trace + h_offset[:, None] + i[None, :], mask=inside, other=0.0)
            if HAS_INITIAL:
                starts = (there & (t == 0))[:, None] & (i < D)[None, :]
                h += tl.load(initial + (b * S * H + head)[:, None] * D + i[None, :], mask=starts, other=0.0)
            acc = tl.dot(tl.trans(d), h, acc, input_precision="ieee")
            total += tl.sum(d, axis=0)
        target = dweight + ((head * G + gate) * D + o.to(tl.int64))[:, None] * D + i[None, :]
        tl.store(target, acc.to(dweight.dtype.element_ty), mask=(o < D)[:, None] & (i < D)[None, :])
        if HAS_BIAS:
            target = dbias + (gate * H + head) * D + o
            tl.store(target, total.to(dbias.dtype.element_ty), mask=(o < D) & (i_block == 0))


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, the arguments that all kernels share, and the block sizes."""

    def __init__(self, x, weight, bias, initial, cell):
        self.B, self.L, self.G, self.H, self.D = x.shape
        self.S = STATES[CELLS[cell]]
        self.initial = initial
        self.block_b = max(16, min(tuned(32, small=16), next_power_of_two(self.B)))
        self.block_d = max(16, min(tuned(32, small=16), next_power_of_two(self.D)))
        self.b_blocks, self.d_blocks = cdiv(self.B, self.block_b), cdiv(self.D, self.block_d)
        self.shared = {
            "x": x, "weight": weight, "bias": x if bias is None else bias, "B": self.B, "L": self.L, "H": self.H,
            "D": self.D, "G": self.G, "S": self.S, "CELL": cell, "b_blocks": self.b_blocks, "d_blocks": self.d_blocks,
            "BLOCK_B": self.block_b, "BLOCK_D": self.block_d, "BLOCK_K": self.block_d, "BLOCK_R": 32,
            "HAS_BIAS": bias is not None, "bias_stride_g": 0, "bias_stride_h": 0,
        }  # fmt: skip
        self.add("x", "blgh", x)
        self.add("weight", "hgo", weight)
        if bias is not None:
            self.add("bias", "gh", bias)

    def add(self, name, axes, tensor):
        for axis, stride in zip(axes, tensor.stride(), strict=False):
            self.shared[f"{name}_stride_{axis}"] = stride

    def before(self, trace, t):
        """The states before token t, as arguments."""
        states = self.S * self.H * self.D
        if t > 0:
            return {"before": trace, "before_stride_b": self.L * states, "before_offset": (t - 1) * states}
        there = self.initial is not None
        return {"before": self.initial if there else trace, "before_stride_b": states, "before_offset": 0}

    def launch(self, kernel, units, **extra):
        """A launch of `kernel` with the shared arguments that it names, and `extra`."""
        walk = cdiv(units, tuned(MAX_GRID, small=8))
        index = tl.int64 if units + walk > MAX_GRID else tl.int32
        available = self.shared | extra | {"units": units, "walk": walk, "INDEX": index}
        return Launch(kernel, cdiv(units, walk), {name: available[name] for name in kernel.arg_names}, 4, 2)

    def step(self, kernel, trace, t, **extra):
        extra |= self.before(trace, t) | {"t": t, "HAS_BEFORE": t > 0 or self.initial is not None}
        return self.launch(kernel, self.H * self.b_blocks * self.d_blocks, trace=trace, **extra)


def _plan_forward(x, weight, bias=None, initial=None, *, cell=0):
    """((out, trace), launches). Works on meta tensors."""
    p = _Problem(x, weight, bias, initial, cell)
    out = torch.empty((p.B, p.L, p.H, p.D), dtype=x.dtype, device=x.device)
    trace = torch.empty((p.B, p.L, p.S, p.H, p.D), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return (out, trace), []
    return (out, trace), [p.step(rnn_scan_fwd_kernel, trace, t, out=out) for t in range(p.L)]


def _plan_backward(grad_out, grad_trace, x, weight, trace, bias=None, initial=None, *, cell=0):
    """((dx, dweight, dbias, dinitial), launches). Works on meta tensors."""
    p = _Problem(x, weight, bias, initial, cell)
    dx, dweight = (torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (x, weight))
    dbias = torch.empty(0 if bias is None else bias.shape, dtype=x.dtype, device=x.device)
    dinitial = torch.empty(0 if initial is None else initial.shape, dtype=torch.float32, device=x.device)
    results = dx, dweight, dbias, dinitial
    if dx.numel() == 0:
        return tuple(t.zero_() for t in results), []
    p.add("grad_out", "blh", grad_out)
    drec = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    extra = {
        "grad_out": grad_out, "grad_trace": trace if grad_trace is None else grad_trace, "drec": drec, "dx": dx,
        "carried": torch.empty((p.B, p.S, p.H, p.D), dtype=torch.float32, device=x.device),
        "dinitial": drec if initial is None else dinitial, "HAS_GRAD_TRACE": grad_trace is not None,
    }  # fmt: skip
    launches = [
        p.step(rnn_scan_bwd_kernel, trace, t, **extra, LAST=t == p.L - 1, FINAL=False) for t in reversed(range(p.L))
    ]
    if initial is not None:
        launches.append(p.step(rnn_scan_bwd_kernel, trace, -1, **extra, LAST=False, FINAL=True))
    launches.append(p.launch(
        rnn_scan_bwd_weight_kernel, p.H * p.G * p.d_blocks**2, drec=drec, trace=trace, dweight=dweight,
        initial=trace if initial is None else initial, dbias=drec if bias is None else dbias,
        HAS_INITIAL=initial is not None,
    ))  # fmt: skip
    return results, launches


def forward(x, weight, bias=None, initial=None, *, cell=0):
    """effvit::rnn_scan: (out, trace). The arguments must have been validated."""
    initial = None if initial is None else initial.contiguous()
    results, launches = _plan_forward(x, weight, bias, initial, cell=cell)
    run(launches, x.device)
    return results


def backward(grad_out, grad_trace, x, weight, trace, bias=None, initial=None, *, cell=0):
    """effvit::rnn_scan_backward: (dx, dweight, dbias, dinitial)."""
    grad_trace, initial = (None if t is None else t.contiguous() for t in (grad_trace, initial))
    results, launches = _plan_backward(grad_out, grad_trace, x, weight, trace, bias, initial, cell=cell)
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for cell, name in enumerate(CELLS):
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
            B, L, H, D = 8, 2, 4, 64
            make = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
            x, weight, bias = make(B, L, GATES[name], H, D), make(H, GATES[name], D, D), make(GATES[name], H, D)
            initial = make(B, STATES[name], H, D, dtype=torch.float32)
            (out, trace), launches = _plan_forward(x, weight, bias, initial, cell=cell)
            _, backward_launches = _plan_backward(out, trace, x, weight, trace, bias, initial, cell=cell)
            for launch in launches[-1:] + backward_launches:
                yield launch.aot(f"{name}-{short}")
