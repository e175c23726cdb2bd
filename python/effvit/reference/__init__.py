"""Every operator in readable, differentiable PyTorch: the definition, the oracle of the tests, the last resort."""

from .glu import glu
from .linear_attention import linear_attention
from .newton_pinv import newton_pinv
from .rbf_gram import rbf_gram
from .selective_scan2d import selective_scan2d
from .window_attention import window_attention

__all__ = ["glu", "linear_attention", "newton_pinv", "rbf_gram", "selective_scan2d", "window_attention"]
