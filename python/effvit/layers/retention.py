"""Retention: RetNet's multi-scale retention with its rotations, and ViR's for vision, with a class token."""

import math

import torch
from torch import nn

from ._ops import gated_linear_attention, wide
from ._tokens import head_dim, split_tokens
from .gla import GatedMixer

ROTATIONS = ("half", "pairs")


def positions_of(L, offset, cu_seqlens, device):
    """[L]: offset .. offset + L - 1, or in each packed sequence from its own offset on, a number or [N] of them."""
    position = torch.arange(L, device=device)
    if cu_seqlens is None:
        return position + offset
    n = torch.searchsorted(cu_seqlens[1:].contiguous(), position.to(cu_seqlens.dtype), right=True)
    n = n.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    return position - cu_seqlens[n] + (offset[n] if isinstance(offset, torch.Tensor) else offset)


def rotate(x, kind, base=10000.0, position=None):
    """Rotary encoding of x [B, L, h, K] at `position` [L], 0 .. L - 1 if None, computed in float32 and rounded once.

    "half" turns channels i and i + K/2 by position * base^(-2i/K), as fla does; "pairs" turns channels 2i and 2i + 1 by
    position * base^(-i/(K/2 - 1)), as torchscale does.
    """
    dtype, n = x.dtype, x.shape[-1] // 2
    x = wide(x)
    i = torch.arange(n, device=x.device, dtype=x.dtype)
    theta = base ** -(i / n if kind == "half" else i / max(n - 1, 1))
    position = torch.arange(x.shape[1], device=x.device) if position is None else position
    angles = position.to(x.dtype).unsqueeze(-1) * theta
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)  # [L, 1, K/2]
    a, b = x.chunk(2, dim=-1) if kind == "half" else x.unflatten(-1, (n, 2)).unbind(-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.cat(turned, dim=-1) if kind == "half" else torch.stack(turned, dim=-1).flatten(-2)).to(dtype)


class MultiScaleRetention(GatedMixer):
    """RetNet's multi-scale retention (arXiv:2307.08621): arguments and state_dict of flash-linear-attention's layer.

    Head h forgets by gamma_h = 1 - 2^(-5-h) a token, and queries and keys are rotated by their positions::

        S_t = gamma_h S_(t-1) + k_t^T v_t,    o_t = q_t S_t / sqrt(K),    out = o_proj(RMSNorm(o) * silu(g_proj(x)))

    hidden_states [B, L, hidden_size] -> the same shape; with `return_state` also the state after the last token
    [B, heads, K, V], float32. `initial_state` takes it up, with `offset` the number of tokens before. `cu_seqlens`
    packs sequences, whose positions start anew, or at `offset`, [N] of them where states are taken up.
    `bidirectional=True` adds the recurrence from the last
    token to the first, each token's own term once; it has no state.

    `rotary` is "half" (fla's order of channels), "pairs" (torchscale's order and frequencies) or None. The paper's xpos
    is such a rotation together with the decay.

    Compared with fla-org/flash-linear-attention, fla/layers/multiscale_retention.py, commit bc3b101, where the result
    is a triple with a cache. With `rotary="pairs"` and `elementwise_affine=False` it is microsoft/torchscale's,
    torchscale/component/multiscale_retention.py at 4d1e0e8, under other names (out_proj there) and without its
    normalisation of scores, which the norm of the output takes back but for eps. `mode`, `layer_idx` and further
    keyword arguments do nothing.
    """

    def __init__(
        self, mode="chunk", hidden_size=1024, expand_k=1.0, expand_v=2.0, num_heads=8, num_kv_heads=None,
        feature_map=None, use_short_conv=False, conv_size=4, conv_bias=False, use_output_gate=True, gate_fn="swish",
        elementwise_affine=True, norm_eps=1e-5, fuse_norm=True, layer_idx=None, rotary="half", bidirectional=False,
        device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        super().__init__(
            hidden_size, expand_k, expand_v, num_heads, num_kv_heads, feature_map, use_short_conv, conv_size, conv_bias,
            use_output_gate, gate_fn, elementwise_affine, norm_eps, fuse_norm, bidirectional,
            {"device": device, "dtype": dtype},
        )  # fmt: skip
        if rotary is not None and rotary not in ROTATIONS:
            raise ValueError(f"effvit::MultiScaleRetention: rotary must be None or one of {ROTATIONS}, got {rotary!r}")
        if rotary is not None and self.head_k_dim % 2:
            raise ValueError(
                f"effvit::MultiScaleRetention: expand_k must be such that key dims are even, got {self.head_k_dim}"
            )
        self.rotary = rotary

    def forward(self, hidden_states, initial_state=None, cu_seqlens=None, offset=0, return_state=False):
        x = hidden_states
        q, k, v = self.project(x, cu_seqlens)
        if self.rotary is not None:
            position = positions_of(x.shape[1], offset, cu_seqlens, x.device)
            q, k = (rotate(t, self.rotary, position=position) for t in (q, k))
        h = torch.arange(self.num_heads, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        g = torch.log1p(-torch.exp2(-5 - h))
        return self.attend(q, k, v, g, x, initial_state, cu_seqlens, return_state)

    def extra_repr(self):
        return f"{super().extra_repr()}, rotary={self.rotary!r}"


class ViRRetention(nn.Module):
    """ViR's retention (arXiv:2310.19731): the arguments and the state_dict of the published `Retention`.

    Per head, q, k and v of one projection::

        S_t = gamma_h S_(t-1) + k_t^T v_t,    o_t = q_t S_t / sqrt(d),    out = out_proj(o)

    x [B, N, dim] -> the same shape; with `return_state` also the state after the last token [B, heads, d, d], float32,
    which `state` takes up. The class token comes last, so that it sees all of the image; `class_token="first"` says
    that it is the first in x (as timm has it), and moves it behind the others for the recurrence. `bidirectional=True`
    adds the recurrence in the other direction, each token's own term once, and has no state.

    `decay` is "published", 1 - gamma_h in equal ratios from 1/32 to 1/512, or "powers", 2^(-5-h) as in RetNet.

    Compared with the published code, anom63931/ViR, models/vir.py at d91fd8b, in its modes "recurrent" and "chunkwise".
    Its mode "parallel" takes a softmax of the decayed scores, zeros of later tokens included: no recurrence computes
    that, and it is not here. Its projections have biases whatever `qkv_bias` says; that and `qk_norm`, `attn_drop`,
    `proj_drop` and `norm_layer` do nothing, as there.
    """

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, qk_norm=False, attn_drop=0.0, proj_drop=0.0, norm_layer=nn.LayerNorm,
        decay="published", class_token="last", bidirectional=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        head_dim(self, dim, num_heads)
        for argument, given, choices in (
            ("decay", decay, ("published", "powers")), ("class_token", class_token, ("last", "first"))
        ):  # fmt: skip
            if given not in choices:
                raise ValueError(f"effvit::ViRRetention: {argument} must be one of {choices}, got {given!r}")
        self.num_heads = num_heads
        self.decay = decay
        self.class_token = class_token
        self.bidirectional = bidirectional
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.out_proj = nn.Linear(dim, dim, **factory)

    def _gates(self, device, dtype):
        """log gamma_h."""
        if self.decay == "powers":
            return torch.log1p(-torch.exp2(-5 - torch.arange(self.num_heads, device=device, dtype=dtype)))
        ends = math.log(1 / 32), math.log(1 / 512)
        return torch.log1p(-torch.linspace(*ends, self.num_heads, device=device, dtype=dtype).exp())

    def forward(self, x, state=None, return_state=False):
        first = self.class_token == "first"
        if first:
            x = x.roll(-1, dims=1)
        q, k, v = split_tokens(self.qkv(x), 3, self.num_heads)
        g = self._gates(x.device, torch.promote_types(x.dtype, torch.float32))
        out = gated_linear_attention(
            q, k, v, g, state, bidirectional=self.bidirectional, return_state=return_state
        )  # fmt: skip
        out, state = out if return_state else (out, None)
        out = self.out_proj(out.flatten(2))
        out = out.roll(1, dims=1) if first else out
        return (out, state) if return_state else out

    def extra_repr(self):
        return f"num_heads={self.num_heads}, decay={self.decay!r}, class_token={self.class_token!r}"
