"""What a layer's roundings do to a model's result: relevance, and second derivatives of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ._calibrate import evaluating
from ._progress import progress
from .ops import _checks


def relevance(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable, bar: bool = False
) -> dict[str, float]:
    """{name: share of the relevance that passes through the layer's input}, of the largest logits; they sum to 1.

    Layer-wise relevance propagation by the epsilon rule, as gradient times input, which it equals for layers that are
    linear or ReLU; LayerNorm, softmax and GELU are taken for linear at what they see. A layer's score is the sum of
    the absolute relevances of its inputs, so that relevances of both signs do not cancel.
    """
    scores, found = dict.fromkeys(layers, 0.0), []

    def watch(name):
        def before(module, args):
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()  # the model's own input
            found.append((name, x))
            return (x, *args[1:])

        return before

    def each(grads):
        for (name, x), g in zip(found, grads, strict=True):
            scores[name] += 0.0 if g is None else float((g.double() * x.detach().double()).abs().sum())

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in layers.items()]
    _differentiate(model, batches, lambda y: y.amax(1).sum(), found, each, handles, "relevance", bar)
    total = sum(scores.values())
    return {name: x / total if total else 1 / len(scores) for name, x in scores.items()}


def hessian(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable, bar: bool = False
) -> dict[str, torch.Tensor]:
    """{name: [out] float64}: the diagonal of the loss's second derivatives by the layer's outputs, of a token.

    The loss is the cross-entropy with the model's own predictions, and the squares of its first derivatives stand for
    its second ones (Fisher), as in Q-HyViT (arXiv:2303.12557) and the calibrations before it.
    """
    sums, counts, found = {}, dict.fromkeys(layers, 0), []

    def watch(name):
        def after(module, args, y):
            y = y if y.requires_grad else y.detach().requires_grad_()
            found.append((name, y))
            return y

        return after

    def each(grads):
        for (name, y), g in zip(found, grads, strict=True):
            squares = y.new_zeros(y.shape[-1]) if g is None else g.detach().double().flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, 0.0) + squares.double()
            counts[name] += y[..., 0].numel()

    handles = [m.register_forward_hook(watch(name)) for name, m in layers.items()]

    def loss(y):
        return F.cross_entropy(y, y.detach().argmax(1), reduction="sum")

    _differentiate(model, batches, loss, found, each, handles, "second derivatives", bar)
    return {name: x / max(counts[name], 1) for name, x in sums.items()}


def _differentiate(
    model: nn.Module,
    batches: Iterable,
    loss: Callable,
    found: list,
    each: Callable,
    handles: list,
    what: str,
    bar: bool,
) -> None:
    """Calls each(gradients of the loss by the tensors of `found`), batch by batch; removes the hooks that fill it."""
    try:
        with evaluating(model):
            for batch in progress(batches, what, enabled=bar):
                found.clear()
                with torch.enable_grad():
                    y = _output(model, batch)
                    if not isinstance(y, torch.Tensor) or y.dim() != 2:
                        given = _checks.shape(y) if isinstance(y, torch.Tensor) else type(y).__name__
                        raise _checks.value_error(
                            "calibrate_ptq", "model", "a classifier that returns logits [B, classes]", given
                        )
                    inputs = [x for _, x in found]
                    each(torch.autograd.grad(loss(y), inputs, allow_unused=True) if inputs else ())
    finally:
        for handle in handles:
            handle.remove()


def _output(model, batch):
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
