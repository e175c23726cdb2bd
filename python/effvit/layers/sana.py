"""SANA's ReLU linear attention, under the parameter names of its own code (LiteLA) and of diffusers."""

import torch
from torch import nn

from ._ops import linear_attention


def _clip_float16(x):
    """As the originals do: an overflow of the output projection becomes the largest float16."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _normalise(norm, x):
    """norm(x) in the dtype of x, computed in the dtype of the weight: under autocast the two differ."""
    if norm is None:
        return x
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype)).to(x.dtype)


def _rotate(x, cos, sin):
    """Channels 2i and 2i+1 of x [B, N, h, d], a complex number, times cos + i sin (both [1, N, 1, d/2]).

    Computed in float32 (float64 for float64), returned in the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(device=x.device, dtype=wide) for t in (cos, sin))
    re, im = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([re * cos - im * sin, re * sin + im * cos], dim=-1).flatten(-2).to(x.dtype)


def _attend_rotated(q, k, v, cos, sin, eps):
    """ReLU attention whose scores are of the rotated features, and whose normaliser is of the features themselves."""
    q, k = q.relu(), k.relu()
    q_rotated, k_rotated = (_rotate(t, cos, sin) for t in (q, k))
    return linear_attention(
        q_rotated, k_rotated, v, q_den=q, k_den=k, feature_map="none", normalize="sum", eps=eps
    )  # fmt: skip


def _cos_and_sin(module, rotary_emb, shape):
    """A pair of tensors of the same `shape`, every value twice in the last dimension -> the values once."""
    expected = f"effvit::{type(module).__name__}: rotary_emb must be a pair (cos, sin), {list(shape)} each"
    if not isinstance(rotary_emb, tuple | list) or len(rotary_emb) != 2:
        raise TypeError(f"{expected}, got {type(rotary_emb).__name__}")
    if any(tuple(t.shape) != shape for t in rotary_emb):
        raise ValueError(f"{expected}, got {' and '.join(str(list(t.shape)) for t in rotary_emb)}")
    return tuple(t[..., ::2] for t in rotary_emb)


class LiteLA(nn.Module):
    """SANA's self-attention with the constructor and the state_dict of its own code.

    x [B, N, C] -> [B, N, C]. With qk_norm, q and k are RMS-normalised over all channels. `rotary_emb` (in other
    versions of the original `image_rotary_emb`: either name, not both) is the pair (cos, sin), [N, d] each with every
    value twice, of its RopePosEmbed: q and k are rotated before the ReLU, in numerator and denominator alike.

    `mask`, `HW`, `block_id` and `block_mask` are accepted and unused, as in the original; so is its attribute
    `fp32_attention`: sums are float32 always. `attn_matmul` and `kernel_func` are there for the original's
    processors (PAGCFGIdentitySelfAttnProcessorLiteLA and the like), which call them.

    Sources: SANA (arXiv:2410.10629); compared with NVlabs/Sana, diffusion/model/nets/sana_blocks.py, commits 73c7275
    (no rotary embedding), 2cfb4f7 (image_rotary_emb) and the version of SANA-Video (rotary_emb, block_mask). The first
    two clip the output to the range of float16 in every dtype, the last never: here, in float16.
    """

    def __init__(
        self, in_dim, out_dim, heads=None, heads_ratio=1.0, dim=32, eps=1e-15, use_bias=False, qk_norm=False,
        norm_eps=1e-5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        name = type(self).__name__
        heads = heads or int(out_dim // dim * heads_ratio)
        if heads < 1:
            raise ValueError(f"effvit::{name}: heads must be >= 1, got {heads}")
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.heads = heads
        self.dim = out_dim // heads
        self.eps = eps
        self.qk_norm = qk_norm
        if in_dim % self.dim:
            raise ValueError(f"effvit::{name}: in_dim must be a multiple of the head dim {self.dim}, got {in_dim}")
        self.qkv = nn.Linear(in_dim, 3 * in_dim, bias=use_bias, **factory)
        self.q_norm = nn.RMSNorm(in_dim, eps=norm_eps, **factory) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(in_dim, eps=norm_eps, **factory) if qk_norm else nn.Identity()
        self.kernel_func = nn.ReLU()
        self.proj = nn.Linear(in_dim, in_dim, **factory)

    def _heads(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = _normalise(self.q_norm, q), _normalise(self.k_norm, k)
        return (t.unflatten(-1, (-1, self.dim)) for t in (q, k, v))

    def attn_matmul(self, q, k, v):
        """q, v [B, h, d, N], k [B, h, N, d] -> [B, h, d, N]: the attention between the projections, ReLU included."""
        q, k, v = q.permute(0, 3, 1, 2), k.transpose(1, 2), v.permute(0, 3, 1, 2)
        return linear_attention(q, k, v, eps=self.eps).permute(0, 2, 3, 1)

    def forward(
        self, x, mask=None, HW=None, rotary_emb=None, block_id=None, block_mask=None, image_rotary_emb=None
    ):  # fmt: skip
        if image_rotary_emb is not None:
            if rotary_emb is not None:
                name = type(self).__name__
                raise ValueError(f"effvit::{name}: rotary_emb must be None when image_rotary_emb is given, got both")
            rotary_emb = image_rotary_emb
        q, k, v = self._heads(x)
        if rotary_emb is not None:
            cos, sin = (t.unsqueeze(1) for t in _cos_and_sin(self, rotary_emb, (x.shape[1], self.dim)))
            q, k = (_rotate(t, cos, sin) for t in (q, k))
        return _clip_float16(self.proj(linear_attention(q, k, v, eps=self.eps).flatten(2)))

    def extra_repr(self):
        return f"heads={self.heads}, dim={self.dim}, eps={self.eps}"


class LiteLAReLURope(LiteLA):
    """SANA-Video's self-attention: `LiteLA` with rotations after the ReLU, and in the numerator only.

    x [B, N, C] -> [B, N, C]; `rotary_emb`, complex [1, 1, N, d/2] as of the original's WanRotaryPosEmbed, must be
    given. `mask`, `HW`, `block_mask` and further keyword arguments (`chunk_index`, `save_kv_cache`) are accepted and
    unused, as in the original. Its subclasses that do use those, ChunkCausalAttention and CachedCausalAttention, are
    not covered. Rotations are computed in float32, there in float64; `qkv_store_buffer`, there filled for plots, is
    not.

    Sources: SANA-Video (arXiv:2509.24695); compared with NVlabs/Sana, diffusion/model/nets/sana_blocks.py.
    """

    def forward(self, x, mask=None, HW=None, rotary_emb=None, block_mask=None, **kwargs):
        shape = (1, 1, x.shape[1], self.dim // 2)
        expected = f"effvit::LiteLAReLURope: rotary_emb must be complex {list(shape)}"
        if not isinstance(rotary_emb, torch.Tensor) or not rotary_emb.is_complex():
            raise TypeError(f"{expected}, got {getattr(rotary_emb, 'dtype', type(rotary_emb).__name__)}")
        if tuple(rotary_emb.shape) != shape:
            raise ValueError(f"{expected}, got {list(rotary_emb.shape)}")
        freqs = rotary_emb.transpose(1, 2)
        return self.proj(_attend_rotated(*self._heads(x), freqs.real, freqs.imag, self.eps).flatten(2))


def _attend(attn, q, k, v, rotary_emb=None):
    """q [B, L, C], k and v [B, M, C] of a module with diffusers' attribute `heads` -> [B, L, C]."""
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
    if rotary_emb is None:
        return linear_attention(q, k, v, eps=1e-15).flatten(2)
    shape = (1, q.shape[1], 1, q.shape[-1])
    return _attend_rotated(q, k, v, *_cos_and_sin(attn, rotary_emb, shape), 1e-15).flatten(2)


def _project(attn, x):
    return _clip_float16(attn.to_out[1](attn.to_out[0](x)))


def _check_self_attention(processor, attn):
    if getattr(attn, "is_cross_attention", False):
        raise ValueError(
            f"effvit::{type(processor).__name__}: attn must be self-attention (SANA's cross-attention is softmax "
            "attention: keep its processor), got is_cross_attention True"
        )


class SanaLinearAttnProcessor:
    """diffusers' SanaLinearAttnProcessor2_0 (SANA) and SanaLinearAttnProcessor3_0 (SANA-Video) on effvit's operator.

    For `attn.set_processor(SanaLinearAttnProcessor())` on an Attention of diffusers, and for a whole model::

        model.set_attn_processor(effvit.layers.sana_attn_processors(model.attn_processors))

    hidden_states [B, L, C] -> [B, L, C]. Keys and values come from encoder_hidden_states where given. `rotary_emb` is
    the pair (cos, sin), [1, L, 1, d] each with every value twice, of SANA-Video: it turns q and k in the numerator
    only. `attention_mask` is accepted and unused, as in the originals. ValueError on a cross-attention module
    (`attn.is_cross_attention`), which `model.set_attn_processor` with a single processor would reach.

    Compared with diffusers 0.42.1, models/attention_processor.py and models/transformers/transformer_sana_video.py.
    Differences: attends in the dtype of q with float32 sums, there everything is float32; 3_0 requires rotary_emb,
    does not clip in float16, and computes its denominator in the dtype of q, where 1e-15 is 0 in float16.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        _check_self_attention(self, attn)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k = _normalise(attn.norm_q, q), _normalise(attn.norm_k, k)
        return _project(attn, _attend(attn, q, k, v, rotary_emb))


class PAGIdentitySanaLinearAttnProcessor:
    """diffusers' PAGIdentitySanaLinearAttnProcessor2_0: perturbed attention guidance without classifier-free guidance.

    hidden_states [B, L, C], the last half of B perturbed: there the attention matrix is the identity. As in the
    original, `encoder_hidden_states` and `attention_mask` are accepted and unused, and attn.norm_q and attn.norm_k
    are *not* applied. Use, cross-attention, dtypes and version: see `SanaLinearAttnProcessor`.
    """

    parts = 2

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        _check_self_attention(self, attn)
        perturbed, remainder = divmod(hidden_states.shape[0], self.parts)
        if remainder:
            raise ValueError(
                f"effvit::{type(self).__name__}: hidden_states must be a batch of a multiple of {self.parts}, "
                f"got {list(hidden_states.shape)}"
            )
        attended = hidden_states[: (self.parts - 1) * perturbed]
        v, v_perturbed = attn.to_v(hidden_states).tensor_split([len(attended)])
        out = _attend(attn, attn.to_q(attended), attn.to_k(attended), v)
        return _project(attn, torch.cat([out, v_perturbed]))


class PAGCFGSanaLinearAttnProcessor(PAGIdentitySanaLinearAttnProcessor):
    """diffusers' PAGCFGSanaLinearAttnProcessor2_0: as without classifier-free guidance, with the last third of B
    perturbed."""

    parts = 3


def sana_attn_processors(processors):
    """`model.attn_processors` of diffusers -> the same for `model.set_attn_processor`, SANA's linear ones effvit's.

    processors: a dict of attention processors by name; those of other classes stay as they are.
    """
    ours = {
        "SanaLinearAttnProcessor2_0": SanaLinearAttnProcessor,
        "SanaLinearAttnProcessor3_0": SanaLinearAttnProcessor,
        "PAGCFGSanaLinearAttnProcessor2_0": PAGCFGSanaLinearAttnProcessor,
        "PAGIdentitySanaLinearAttnProcessor2_0": PAGIdentitySanaLinearAttnProcessor,
    }
    return {name: ours.get(type(p).__name__, lambda p=p: p)() for name, p in processors.items()}


class SanaLinearAttention(nn.Module):
    """SANA's attention with the parameter names of diffusers' Attention (attn1 of SanaTransformer2DModel).

    hidden_states [B, L, query_dim] -> [B, L, query_dim]; keys and values come from encoder_hidden_states [B, M, .]
    where given. qk_norm is None or "rms_norm_across_heads". `rotary_emb` as in `SanaLinearAttnProcessor`.
    `attention_mask` is accepted and unused, as in the original. Compared with diffusers 0.42.1; to run a model of
    diffusers as it is, use `sana_attn_processors`.
    """

    def __init__(
        self, query_dim, cross_attention_dim=None, heads=8, dim_head=64, dropout=0.0, bias=False, qk_norm=None,
        out_bias=True, eps=1e-5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(
                f"effvit::SanaLinearAttention: qk_norm must be None or 'rms_norm_across_heads', got {qk_norm!r}"
            )
        factory = {"device": device, "dtype": dtype}
        self.heads = heads
        self.inner_dim = heads * dim_head
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.norm_q = nn.RMSNorm(self.inner_dim, eps=eps, **factory) if qk_norm else None
        self.norm_k = nn.RMSNorm(self.inner_dim, eps=eps, **factory) if qk_norm else None
        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=bias, **factory)
        self.to_k = nn.Linear(context_dim, self.inner_dim, bias=bias, **factory)
        self.to_v = nn.Linear(context_dim, self.inner_dim, bias=bias, **factory)
        self.to_out = nn.ModuleList([
            nn.Linear(self.inner_dim, query_dim, bias=out_bias, **factory), nn.Dropout(dropout),
        ])  # fmt: skip
        self.processor = SanaLinearAttnProcessor()

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def extra_repr(self):
        return f"heads={self.heads}"
