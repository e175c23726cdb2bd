"""quantize_lut in readable PyTorch: the definition."""

import torch


def count(x: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """How many thresholds [T], in ascending order, are at most x: int64, none for a NaN."""
    found = torch.searchsorted(thresholds.detach().to(x.dtype), x.detach().contiguous(), right=True)
    return torch.where(torch.isnan(x), torch.zeros_like(found), found)


def quantize_lut(x: torch.Tensor, thresholds: torch.Tensor, *, descending: bool = False) -> torch.Tensor:
    """x [..., C] -> uint8 [..., C]: the thresholds at most x, counted; descending: those above it."""
    found = count(x, thresholds)
    return (thresholds.shape[0] - found if descending else found).to(torch.uint8)
