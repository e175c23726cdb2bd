"""Block-sparse weights for `effvit.block_sparse_linear`: which blocks to keep, and the form it takes them in."""

from __future__ import annotations

import torch

from .ops import _checks
from .ops.block_sparse_linear import BLOCKS, check_places
from .reference.block_sparse_linear import dense_weight, kept_blocks

_NAME = "block_sparse"


def _check_weight(w: object, block: object) -> None:
    _checks.check_tensor(_NAME, "w", w)
    if not w.is_floating_point():
        raise _checks.type_error(_NAME, "w", "a floating-point tensor", w.dtype)
    if not _checks.is_int(block) or block not in BLOCKS:
        raise _checks.value_error(_NAME, "block", "16 or 32", block)
    if w.dim() != 2 or w.shape[0] % block or w.shape[1] % block:
        expected = f"[N, K] with N and K multiples of the block, {block}"
        raise _checks.value_error(_NAME, "w", expected, _checks.shape(w))


def _blocks(w: torch.Tensor, block: int) -> torch.Tensor:
    """[N / B, K / B, B, B]"""
    return w.unflatten(1, (w.shape[1] // block, block)).unflatten(0, (w.shape[0] // block, block)).transpose(1, 2)


def mask(w: torch.Tensor, *, density: float, block: int = 16, balanced: bool = False) -> torch.Tensor:
    """The blocks of the largest norm, as a mask of w.

    Args:
        w: [N, K] in floating point, N and K multiples of the block.
        density: between 0 and 1: the share of blocks to keep, rounded to a whole number of them, ties to even.
        block: 16 or 32.
        balanced: keep equally many in every row of blocks, so that output channels cost the same; else the largest
            of the whole matrix.

    Returns:
        bool [N, K]. Norms are sums of squares in float64; of equal ones the first is kept. A NaN counts as infinite.
    """
    _check_weight(w, block)
    if not 0 <= _checks.as_finite(_NAME, "density", density) <= 1:
        raise _checks.value_error(_NAME, "density", "between 0 and 1", density)
    norms = _blocks(w.detach().double(), block).square().sum((-1, -2))
    norms = torch.where(norms.isnan(), torch.inf, norms)
    groups = norms if balanced else norms.flatten()[None]
    order = groups.sort(dim=-1, descending=True, stable=True).indices[:, : round(density * groups.shape[1])]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view_as(norms)
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)


def compress(
    w: torch.Tensor, *, block: int = 16, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, crow, columns) of w [N, K]: its blocks that are not zero, or those of which the mask has any entry.

    Differentiable in w. With a mask, what lies in blocks outside of it is lost. Waits for a GPU: the number of blocks
    depends on values.
    """
    _check_weight(w, block)
    if mask is not None:
        _checks.check_tensor(_NAME, "mask", mask)
        if mask.dtype != torch.bool:
            raise _checks.type_error(_NAME, "mask", torch.bool, mask.dtype)
        if mask.shape != w.shape or mask.device != w.device:
            expected = f"{_checks.shape(w)} on {w.device} like w"
            raise _checks.value_error(_NAME, "mask", expected, f"{_checks.shape(mask)} on {mask.device}")
    there = _blocks(w.detach() != 0 if mask is None else mask, block).any(-1).any(-1)
    columns = there.nonzero()[:, 1].to(torch.int32)
    crow = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return kept_blocks(w.contiguous(), crow, columns, block), crow, columns


def decompress(values: torch.Tensor, crow: torch.Tensor, columns: torch.Tensor, k: int) -> torch.Tensor:
    """The weight [N, k] of which `compress` made the others; differentiable in values."""
    for name, t, rank in (("values", values, 3), ("crow", crow, 1), ("columns", columns, 1)):
        _checks.check_tensor(_NAME, name, t)
        if t.dim() != rank:
            raise _checks.value_error(_NAME, name, f"of {rank} dims", _checks.shape(t))
        if rank == 1 and t.dtype != torch.int32:
            raise _checks.type_error(_NAME, name, torch.int32, t.dtype)
    block = values.shape[-1]
    if block not in BLOCKS or values.shape[1] != block:
        raise _checks.value_error(_NAME, "values", "[Z, B, B] with B 16 or 32", _checks.shape(values))
    if not _checks.is_int(k) or k < 0 or k % block:
        raise _checks.value_error(_NAME, "k", f"a multiple of {block}", k)
    if crow.shape[0] == 0:
        raise _checks.value_error(_NAME, "crow", "[N / B + 1]", _checks.shape(crow))
    if columns.shape[0] != values.shape[0]:
        expected = f"[Z] like values {_checks.shape(values)}"
        raise _checks.value_error(_NAME, "columns", expected, _checks.shape(columns))
    check_places(_NAME, crow, columns, k // block)
    return dense_weight(values, crow, columns, k)
