"""Every operator in readable, differentiable PyTorch: the definition, the oracle of the tests, the last resort."""

from .gated_linear_attention import gated_linear_attention
from .gated_linear_attention_step import gated_linear_attention_step
from .glu import glu
from .linear_attention import linear_attention
from .newton_pinv import newton_pinv
from .rbf_gram import rbf_gram
from .window_attention import window_attention

__all__ = [
    "gated_linear_attention", "gated_linear_attention_step", "glu", "linear_attention", "newton_pinv", "rbf_gram",
    "window_attention",
]  # fmt: skip
