"""EfficientViT (MIT) of timm: its multi-scale linear attention runs channels last, on the operator."""

import torch
from timm.models import efficientvit_mit as timm_efficientvit
from timm.models import register_notrace_module

from ..layers.efficientvit import LiteMLAForward
from . import Adapter, Fused


@register_notrace_module
class FusedLiteMLA(LiteMLAForward, Fused, timm_efficientvit.LiteMLA):
    """timm's LiteMLA without the concatenated q, k, v of all scales and their transposed copies."""

    original = timm_efficientvit.LiteMLA


class LiteMLAAdapter(Adapter):
    fused = FusedLiteMLA

    def reason_not(self, module):
        if "forward" in vars(module) or "_attn" in vars(module):
            return "its forward has been replaced on the instance"
        if type(module.qkv) is not timm_efficientvit.ConvNormAct:
            return f"its qkv is {type(module.qkv).__module__}.{type(module.qkv).__qualname__}, not timm's ConvNormAct"
        return None

    def sample(self, module, generator):
        # The module knows no resolution: two small maps of odd sides, more tokens than channels of a head.
        side = 7
        while side * (side + 2) <= module.dim:
            side += 2
        return (torch.randn(2, module.qkv.conv.in_channels, side, side + 2, generator=generator),)

    def describe(self, module):
        heads = module.qkv.conv.out_channels // (3 * module.dim)
        scales = ",".join(str(aggregate[0].kernel_size[0]) for aggregate in module.aggreg)
        return f"heads {heads}x{module.dim} scales {scales}"


ADAPTERS = [LiteMLAAdapter()]
