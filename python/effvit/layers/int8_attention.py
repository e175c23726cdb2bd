"""Attention on int8 products: a ViT's layer, a cache of int8 keys and values, and transformers' attention interface."""

import torch
from torch import nn

import effvit.ops

from .._when_imported import when_imported
from ..ops import _checks
from ..reference.int8_attention import BLOCK, blocks_of, mean_of_keys, quantise_keys, quantise_values
from . import _ops


class Int8Attention(nn.Module):
    """Self-attention of a ViT on :func:`effvit.ops.int8_attention`: timm's `Attention`, its state_dict and those of its
    constructor's arguments that concern attention.

    ``effvit.quantize_(model, attention="int8")`` puts it into a model that is there. In training gradients go straight
    through the roundings, at the speed and memory of PyTorch.

    Args:
        dim: channels of x. num_heads: of attention; divides dim. attn_head_dim: channels of a head, dim / num_heads if
            None.
        qkv_bias, proj_bias: whether the projections have a bias.
        qk_norm: whether queries and keys are normalised, by `norm_layer(head_dim)`.
        smooth_k, exponential: of the operator.
    """

    def __init__(
        self, dim, num_heads=8, attn_head_dim=None, qkv_bias=False, qk_norm=False, proj_bias=True, proj_drop=0.0,
        norm_layer=nn.LayerNorm, smooth_k=True, exponential="exp2", device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"effvit::Int8Attention: dim must be a multiple of num_heads = {num_heads}, got {dim}")
        factory = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, attn_head_dim or dim // num_heads
        self.smooth_k, self.exponential = smooth_k, exponential
        inner = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, attn_mask=None, is_causal=False, cache=None):
        """x [B, N, dim] -> [B, N, dim].

        attn_mask: [N, M], [B, N, M] or [B, heads, N, M] (or 1 for B and heads): bool, True where a query sees a key, or
            numbers to add to the scores.
        is_causal: a token sees none after it.
        cache: an :class:`Int8KVCache`: keys and values of x are appended to it, and all that it holds is seen.
        """
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        options = {"causal": is_causal, "exponential": self.exponential}
        if cache is not None:
            cache.append(k, v)
            y = cache.attend(q, bias=as_bias(attn_mask, q, cache.length), **options)
        else:
            bias = as_bias(attn_mask, q, N)
            y = _ops.int8_attention(q, k, v, bias=bias, smooth_k=self.smooth_k, **options)
        return self.proj_drop(self.proj(y.flatten(2)))

    def extra_repr(self):
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, exponential={self.exponential!r}"


def as_bias(mask, q, keys):
    """A mask [N, M], [B, N, M], or [B or 1, H or 1, N or 1, M], bool or additive -> bias [W, H, N, M], or None."""
    if mask is None:
        return None
    B, N, H = q.shape[:3]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    elif not mask.is_floating_point():
        mask = mask.to(q.dtype)
    mask = mask.unsqueeze(-3) if mask.dim() == 3 else mask
    mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    if mask.dtype not in _checks.FLOAT_DTYPES:
        mask = mask.to(q.dtype)
    mask = mask if mask.stride(-1) == 1 and mask.shape[-1] == keys else mask.expand(-1, -1, -1, keys).contiguous()
    return mask.expand(mask.shape[0], H, N, keys)


class Int8KVCache:
    """Keys and values of the tokens so far, as int8: a quarter of float32, for attention over a growing sequence.

    Blocks of 64 tokens have a scale for the keys of a head and one for every channel of its values; the mean that is
    taken off all keys is that of the first append. The tokens of the last block are kept as they came as well, as its
    scales change until it is full. Beyond `max_length` the oldest whole blocks go, those of the first `sink` tokens
    excepted: a sliding window, as for streams of frames of which the first is the reference.

    Args:
        max_length: how many tokens to keep, a multiple of 64; None: all.
        sink: how many of the first tokens to keep always, a multiple of 64 below max_length.
        k_mean: [B, G, K] float32, in place of the mean of the first append.

    Not differentiable. Source: XStreamVGGT (arXiv:2601.01204), SageAttention (arXiv:2410.02367).
    """

    def __init__(self, max_length=None, sink=0, k_mean=None):
        name = "Int8KVCache"
        for argument, x in (("max_length", max_length), ("sink", sink)):
            if x is not None and (not _checks.is_int(x) or x % BLOCK or x < 0):
                raise _checks.value_error(name, argument, "a multiple of 64", repr(x))
        if max_length is not None and sink + BLOCK > max_length:
            raise _checks.value_error(name, "max_length", f"at least sink + 64 = {sink + BLOCK}", max_length)
        self.max_length, self.sink, self.given_mean = max_length, sink, k_mean
        self.reset()

    def reset(self):
        """Forgets all tokens."""
        self.length = 0
        self.k = self.v = self.k_scale = self.v_scale = self.k_mean = None  # k, v: of more tokens than there are
        self.tail = None  # (k, v) of the last block, unless it is full

    def append(self, k, v):
        """k [B, T, G, K] and v [B, T, G, V] of T more tokens, in one float dtype; any strides. Returns self."""
        name = "Int8KVCache.append"
        for argument, x in (("k", k), ("v", v)):
            _checks.check_tensor(name, argument, x)
            _checks.check_dtype(name, argument, x)
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise _checks.value_error(name, "v", f"[B, T, G, V] like k {_checks.shape(k)}", _checks.shape(v))
        if self.k is not None:
            for argument, x, kept in (("k", k, self.k), ("v", v, self.v)):
                if x.shape[0] != kept.shape[0] or x.shape[2:] != kept.shape[2:]:
                    like = [kept.shape[0], "T", *kept.shape[2:]]
                    raise _checks.value_error(name, argument, f"{like} like the tokens before", _checks.shape(x))
        if k.shape[1] == 0:
            return self
        k, v = k.detach(), v.detach()
        if self.k_mean is None:
            self.k_mean = mean_of_keys(k.float()) if self.given_mean is None else self.given_mean
        first = self.length // BLOCK  # the block that the new tokens start in
        if self.tail is not None:
            k, v = (torch.cat((old.to(new.dtype), new), 1) for old, new in zip(self.tail, (k, v), strict=True))
        self.length = first * BLOCK + k.shape[1]
        self._reserve(k, v)
        (k8, k_scale), (v8, v_scale) = quantise_keys(k, self.k_mean), quantise_values(v)
        blocks = slice(first, first + k_scale.shape[1])
        tokens = slice(first * BLOCK, first * BLOCK + k8.shape[1] * BLOCK)
        self.k[:, tokens], self.v[:, tokens] = k8.flatten(1, 2), v8.flatten(1, 2)
        self.k_scale[:, blocks], self.v_scale[:, blocks] = k_scale, v_scale
        rest = self.length % BLOCK
        self.tail = (k[:, -rest:].clone(), v[:, -rest:].clone()) if rest else None
        self._evict()
        return self

    def _reserve(self, k, v):
        """Room for self.length tokens: half as many again as there were, so that appending is linear in time."""
        blocks = -(-self.length // BLOCK)
        if self.k is not None and blocks <= self.k_scale.shape[1]:
            return
        room = blocks if self.k is None else max(blocks, self.k_scale.shape[1] * 3 // 2)
        B, _, G, K = k.shape

        def larger(old, *shape, dtype):
            new = torch.zeros(B, *shape, dtype=dtype, device=k.device)
            if old is not None:
                new[:, : old.shape[1]] = old
            return new

        self.k = larger(self.k, room * BLOCK, G, K, dtype=torch.int8)
        self.v = larger(self.v, room * BLOCK, G, v.shape[-1], dtype=torch.int8)
        self.k_scale = larger(self.k_scale, room, G, dtype=torch.float32)
        self.v_scale = larger(self.v_scale, room, G, v.shape[-1], dtype=torch.float32)

    def _evict(self):
        if self.max_length is None or self.length <= self.max_length:
            return
        sink, gone = self.sink // BLOCK, -(-(self.length - self.max_length) // BLOCK)
        blocks = -(-self.length // BLOCK)
        for t, step in ((self.k, BLOCK), (self.v, BLOCK), (self.k_scale, 1), (self.v_scale, 1)):
            kept = t[:, (sink + gone) * step : blocks * step].clone()
            t[:, sink * step : (blocks - gone) * step] = kept
        self.length -= gone * BLOCK

    @property
    def tensors(self):
        """(k, v, k_scale, v_scale, k_mean) as :func:`effvit.ops.int8_attention` takes them after q."""
        if self.k is None:
            raise ValueError("effvit::Int8KVCache: tensors must be read after tokens were appended, got none")
        blocks = -(-self.length // BLOCK)
        scales = self.k_scale[:, :blocks], self.v_scale[:, :blocks]
        return self.k[:, : self.length], self.v[:, : self.length], *scales, self.k_mean

    @property
    def nbytes(self):
        """Bytes of all tensors, room to grow included."""
        kept = (self.k, self.v, self.k_scale, self.v_scale, self.k_mean, *(self.tail or ()))
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def attend(self, q, bias=None, **options):
        """Attention of q [B, L, H, K] over all tokens; bias and options are those of int8_attention."""
        return effvit.ops.int8_attention(q, *self.tensors, bias, **options)

    def dequantised(self):
        """(k [B, M, G, K], v [B, M, G, V]) in float32: what is left of the tokens."""
        k, v, k_scale, v_scale, k_mean = self.tensors
        k = blocks_of(k.float()) * k_scale[:, :, None, :, None]
        v = blocks_of(v.float()) * v_scale[:, :, None]
        return k.flatten(1, 2)[:, : self.length] + k_mean[:, None], v.flatten(1, 2)[:, : self.length]


# ---- transformers ----------------------------------------------------------------------------------------------------


def int8_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options
):  # fmt: skip
    """transformers' attention interface: ``model.set_attn_implementation("effvit_int8")``.

    query [B, H, L, K], key [B, G, M, K], value [B, G, M, V] -> (out [B, L, H, V], None). attention_mask: bool, True
    where a query sees a key, or additive. Raises ValueError for what int8_attention does not compute.
    """
    for name in ("softcap", "position_bias", "s_aux"):
        if options.get(name) is not None:
            raise _checks.value_error("int8_attention_forward", name, "None", type(options[name]).__name__)
    if dropout:
        raise _checks.value_error("int8_attention_forward", "dropout", "0: of attention there is none", dropout)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    L = q.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and L > 1 and attention_mask is None
    if causal and k.shape[1] > L:  # a static cache that is filled up to the queries
        k, v = k[:, :L], v[:, :L]
    bias = as_bias(attention_mask, q, k.shape[1])
    return effvit.ops.int8_attention(q, k, v, bias=bias, scale=scaling, causal=causal), None


def _register(_):
    """transformers knows the implementation by name, and makes masks for it as for its own eager attention."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask
    except ImportError:  # before 4.53
        return
    AttentionInterface.register("effvit_int8", int8_attention_forward)
    AttentionMaskInterface.register("effvit_int8", eager_mask)


when_imported("transformers.modeling_utils", _register)
