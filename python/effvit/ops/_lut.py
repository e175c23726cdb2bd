"""What the operators on tables of levels declare alike: the thresholds of codes and their checks."""

from __future__ import annotations

import torch

from . import _checks

MOST = 256  # codes


def limits(name: str, dim: str, most: int) -> dict:
    return {f"{name}.{dim}": (1, most, f"have 1 to {most} elements")}


def check_ascending(op: str, tensors: dict) -> None:
    """Thresholds that can be read are numbers in ascending order, equal ones allowed."""
    t = tensors["thresholds"]
    if not _checks.has_readable_values(t):
        return
    wrong = torch.isnan(t)
    wrong[1:] |= t[1:] < t[:-1]
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise _checks.value_error(op, "thresholds", "in ascending order", f"{t[at].item()} at [{at}]")


def elements(dims: dict) -> int:
    return torch.Size(dims["..."]).numel() * dims["C"]
