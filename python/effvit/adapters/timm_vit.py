"""The attention of timm's ViT, DeiT and whatever else uses its `Attention`: all tokens as one window, on the CPU."""

import torch
import torch.fx.experimental.symbolic_shapes as symbolic_shapes
from timm.models import register_notrace_module
from timm.models import vision_transformer as timm_vit

import effvit.ops

from ..layers._tokens import is_hooked
from . import Adapter, Fused

TOKENS, ELEMENTS = 32768, 1 << 18  # of a window and a head: what the operator takes; beyond it PyTorch is as fast


def varies(size):
    """Whether a compiler has been told that this size is not one number."""
    if not (torch.compiler.is_compiling() or isinstance(size, torch.SymInt)):
        return False
    return not symbolic_shapes.has_static_value(size)


@register_notrace_module
class FusedAttention(Fused, timm_vit.Attention):
    """timm's Attention, on the CPU by :func:`effvit.ops.window_attention` with one window of all tokens.

    On GPUs, for more than 4,096 tokens (64 channels a head), with a mask, causal, with active attention dropout or in
    float64 it is timm's own forward, on PyTorch's scaled_dot_product_attention. So it is where a compiler is told that
    the number of tokens varies: a window has one size.
    """

    original = timm_vit.Attention

    def forward(self, x, attn_mask=None, **options):
        if attn_mask is not None or any(options.values()) or self._needs_original(x):
            return super().forward(x, *(() if attn_mask is None else (attn_mask,)), **options)
        gate = getattr(self, "gate", None)
        gate = None if gate is None else gate(x).sigmoid()
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, 1, N, 3, self.num_heads, self.head_dim).unbind(3)
        scale = None if self.fused_attn else self.scale
        y, _ = effvit.ops.window_attention(self.q_norm(q), self.k_norm(k), v, window=(1, N), scale=scale)
        y = y.view(B, N, self.num_heads * self.head_dim)
        y = self.norm(y) if hasattr(self, "norm") else y
        y = y if gate is None else y * gate
        return self.proj_drop(self.proj(y))

    def _needs_original(self, x):
        dropout, tokens = self.attn_drop, x.shape[1]
        observed = is_hooked(dropout) and not self.fused_attn
        drops = self.training and dropout.p > 0
        if x.device.type != "cpu" or x.dtype == torch.float64 or observed or drops or varies(tokens):
            return True
        return not 0 < tokens <= min(TOKENS, ELEMENTS // self.head_dim)


class AttentionAdapter(Adapter):
    fused = FusedAttention

    def reason_not(self, module):
        if "forward" in vars(module):
            return "its forward has been replaced on the instance"
        if type(module.attn_drop) is not torch.nn.Dropout:
            return f"its attn_drop is {type(module.attn_drop).__qualname__}"
        return None

    def sample(self, module, generator):
        # The module knows no resolution: two images of 14 x 14 patches and a class token.
        channels = getattr(module.qkv, "in_features", module.num_heads * module.head_dim)
        return (torch.randn(2, 197, channels, generator=generator),)

    def describe(self, module):
        return f"heads {module.num_heads}x{module.head_dim}"


ADAPTERS = [AttentionAdapter()]
