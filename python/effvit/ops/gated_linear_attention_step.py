"""gated_linear_attention_step: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.gated_linear_attention_step import gated_linear_attention_step as _definition
from ._op import op
from .gated_linear_attention import GATES, check_gates, default_scale, gate_of

_HEAD_DIM = "have a head dim between 1 and 256"


def _derive(op, dims, options, tensors):
    check_gates(op, tensors)


def _flops(dims, options):
    """Decay, update and product of a state."""
    forward = 5 * dims["B"] * dims["H"] * dims["K"] * dims["V"]
    return forward, 2 * forward


OP = op(
    "gated_linear_attention_step",
    """q: B H K, k: B H K, v: B H V, state: B H K V | float32 packed, g_head?: H | float strided,
    g_token?: B H | float strided, g_channel?: B H K | float -> out: B H V, new_state: B H K V | float32""",
    "scale: float = 1.",
    reference=_definition,
    saves=None,
    limits={"q.K": (1, 256, _HEAD_DIM), "v.V": (1, 256, _HEAD_DIM)},
    derive=_derive,
    empty="B H",
    shards=("B", "H"),
    flops=_flops,
)


def gated_linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of :func:`effvit.gated_linear_attention`: decoding.

    ``new_state = diag(e^g) state + k^T v``, ``out = scale * q new_state``.

    Args:
        q, k: [B, H, K]: batch, heads, head dim; v: [B, H, V]. K and V between 1 and 256. float32, bfloat16 or float16
            (one dtype), any strides with a last stride of 1.
        g: the gate: [H], [B, H] or [B, H, K] (a last stride of 1), at most 0, or None. float32, bfloat16 or float16.
        state: [B, H, K, V], float32. It is not changed.
        scale: a finite number; ``K**-0.5`` if not given.

    Returns:
        ``out`` [B, H, V] in the dtype of q, and ``new_state`` [B, H, K, V], float32. Differentiable, by the definition
        in PyTorch.

    Computed in float32, deterministic. Under autocast q, k and v are cast, g and the state are not.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.

    Sources: RetNet (arXiv:2307.08621), GLA (2312.06635), Mamba-2 (2405.21060).
    """
    gates = gate_of(OP.name, g, 2, "[H], [B, H] or [B, H, K]")
    if scale is None:
        scale = default_scale(q)
    return OP(q, k, v, state, *(gates.get(n) for n in GATES), scale=scale)
