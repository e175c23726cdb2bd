"""Squared-ReLU attention within groups of tokens in Triton: forward and backward.

With r = relu(q k^T / G), forward: out = r^2 v. A program has rows of one group and a block of value columns, and walks
over the keys of its group. Backward, with dp = g v^T and ds = 2 r dp / G: dq = ds k, dk = ds^T q, dv = (r^2)^T g. One
kernel makes dq and dk: a program has rows of one of them and walks over the other side; one makes dv.
"""

import torch

from ._common import (
    INTERPRETED,
    MAX_GRID,
    Launch,
    _loop_bound,
    cdiv,
    device_function,
    next_power_of_two,
    run,
    tl,
    triton,
    tuned,
)
from ._tiles import _rounded, _share_of

BLOCK = 64  # rows of queries and of keys in a tile

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["L", "groups", "blocks", "column_blocks", "units", "walk"]


@device_function
def _load(pointer, row, rows, stride, column, columns, UPCAST: tl.constexpr):
    """Rows `row` below `rows` and columns `column` below `columns` of a matrix with last stride 1, else zeros."""
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    x = tl.load(pointer + offset, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@device_function
def _scores(
    q, k, row, key, n, q_stride_l, k_stride_l, scale,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """r of rows `row` and keys `key` of a group of n tokens."""
    s = tl.zeros([row.shape[0], key.shape[0]], tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        q_tile = _load(q, row, n, q_stride_l, column, K, UPCAST)
        k_tile = _load(k, key, n, k_stride_l, column, K, UPCAST)
        s = tl.dot(q_tile, tl.trans(k_tile), s, input_precision="ieee")
    s = s * scale
    s = tl.where(s < 0.0, 0.0, s)  # NaN stays NaN
    if CAUSAL:
        s = tl.where(key[None, :] <= row[:, None], s, 0.0)
    return s


@device_function
def _place(unit, blocks, groups, G, L):
    """(batch item, first token of the group, its tokens, block of the group) of a piece of work."""
    block = (unit % blocks).to(tl.int32)
    unit = unit // blocks
    b = (unit // groups).to(tl.int64)
    start = (unit % groups).to(tl.int32) * G
    return b, start, tl.minimum(L - start, G), block


@triton.jit(do_not_specialize=_SIZES)
def block_relu2_attention_fwd_kernel(
    q,  # [B, L, K], last stride 1
    k,  # [B, L, K], last stride 1
    v,  # [B, L, V], last stride 1
    out,  # [B, L, V], contiguous
    L, groups, blocks, column_blocks, units, walk,
    q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l,
    scale,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CAUSAL: tl.constexpr, INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % column_blocks).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
        b, start, n, block = _place(unit // column_blocks, blocks, groups, G, L)
        row = block * BLOCK_L + tl.arange(0, BLOCK_L)
        q_group = q + b * q_stride_b + start.to(tl.int64) * q_stride_l
        k_group = k + b * k_stride_b + start.to(tl.int64) * k_stride_l
        v_group = v + b * v_stride_b + start.to(tl.int64) * v_stride_l
        acc = tl.zeros([BLOCK_L, BLOCK_V], tl.float32)
        last = tl.minimum(n, (block + 1) * BLOCK_L) if CAUSAL else n
        for key_start in range(0, _loop_bound(last), BLOCK_L):
            key = key_start + tl.arange(0, BLOCK_L)
            r = _scores(q_group, k_group, row, key, n, q_stride_l, k_stride_l, scale, K, BLOCK_K, CAUSAL, UPCAST)
            v_tile = _load(v_group, key, n, v_stride_l, column, V, UPCAST)
            acc = tl.dot(_rounded(r * r, v.dtype.element_ty), v_tile, acc, input_precision="ieee")
        target = out + (b * L + start) * V + row[:, None] * V + column[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=(row < n)[:, None] & (column < V)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def block_relu2_attention_bwd_dqk_kernel(
    grad_out,  # [B, L, V], last stride 1
    q,  # [B, L, K], last stride 1
    k,  # [B, L, K], last stride 1
    v,  # [B, L, V], last stride 1
    dx,  # dq, or dk where KEYS: [B, L, K], contiguous
    L, groups, blocks, column_blocks, units, walk,
    q_stride_b, q_stride_l, k_stride_b, k_stride_l, v_stride_b, v_stride_l, grad_out_stride_b, grad_out_stride_l,
    scale,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CAUSAL: tl.constexpr, KEYS: tl.constexpr, INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % column_blocks).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
        b, start, n, block = _place(unit // column_blocks, blocks, groups, G, L)
        own = block * BLOCK_L + tl.arange(0, BLOCK_L)
        q_group = q + b * q_stride_b + start.to(tl.int64) * q_stride_l
        k_group = k + b * k_stride_b + start.to(tl.int64) * k_stride_l
        v_group = v + b * v_stride_b + start.to(tl.int64) * v_stride_l
        g_group = grad_out + b * grad_out_stride_b + start.to(tl.int64) * grad_out_stride_l
        acc = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        low = block * BLOCK_L if CAUSAL and KEYS else 0
        high = tl.minimum(n, (block + 1) * BLOCK_L) if CAUSAL and not KEYS else n
        for other_start in range(_loop_bound(low) if CAUSAL and KEYS else 0, _loop_bound(high), BLOCK_L):
            other = other_start + tl.arange(0, BLOCK_L)
            row, key = (other, own) if KEYS else (own, other)
            r = _scores(q_group, k_group, row, key, n, q_stride_l, k_stride_l, scale, K, BLOCK_K, CAUSAL, UPCAST)
            dp = tl.zeros([BLOCK_L, BLOCK_L], tl.float32)
            for v_start in range(0, V, BLOCK_V):
                v_column = v_start + tl.arange(0, BLOCK_V)
                g_tile = _load(g_group, row, n, grad_out_stride_l, v_column, V, UPCAST)
                v_tile = _load(v_group, key, n, v_stride_l, v_column, V, UPCAST)
                dp = tl.dot(g_tile, tl.trans(v_tile), dp, input_precision="ieee")
            ds = _rounded(r * dp, q.dtype.element_ty)
            if KEYS:
                x_tile = _load(q_group, other, n, q_stride_l, column, K, UPCAST)
                acc = tl.dot(tl.trans(ds), x_tile, acc, input_precision="ieee")
            else:
                x_tile = _load(k_group, other, n, k_stride_l, column, K, UPCAST)
                acc = tl.dot(ds, x_tile, acc, input_precision="ieee")
        target = dx + (b * L + start) * K + own[:, None] * K + column[None, :]
        result = (acc * (2.0 * scale)).to(dx.dtype.element_ty)
        tl.store(target, result, mask=(own < n)[:, None] & (column < K)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def block_relu2_attention_bwd_dv_kernel(
    grad_out,  # [B, L, V], last stride 1
    q,  # [B, L, K], last stride 1
    k,  # [B, L, K], last stride 1
    dv,  # [B, L, V], contiguous
    L, groups, blocks, column_blocks, units, walk,
    q_stride_b, q_stride_l, k_stride_b, k_stride_l, grad_out_stride_b, grad_out_stride_l,
    scale,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CAUSAL: tl.constexpr, INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % column_blocks).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
        b, start, n, block = _place(unit // column_blocks, blocks, groups, G, L)
        key = block * BLOCK_L + tl.arange(0, BLOCK_L)
        q_group = q + b * q_stride_b + start.to(tl.int64) * q_stride_l
        k_group = k + b * k_stride_b + start.to(tl.int64) * k_stride_l
        g_group = grad_out + b * grad_out_stride_b + start.to(tl.int64) * grad_out_stride_l
        acc = tl.zeros([BLOCK_L, BLOCK_V], tl.float32)
        low = block * BLOCK_L if CAUSAL else 0
        for row_start in range(_loop_bound(low) if CAUSAL else 0, _loop_bound(n), BLOCK_L):
            row = row_start + tl.arange(0, BLOCK_L)
            r = _scores(q_group, k_group, row, key, n, q_stride_l, k_stride_l, scale, K, BLOCK_K, CAUSAL, UPCAST)
            g_tile = _load(g_group, row, n, grad_out_stride_l, column, V, UPCAST)
            p = _rounded(r * r, grad_out.dtype.element_ty)
            acc = tl.dot(tl.trans(p), g_tile, acc, input_precision="ieee")
        target = dv + (b * L + start) * V + key[:, None] * V + column[None, :]
        tl.store(target, acc.to(dv.dtype.element_ty), mask=(key < n)[:, None] & (column < V)[None, :])


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, the arguments that all kernels share, and the block sizes."""

    def __init__(self, q, k, v, group, causal):
        (self.B, self.L, self.K), self.V = q.shape, v.shape[2]
        half = q.element_size() == 2
        size = min(group, max(self.L, 1))
        self.groups = cdiv(self.L, size)
        block_l = max(16, min(tuned(BLOCK if half else BLOCK // 2, small=16), next_power_of_two(size)))
        self.blocks = cdiv(size, block_l)
        widest = tuned(64 if half else 32, small=16)
        self.block_k, self.block_v = (max(16, min(widest, next_power_of_two(n))) for n in (self.K, self.V))
        self.shared = {
            "q": q, "k": k, "v": v, "L": self.L, "groups": self.groups, "blocks": self.blocks, "scale": 1.0 / group,
            "G": size, "K": self.K, "V": self.V, "CAUSAL": causal, "BLOCK_L": block_l, "BLOCK_K": self.block_k,
            "BLOCK_V": self.block_v, "UPCAST": INTERPRETED,
        }  # fmt: skip
        self.add_strides(q=q, k=k, v=v)

    def add_strides(self, **tensors):
        for name, t in tensors.items():
            self.shared |= {name: t, f"{name}_stride_b": t.stride(0), f"{name}_stride_l": t.stride(1)}

    def launch(self, kernel, column_blocks, **extra):
        """A launch of `kernel` with the shared arguments that it names, and `extra`."""
        units = self.B * self.groups * self.blocks * column_blocks
        walk = cdiv(units, tuned(MAX_GRID, small=8))
        index = tl.int64 if units + walk > MAX_GRID else tl.int32
        available = self.shared | extra
        available |= {"units": units, "walk": walk, "INDEX": index, "column_blocks": column_blocks}
        return Launch(kernel, cdiv(units, walk), {name: available[name] for name in kernel.arg_names}, 4, 2)


def _plan_forward(q, k, v, *, group=256, causal=False):
    """(out, launches). Works on meta tensors."""
    p = _Problem(q, k, v, group, causal)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out, []
    return out, [p.launch(block_relu2_attention_fwd_kernel, cdiv(p.V, p.block_v), out=out)]


def _plan_backward(grad_out, q, k, v, *, group=256, causal=False):
    """((dq, dk, dv), launches). Works on meta tensors."""
    p = _Problem(q, k, v, group, causal)
    dq, dk, dv = results = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if dv.numel() == 0:
        return tuple(t.zero_() for t in results), []
    p.add_strides(grad_out=grad_out)
    k_blocks, v_blocks = cdiv(p.K, p.block_k), cdiv(p.V, p.block_v)
    return results, [
        p.launch(block_relu2_attention_bwd_dqk_kernel, k_blocks, dx=dq, KEYS=False),
        p.launch(block_relu2_attention_bwd_dqk_kernel, k_blocks, dx=dk, KEYS=True),
        p.launch(block_relu2_attention_bwd_dv_kernel, v_blocks, dv=dv),
    ]


def forward(q, k, v, *, group=256, causal=False):
    """effvit::block_relu2_attention. The arguments must have been validated."""
    out, launches = _plan_forward(q, k, v, group=group, causal=causal)
    run(launches, q.device)
    return out


def backward(grad_out, q, k, v, *, group=256, causal=False):
    """effvit::block_relu2_attention_backward: (dq, dk, dv)."""
    results, launches = _plan_backward(grad_out, q, k, v, group=group, causal=causal)
    run(launches, q.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (B, L, K, V), causal in (
        ("mossformer", (1, 4096, 128, 1024), False),
        ("causal", (8, 196, 64, 192), True),
    ):
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
            q, k, v = (torch.empty((B, L, n), dtype=dtype, device="meta") for n in (K, K, V))
            _, launches = _plan_forward(q, k, v, causal=causal)
            _, backward_launches = _plan_backward(v, q, k, v, causal=causal)
            for launch in launches + backward_launches:
                yield launch.aot(f"{name}-{short}")
