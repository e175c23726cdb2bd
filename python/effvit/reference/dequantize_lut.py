"""dequantize_lut in readable PyTorch: the definition."""

import torch
import torch.nn.functional as F


def dequantize_lut(q: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q [..., C] uint8 -> values[q]; NaN for a code that has no value."""
    return F.pad(values, (0, 256 - values.shape[0]), value=float("nan"))[q.long()]
