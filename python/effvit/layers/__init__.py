"""Drop-in modules built on effvit's operators: constructors and state_dict keys of timm or of the original code."""

from .dualtoken import DualTokenAttention, PositionAwareTokenModule, TokenToMapAttention
from .efficientvit import LiteMLA
from .flatten import FocusedLinearAttention
from .hit_sr import SCC, HierarchicalTransformerBlock
from .l2vit import LCM, LGABlock, LinearGlobalAttention
from .mlla import MLLABlock, MLLAttention
from .mpcvit import MPCViTAttention, XNormAttention
from .sana import LiteLA, SanaLinearAttention
from .slab import LinearNorm, RepBN, SimplifiedLinearAttention, fold_affine, fuse_prepbn
from .soft import SoftmaxFreeAttention, SoftmaxFreeNormAttention
from .swin_block import SwinTransformerBlock
from .vssd import NonCausalSSD, VMAMBA2Block
from .window_attention import WindowAttention

__all__ = [
    "DualTokenAttention",
    "FocusedLinearAttention",
    "fold_affine",
    "fuse_prepbn",
    "HierarchicalTransformerBlock",
    "LCM",
    "LGABlock",
    "LinearGlobalAttention",
    "LinearNorm",
    "LiteLA",
    "LiteMLA",
    "MLLABlock",
    "MLLAttention",
    "MPCViTAttention",
    "NonCausalSSD",
    "PositionAwareTokenModule",
    "RepBN",
    "SanaLinearAttention",
    "SCC",
    "SimplifiedLinearAttention",
    "SoftmaxFreeAttention",
    "SoftmaxFreeNormAttention",
    "SwinTransformerBlock",
    "TokenToMapAttention",
    "VMAMBA2Block",
    "WindowAttention",
    "XNormAttention",
]
