"""pam_matmul: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.pam_matmul import pam_matmul as _definition
from . import _checks
from ._op import op

OP = op(
    "pam_matmul",
    "x: M K, weight: N K -> out: M N",
    reference=_definition,
    saves=None,
    empty="M N",
    batch="M",
    shards=("M",),
    autocast=False,
    flops=lambda dims, options: (2 * dims["M"] * dims["N"] * dims["K"], 0),
)


def pam_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x weightᵀ`` with piecewise affine multiplication (PAM): floats are multiplied by adding their bits as integers.

    With |a| = 2^e (1 + m) and |b| = 2^f (1 + n), a product is 2^(e + f) (1 + m + n) where m + n < 1 and 2^(e + f + 1)
    (m + n) else, with the sign of a b: at most a ninth below the true one, equal where either is a power of two.

    Args:
        x: [..., K], weight: [N, K], both float32, bfloat16 or float16, a last stride of 1.

    Returns:
        [..., N] in the dtype of x. Products are exact as float32; sums are float32. Zeros and subnormal float32 numbers
        give 0, products below 2^-126 as well; from 2^128 on they are infinite. Where a row of x or of weight has a
        NaN or an infinity, its results are NaN. Differentiable: the derivative is the exact one of the affine piece, a
        power of two with a sign, at the speed of PyTorch; PAMLinear also has the one that mimics a product's.
        Deterministic; results do not depend on the number of threads.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype. ValueError: a shape or stride is
        outside the above. The message names the argument.

    Source: Kosson and Jaggi, multiplication-free transformer training (arXiv:2305.17190), after Mogami (2020).
    """
    _checks.check_tensor(OP.name, "x", x)
    if x.dim() == 0:
        raise _checks.value_error(OP.name, "x", "[..., K]", _checks.shape(x))
    if x.dim() == 2:
        return OP(x, weight)
    out = OP(x.flatten(0, -2) if x.dim() > 2 else x[None], weight)
    return out.reshape(*x.shape[:-1], out.shape[-1])
