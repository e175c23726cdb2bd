"""GLA: the gated linear attention layer, and what it has in common with retention: projections, norm, output gate."""

import torch.nn.functional as F
from torch import nn

from ._ops import gated_linear_attention, glu, wide
from ._tokens import convolve_tokens

FEATURE_MAPS = {"relu": F.relu, "silu": F.silu, "swish": F.silu, "sigmoid": F.sigmoid}
GATES = {"relu": "relu", "silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}  # names there: effvit.glu's


class GatedMixer(nn.Module):
    """Projections to heads with optional short convolutions, and after the operator norm, gate and projection."""

    def __init__(
        self, hidden_size, expand_k, expand_v, num_heads, num_kv_heads, feature_map, use_short_conv, conv_size,
        conv_bias, use_output_gate, gate_fn, elementwise_affine, norm_eps, fuse_norm, bidirectional, factory,
    ):  # fmt: skip
        super().__init__()
        name = type(self).__name__
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.key_dim, self.value_dim = int(hidden_size * expand_k), int(hidden_size * expand_v)
        self.use_output_gate = use_output_gate
        self.use_short_conv = use_short_conv
        self.bidirectional = bidirectional
        heads = f"a multiple of {num_heads} heads"
        for argument, ok, expected, got in (
            ("num_heads", num_heads >= 1, ">= 1", num_heads),
            ("expand_k", self.key_dim > 0 and self.key_dim % max(num_heads, 1) == 0,
             f"such that the keys are {heads}", expand_k),
            ("expand_v", self.value_dim > 0 and self.value_dim % max(num_heads, 1) == 0,
             f"such that the values are {heads}", expand_v),
            ("num_kv_heads", self.num_kv_heads >= 1 and num_heads % self.num_kv_heads == 0,
             f"a divisor of {num_heads}", num_kv_heads),
            ("feature_map", feature_map is None or feature_map in FEATURE_MAPS, f"None or one of {[*FEATURE_MAPS]}",
             repr(feature_map)),
            ("gate_fn", gate_fn in GATES, f"one of {[*GATES]}", repr(gate_fn)),
        ):  # fmt: skip
            if not ok:
                raise ValueError(f"effvit::{name}: {argument} must be {expected}, got {got}")
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads
        self.feature_map = feature_map
        self.gate = GATES[gate_fn]
        groups = num_heads // self.num_kv_heads
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False, **factory)
        self.k_proj = nn.Linear(hidden_size, self.key_dim // groups, bias=False, **factory)
        self.v_proj = nn.Linear(hidden_size, self.value_dim // groups, bias=False, **factory)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False, **factory)
        if use_short_conv:
            for conv, dim in (("q", self.key_dim), ("k", self.key_dim // groups), ("v", self.value_dim // groups)):
                conv1d = nn.Conv1d(dim, dim, conv_size, groups=dim, bias=conv_bias, **factory)
                setattr(self, f"{conv}_conv1d", conv1d)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False, **factory)
        # fla names the parameter after the kernel it would run
        self._norm = "g_norm_swish_gate" if gate_fn == "swish" and fuse_norm and use_output_gate else "g_norm"
        norm = nn.RMSNorm(self.head_v_dim, eps=norm_eps, elementwise_affine=bool(elementwise_affine), **factory)
        setattr(self, self._norm, norm)

    def heads(self, t, dim, kv=False):
        """[B, L, h*dim] -> [B, L, num_heads, dim]; where keys and values have fewer heads, each serves several."""
        t = t.unflatten(-1, (-1, dim))
        groups = self.num_heads // self.num_kv_heads
        if not kv or groups == 1:
            return t
        return t.unsqueeze(3).expand(-1, -1, -1, groups, -1).flatten(2, 3)

    def project(self, x, cu_seqlens):
        """x [B, L, hidden_size] -> q and k [B, L, h, K], v [B, L, h, V]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.use_short_conv:
            if cu_seqlens is not None:
                raise ValueError(
                    f"effvit::{type(self).__name__}: cu_seqlens must be None with use_short_conv, got a tensor"
                )
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            q, k, v = (F.silu(convolve_tokens(conv, t)) for conv, t in zip(convs, (q, k, v), strict=True))
        q, k = self.heads(q, self.head_k_dim), self.heads(k, self.head_k_dim, kv=True)
        if self.feature_map is not None:
            q, k = (FEATURE_MAPS[self.feature_map](t) for t in (q, k))
        return q, k, self.heads(v, self.head_v_dim, kv=True)

    def attend(self, q, k, v, g, x, initial_state, cu_seqlens, return_state):
        """The operator, then norm, gate and projection."""
        out = gated_linear_attention(
            q, k, v, g, initial_state, cu_seqlens, bidirectional=self.bidirectional, return_state=return_state
        )
        out, state = out if return_state else (out, None)
        out = getattr(self, self._norm)(out).flatten(2)
        if self.use_output_gate:
            out = glu(out, self.g_proj(x), self.gate)
        out = self.o_proj(out)
        return (out, state) if return_state else out

    def extra_repr(self):
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, key_dim={self.key_dim}, "
            f"value_dim={self.value_dim}, bidirectional={self.bidirectional}"
        )


class GatedLinearAttention(GatedMixer):
    """Gated linear attention (GLA, arXiv:2312.06635): the arguments and the state_dict of flash-linear-attention.

    Per head, with gates g = logsigmoid(gk_proj(x)) / gate_logit_normalizer for every token and channel::

        S_t = diag(exp(g_t)) S_(t-1) + k_t^T v_t,    o_t = q_t S_t / sqrt(K)
        out = o_proj(RMSNorm(o) * silu(g_proj(x)))

    hidden_states [B, L, hidden_size] -> the same shape; with `return_state` also the state after the last token
    [B, heads, K, V], float32, which `initial_state` takes up: a sequence in parts, or token by token. `cu_seqlens`
    (int32 offsets, with B = 1) packs sequences. `bidirectional=True` adds the recurrence from the last token to the
    first, each token's own term once, as effvit.gated_linear_attention does; it has no state.

    The low-rank gate and the operator compute in float32. `num_kv_heads` keys and values serve several queries'
    heads. Short convolutions are causal, and see zeros before the first token they are given.

    Compared with fla-org/flash-linear-attention, fla/layers/gla.py, commit bc3b101. Differences: the result is a
    tensor, not a triple with a cache; there is no attention mask (pack sequences by cu_seqlens); `mode` and `layer_idx`
    do nothing, and `fuse_norm` only decides how the norm is named, as there.
    """

    def __init__(
        self, mode="chunk", hidden_size=1024, expand_k=0.5, expand_v=1.0, num_heads=4, num_kv_heads=None,
        feature_map=None, use_short_conv=False, conv_size=4, conv_bias=False, use_output_gate=True, gate_fn="swish",
        elementwise_affine=True, norm_eps=1e-5, gate_logit_normalizer=16, gate_low_rank_dim=16, clamp_min=None,
        fuse_norm=True, layer_idx=None, bidirectional=False, device=None, dtype=None,
    ):  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_size, expand_k, expand_v, num_heads, num_kv_heads, feature_map, use_short_conv, conv_size, conv_bias,
            use_output_gate, gate_fn, elementwise_affine, norm_eps, fuse_norm, bidirectional, factory,
        )  # fmt: skip
        self.gate_logit_normalizer = gate_logit_normalizer
        self.clamp_min = clamp_min
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False, **factory),
            nn.Linear(gate_low_rank_dim, self.k_proj.out_features, bias=True, **factory),
        )

    def forward(self, hidden_states, initial_state=None, cu_seqlens=None, return_state=False):
        x = hidden_states
        q, k, v = self.project(x, cu_seqlens)
        g = -F.softplus(-wide(self.gk_proj(x))) / self.gate_logit_normalizer  # logsigmoid
        if self.clamp_min is not None:
            g = g.clamp(min=self.clamp_min)
        g = self.heads(g, self.head_k_dim, kv=True)
        return self.attend(q, k, v, g, x, initial_state, cu_seqlens, return_state)
