"""table_lookup in readable PyTorch: the definition."""

import torch


def table_lookup(
    x: torch.Tensor, table: torch.Tensor, which: torch.Tensor | None = None, *, signed: bool = False
) -> torch.Tensor:
    """x uint8 [..., C], table uint8 [T, 256], which uint8 [...] -> table[which, x]: [..., C].

    signed: x are bytes of int8, and tables begin with -128: x + 128 is x ^ 128 as a byte.
    """
    row = 0 if which is None else which.to(torch.int64)[..., None] * 256
    return table.flatten()[(x ^ 128 if signed else x).to(torch.int64) + row]
