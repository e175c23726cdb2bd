"""table_lookup: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.table_lookup import table_lookup as _definition
from . import _checks
from ._op import op

BYTES = (torch.int8, torch.uint8)


def _check(op, dims, options, tensors):
    which, count = tensors["which"], dims["T"]
    if count == 0 or (which is None and count != 1):
        expected = "[T, 256] with T = 1 where which is None" if which is None else "[T, 256] with T at least 1"
        raise _checks.value_error(op, "table", expected, _checks.shape(tensors["table"]))
    if which is not None and which.numel() and _checks.has_readable_values(which) and int(which.max()) >= count:
        raise _checks.value_error(op, "which", f"below T = {count}", int(which.max()))


OP = op(
    "table_lookup",
    "x: ... C | uint8, table: T 256 | uint8 packed, which?: ... | uint8 strided -> out: ... C | uint8",
    "signed: bool = False",
    reference=_definition,
    saves=None,
    check=_check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=lambda dims, options: (torch.Size(dims["..."]).numel() * dims["C"], 0),
)


def table_lookup(x: torch.Tensor, table: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
    """Any function of a byte, by a table of its 256 values: ``out = table[x]``, or ``table[which, x]``.

    Args:
        x: [..., C] int8 or uint8, a last stride of 1, one to six dims.
        table: [256] or [T, 256], int8 or uint8: the results for x = -128 to 127, or for 0 to 255 where x is uint8.
        which: [...] uint8, the table that each row takes, below T: of blocks with scales of their own. None: T is 1.

    Returns:
        [..., C], contiguous, in the dtype of the table. Not differentiable; see the layers TableFunction, TableGELU
        and TableSoftmax.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype. ValueError: a shape or stride is
        outside the above, or a row's table does not exist (where values can be read, on a CPU).

    Source: the look-up tables of BCT (arXiv:2304.01483) for non-linear functions on blocks of int8.
    """
    name = OP.name
    for argument, t in (("x", x), ("table", table)):
        _checks.check_tensor(name, argument, t)
        if t.dtype not in BYTES:
            raise _checks.type_error(name, argument, "torch.int8 or torch.uint8", t.dtype)
    if table.dim() == 1:
        table = table[None]
    out = OP(_as(torch.uint8, x), _as(torch.uint8, table), which, signed=x.dtype == torch.int8)
    return _as(table.dtype, out)


def _as(dtype, x):
    """The same bytes; a trace cannot hold a view of another dtype."""
    return x if x.dtype == dtype else x.to(dtype) if torch.jit.is_tracing() else x.view(dtype)
