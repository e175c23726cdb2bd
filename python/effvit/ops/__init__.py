"""The operators. Each module defines `torch.ops.effvit.<name>` and a public function of the same name."""

from .window_attention import window_attention

__all__ = ["window_attention"]
