"""Every operator in readable, differentiable PyTorch: the definition, the oracle of the tests, the last resort."""

from .aft import aft
from .block_relu2_attention import block_relu2_attention
from .glu import glu
from .linear_attention import linear_attention
from .newton_pinv import newton_pinv
from .rbf_gram import rbf_gram
from .rnn_scan import rnn_scan
from .window_attention import window_attention

__all__ = [
    "aft", "block_relu2_attention", "glu", "linear_attention", "newton_pinv", "rbf_gram", "rnn_scan",
    "window_attention",
]  # fmt: skip
