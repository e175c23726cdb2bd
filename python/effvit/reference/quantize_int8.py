"""quantize_int8 in readable PyTorch: the definition."""

import torch

ROUNDINGS = {
    "even": torch.round,
    "away": lambda x: torch.trunc(x) + torch.trunc(2 * (x - torch.trunc(x))),  # both differences are exact
}


def row_scale(x: torch.Tensor, excluded: torch.Tensor | None = None) -> torch.Tensor:
    """absmax / 127 of every row, columns excluded left out; 1 where that is 0: [..., K] -> [...]."""
    if x.shape[-1] == 0:
        return x.new_ones(x.shape[:-1])
    if excluded is not None:
        x = torch.where(excluded != 0, torch.zeros_like(x), x)
    scale = x.abs().amax(-1) / 127
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def steps(x: torch.Tensor, scale: torch.Tensor, excluded: torch.Tensor | None = None) -> torch.Tensor:
    """x in steps of scale, before it is rounded; 0 where it is NaN or excluded."""
    y = torch.where(torch.isnan(x / scale[..., None]), torch.zeros_like(x), x / scale[..., None]).clamp(-127, 127)
    return y if excluded is None else torch.where(excluded != 0, torch.zeros_like(y), y)


def quantize_int8(x, scale=None, excluded=None, *, round="even"):
    """x [..., K] -> (int8 [..., K], scale [...]): to the nearest step of scale, or of row_scale(x)."""
    scale = row_scale(x, excluded) if scale is None else scale.to(x.dtype)
    return ROUNDINGS[round](steps(x, scale, excluded)).to(torch.int8), scale
