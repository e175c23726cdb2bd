"""selective_scan2d: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.selective_scan2d import selective_scan2d as _reference
from ._op import op


def _flops(dims, options):
    """Per token, direction, channel and state: the decay and its exponential, two multiply-adds; backward the same once
    more, and the adjoint of each.
    """
    states = 4 * dims["B"] * dims["H"] * dims["W"] * dims["D"] * dims["N"]
    return 7 * states, 20 * states


OP = op(
    "selective_scan2d",
    "x: B H W D, dt: B H W 4 D, b: B H W 4 N, c: B H W 4 N, a: 4 D N | float32 packed, d?: 4 D | float32 packed, "
    "dt_bias?: 4 D | float32 packed -> out: B H W D | float32",
    "softplus: bool = True",
    reference=_reference,
    limits={"b.N": (1, 256, "have between 1 and 256 states")},
    empty="B H W D",
    shards=("B", "D"),
    autocast=False,  # a scan keeps the dtype that it is given: its decays are exponentials of what would be rounded
    flops=_flops,
)


def selective_scan2d(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    d: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    softplus: bool = True,
) -> torch.Tensor:
    r"""The four selective scans of a map and their sum: the core of VMamba's SS2D (arXiv:2401.10166).

    A selective scan (Mamba, arXiv:2312.00752) is a linear recurrence whose decay and input are functions of the token.
    Direction s runs over all tokens of the map; with ``delta = softplus(dt + dt_bias)``, per channel, along its way::

        h_i = exp(delta_i * a) * h_(i-1) + delta_i * b_i * x_i        N states
        y_i = c_i . h_i + d * x_i

    and the result is the sum of y over the directions, at every place of the map. They are, in the order of VMamba's
    CrossScan: 0 row after row, 1 column after column, 2 and 3 the same two from the last token to the first.

    Every tensor lies in the order of the map, channels last, whatever the direction: projections of the tokens are used
    as they are, and no sequence is copied. (In Triton the directions' results are four maps of float32, added up at the
    end.)

    Args:
        x: [B, H, W, D]: batch, map, channels.
        dt: [B, H, W, 4, D], the step sizes of the four directions.
        b, c: [B, H, W, 4, N], what enters the N states and what is read of them; N from 1 to 256.
            These four float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        a: [4, D, N] float32, usually ``-exp(A_log)``: at most 0, or states grow. delta * a above 87 counts
            as 87, also in its derivative.
        d: [4, D] float32, the skip; None: 0.
        dt_bias: [4, D] float32; None: 0.
        softplus: False takes ``dt + dt_bias`` as delta.

    Returns:
        [B, H, W, D] float32, contiguous, whatever the dtype of x. Differentiable in every tensor; the backward keeps
        the inputs alone and computes the states again.

    States are float32. Deterministic; results do not depend on the number of threads. On the CPU the backward takes
    about 16 MiB, sums of parameters, and a state in every 32 tokens or more beyond inputs and outputs; in Triton it
    takes float32 maps [B, H, W, 4, N] of db and dc for each block of channels. Gradients of half precision are rounded
    after each direction on the CPU. Under autocast nothing is cast.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; softplus is not a bool.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.
    """
    return OP(x, dt, b, c, a, d, dt_bias, softplus=softplus)
