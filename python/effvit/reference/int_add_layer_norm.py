"""int_add_layer_norm in readable PyTorch: the definition. Integers, in int64."""

import torch

from .int_layer_norm import int_layer_norm
from .requantize import requantize


def int_add_layer_norm(
    x, residual, x_multiplier, x_shift, residual_multiplier, residual_shift, bias, multiplier, shift, offset,
    *, exact, truncate, bits, out_dtype,
):  # fmt: skip
    """LayerNorm of a sum, and the sum: x and residual in steps of one scale, added, in int16."""
    terms = (x, x_multiplier, x_shift, residual, residual_multiplier, residual_shift)
    total = requantize(*terms, bits=bits, out_dtype=torch.int16)
    options = {"exact": exact, "truncate": truncate, "out_dtype": out_dtype}
    return int_layer_norm(total, bias, multiplier, shift, offset, **options), total
