"""int_linear in readable PyTorch: the definition. Sums in float64, which holds them exactly, the rest in int64."""

import torch

from .int8_linear import integer_product
from .int8_prepack import int8_unpack
from .requantize import requantize
from .shiftmax import saturate


def int_linear(
    x, weight, multiplier=None, shift=None, bias=None, residual=None, residual_multiplier=None, residual_shift=None, *,
    bits=8, out_dtype=torch.int8,
):  # fmt: skip
    """x int8 [M, K], weight int8 [N, K] or packed -> [M, N]: the sums plus bias, rescaled if there is a multiplier."""
    if weight.shape[1] > x.shape[1]:
        n = (multiplier if bias is None else bias).shape[0]
        weight = int8_unpack(weight, n, x.shape[1])
    t = integer_product(x, weight).long()
    if bias is not None:
        t = saturate(t + bias.long(), torch.int32).long()
    if multiplier is None:
        return saturate(t, out_dtype)
    rescaling = {"bits": bits, "out_dtype": out_dtype}
    return requantize(t, multiplier, shift, residual, residual_multiplier, residual_shift, **rescaling)
