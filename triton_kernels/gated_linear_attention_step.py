"""One token of gated linear attention in Triton: a pass over the state, which is what it costs."""

import torch

from ._common import MAX_GRID, Launch, cdiv, next_power_of_two, run, tl, triton, tuned
from ._linear_attention_tiles import _exp

STATE_BLOCK = 4096  # elements of the state that a program has in registers; all of K


@triton.jit(do_not_specialize=["heads", "base"])
def gated_linear_attention_step_kernel(
    q,  # [B, H, K], last stride 1
    k,  # [B, H, K], last stride 1
    v,  # [B, H, V], last stride 1
    state,  # [B, H, K, V] float32, contiguous
    g,  # [H], [B, H] or [B, H, K]; or None: 0
    out,  # [B, H, V], contiguous
    new_state,  # [B, H, K, V] float32, contiguous
    heads, base, q_strides, k_strides, v_strides, g_strides, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHANNEL: tl.constexpr,
):  # fmt: skip
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    if base is not None:
        pid = pid.to(tl.int64) + base
    column_k = tl.arange(0, BLOCK_K)
    column_v = pid % BLOCKS_V * BLOCK_V + tl.arange(0, BLOCK_V)
    pid = pid // BLOCKS_V
    head = (pid % heads).to(tl.int64)
    b = (pid // heads).to(tl.int64)
    ok_k, ok_v = column_k < K, column_v < V
    query = tl.load(q + b * q_strides[0] + head * q_strides[1] + column_k, mask=ok_k, other=0.0).to(tl.float32)
    key = tl.load(k + b * k_strides[0] + head * k_strides[1] + column_k, mask=ok_k, other=0.0).to(tl.float32)
    value = tl.load(v + b * v_strides[0] + head * v_strides[1] + column_v, mask=ok_v, other=0.0).to(tl.float32)
    element = (b * heads + head) * K * V + column_k[:, None] * V + column_v[None, :]
    mask = ok_k[:, None] & ok_v[None, :]
    s = tl.load(state + element, mask=mask, other=0.0)
    if g is not None:
        gate = g + b * g_strides[0] + head * g_strides[1]
        if CHANNEL:
            s = s * _exp(tl.load(gate + column_k, mask=ok_k, other=0.0).to(tl.float32), True)[:, None]
        else:
            s = s * _exp(tl.load(gate).to(tl.float32), True)
    s += key[:, None] * value[None, :]
    tl.store(new_state + element, s, mask=mask)
    o = tl.sum(query[:, None] * s, axis=0) * scale
    tl.store(out + (b * heads + head) * V + column_v, o.to(out.dtype.element_ty), mask=ok_v)


def _plan_forward(q, k, v, state, g_head=None, g_token=None, g_channel=None, *, scale=1.0):
    """((out, new_state), launches). Works on meta tensors."""
    (B, H, K), V = q.shape, v.shape[2]
    out = torch.empty((B, H, V), dtype=q.dtype, device=q.device)
    new_state = torch.empty((B, H, K, V), dtype=torch.float32, device=q.device)
    g = next((x for x in (g_head, g_token, g_channel) if x is not None), None)
    g_strides = (0, 0) if g is None else (0, g.stride(0)) if g_head is not None else g.stride()[:2]
    block_k = next_power_of_two(K)
    block_v = min(next_power_of_two(V), tuned(max(16, STATE_BLOCK // block_k), small=16))
    args = {
        "q": q, "k": k, "v": v, "state": state.contiguous(), "g": g, "out": out, "new_state": new_state, "heads": H,
        "q_strides": q.stride()[:2], "k_strides": k.stride()[:2], "v_strides": v.stride()[:2],
        "g_strides": g_strides, "scale": float(scale), "K": K, "V": V, "BLOCK_K": block_k, "BLOCK_V": block_v,
        "CHANNEL": g_channel is not None,
    }  # fmt: skip
    programs, grid, launches = B * H * cdiv(V, block_v), tuned(MAX_GRID, small=8), []
    for base in range(0, programs, grid):
        of_grid = {**args, "base": base if programs > grid else None}
        launches.append(Launch(gated_linear_attention_step_kernel, min(programs - base, grid), of_grid, 4, 1))
    return (out, new_state), launches


def forward(q, *tensors, **options):
    """effvit::gated_linear_attention_step: (out, new_state). The arguments must have been validated."""
    results, launches = _plan_forward(q, *tensors, **options)
    run(launches, q.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    for name, dtype, K, V, gate in (
        ("d64-channel-bf16", torch.bfloat16, 64, 64, "channel"), ("d64-token-fp16", torch.float16, 64, 64, "token"),
        ("d256-head-fp32", torch.float32, 256, 256, "head"),
    ):  # fmt: skip
        shapes = {"head": (8,), "token": (4, 8), "channel": (4, 8, K)}
        gates = (meta(*shapes[n]) if n == gate else None for n in shapes)
        tokens = (meta(4, 8, d, dtype=dtype) for d in (K, K, V))
        for launch in _plan_forward(*tokens, meta(4, 8, K, V), *gates)[1]:
            yield launch.aot(name)
