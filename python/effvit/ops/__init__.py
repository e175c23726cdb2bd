"""The operators. Each module defines `torch.ops.effvit.<name>` and a public function of the same name."""

from .glu import glu
from .linear_attention import linear_attention
from .newton_pinv import newton_pinv
from .rbf_gram import rbf_gram
from .window_attention import window_attention

__all__ = ["glu", "linear_attention", "newton_pinv", "rbf_gram", "window_attention"]
