"""fake_quantize_int8 in readable PyTorch: the definition, with the straight-through gradient."""

import torch

from .quantize_int8 import ROUNDINGS, row_scale


def fake_quantize_int8(x, scale=None, *, round="even"):
    """x [..., K] -> the same, rounded to a multiple of scale [...], or of row_scale(x), that int8 can hold."""
    if scale is None:
        with torch.no_grad():
            scale = row_scale(x)
        y = x / scale[..., None]
    else:
        y = (x / scale.to(x.dtype)[..., None]).clamp(min=-127).clamp(max=127)  # one: an in-place op in its derivative
    # The difference is exact (y / 2 <= round(y) <= 2 y, or round(y) = 0), and so is the sum.
    steps = y + (ROUNDINGS[round](y.clamp(-127, 127)) - y).detach()
    return steps * scale.to(x.dtype)[..., None]
