"""dwconv_glu: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.dwconv_glu import ACTIVATIONS
from ..reference.dwconv_glu import dwconv_glu as _definition
from ._checks import check_tensor, index_of, shape, value_error
from ._op import op

NAMES = tuple(ACTIVATIONS)  # the schema's int is an index into these
_SIZE = "be [C, k, k] with an odd k from 3 to 7"


def _derive(op, dims, options, tensors):
    x, v, channels = tensors["x"], tensors["v"], dims["C"]
    if dims["k"] % 2 == 0:
        raise ValueError(f"effvit::{op}: weight must {_SIZE}, got {shape(tensors['weight'])}")
    if v is None:
        dims["G"] = dims["D"] - channels
        if not 0 <= dims["G"] <= channels:
            expected = f"[B, H, W, C + G] with C = {channels} and at most as many gates when v is not given"
            raise value_error(op, "x", expected, shape(x))
    else:
        if dims["D"] != channels:
            raise value_error(op, "x", f"[B, H, W, C] with the {channels} channels of weight", shape(x))
        check_tensor(op, "v", v)
        dims["G"] = v.shape[3] if v.dim() == 4 else 0
        if dims["G"] > channels:
            raise value_error(op, "v", f"[B, H, W, G] with at most {channels} channels", shape(v))


def _flops(dims, options):
    """A multiply-add counts 2, an activation and a gate 1 each; backward: three stencils, and as glu."""
    elements = dims["B"] * dims["H"] * dims["W"] * dims["C"]
    stencil = 2 * dims["k"] ** 2
    return elements * (stencil + 2), elements * (3 * stencil + 6)


OP = op(
    "dwconv_glu",
    "x: B H W D, v?: B H W G, weight: C k k | float packed, bias?: C | float packed -> out: B H W C",
    "act: int in 0..5 = 1, gate_first: bool = False",
    reference=lambda x, v, weight, bias, act, gate_first: _definition(
        x, v, weight, bias, act=NAMES[act], gate_first=gate_first
    ),
    limits={"weight.k": (3, 7, _SIZE)},
    derive=_derive,
    empty="B H W C",
    shards=("B",),
    flops=_flops,
)


def dwconv_glu(
    x: torch.Tensor,
    v: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str = "gelu",
    gate_first: bool = False,
) -> torch.Tensor:
    """Gated depthwise convolution, ``act(conv(x) + bias) * v``, channels last, in one pass.

    TransNeXt's ConvGLU (arXiv:2311.17132) with act="gelu"; HorNet's recursive gated convolution (arXiv:2207.14284) with
    act="none". The backward reads x, v and the weights, computes the convolution a second time, and keeps nothing.

    Args:
        x: [B, H, W, C], what is convolved; k x k, stride 1, zeros around the map, which keeps its size.
        v: [B, H, W, G], G <= C: what the first G channels are multiplied with; the others are not. None: x is
            [B, H, W, C + G] and holds both, as one projection writes them: x first, or v with `gate_first`. With G = 0
            it is a depthwise convolution with an activation.
            Both float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        weight: [C, 1, k, k], as ``torch.nn.Conv2d`` has it, or [C, k, k], k odd, from 3 to 7; one of these dtypes,
            any strides.
        bias: [C] in one of these dtypes, or None.
        act: "gelu" (the exact one), "sigmoid", "silu", "relu", "tanh" or "none".
        gate_first: without v, its channels come before those of x.

    Returns:
        [B, H, W, C] in the dtype of x, contiguous; differentiable in x, v, weight and bias. Gradients of weight and
        bias have their dtypes. Computed in float32. Deterministic; results do not depend on the number of threads.
        Under autocast x and v are cast, the weights are read in their own dtype.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; act is not a string.
        ValueError: a shape, stride, device or act is outside the above. The message names the argument.
    """
    if isinstance(weight, torch.Tensor) and weight.dim() == 4 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    return OP(x, v, weight, bias, act=index_of(OP.name, "act", act, NAMES), gate_first=gate_first)
