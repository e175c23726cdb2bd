"""local_pool_attention in Triton: forward and backward.

A program has a block of positions of one head. The window's taps are products of rows, one tap after the other; pooled
tokens come in blocks, by tl.dot; the softmax is online over both. All arithmetic is float32.

Backward: the first kernel computes the softmax again, keeps its logarithm (lse) and delta = sum a da per position, and
has dq and what is summed over positions, in partial sums by program; the second gathers dk and dv from the positions
whose windows a position is in; the third has those of pooled tokens, over shares of the positions; the fourth
dpool_bias, over the batch. Partial sums are added in a fixed order.
"""

import torch

from ._common import (
    MAX_GRID,
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
from ._tiles import (
    _load_rows,
    _load_tile,
    _map_offset,
    _rows_of,
    _store_rows,
    _store_tile,
    feature_map,
    tokens,
)

MAX_SPLITS = 16
NOTHING = tl.constexpr(-1.0e30)  # where maxima begin: an exponential of the difference to it is 0, not NaN

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["batch", "heads", "H", "W", "P", "x_blocks", "p_blocks", "split_blocks"]


@device_function
def _load_map(x, b, head, row, column, ok, c, D: tl.constexpr):
    """Rows of d channels, in float32."""
    offset = _map_offset(x, b, row.to(tl.int64), column.to(tl.int64), head)
    return _load_tile(x.pointer, offset, ok, c, D).to(tl.float32)


@device_function
def _store_map(x, b, head, row, column, ok, c, value, D: tl.constexpr):
    offset = _map_offset(x, b, row.to(tl.int64), column.to(tl.int64), head)
    _store_tile(x.pointer, offset, ok, c, value, D)


@device_function
def _queries(q, q_scale, q_embed, b, head, row, column, ok, c, W, L, D: tl.constexpr):
    """(q, (q + q_embed), q_scale, their product): queries as given and as they are multiplied with keys."""
    given = _load_map(q, b, head, row, column, ok, c, D)
    embedded = given
    if q_embed is not None:
        e = tl.load(q_embed + head * D + c, mask=c < D, other=0.0)
        embedded = tl.where(ok[:, None], given + e[None, :], 0.0)
    if q_scale is not None:
        scale = tl.load(q_scale + head * L + row * W + column, mask=ok, other=0.0)
    else:
        scale = tl.full([row.shape[0]], 1.0, tl.float32)
    return given, embedded, scale, embedded * scale[:, None]


@device_function
def _number(x, head, tap, T: tl.constexpr):
    """One of the T numbers of a head; 0 where there are none."""
    if x is not None:
        return tl.load(x + head * T + tap)
    return 0.0


@device_function
def _token(tokens_, head, tap, c, D: tl.constexpr, T: tl.constexpr):
    return tl.load(tokens_ + (head * D + c) * T + tap, mask=c < D, other=0.0)


@device_function
def _pooled_scores(s, keys, pool_bias, head, n, p, ok, P, L):
    """[positions, pooled tokens]"""
    scores = tl.dot(s, tl.trans(keys), input_precision="ieee")
    inside = ok[:, None] & (p < P)[None, :]
    if pool_bias is not None:
        offset = (head * L + n.to(tl.int64))[:, None] * P + p[None, :]
        scores += tl.load(pool_bias + offset, mask=inside, other=0.0)
    return tl.where((p < P)[None, :], scores, -float("inf"))


@device_function
def _larger(m, score):
    """(the maximum, the factor of what was summed for the maximum before, the exponential of a score)"""
    larger = tl.maximum(m, score)
    return larger, tl.exp(m - larger), tl.exp(score - larger)


@triton.jit(do_not_specialize=_SIZES)
def local_pool_attention_fwd_kernel(
    q, k, v,  # FeatureMap [B, H, W, h, D]
    k_pool, v_pool,  # Tokens [B, P, h, D]
    local_bias,  # [h, T] float32 or None; likewise
    pool_bias,  # [h, H*W, P]
    q_scale,  # [h, H*W]
    q_embed,  # [h, D]
    tokens_,  # [h, D, T]
    token_bias,  # [h, T]
    out,  # FeatureMap [B, H, W, h, D]
    heads, H, W, P, x_blocks,
    WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WINDOW * WINDOW
    program = tl.program_id(0)
    n = program % x_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    head = (program // x_blocks % heads).to(tl.int64)
    b = (program // x_blocks // heads).to(tl.int64)
    L = H * W
    ok = n < L
    row, column, c = n // W, n % W, tl.arange(0, BLOCK_D)
    given, _, _, s = _queries(q, q_scale, q_embed, b, head, row, column, ok, c, W, L, D)
    m = tl.full([BLOCK_X], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_X], tl.float32)
    acc = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    more = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    for tap in range(T):
        y = row + (tap // WINDOW - WINDOW // 2)
        x = column + (tap % WINDOW - WINDOW // 2)
        inside = ok & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        key = _load_map(k, b, head, y, x, inside, c, D)
        value = _load_map(v, b, head, y, x, inside, c, D)
        score = tl.sum(s * key, axis=1) + _number(local_bias, head, tap, T)
        m, factor, e = _larger(m, tl.where(inside, score, -float("inf")))
        total = total * factor + e
        acc = acc * factor[:, None] + e[:, None] * value
        extra = tl.zeros([BLOCK_X], tl.float32) + _number(token_bias, head, tap, T)
        if tokens_ is not None:
            extra += tl.sum(given * _token(tokens_, head, tap, c, D, T)[None, :], axis=1)
        more += extra[:, None] * value
    keys, values = _rows_of(k_pool, b, head), _rows_of(v_pool, b, head)
    for start in range(0, _loop_bound(P), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        key = _load_rows(keys, p.to(tl.int64), p < P, c, D)
        value = _load_rows(values, p.to(tl.int64), p < P, c, D)
        scores = _pooled_scores(s, key, pool_bias, head, n, p, ok, P, L)
        larger = tl.maximum(m, tl.max(scores, axis=1))
        factor = tl.exp(m - larger)
        e = tl.exp(scores - larger[:, None])
        total = total * factor + tl.sum(e, axis=1)
        acc = tl.dot(e, value, acc * factor[:, None], input_precision="ieee")
        m = larger
    total = tl.where(ok, total, 1.0)
    _store_map(out, b, head, row, column, ok, c, acc / total[:, None] + more, D)


@triton.jit(do_not_specialize=_SIZES)
def local_pool_attention_bwd_q_kernel(
    grad_out, q, k, v,  # FeatureMap [B, H, W, h, D]
    k_pool, v_pool,  # Tokens [B, P, h, D]
    local_bias, pool_bias, q_scale, q_embed, tokens_, token_bias,
    dq,  # FeatureMap [B, H, W, h, D]
    lse, delta,  # [B, h, H*W] float32
    dlocal_bias,  # [B, x_blocks, h, T] float32, or None; likewise
    dq_scale,  # [B, h, H*W]
    dq_embed,  # [B, x_blocks, h, D]
    dtokens,  # [B, x_blocks, h, D, T]
    dtoken_bias,  # [B, x_blocks, h, T]
    heads, H, W, P, x_blocks,
    WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WINDOW * WINDOW
    program = tl.program_id(0)
    block = program % x_blocks
    n = block * BLOCK_X + tl.arange(0, BLOCK_X)
    head = (program // x_blocks % heads).to(tl.int64)
    b = (program // x_blocks // heads).to(tl.int64)
    L = H * W
    ok = n < L
    row, column, c = n // W, n % W, tl.arange(0, BLOCK_D)
    given, embedded, scale, s = _queries(q, q_scale, q_embed, b, head, row, column, ok, c, W, L, D)
    grad = _load_map(grad_out, b, head, row, column, ok, c, D)
    keys, values = _rows_of(k_pool, b, head), _rows_of(v_pool, b, head)

    m = tl.full([BLOCK_X], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_X], tl.float32)
    weighted = tl.zeros([BLOCK_X], tl.float32)  # gradients of the weights
    for tap in range(T):
        y = row + (tap // WINDOW - WINDOW // 2)
        x = column + (tap % WINDOW - WINDOW // 2)
        inside = ok & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        score = tl.sum(s * _load_map(k, b, head, y, x, inside, c, D), axis=1) + _number(local_bias, head, tap, T)
        da = tl.sum(grad * _load_map(v, b, head, y, x, inside, c, D), axis=1)
        m, factor, e = _larger(m, tl.where(inside, score, -float("inf")))
        total = total * factor + e
        weighted = weighted * factor + e * da
    for start in range(0, _loop_bound(P), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        key = _load_rows(keys, p.to(tl.int64), p < P, c, D)
        value = _load_rows(values, p.to(tl.int64), p < P, c, D)
        scores = _pooled_scores(s, key, pool_bias, head, n, p, ok, P, L)
        larger = tl.maximum(m, tl.max(scores, axis=1))
        factor = tl.exp(m - larger)
        e = tl.exp(scores - larger[:, None])
        total = total * factor + tl.sum(e, axis=1)
        da_pooled = tl.dot(grad, tl.trans(value), input_precision="ieee")
        weighted = weighted * factor + tl.sum(e * da_pooled, axis=1)
        m = larger
    total = tl.where(ok, total, 1.0)
    log_sum = tl.where(ok, m + tl.log(total), 0.0)
    mean = weighted / total
    at = (b * heads + head) * L + n
    tl.store(lse + at, log_sum, mask=ok)
    tl.store(delta + at, mean, mask=ok)

    share = (b * x_blocks + block) * heads + head
    ds_k = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    more = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    for tap in range(T):
        y = row + (tap // WINDOW - WINDOW // 2)
        x = column + (tap % WINDOW - WINDOW // 2)
        inside = ok & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        key = _load_map(k, b, head, y, x, inside, c, D)
        score = tl.sum(s * key, axis=1) + _number(local_bias, head, tap, T)
        da = tl.sum(grad * _load_map(v, b, head, y, x, inside, c, D), axis=1)
        ds = tl.where(inside, tl.exp(score - log_sum), 0.0) * (da - mean)
        ds_k += ds[:, None] * key
        if dlocal_bias is not None:
            tl.store(dlocal_bias + share * T + tap, tl.sum(ds, axis=0))
        if dtoken_bias is not None:
            tl.store(dtoken_bias + share * T + tap, tl.sum(da, axis=0))
        if tokens_ is not None:
            more += da[:, None] * _token(tokens_, head, tap, c, D, T)[None, :]
            tl.store(dtokens + (share * D + c) * T + tap, tl.sum(da[:, None] * given, axis=0), mask=c < D)
    for start in range(0, _loop_bound(P), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        key = _load_rows(keys, p.to(tl.int64), p < P, c, D)
        value = _load_rows(values, p.to(tl.int64), p < P, c, D)
        scores = _pooled_scores(s, key, pool_bias, head, n, p, ok, P, L)
        da_pooled = tl.dot(grad, tl.trans(value), input_precision="ieee")
        ds_pooled = tl.where(ok[:, None], tl.exp(scores - log_sum[:, None]) * (da_pooled - mean[:, None]), 0.0)
        ds_k = tl.dot(ds_pooled, key, ds_k, input_precision="ieee")
    result = ds_k * scale[:, None]
    if dq_embed is not None:
        tl.store(dq_embed + share * D + c, tl.sum(result, axis=0), mask=c < D)
    if dq_scale is not None:
        tl.store(dq_scale + at, tl.sum(ds_k * embedded, axis=1), mask=ok)
    _store_map(dq, b, head, row, column, ok, c, result + more, D)


@triton.jit(do_not_specialize=_SIZES)
def local_pool_attention_bwd_kv_kernel(
    grad_out, q, k, v,  # FeatureMap [B, H, W, h, D]
    local_bias, q_scale, q_embed, tokens_, token_bias,
    lse, delta,  # [B, h, H*W] float32
    dk, dv,  # FeatureMap [B, H, W, h, D]
    heads, H, W, x_blocks,
    WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WINDOW * WINDOW
    program = tl.program_id(0)
    n = program % x_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    head = (program // x_blocks % heads).to(tl.int64)
    b = (program // x_blocks // heads).to(tl.int64)
    L = H * W
    ok = n < L
    row, column, c = n // W, n % W, tl.arange(0, BLOCK_D)
    key = _load_map(k, b, head, row, column, ok, c, D)
    value = _load_map(v, b, head, row, column, ok, c, D)
    dk_tile = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    for tap in range(T):
        y = row - (tap // WINDOW - WINDOW // 2)  # the position whose tap this is
        x = column - (tap % WINDOW - WINDOW // 2)
        inside = ok & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        given, _, _, s = _queries(q, q_scale, q_embed, b, head, y, x, inside, c, W, L, D)
        grad = _load_map(grad_out, b, head, y, x, inside, c, D)
        at = (b * heads + head) * L + y * W + x
        log_sum = tl.load(lse + at, mask=inside, other=0.0)
        mean = tl.load(delta + at, mask=inside, other=0.0)
        score = tl.sum(s * key, axis=1) + _number(local_bias, head, tap, T)
        a = tl.where(inside, tl.exp(score - log_sum), 0.0)
        dk_tile += (a * (tl.sum(grad * value, axis=1) - mean))[:, None] * s
        a += _number(token_bias, head, tap, T)
        if tokens_ is not None:
            a += tl.sum(given * _token(tokens_, head, tap, c, D, T)[None, :], axis=1)
        dv_tile += a[:, None] * grad
    _store_map(dk, b, head, row, column, ok, c, dk_tile, D)
    _store_map(dv, b, head, row, column, ok, c, dv_tile, D)


@triton.jit(do_not_specialize=_SIZES)
def local_pool_attention_bwd_pool_kernel(
    grad_out, q,  # FeatureMap [B, H, W, h, D]
    k_pool, v_pool,  # Tokens [B, P, h, D]
    pool_bias, q_scale, q_embed,
    lse, delta,  # [B, h, H*W] float32
    dk_pool, dv_pool,  # Tokens [splits * B, P, h, D] float32, or [B, P, h, D] where there is one split
    batch, heads, H, W, P, p_blocks, split_blocks,
    D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    p = program % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    head = (program // p_blocks % heads).to(tl.int64)
    share = (program // p_blocks // heads).to(tl.int64)  # split * batch + b
    b = share % batch
    split = (share // batch).to(tl.int32)
    L = H * W
    c = tl.arange(0, BLOCK_D)
    key = _load_rows(_rows_of(k_pool, b, head), p.to(tl.int64), p < P, c, D)
    value = _load_rows(_rows_of(v_pool, b, head), p.to(tl.int64), p < P, c, D)
    dk_tile = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for block in range(0, _loop_bound(split_blocks)):
        n = (split * split_blocks + block) * BLOCK_X + tl.arange(0, BLOCK_X)
        ok = n < L
        row, column = n // W, n % W
        _, _, _, s = _queries(q, q_scale, q_embed, b, head, row, column, ok, c, W, L, D)
        grad = _load_map(grad_out, b, head, row, column, ok, c, D)
        at = (b * heads + head) * L + n
        log_sum = tl.load(lse + at, mask=ok, other=0.0)
        mean = tl.load(delta + at, mask=ok, other=0.0)
        scores = _pooled_scores(s, key, pool_bias, head, n, p, ok, P, L)
        a = tl.where(ok[:, None], tl.exp(scores - log_sum[:, None]), 0.0)
        ds = a * (tl.dot(grad, tl.trans(value), input_precision="ieee") - mean[:, None])
        dk_tile = tl.dot(tl.trans(ds), s, dk_tile, input_precision="ieee")
        dv_tile = tl.dot(tl.trans(a), grad, dv_tile, input_precision="ieee")
    _store_rows(_rows_of(dk_pool, share, head), p.to(tl.int64), p < P, c, dk_tile, D)
    _store_rows(_rows_of(dv_pool, share, head), p.to(tl.int64), p < P, c, dv_tile, D)


@triton.jit(do_not_specialize=_SIZES)
def local_pool_attention_bwd_bias_kernel(
    grad_out, q,  # FeatureMap [B, H, W, h, D]
    k_pool, v_pool,  # Tokens [B, P, h, D]
    pool_bias, q_scale, q_embed,
    lse, delta,  # [B, h, H*W] float32
    dpool_bias,  # [h, H*W, P] float32
    batch, heads, H, W, P, x_blocks, p_blocks,
    D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    p = program % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    n = program // p_blocks % x_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    head = (program // p_blocks // x_blocks).to(tl.int64)
    L = H * W
    ok = n < L
    row, column, c = n // W, n % W, tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_X, BLOCK_P], tl.float32)
    for image in range(0, _loop_bound(batch)):
        b = tl.cast(image, tl.int64)
        key = _load_rows(_rows_of(k_pool, b, head), p.to(tl.int64), p < P, c, D)
        value = _load_rows(_rows_of(v_pool, b, head), p.to(tl.int64), p < P, c, D)
        _, _, _, s = _queries(q, q_scale, q_embed, b, head, row, column, ok, c, W, L, D)
        grad = _load_map(grad_out, b, head, row, column, ok, c, D)
        at = (b * heads + head) * L + n
        log_sum = tl.load(lse + at, mask=ok, other=0.0)
        mean = tl.load(delta + at, mask=ok, other=0.0)
        scores = _pooled_scores(s, key, pool_bias, head, n, p, ok, P, L)
        da = tl.dot(grad, tl.trans(value), input_precision="ieee")
        total += tl.exp(scores - log_sum[:, None]) * (da - mean[:, None])
    offset = (head * L + n.to(tl.int64))[:, None] * P + p[None, :]
    tl.store(dpool_bias + offset, total, mask=ok[:, None] & (p < P)[None, :])


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, the arguments that all kernels share, and the block sizes."""

    def __init__(self, maps, pooled, optional, window):
        self.B, self.H, self.W, self.h, self.d = maps["q"].shape
        self.P = pooled["k_pool"].shape[1]
        L = self.H * self.W
        self.block_x = max(16, min(tuned(64, small=16), next_power_of_two(L)))
        self.block_p = max(16, min(tuned(32, small=16), next_power_of_two(self.P)))
        block_d = max(16, next_power_of_two(self.d))
        self.num_warps = 8 if block_d > 64 else 4
        self.x_blocks, self.p_blocks = cdiv(L, self.block_x), cdiv(self.P, self.block_p)
        optional = {n: None if t is None else t.contiguous() for n, t in optional.items()}
        self.shared = {
            **{n: feature_map(t) for n, t in maps.items()}, **{n: tokens(t) for n, t in pooled.items()},
            **optional, "tokens_": optional["tokens"], "batch": self.B, "heads": self.h, "H": self.H, "W": self.W,
            "P": self.P, "x_blocks": self.x_blocks, "p_blocks": self.p_blocks, "WINDOW": window, "D": self.d,
            "BLOCK_X": self.block_x, "BLOCK_P": self.block_p, "BLOCK_D": block_d,
        }  # fmt: skip

    def launch(self, kernel, programs, **extra):
        if programs > MAX_GRID:
            raise ValueError(
                f"effvit::local_pool_attention: q must have fewer positions for one launch, got {programs}"
            )
        available = {**self.shared, **extra}
        args = {name: available[name] for name in kernel.arg_names}
        return Launch(kernel, programs, args, self.num_warps, 1)


_OPTIONAL = ("local_bias", "pool_bias", "q_scale", "q_embed", "tokens", "token_bias")


def _plan_forward(q, k, v, k_pool, v_pool, *optional, window=3):
    """(out, launches). Works on meta tensors."""
    optional = dict(zip(_OPTIONAL, (*optional, *(None,) * (6 - len(optional))), strict=True))
    p = _Problem({"q": q, "k": k, "v": v}, {"k_pool": k_pool, "v_pool": v_pool}, optional, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out, []
    return out, [p.launch(local_pool_attention_fwd_kernel, p.B * p.h * p.x_blocks, out=feature_map(out))]


def _plan_backward(grad_out, q, k, v, k_pool, v_pool, *optional, window=3):
    """(gradients, launches). Works on meta tensors."""
    optional = dict(zip(_OPTIONAL, (*optional, *(None,) * (6 - len(optional))), strict=True))
    maps, pooled = {"q": q, "k": k, "v": v}, {"k_pool": k_pool, "v_pool": v_pool}
    p = _Problem(maps | {"grad_out": grad_out}, pooled, optional, window)
    inputs = maps | pooled | optional
    results = {
        n: torch.empty(0 if t is None else t.shape, dtype=torch.float32 if t is None else t.dtype, device=q.device)
        for n, t in inputs.items()
    }
    if grad_out.numel() == 0:
        return tuple(t.zero_() for t in results.values()), []

    def floats(*shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    L, shares = p.H * p.W, p.B * p.x_blocks
    p.shared.update(lse=floats(p.B, p.h, L), delta=floats(p.B, p.h, L))
    partials = {}  # gradient: what is summed over the first dim
    for name, splits in (("local_bias", shares), ("q_scale", p.B), ("q_embed", shares), ("tokens", shares),
                         ("token_bias", shares)):  # fmt: skip
        partials[name] = None if optional[name] is None else floats(splits, *optional[name].shape)
    p.shared.update({f"d{n}": t for n, t in partials.items()}, **{f"d{n}": feature_map(results[n]) for n in maps})
    units = p.B * p.h * p.x_blocks
    launches = [p.launch(local_pool_attention_bwd_q_kernel, units), p.launch(local_pool_attention_bwd_kv_kernel, units)]
    if p.P:
        split_blocks = cdiv(p.x_blocks, min(MAX_SPLITS, tuned(cdiv(p.x_blocks, 8), small=2)))
        splits = cdiv(p.x_blocks, split_blocks)
        for n in pooled:
            partials[n] = results[n] if splits == 1 else floats(splits, *results[n].shape)
        launches.append(p.launch(
            local_pool_attention_bwd_pool_kernel, p.p_blocks * p.h * p.B * splits, split_blocks=split_blocks,
            **{f"d{n}": tokens(partials[n].view(-1, *results[n].shape[1:])) for n in pooled},
        ))  # fmt: skip
        if splits == 1:
            partials = {n: t for n, t in partials.items() if n not in pooled}
    if optional["pool_bias"] is not None and p.P:
        programs = p.p_blocks * p.x_blocks * p.h
        launches.append(p.launch(local_pool_attention_bwd_bias_kernel, programs, dpool_bias=results["pool_bias"]))
    launches += [sum_partials(t, results[n], t.shape[0]) for n, t in partials.items() if t is not None]
    return tuple(results.values()), launches


def forward(q, k, v, k_pool, v_pool, *optional, window=3):
    """effvit::local_pool_attention. The arguments must have been validated."""
    out, launches = _plan_forward(q, k, v, k_pool, v_pool, *optional, window=window)
    run(launches, q.device)
    return out


def backward(grad_out, q, k, v, k_pool, v_pool, *optional, window=3):
    """effvit::local_pool_attention_backward: gradients of all tensors, empty for those that are not given."""
    results, launches = _plan_backward(grad_out, q, k, v, k_pool, v_pool, *optional, window=window)
    run(launches, q.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    cases = {
        "transnext-bf16": (torch.bfloat16, 8, 56, 56, 3, 24, 49, 3, True),
        "window5-plain-fp32": (torch.float32, 8, 28, 28, 4, 32, 49, 5, False),
    }
    for name, (dtype, B, H, W, h, d, P, window, everything) in cases.items():
        empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
        maps = [empty(B, H, W, h, d) for _ in range(3)] + [empty(B, P, h, d) for _ in range(2)]
        T = window * window
        shapes = ((h, T), (h, H * W, P), (h, H * W), (h, d), (h, d, T), (h, T))
        optional = [empty(*shape, dtype=torch.float32) if everything else None for shape in shapes]
        out, launches = _plan_forward(*maps, *optional, window=window)
        _, backward_launches = _plan_backward(out, *maps, *optional, window=window)
        for launch in launches + backward_launches:
            yield launch.aot(name)
