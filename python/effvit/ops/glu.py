"""glu: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.glu import ACTIVATIONS
from ..reference.glu import glu as _definition
from ._checks import index_of, shape, value_error
from ._op import op

NAMES = tuple(ACTIVATIONS)  # the schema's int is an index into these


def _derive(op, dims, options, tensors):
    b = tensors["b"]
    if b is None and dims["D"] % 2:
        raise value_error(op, "a", "[..., 2*C] when b is not given", shape(tensors["a"]))
    dims["C"] = dims["D"] // (2 if b is None else 1)


def _flops(dims, options):
    elements = torch.Size(dims["..."]).numel() * dims["C"]
    return 2 * elements, 6 * elements  # a product and, counted as one, an activation; backward three of each


OP = op(
    "glu",
    "a: ... D, b?: ... D -> out: ... C",
    "act: int in 0..4 = 0",
    reference=lambda a, b, act: _definition(a, b, act=NAMES[act]),
    derive=_derive,
    empty="... D",
    batch="...",
    shards=("...",),
    flops=_flops,
)


def glu(a: torch.Tensor, b: torch.Tensor | None = None, *, act: str = "sigmoid") -> torch.Tensor:
    """Gated linear unit, ``a * act(b)``, in one pass; the backward reads a and b again and keeps nothing.

    Args:
        a: [..., C]; or, without b, [..., 2*C], which holds a and then b, as ``torch.nn.functional.glu`` takes it.
        b: [..., C], what is activated. Both float32, bfloat16 or float16 (one dtype), any strides with a last stride
            of 1, at least one dim and at most six.
        act: "sigmoid" (GLU), "gelu" (GEGLU, the exact one), "silu" (SwiGLU), "relu" (ReGLU) or "tanh".

    Returns:
        [..., C] in the dtype of a, contiguous; differentiable in a and b. Computed in float32. Deterministic;
        results do not depend on the number of threads. Under autocast a and b are cast.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; act is not a string.
        ValueError: a shape, stride, device or act is outside the above. The message names the argument.

    Sources: Dauphin et al. (arXiv:1612.08083), Shazeer (arXiv:2002.05202).
    """
    return OP(a, b, act=index_of(OP.name, "act", act, NAMES))
