"""Drop-in modules built on effvit's operators: timm's constructors and state_dict keys."""

from .swin_block import SwinTransformerBlock
from .window_attention import WindowAttention

__all__ = ["SwinTransformerBlock", "WindowAttention"]
