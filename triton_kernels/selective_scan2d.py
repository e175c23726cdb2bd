"""VMamba's four selective scans in Triton: forward and backward.

A program has a block of channels of one direction of one batch item and goes through its tokens one by one, its states
in registers, so a step is a few loads and an elementwise product; directions write their own sums, which
`sum_partials` adds in order.

Backward: a program first goes forward and keeps its states every CHUNK tokens; then it takes the chunks last first,
computes their states again into a scratch of its own, and goes back through them with the adjoint of the state. The
gradients of b and c are sums over channels, those of a, d and dt_bias sums over the batch: of programs, of batch items,
added in a fixed order afterwards. Where what programs write of b and c would be more than PARTIAL_BYTES and more than
the gradients themselves, a program takes several blocks of channels, one after the other.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, device_function, next_power_of_two, run, sum_partials, tl, triton, tuned
from ._tiles import _load_vector, _map_offset, feature_map

CHUNK = 32  # tokens between the states that are kept
TILE = 512  # channels x states of a block, about
PARTIAL_BYTES = 64 << 20

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["H", "W", "batch", "chunks"]


@device_function
def _place(k, s, H, W):
    """Row and column of the k-th token of direction s."""
    columns = s % 2
    back = s // 2
    inner = W + columns * (H - W)
    j = back * (H * W - 1) + (1 - 2 * back) * k
    outer = j // inner
    i = j - outer * inner
    y = outer + columns * (i - outer)
    x = i + columns * (outer - i)
    return y, x


@device_function
def _row(t, b, y, x, s, column, D):
    """Channels `column` of a token, float32, zeros beyond D."""
    return _load_vector(t.pointer + _map_offset(t, b, y, x, s), column, D).to(tl.float32)


@device_function
def _delta(dt, bias, SOFTPLUS: tl.constexpr):
    """The step sizes and their derivatives. log(1 + e) = 2 atanh(e / (2 + e)), e = exp(-|x|), by its series."""
    x = dt + bias
    slope = tl.zeros_like(x) + 1.0
    if SOFTPLUS:
        e = tl.exp(-tl.abs(x))
        s = e / (e + 2.0)
        z = s * s
        p = 1.0 / 13.0 * z + 1.0 / 11.0
        p = p * z + 1.0 / 9.0
        p = p * z + 1.0 / 7.0
        p = p * z + 1.0 / 5.0
        p = p * z + 1.0 / 3.0
        p = p * z + 1.0
        inverse = 1.0 / (e + 1.0)
        slope = tl.where(x < 0.0, e * inverse, inverse)
        x = tl.where(x < 0.0, 0.0, x) + 2.0 * s * p
    return x, slope


@device_function
def _decay(delta, rates):
    exponent = delta[:, None] * rates
    return tl.exp(tl.where(exponent > 87.0, 87.0, exponent))  # a NaN stays


@device_function
def _parameter(pointer, offset, column, D):
    """[D] at `offset`, zeros where there is none."""
    value = column.to(tl.float32) * 0.0
    if pointer is not None:
        value = _load_vector(pointer + offset, column, D)
    return value


@triton.jit(do_not_specialize=_SIZES)
def selective_scan2d_fwd_kernel(
    x,  # [B, H, W, 1, D]
    dt,  # [B, H, W, 4, D]
    b,  # [B, H, W, 4, N]
    c,  # [B, H, W, 4, N]
    a,  # [4, D, N] float32, contiguous
    d,  # [4, D] float32 or None
    dt_bias,  # [4, D] float32 or None
    partial,  # [4, B, H, W, D] float32
    H, W, batch,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    unit = tl.program_id(0).to(tl.int64)
    column = ((unit % D_BLOCKS) * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)
    s = (unit // D_BLOCKS) % 4
    item = unit // (D_BLOCKS * 4)
    n = tl.arange(0, BLOCK_N)
    mask = (column < D)[:, None] & (n < N)[None, :]
    rates = tl.load(a + (s * D + column)[:, None] * N + n[None, :], mask=mask, other=0.0)
    skip = _parameter(d, s * D, column, D)
    bias = _parameter(dt_bias, s * D, column, D)
    state = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for k in range(0, _loop_bound(H * W)):
        row, place = _place(k, s, H, W)
        u = _row(x, item, row, place, s * 0, column, D)
        delta, _ = _delta(_row(dt, item, row, place, s, column, D), bias, SOFTPLUS)
        added = _row(b, item, row, place, s, n, N)
        read = _row(c, item, row, place, s, n, N)
        state = _decay(delta, rates) * state + (delta * u)[:, None] * added[None, :]
        result = tl.sum(state * read[None, :], axis=1) + skip * u
        target = partial + (((s * batch + item) * H + row) * W + place) * D
        tl.store(target + column, result, mask=column < D)


@triton.jit(do_not_specialize=_SIZES)
def selective_scan2d_bwd_kernel(
    grad_out,  # [B, H, W, D] float32, contiguous
    x,  # [B, H, W, 1, D]
    dt,  # [B, H, W, 4, D]
    b,  # [B, H, W, 4, N]
    c,  # [B, H, W, 4, N]
    a,  # [4, D, N] float32, contiguous
    d,  # [4, D] float32 or None
    dt_bias,  # [4, D] float32 or None
    kept,  # [B, 4, D_GROUPS, chunks, BLOCK_D, BLOCK_N] float32: states at the start of every chunk
    states,  # [B, 4, D_GROUPS, CHUNK, BLOCK_D, BLOCK_N] float32: states before every token of a chunk
    partial_dx,  # [4, B, H, W, D] float32
    ddt,  # [B, H, W, 4, D], contiguous
    partial_db,  # [D_GROUPS, B, H, W, 4, N] float32, or db where there is one group of one block
    partial_dc,  # likewise
    partial_da,  # [B, 4, D, N] float32
    partial_dd,  # [B, 4, D] float32
    partial_dbias,  # [B, 4, D] float32
    H, W, batch, chunks,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """A program has GROUP blocks of channels of one direction of one batch item."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    D_GROUPS: tl.constexpr = (D_BLOCKS + GROUP - 1) // GROUP
    TILE: tl.constexpr = BLOCK_D * BLOCK_N
    unit = tl.program_id(0).to(tl.int64)
    group = unit % D_GROUPS
    s = (unit // D_GROUPS) % 4
    item = unit // (D_GROUPS * 4)
    n = tl.arange(0, BLOCK_N)
    tile = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    kept_here = kept + unit * chunks * TILE
    states_here = states + unit * CHUNK * TILE
    for member in range(0, _loop_bound(tl.minimum(D_BLOCKS - group * GROUP, GROUP))):
        block = group * GROUP + member
        column = (block * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)
        inside = column < D
        mask = inside[:, None] & (n < N)[None, :]
        rates = tl.load(a + (s * D + column)[:, None] * N + n[None, :], mask=mask, other=0.0)
        skip = _parameter(d, s * D, column, D)
        bias = _parameter(dt_bias, s * D, column, D)

        state = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        for chunk in range(0, _loop_bound(chunks)):
            tl.store(kept_here + chunk * TILE + tile, state)
            for i in range(0, _loop_bound(tl.minimum(H * W - chunk * CHUNK, CHUNK))):
                row, place = _place(chunk * CHUNK + i, s, H, W)
                u = _row(x, item, row, place, s * 0, column, D)
                delta, _ = _delta(_row(dt, item, row, place, s, column, D), bias, SOFTPLUS)
                added = _row(b, item, row, place, s, n, N)
                state = _decay(delta, rates) * state + (delta * u)[:, None] * added[None, :]
        tl.debug_barrier()  # what is kept may be read by other threads than have written it

        adjoint = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)  # e_(i+1) dh_(i+1)
        da = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        dd = tl.zeros([BLOCK_D], tl.float32)
        dbias = tl.zeros([BLOCK_D], tl.float32)
        for step in range(0, _loop_bound(chunks)):
            chunk = chunks - 1 - step
            count = tl.minimum(H * W - chunk * CHUNK, CHUNK)
            state = tl.load(kept_here + chunk * TILE + tile)
            for i in range(0, _loop_bound(count)):
                tl.store(states_here + i * TILE + tile, state)
                row, place = _place(chunk * CHUNK + i, s, H, W)
                u = _row(x, item, row, place, s * 0, column, D)
                delta, _ = _delta(_row(dt, item, row, place, s, column, D), bias, SOFTPLUS)
                added = _row(b, item, row, place, s, n, N)
                state = _decay(delta, rates) * state + (delta * u)[:, None] * added[None, :]
            tl.debug_barrier()
            for back in range(0, _loop_bound(count)):
                i = count - 1 - back
                row, place = _place(chunk * CHUNK + i, s, H, W)
                u = _row(x, item, row, place, s * 0, column, D)
                delta, slope = _delta(_row(dt, item, row, place, s, column, D), bias, SOFTPLUS)
                added = _row(b, item, row, place, s, n, N)
                read = _row(c, item, row, place, s, n, N)
                index = ((item * H + row) * W + place).to(tl.int64)
                grad = _load_vector(grad_out + index * D, column, D)
                decay = _decay(delta, rates)
                before = decay * tl.load(states_here + i * TILE + tile)
                drive = (delta * u)[:, None]
                dh = grad[:, None] * read[None, :] + adjoint
                dc = tl.sum(grad[:, None] * (before + drive * added[None, :]), axis=0)
                db = tl.sum(dh * drive, axis=0)
                along_b = tl.sum(dh * added[None, :], axis=1)
                through_decay = dh * before
                da += delta[:, None] * through_decay
                step_grad = (u * along_b + tl.sum(through_decay * rates, axis=1)) * slope
                dd += grad * u
                dbias += step_grad
                adjoint = decay * dh
                of_map = batch * H * W
                tl.store(partial_dx + (s * of_map + index) * D + column, delta * along_b + skip * grad, mask=inside)
                tl.store(ddt + (index * 4 + s) * D + column, step_grad.to(ddt.dtype.element_ty), mask=inside)
                target = ((group * of_map + index) * 4 + s) * N + n
                if GROUP > 1:  # the blocks before, in the same order
                    before_it = (n < N) & (member > 0)
                    db += tl.load(partial_db + target, mask=before_it, other=0.0)
                    dc += tl.load(partial_dc + target, mask=before_it, other=0.0)
                tl.store(partial_db + target, db.to(partial_db.dtype.element_ty), mask=n < N)
                tl.store(partial_dc + target, dc.to(partial_dc.dtype.element_ty), mask=n < N)
            tl.debug_barrier()  # the states are overwritten
        channel = (item * 4 + s) * D + column
        tl.store(partial_da + channel[:, None] * N + n[None, :], da, mask=mask)
        tl.store(partial_dd + channel, dd, mask=inside)
        tl.store(partial_dbias + channel, dbias, mask=inside)


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, the arguments that all kernels share, and the block sizes."""

    def __init__(self, x, dt, b, c, a, d, dt_bias, softplus):
        (self.B, self.H, self.W, self.D), self.N = x.shape, b.shape[-1]
        self.block_n = next_power_of_two(self.N)
        self.block_d = max(1, min(next_power_of_two(self.D), tuned(max(4, min(32, TILE // self.block_n)), small=2)))
        self.d_blocks = cdiv(self.D, self.block_d)
        self.shared = {
            "x": feature_map(x.unsqueeze(3)), "dt": feature_map(dt), "b": feature_map(b), "c": feature_map(c),
            "a": a.contiguous(), "d": None if d is None else d.contiguous(),
            "dt_bias": None if dt_bias is None else dt_bias.contiguous(), "H": self.H, "W": self.W, "batch": self.B,
            "D": self.D, "N": self.N, "BLOCK_D": self.block_d, "BLOCK_N": self.block_n, "SOFTPLUS": softplus,
        }  # fmt: skip

    def launch(self, kernel, blocks, **extra):
        available = {**self.shared, **extra}
        args = {name: available[name] for name in kernel.arg_names}
        return Launch(kernel, self.B * 4 * blocks, args, num_warps=2, num_stages=2)

    def blocks_of_group(self, *results):
        """As many as keep the sums of groups within PARTIAL_BYTES, or within the bytes of `results`."""
        most = max(PARTIAL_BYTES, sum(t.numel() * t.element_size() for t in results))
        groups = max(1, most // (8 * self.B * self.H * self.W * 4 * self.N))
        return cdiv(self.d_blocks, tuned(min(groups, self.d_blocks), small=min(2, self.d_blocks)))


def _float32(shape, like):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _plan_forward(x, dt, b, c, a, d=None, dt_bias=None, *, softplus=True):
    """(out, launches). Works on meta tensors."""
    out = _float32(x.shape, x)
    if out.numel() == 0:
        return out, []
    p = _Problem(x, dt, b, c, a, d, dt_bias, softplus)
    partial = _float32((4, *out.shape), x)
    return out, [p.launch(selective_scan2d_fwd_kernel, p.d_blocks, partial=partial), sum_partials(partial, out, 4)]


def _plan_backward(grad_out, x, dt, b, c, a, d=None, dt_bias=None, *, softplus=True):
    """((dx, ddt, db, dc, da, dd, ddt_bias), launches). Works on meta tensors."""
    dx, ddt, db, dc = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c))
    da = _float32(a.shape, a)
    dd, dbias = (_float32(a.shape[:2] if t is not None else (0,), a) for t in (d, dt_bias))
    results = (dx, ddt, db, dc, da, dd, dbias)
    if x.numel() == 0:
        return tuple(t.zero_() for t in results), []
    p = _Problem(x, dt, b, c, a, d, dt_bias, softplus)
    chunk = min(tuned(CHUNK, small=2), p.H * p.W)
    chunks = cdiv(p.H * p.W, chunk)
    tile = (p.block_d, p.block_n)
    group = p.blocks_of_group(ddt, db, dc)
    groups = cdiv(p.d_blocks, group)
    one = groups == 1 and (group == 1 or db.dtype == torch.float32)
    partial = {
        "partial_dx": _float32((4, *dx.shape), x),
        "partial_db": db if one else _float32((groups, *db.shape), x),
        "partial_dc": dc if one else _float32((groups, *dc.shape), x),
        "partial_da": _float32((p.B, *a.shape), x),
        "partial_dd": _float32((p.B, *a.shape[:2]), x),
        "partial_dbias": _float32((p.B, *a.shape[:2]), x),
    }
    launches = [p.launch(
        selective_scan2d_bwd_kernel, groups, grad_out=grad_out.contiguous(), ddt=ddt, chunks=chunks, CHUNK=chunk,
        kept=_float32((p.B * 4 * groups, chunks, *tile), x), states=_float32((p.B * 4 * groups, chunk, *tile), x),
        GROUP=group, **partial,
    )]  # fmt: skip
    sums = [("partial_dx", dx, 4), ("partial_da", da, p.B)]
    sums += [] if one else [("partial_db", db, groups), ("partial_dc", dc, groups)]
    sums += [
        (n, t, p.B) for n, t, given in (("partial_dd", dd, d), ("partial_dbias", dbias, dt_bias)) if given is not None
    ]
    return results, launches + [sum_partials(partial[name], out, splits) for name, out, splits in sums]


def forward(x, dt, b, c, a, d=None, dt_bias=None, *, softplus=True):
    """effvit::selective_scan2d. The arguments must have been validated."""
    out, launches = _plan_forward(x, dt, b, c, a, d, dt_bias, softplus=softplus)
    run(launches, x.device)
    return out


def backward(grad_out, x, dt, b, c, a, d=None, dt_bias=None, *, softplus=True):
    """effvit::selective_scan2d_backward: (dx, ddt, db, dc, da, dd, ddt_bias)."""
    results, launches = _plan_backward(grad_out, x, dt, b, c, a, d, dt_bias, softplus=softplus)
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    # Of the last one's backward a program has several blocks of channels.
    for name, (B, H, D, N) in {"n16": (8, 28, 192, 16), "n1": (8, 56, 96, 1), "n64": (8, 28, 384, 64)}.items():
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
            x = torch.empty((B, H, H, D), dtype=dtype, device="meta")
            dt = torch.empty((B, H, H, 4, D), dtype=dtype, device="meta")
            b, c = (torch.empty((B, H, H, 4, N), dtype=dtype, device="meta") for _ in range(2))
            a = torch.empty((4, D, N), device="meta")
            d, dt_bias = (None, None) if N == 64 else torch.empty((2, 4, D), device="meta").unbind(0)
            out, launches = _plan_forward(x, dt, b, c, a, d, dt_bias, softplus=N != 64)
            _, backward_launches = _plan_backward(out, x, dt, b, c, a, d, dt_bias, softplus=N != 64)
            for launch in launches + backward_launches:
                yield launch.aot(f"{name}-{short}")
