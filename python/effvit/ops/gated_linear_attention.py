"""gated_linear_attention: the declaration, the checks of its arguments and the public function."""

from __future__ import annotations

import torch

from ..reference.gated_linear_attention import DIRECTIONS
from ..reference.gated_linear_attention import gated_linear_attention as _definition
from ._checks import as_bool, shape, value_error
from ._op import op
from .linear_attention import _check_offsets

GATES = ("g_head", "g_token", "g_channel")
_HEAD_DIM = "have a head dim between 1 and 256"
_BOTH = DIRECTIONS.index("bidirectional")


def check_gates(op, tensors):
    """At most one of the three."""
    given = [name for name in GATES if tensors[name] is not None]
    if len(given) > 1:
        raise value_error(op, given[1], f"None when {given[0]} is given", _shape(tensors[given[1]]))


def _shape(x):
    return shape(x) if isinstance(x, torch.Tensor) else type(x).__name__


def _derive(op, dims, options, tensors):
    """N sequences: the batch, or those of cu_seqlens. Both directions together have no state: K' = V' = 0."""
    both = options["direction"] == _BOTH
    dims["K'"], dims["V'"] = (0, 0) if both else (dims["K"], dims["V"])
    if tensors["cu_seqlens"] is None:
        dims["N"] = dims["B"]
    check_gates(op, tensors)
    if both and tensors["initial_state"] is not None:
        raise value_error(op, "initial_state", "None when both directions are summed", _shape(tensors["initial_state"]))


def _check(op, dims, options, tensors):
    cu_seqlens = tensors["cu_seqlens"]
    if cu_seqlens is None:
        return
    if dims["B"] != 1:
        given = shape(tensors["q"])
        raise ValueError(f"effvit::{op}: q must have a batch size of 1 when cu_seqlens is given, got {given}")
    _check_offsets(op, cu_seqlens, dims["L"])


def _flops(dims, options):
    """The recurrence: update and product of a state for every token; in the backward five such products."""
    B, L, H, K, V = (dims[n] for n in "BLHKV")
    products = (2 if options["direction"] == _BOTH else 1) * 2 * B * L * H * K * V
    return 2 * products, 5 * products


OP = op(
    "gated_linear_attention",
    """q: B L H K, k: B L H K, v: B L H V, g_head?: H | float strided, g_token?: B L H | float strided,
    g_channel?: B L H K | float, cu_seqlens?: N+1 | int32 packed, initial_state?: N H K V | float32 packed
    -> out: B L H V, state: N H K' V' | float32""",
    "scale: float = 1., direction: int in 0..2 = 0",
    reference=_definition,
    limits={"q.K": (1, 256, _HEAD_DIM), "v.V": (1, 256, _HEAD_DIM)},
    derive=_derive,
    check=_check,
    empty="B H",
    batch="B N",
    alone="cu_seqlens",
    shards=("B N", "H"),
    shape_options=("direction",),
    flops=_flops,
)


def gate_of(op: str, g: object, token_dims: int, shapes: str) -> dict:
    """Which of the three gates g is, by its number of dims."""
    if g is None:
        return {}
    if not isinstance(g, torch.Tensor):
        return {"g_token": g}  # which the op refuses
    names = {1: "g_head", token_dims: "g_token", token_dims + 1: "g_channel"}
    if g.dim() not in names:
        raise value_error(op, "g", shapes, shape(g))
    return {names[g.dim()]: g}


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    bidirectional: bool = False,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Linear attention whose state decays from token to token: retention, Mamba-2's SSD, GLA.

    For every sequence and head, from S = initial_state or zeros::

        S_t = diag(e^{g_t}) S_{t-1} + k_t^T v_t        [K, V]
        out_t = scale * q_t S_t

    A token's gate decays what came before it, never its own k_t^T v_t. With ``reverse`` the sequence is walked from its
    end: S_t = diag(e^{g_t}) S_{t+1} + k_t^T v_t. With ``bidirectional`` the outputs of both directions are summed and
    the own token counts once: ``out = forward + reverse - scale * (q_t . k_t) v_t``.

    Args:
        q, k: queries and keys [B, L, H, K]: batch, tokens, heads, head dim.
        v: values [B, L, H, V]. K and V between 1 and 256. All three float32, bfloat16 or float16 (one dtype), any
            strides with a last stride of 1.
        g: gates, natural logarithms of decays, at most 0: [H], one for each head (RetNet, ViR: log(1 - 2^(-5-h)));
            [B, L, H], for each token as well (Mamba-2, simple GLA); or [B, L, H, K], for each channel too (GLA), with a
            last stride of 1. None: 0, no decay. float32, bfloat16 or float16, not necessarily the dtype of q. From 0 to
            -20 a token and beyond, -inf too, results are as accurate as those of the recurrence. Positive gates are not
            refused; their sums overflow from 88 on.
        initial_state: [N, H, K, V], float32, what S starts from; not with ``bidirectional``. N is B without cu_seqlens.
            A sequence may be cut into calls: each starts from the state that the last one returned.
        cu_seqlens: [N + 1], int32 or int64: sequence n holds the tokens from ``cu_seqlens[n]`` to
            ``cu_seqlens[n+1] - 1`` of a batch of one; from 0 to L, never falling. On a GPU the values are not checked
            (that would wait for the device); offsets outside are cut, and tokens beyond the last one give 0.
        scale: a finite number; ``K**-0.5`` if not given. Does not act on S.
        reverse: walk from the last token to the first.
        bidirectional: sum both directions; not together with ``reverse``.
        return_state: return the last S as well; not with ``bidirectional``, whose two states have no use.

    Returns:
        ``out`` [B, L, H, V] in the dtype of q; with ``return_state`` also the state after the last token walked,
        [N, H, K, V], float32. Differentiable in q, k, v, g and initial_state.

    Computed chunk by chunk with matrix products, in float32. No exponential of a positive number is taken.
    Deterministic; results do not depend on the number of threads. Under autocast q, k and v are cast, g and the state
    are not.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.

    Sources: RetNet (arXiv:2307.08621), ViR (2310.19731), GLA (2312.06635), Mamba-2 (2405.21060).
    """
    name = OP.name
    gates = gate_of(name, g, 3, "[H], [B, L, H] or [B, L, H, K]")
    for option, x in (("reverse", reverse), ("bidirectional", bidirectional), ("return_state", return_state)):
        as_bool(name, option, x)
    for option, x in (("reverse", reverse), ("return_state", return_state)):
        if bidirectional and x:
            raise value_error(name, option, "False when bidirectional is True", x)
    if isinstance(cu_seqlens, torch.Tensor) and cu_seqlens.dtype == torch.int64:
        if cu_seqlens.dim() == 1 and cu_seqlens.shape[0] and isinstance(q, torch.Tensor) and q.dim() == 4:
            _check_offsets(name, cu_seqlens, q.shape[1])  # before they are cut to 32 bits
        cu_seqlens = cu_seqlens.clamp(0, 2**31 - 1).to(torch.int32)
    if scale is None:
        scale = default_scale(q)
    direction = _BOTH if bidirectional else int(reverse)
    tensors = (q, k, v, *(gates.get(n) for n in GATES), cu_seqlens, initial_state)
    out, state = OP(*tensors, scale=scale, direction=direction)
    return (out, state) if return_state else out


def default_scale(q: object) -> float:
    """K**-0.5; of what the op refuses, anything."""
    is_dense = isinstance(q, torch.Tensor) and not q.is_nested and q.dim() > 0 and q.shape[-1] != 0
    return float(q.shape[-1]) ** -0.5 if is_dense else 1.0
