"""Every operator in readable, differentiable PyTorch: the definition, the oracle of the tests, the last resort."""

from .aft import aft
from .block_relu2_attention import block_relu2_attention
from .dwconv import dwconv
from .dwconv_glu import dwconv_glu
from .fft_conv import fft_conv
from .gated_linear_attention import gated_linear_attention
from .gated_linear_attention_step import gated_linear_attention_step
from .glu import glu
from .linear_attention import linear_attention
from .local_pool_attention import local_pool_attention
from .newton_pinv import newton_pinv
from .rbf_gram import rbf_gram
from .rnn_scan import rnn_scan
from .selective_scan2d import selective_scan2d
from .spectral_gate import spectral_gate
from .window_attention import window_attention

__all__ = [
    "aft", "block_relu2_attention", "dwconv", "dwconv_glu", "fft_conv", "gated_linear_attention",
    "gated_linear_attention_step", "glu", "linear_attention", "local_pool_attention", "newton_pinv", "rbf_gram",
    "rnn_scan", "selective_scan2d", "spectral_gate", "window_attention",
]  # fmt: skip
