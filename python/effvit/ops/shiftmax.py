"""shiftmax: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.shiftmax import shiftmax as _definition
from . import _checks, _integer
from ._declaration import OUT_DTYPES
from ._op import op

MOST_BITS = {"int8": 8, "uint8": 9, "int16": 16, "int32": 16}  # of results below 2^(bits - 1)


def _check(op, dims, options, tensors):
    _integer.check_shift_exp(op, options)
    dtype = OUT_DTYPES[options["out_dtype"]]
    if options["bits"] > MOST_BITS[dtype]:
        raise _checks.value_error(op, "bits", f"at most {MOST_BITS[dtype]} with out_dtype {dtype}", options["bits"])


def _flops(dims, options):
    return 20 * torch.Size(dims["..."]).numel() * dims["C"], 0  # integer operations


OP = op(
    "shiftmax",
    "x: ... C | integer -> out: ... C | out_dtype",
    f"{_integer.SHIFT_EXP.format(n=15, bits=8)}, {_integer.OUT_DTYPE.format(4)}",
    reference=lambda x, **options: _definition(x, **_integer.named(options)),
    saves=None,
    check=_check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def shiftmax(
    x: torch.Tensor,
    scale: float | torch.Tensor | None = None,
    *,
    x0: int | None = None,
    n: int = 15,
    bits: int = 8,
    deployed: bool = False,
    out_dtype: torch.dtype = torch.int8,
) -> torch.Tensor:
    """I-ViT's Shiftmax: softmax over the last dim, with integers alone, the same bits on every device.

    Args:
        x: [..., C] int32, int16, int8 or uint8, any values, a last stride of 1; C from 0.
        scale: what one step of x is worth: a number, or a tensor of one element. 1 / scale is at most (2^31 - 1) >> n,
            65535 with n = 15: then no number on the way exceeds int32.
        x0: in place of scale, what kernels take: floor(-1 / scale), computed in float64.
        n: the exponential has n bits after the point, and is constant from x0 * n down. The reciprocal of a row's sum
            keeps few bits where that is large: rows sum to more nearly 1 with a smaller n. 4 to 30.
        bits: the result is in steps of 2^(1 - bits), below 2^(bits - 1). 2 to 16; 8 at most with int8, 9 with uint8.
            The authors' ViT has 16, their Swin 8.
        deployed: as the authors' TVM kernels have it: the remainder halved before the left shift, and x0 =
            int(-1 / scale - 1). They use n = 16.
        out_dtype: int8, uint8, int16 or int32.

    Returns:
        [..., C] in out_dtype, contiguous: softmax in steps of 2^(1 - bits), rounded down. Not differentiable. A sum
        above 2^31 - 1 counts as that. Deterministic, bit for bit the formula in int64.

    Raises:
        TypeError: x is not a dense tensor of these dtypes; an option has the wrong type.
        ValueError: a shape, stride, scale or option is outside the above. The message names the argument.

    Source: I-ViT (arXiv:2207.01405).
    """
    _checks.check_tensor(OP.name, "x", x)
    x0 = _integer.as_x0(OP.name, scale, x0, n, deployed)
    return OP(x, x0=x0, n=n, bits=bits, half_bit=not deployed, out_dtype=_integer.as_out_dtype(OP.name, out_dtype))
