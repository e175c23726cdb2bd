"""The attention of timm's ViT, DeiT and Swin on int8 products: `effvit.quantize_` with attention="int8".

No family of `effvit.patch`, which compares with the float model: the name does not start with a library's.
"""

import torch
from timm.models import register_notrace_module
from timm.models import swin_transformer as timm_swin
from timm.models import vision_transformer as timm_vit

import effvit.ops

from ..layers._tokens import is_hooked
from ..layers.int8_attention import as_bias
from . import Fused
from . import timm_swin as swin
from . import timm_vit as vit


def needs_original(module, x):
    """float64, active attention dropout, or hooks on it, which fire where PyTorch computes."""
    dropout = module.attn_drop
    return x.dtype == torch.float64 or (module.training and dropout.p > 0) or is_hooked(dropout)


@register_notrace_module
class Int8ViTAttention(Fused, timm_vit.Attention):
    """timm's Attention on :func:`effvit.ops.int8_attention`."""

    original = timm_vit.Attention

    def forward(self, x, attn_mask=None, is_causal=False):
        if needs_original(self, x):
            return super().forward(x, attn_mask, is_causal)
        gate = getattr(self, "gate", None)
        gate = None if gate is None else gate(x).sigmoid()
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = as_bias(attn_mask, q, N)
        y = effvit.ops.int8_attention(q, k, v, bias=bias, scale=self.scale, causal=is_causal).flatten(2)
        y = self.norm(y) if hasattr(self, "norm") else y
        y = y if gate is None else y * gate
        return self.proj_drop(self.proj(y))


@register_notrace_module
class Int8WindowAttention(Fused, timm_swin.WindowAttention):
    """timm's WindowAttention on :func:`effvit.ops.int8_attention`, window by window."""

    original = timm_swin.WindowAttention

    def forward(self, x, mask=None):
        if needs_original(self, x) or is_hooked(self.softmax):
            return super().forward(x, mask)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        bias = self._get_rel_pos_bias()
        bias = bias if mask is None else bias + mask[:, None].to(bias.dtype)  # [windows of an image, heads, N, N]
        y = effvit.ops.int8_attention(q, k, v, bias=bias.contiguous(), scale=self.scale)
        return self.proj_drop(self.proj(y.flatten(2)))


INT8 = {
    timm_vit.Attention: Int8ViTAttention, vit.FusedAttention: Int8ViTAttention,
    timm_swin.WindowAttention: Int8WindowAttention,
}  # fmt: skip


def reason_not(module):
    """Why a module of INT8 is left alone, or None."""
    if "forward" in vars(module):
        return "its forward has been replaced on the instance"
    if type(module.attn_drop) is not torch.nn.Dropout:
        return f"its attn_drop is {type(module.attn_drop).__qualname__}"
    head_dim = module.qkv.out_features // (3 * module.num_heads)
    return None if head_dim <= 256 else f"heads of {head_dim} channels, above 256"


PATCHED = {swin.FusedWindowAttention: "patched: its block hands it the whole map; effvit.unpatch(model) first"}
