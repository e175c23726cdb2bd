"""effvit.sparsify_(model): 2:4 masks on linear layers, to train through, reversibly; what is trained stays dense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

import effvit.ops

from ._report import class_name
from .ops import _checks

DECAYS = ("none", "linear", "exponential")
LAST = 1e-3  # what an exponential decay has come to in its last step, when it becomes 0


class Sparse24Mask(nn.Module):
    """The parametrisation of a weight [N, K]: two of every four entries along K, by :func:`effvit.ops.sparse24_prune`.

    The mask is found in every call, by `algorithm`. The gradient goes straight through to all weights, and pulls those
    that are masked towards 0 by `strength` (SR-STE, arXiv:2102.04010). While `decay` is above 0, masked weights count
    by that factor (progressive gradient flow, arXiv:2402.04744).
    """

    def __init__(self, algorithm="magnitude", strength=2e-4, decay=0.0):
        super().__init__()
        self.algorithm = algorithm
        self.strength = strength
        self.decay = decay

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return effvit.ops.sparse24_prune(
            weight, algorithm=self.algorithm, strength=self.strength, decay=self.decay
        )  # fmt: skip

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def extra_repr(self):
        return f"algorithm={self.algorithm}, strength={self.strength}, decay={self.decay}"


def is_sparsified(module: nn.Module) -> bool:
    """Whether `sparsify_` has masked this linear layer, and nothing else has parametrised it."""
    if not isinstance(module, nn.Linear) or not parametrize.is_parametrized(module):
        return False
    masks = module.parametrizations
    return set(masks) == {"weight"} and [type(m) for m in masks.weight] == [Sparse24Mask]


@dataclasses.dataclass
class Sparsity:
    """What `effvit.sparsify_` did, and its schedule: a row for every linear layer, `step()` after every optimizer step.

    `decay` is the factor by which masked weights still count.
    """

    report: object
    masks: list[Sparse24Mask]
    schedule: str = "none"
    steps: int = 0
    done: int = 0

    @property
    def decay(self) -> float:
        if self.schedule == "none" or self.done >= self.steps:
            return 0.0
        left = 1 - self.done / self.steps
        return left if self.schedule == "linear" else math.exp(math.log(LAST) * (1 - left))

    def step(self) -> float:
        """One step further; returns the decay that now holds. Without a schedule nothing changes."""
        self.done += 1
        for mask in self.masks:
            mask.decay = self.decay
        return self.decay

    def __iter__(self):
        return iter(self.report)

    def __len__(self):
        return len(self.report)

    def __str__(self):
        return str(self.report)


def sparsify_(
    model: nn.Module,
    algorithm: str = "magnitude",
    *,
    strength: float = 2e-4,
    decay: str = "none",
    steps: int = 0,
    skip: Sequence[str] | None = None,
    verbose: bool = True,
) -> Sparsity:
    """Put 2:4 masks on the linear layers of `model`, in place, for training; `effvit.unsparsify_` takes them off.

    Each weight becomes a parametrisation (torch.nn.utils.parametrize): the dense parameter stays the same object, so
    an optimizer made before or after trains it, and `weight` is what the mask leaves. Then `effvit.quantize_` with kind
    "sparse24_int8" makes int8 layers of the model, or `Sparse24Linear.from_linear` 16-bit ones of its layers.

    Args:
        algorithm: "magnitude": the two largest of every four; "transposable": a mask that is 2:4 along both dims, for
            a sparse backward as well.
        strength: SR-STE's lambda, what pulls masked weights towards 0; 0 is the plain straight-through gradient.
        decay: "none": masked weights are 0 at once; "linear" or "exponential": their factor falls from 1 to 0 within
            `steps` calls of `step()` of what is returned.
        skip: patterns of names to leave alone (fnmatch); None: those of `QuantizeConfig`.
        verbose: print the report.

    Returns:
        A Sparsity: the report, with the error of each weight, and `step()`.
    """
    from .quantize import QuantizeConfig, Report, Row, _check_model, relative, scan, size_of

    _check_model("sparsify_", model)
    _checks.index_of("sparsify_", "algorithm", algorithm, ("magnitude", "transposable"))
    _checks.index_of("sparsify_", "decay", decay, DECAYS)
    if _checks.as_finite("sparsify_", "strength", strength) < 0:
        raise _checks.value_error("sparsify_", "strength", "at least 0", strength)
    if (decay != "none") != (_checks.as_int("sparsify_", "steps", steps, None) > 0):
        expected = "positive with a decay" if decay != "none" else "0 without a decay"
        raise _checks.value_error("sparsify_", "steps", expected, steps)

    def reason_not(module):
        if is_sparsified(module):
            return "already sparse"
        if module.in_features % 4:
            return f"in_features {module.in_features} is no multiple of 4"
        if algorithm == "transposable" and module.out_features % 4:
            return f"out_features {module.out_features} is no multiple of 4, for a transposable mask"
        return None

    chosen, rows = scan(model, QuantizeConfig().skip if skip is None else skip, reason_not)
    if not chosen and not any("already" in r.detail for r in rows):
        raise ValueError(
            f"effvit.sparsify_: model must contain a Linear to sparsify, got {class_name(model)} with "
            f"{Report(rows, 'not sparse') if rows else 'no Linear'}"
        )
    masks, changed = [], []
    first = 1.0 if decay != "none" else 0.0
    for name, module in chosen.items():
        with torch.no_grad():
            weight = module.weight.detach()
            kept = weight * effvit.ops.sparse24_mask(weight, algorithm=algorithm)
        size = size_of(module)
        values, meta = weight.numel() // 2 * weight.element_size(), weight.numel() // 8
        after = size - weight.numel() * weight.element_size() + values + meta  # once it is stored as 2:4
        detail = f"2:4 {algorithm}" + (f", {decay} decay in {steps} steps" if steps else "")
        changed.append(Row(name, class_name(module), True, detail, relative(kept, weight), None, size, after))
        masks.append(Sparse24Mask(algorithm, strength, first))
        parametrize.register_parametrization(module, "weight", masks[-1])
    result = Sparsity(Report(changed + rows, "not sparse"), masks, decay, steps)
    if verbose:
        print(result)
    return result


def unsparsify_(model: nn.Module, keep_zeros: bool = False, verbose: bool = True) -> list[str]:
    """Take off the masks of `effvit.sparsify_`, in place: classes, parameters and their order are what they were.

    Args:
        keep_zeros: write the masked weights into the parameters, which are then 2:4 and dense in memory.

    Returns the names of the restored modules, none if there were none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"effvit.unsparsify_: model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: m for name, m in model.named_modules() if is_sparsified(m)}
    for module in found.values():
        if keep_zeros:
            with torch.no_grad():
                masked = module.weight.detach().clone()
                module.parametrizations.weight.original.copy_(masked)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        if "bias" in module._parameters:  # the weight has come back behind it
            module._parameters["bias"] = module._parameters.pop("bias")
    if verbose and not found:
        print(f"effvit.unsparsify_: nothing to undo, {class_name(model)} is not sparse")
    return list(found)
