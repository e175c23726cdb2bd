"""Every operator in readable, differentiable PyTorch: the definition, the oracle of the tests, the last resort."""

from .dwconv_glu import dwconv_glu
from .glu import glu
from .linear_attention import linear_attention
from .local_pool_attention import local_pool_attention
from .newton_pinv import newton_pinv
from .rbf_gram import rbf_gram
from .window_attention import window_attention

__all__ = [
    "dwconv_glu",
    "glu",
    "linear_attention",
    "local_pool_attention",
    "newton_pinv",
    "rbf_gram",
    "window_attention",
]
