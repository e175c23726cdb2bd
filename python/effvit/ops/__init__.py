"""The operators. Each module defines `torch.ops.effvit.<name>` and a public function of the same name."""

from .aft import aft
from .binary_linear import binary_linear
from .block_relu2_attention import block_relu2_attention
from .block_sparse_int8_linear import block_sparse_int8_linear
from .block_sparse_linear import block_sparse_linear
from .dequantize_lut import dequantize_lut
from .dwconv import dwconv
from .dwconv_glu import dwconv_glu
from .fake_quantize_int8 import fake_quantize_int8
from .fake_quantize_lut import fake_quantize_lut
from .fft_conv import fft_conv
from .fft_conv import fft_conv_spectrum as fft_conv_spectrum
from .gated_linear_attention import gated_linear_attention
from .gated_linear_attention_step import gated_linear_attention_step
from .glu import glu
from .int8_attention import int8_attention
from .int8_linear import int8_linear
from .int8_matmul import int8_matmul
from .int8_prepack import int8_prepack
from .int_add_layer_norm import int_add_layer_norm
from .int_attention import int_attention
from .int_layer_norm import int_layer_norm
from .int_linear import int_linear
from .kernel_hash import kernel_hash
from .linear_attention import linear_attention
from .local_pool_attention import local_pool_attention
from .newton_pinv import newton_pinv
from .pam_matmul import pam_matmul
from .pow2_linear import pow2_linear
from .quantize_int8 import quantize_int8
from .quantize_lut import quantize_lut
from .rbf_gram import rbf_gram
from .requantize import requantize
from .rnn_scan import rnn_scan
from .selective_scan2d import selective_scan2d
from .shift_gelu import shift_gelu
from .shiftmax import shiftmax
from .sign_bits import sign_bits
from .sparse24_compress import sparse24_compress
from .sparse24_decompress import sparse24_decompress
from .sparse24_int8_linear import sparse24_int8_linear
from .sparse24_linear import sparse24_linear
from .sparse24_mask import sparse24_mask
from .sparse24_prepack import sparse24_prepack
from .sparse24_prune import sparse24_prune
from .spectral_gate import spectral_gate
from .table_lookup import table_lookup
from .window_attention import window_attention

__all__ = [
    "aft", "binary_linear", "block_relu2_attention", "block_sparse_int8_linear", "block_sparse_linear",
    "dequantize_lut", "dwconv", "dwconv_glu", "fake_quantize_int8", "fake_quantize_lut", "fft_conv",
    "gated_linear_attention", "gated_linear_attention_step", "glu", "int8_attention", "int8_linear", "int8_matmul",
    "int8_prepack", "int_add_layer_norm", "int_attention", "int_layer_norm", "int_linear", "kernel_hash",
    "linear_attention", "local_pool_attention", "newton_pinv", "pam_matmul", "pow2_linear", "quantize_int8",
    "quantize_lut", "rbf_gram", "requantize", "rnn_scan", "selective_scan2d", "shift_gelu", "shiftmax", "sign_bits",
    "sparse24_compress", "sparse24_decompress", "sparse24_int8_linear", "sparse24_linear", "sparse24_mask",
    "sparse24_prepack", "sparse24_prune", "spectral_gate", "table_lookup", "window_attention",
]  # fmt: skip
