"""dwconv: the declaration and the public function."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..reference.dwconv import dwconv as _definition
from ..reference.dwconv_glu import ACTIVATIONS
from ._checks import as_bool, as_pair, check_tensor, index_of, is_int, shape, type_error, value_error
from ._op import op

NAMES = tuple(ACTIVATIONS)  # the schema's int is an index into these
_MOST = 2**24  # of padding, and of the side of a window


def _derive(op, dims, options, tensors):
    before, after, dilation, window = (options[n] for n in ("before", "after", "dilation", "window"))
    x, (kh, kw) = tensors["x"], (dims["kh"], dims["kw"])
    if kh < 1 or kw < 1:
        expected = "[C, kh, kw] with at least one row and column"
        raise value_error(op, "weight", expected, shape(tensors["weight"]))
    reach = [d * (k - 1) for d, k in zip(dilation, (kh, kw), strict=True)]
    grown = [b + a - r for b, a, r in zip(before, after, reach, strict=True)]
    if window != [0, 0]:
        if 0 in window or dims["H"] % window[0] or dims["W"] % window[1]:
            raise value_error(op, "window", f"[0, 0], or divide the map of {shape(x)}", window)
        if grown != [0, 0]:
            raise value_error(op, "after", f"such that windows keep their size: before + after = {reach}", after)
    dims["P"], dims["Q"] = dims["H"] + grown[0], dims["W"] + grown[1]
    if dims["P"] < 0 or dims["Q"] < 0:
        least = [max(0, -g) for g in grown]
        raise value_error(op, "x", f"[B, H, W, C] with H and W of at least {least[0]} and {least[1]}", shape(x))
    if tensors["state"] is not None and (kh != 1 or before[0] or after[0] or window != [0, 0]):
        expected = "None where weight has more than one row, and with padding of rows or windows"
        given = tensors["state"]
        raise value_error(op, "state", expected, shape(given) if isinstance(given, torch.Tensor) else type(given))


def _flops(dims, options):
    """A multiply-add counts 2, an activation and a gate 1 each; backward: three stencils, and the derivatives."""
    elements = dims["B"] * dims["P"] * dims["Q"] * dims["C"]
    stencil = 2 * dims["kh"] * dims["kw"]
    return elements * (stencil + 3), elements * (3 * stencil + 7)


OP = op(
    "dwconv",
    """x: B H W C, weight: C kh kw | float packed, bias?: C | float packed, pregate?: B H W C, postgate?: B P Q C,
    state?: B H px C -> out: B P Q C""",
    """before: int[2](py, px) in 0..16777216 = 0, after: int[2](qy, qx) in 0..16777216 = 0,
    dilation: int[2](dy, dx) in 1..32768 = 1, window: int[2](wh, ww) in 0..16777216 = 0, act: int in 0..5 = 5""",
    reference=lambda x, weight, bias, pregate, postgate, state, act, **options: _definition(
        x, weight, bias, pregate, postgate, state, act=NAMES[act], **options
    ),
    derive=_derive,
    empty="B P Q C",
    shards=("B", "C"),
    shape_options=("before", "after", "dilation"),
    flops=_flops,
)


def _padding(padding, weight, reach, flat):
    """(before, after) of "same", "valid" or numbers."""
    name = OP.name
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise value_error(name, "padding", "'same', 'valid', an int or 2 integers", repr(padding))
        before = [r // 2 if padding == "same" else 0 for r in reach]
        return before, [r - b if padding == "same" else 0 for r, b in zip(reach, before, strict=True)]
    if flat and not is_int(padding):
        raise type_error(name, "padding", "'same', 'valid' or an int", repr(padding))
    before = as_pair(name, "padding", padding, (0, _MOST))
    before = [0, before[1]] if flat else before
    return before, before


def dwconv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pregate: torch.Tensor | None = None,
    postgate: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    padding: str | int | Sequence[int] = "same",
    causal: bool = False,
    dilation: int | Sequence[int] = 1,
    act: str = "none",
    window: int | Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution of sequences or maps, channels last: ``postgate * act(conv(x * pregate) + bias)``.

    Every channel has a filter of its own, of any size; stride 1. As ``torch.nn.Conv1d`` and ``Conv2d`` with ``groups``
    = C, a cross-correlation. The backward reads the inputs, computes the convolution a second time where an activation
    or a gate needs it, and keeps nothing.

    Args:
        x: [B, L, C] or [B, H, W, C], float32, bfloat16 or float16, any strides with a last stride of 1.
        weight: [C, k] or [C, 1, k] for a sequence, [C, kh, kw] or [C, 1, kh, kw] for a map, as ``torch.nn.Conv1d`` and
            ``Conv2d`` have it; any size, even ones too; one of these dtypes, any strides.
        bias: [C] in one of these dtypes, or None.
        pregate: of the shape and dtype of x: x is multiplied with it first (Hyena's short filters).
        postgate: of the shape of the result and the dtype of x: the result is multiplied with it.
        state: [B, (k - 1) * dilation, C], in the dtype of x, of a causal convolution: what comes before the sequence,
            times its pregate, in the place of zeros. ([B, H, (kw - 1) * dilation, C] for the rows of a map.)
        padding: zeros around x. "same": the result has the size of x; where the zeros are odd in number, one more of
            them is at the end, as in PyTorch. "valid": none. An int, or for maps two: so many on each side.
        causal: all zeros (or `state`) come before the sequence. For a map, of whose rows the same holds, weight has
            one row. padding must be "same".
        dilation: distance of taps, an int, or for maps two.
        act: "none", "gelu" (the exact one), "silu", "relu", "sigmoid" or "tanh".
        window: an int, or for maps two: x is a grid of windows of this size, which are convolved one by one, with zeros
            around each (the LePE of CSWin, arXiv:2107.00652). It divides the map; padding must be "same".

    Returns:
        [B, L', C] or [B, H', W', C] in the dtype of x, contiguous; differentiable in every tensor. Gradients of weight
        and bias have their dtypes. With `state` (out, new_state): new_state is what the next part of the sequence
        takes. Computed in float32. Deterministic; results do not depend on the number of threads. Under autocast maps
        are cast, weights are read in their own dtype.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; another one has a wrong type.
        ValueError: a shape, stride, device or option is outside the above. The message names the argument; shapes of
            sequences appear in it as those of maps of one row.
    """
    name = OP.name
    maps = {"pregate": pregate, "postgate": postgate, "state": state}
    for label, t in {"x": x, "weight": weight, "bias": bias, **maps}.items():
        if t is not None or label in ("x", "weight"):
            check_tensor(name, label, t)
    if x.dim() not in (3, 4):
        raise value_error(name, "x", "[B, L, C] or [B, H, W, C]", shape(x))
    flat = x.dim() == 3
    if weight.dim() == x.dim() and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if weight.dim() != x.dim() - 1:
        expected = "[C, k] or [C, 1, k]" if flat else "[C, kh, kw] or [C, 1, kh, kw]"
        raise value_error(name, "weight", f"{expected} like x {shape(x)}", shape(weight))
    if flat:
        for label, t in maps.items():
            if t is not None and t.dim() != 3:
                raise value_error(name, label, f"of 3 dims like x {shape(x)}", shape(t))
        x, weight = x.unsqueeze(1), weight.unsqueeze(1)
        pregate, postgate, state = (None if t is None else t.unsqueeze(1) for t in maps.values())
        if not is_int(dilation):
            raise type_error(name, "dilation", "an int", repr(dilation))
        if window is not None and not is_int(window):
            raise type_error(name, "window", "an int or None", repr(window))
    dilation = as_pair(name, "dilation", dilation, (1, 32768))
    dilation = [1, dilation[1]] if flat else dilation
    windows = [0, 0] if window is None else as_pair(name, "window", window, (1, _MOST))
    windows = [1, windows[1]] if flat and window is not None else windows
    reach = [d * max(k - 1, 0) for d, k in zip(dilation, weight.shape[1:], strict=True)]
    if as_bool(name, "causal", causal):
        if weight.shape[1] > 1:
            raise value_error(name, "weight", "[C, 1, kw], of one row, where causal is given", shape(weight))
        if padding != "same":
            raise value_error(name, "padding", "'same' where causal is given", repr(padding))
        before, after = [0, reach[1]], [0, 0]
    else:
        if state is not None:
            raise value_error(name, "state", "None unless causal is given", type(state).__name__)
        before, after = _padding(padding, weight, reach, flat)
    out = OP(
        x, weight, bias, pregate, postgate, state, before=before, after=after, dilation=dilation, window=windows,
        act=index_of(name, "act", act, NAMES),
    )  # fmt: skip
    if state is None:
        return out.squeeze(1) if flat else out
    length = reach[1]
    tail = x[:, :, max(x.shape[2] - length, 0) :]
    if pregate is not None:
        tail = tail * pregate[:, :, max(x.shape[2] - length, 0) :]
    new_state = torch.cat((state[:, :, tail.shape[2] :], tail), 2)
    return (out.squeeze(1), new_state.squeeze(1)) if flat else (out, new_state)
