"""InceptionNeXt of timm: its token mixer runs channels last, on the operator."""

import torch
from timm.models import inception_next as timm_inception_next
from timm.models import register_notrace_module

from ..layers._depthwise import is_operators
from ..layers.inception_next import InceptionDWConv2dForward
from . import Adapter, Fused


@register_notrace_module
class FusedInceptionDWConv2d(InceptionDWConv2dForward, Fused, timm_inception_next.InceptionDWConv2d):
    """timm's InceptionDWConv2d on `effvit::dwconv`. Maps stay channels last between the blocks."""

    original = timm_inception_next.InceptionDWConv2d


class InceptionDWConv2dAdapter(Adapter):
    fused = FusedInceptionDWConv2d

    def reason_not(self, module):
        if "forward" in vars(module):
            return "its forward has been replaced on the instance"
        for name in ("dwconv_hw", "dwconv_w", "dwconv_h"):
            if not is_operators(getattr(module, name)):
                return f"its {name} is not a plain depthwise convolution"
        return None

    def sample(self, module, generator):
        # The module knows no resolution: two maps that the longest band exceeds on one side.
        return (torch.randn(2, sum(module.split_indexes), 9, 14, generator=generator),)

    def describe(self, module):
        sizes = [module.dwconv_hw, module.dwconv_w, module.dwconv_h]
        return "taps " + ", ".join(f"{conv.kernel_size[0]}x{conv.kernel_size[1]}" for conv in sizes)


ADAPTERS = [InceptionDWConv2dAdapter()]
