"""Swin v1 of timm: the block hands the whole map to the operator instead of rolling, padding and partitioning it."""

import torch
from timm.models import register_notrace_module
from timm.models import swin_transformer as timm_swin

from ..layers.window_attention import WindowAttentionForward
from . import Adapter, Fused


@register_notrace_module
class FusedWindowAttention(WindowAttentionForward, Fused, timm_swin.WindowAttention):
    """timm's WindowAttention that also takes a map [B, H, W, C]."""

    original = timm_swin.WindowAttention


class FusedSwinTransformerBlock(Fused, timm_swin.SwinTransformerBlock):
    """timm's SwinTransformerBlock without roll, padding, partition and mask."""

    original = timm_swin.SwinTransformerBlock

    def _attn(self, x):
        return self.attn(x, shift=self.shift_size)


class SwinBlockAdapter(Adapter):
    fused = FusedSwinTransformerBlock

    def reason_not(self, block):
        attn = block.attn
        if type(attn) is not timm_swin.WindowAttention:
            return f"its attn is {type(attn).__module__}.{type(attn).__qualname__}, not timm's WindowAttention"
        if "forward" in vars(attn) or "_attn" in vars(block):
            return "its forward has been replaced on the instance"
        if type(attn.softmax) is not torch.nn.Softmax:
            return f"its softmax is {type(attn.softmax).__qualname__}"
        if any(s >= w for s, w in zip(block.shift_size, block.window_size, strict=True)):
            return f"shift {tuple(block.shift_size)} is not smaller than window {tuple(block.window_size)}"
        return None

    def parts(self, block):
        return [(block, self.fused), (block.attn, FusedWindowAttention)]

    def sample(self, block, generator):
        # Two images: a batch stride mistaken for a window stride shows. A mask made for input_resolution is the
        # reason for that resolution.
        return (torch.randn(2, *block.input_resolution, block.dim, generator=generator),)

    def run(self, block, x):
        return block._attn(x)

    def describe(self, block):
        attn = block.attn
        head_dim = attn.proj.in_features // attn.num_heads if hasattr(attn.proj, "in_features") else "?"
        (H, W), (wh, ww), (sh, sw) = block.input_resolution, block.window_size, block.shift_size
        return f"map {H}x{W} window {wh}x{ww} shift {sh},{sw} heads {attn.num_heads}x{head_dim}"


ADAPTERS = [SwinBlockAdapter()]
