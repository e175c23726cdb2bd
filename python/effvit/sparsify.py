"""effvit.sparsify_(model): 2:4 or block masks on linear layers, to train through, reversibly; parameters stay dense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import block_sparse
from ._report import class_name
from .layers import _ops
from .ops import _checks

PATTERNS = ("2:4", "block")
SCORES = ("magnitude", "second_order")
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
        return _ops.sparse24_prune(
            weight, algorithm=self.algorithm, strength=self.strength, decay=self.decay
        )  # fmt: skip

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def extra_repr(self):
        return f"algorithm={self.algorithm}, strength={self.strength}, decay={self.decay}"


class BlockMask(nn.Module):
    """The parametrisation of a weight [N, K]: some of its blocks, chosen once; `blocks` is bool [N / B, K / B].

    The gradient of the others is 0. While `decay` is above 0, they count by that factor.
    """

    def __init__(self, blocks: torch.Tensor, block: int, decay: float = 0.0):
        super().__init__()
        self.block = block
        self.decay = decay
        self.register_buffer("blocks", blocks)

    def entries(self) -> torch.Tensor:
        """The mask of the weight: bool [N, K]."""
        return self.blocks.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.where(self.entries(), weight, weight * self.decay if self.decay else 0.0)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def extra_repr(self):
        return f"block={self.block}, {list(self.blocks.shape)}, decay={self.decay}"


def mask_of(module: nn.Module) -> Sparse24Mask | BlockMask | None:
    """The mask that `sparsify_` has put on this linear layer, if nothing else has parametrised it."""
    if not isinstance(module, nn.Linear) or not parametrize.is_parametrized(module):
        return None
    masks = module.parametrizations
    if set(masks) != {"weight"} or [type(m) for m in masks.weight] not in ([Sparse24Mask], [BlockMask]):
        return None
    return masks.weight[0]


def is_sparsified(module: nn.Module) -> bool:
    """Whether `sparsify_` has masked this linear layer, and nothing else has parametrised it."""
    return mask_of(module) is not None


# ---- which blocks ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def block_scores(weight: torch.Tensor, block: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """What leaving out each block alone costs, as a share of the whole: float64 [N / B, K / B].

    Without tokens the squares of the weights. With tokens x [*, K] the squared change of the layer's output on them,
    w H wᵀ summed over the rows of the block, where H = xᵀ x of the block's inputs: the second-order term of a Taylor
    expansion of the layer's squared error, whose first-order term is 0 (arXiv:2407.02068).
    """
    blocks = block_sparse._blocks(weight.detach().double(), block)
    if tokens is None:
        scores = blocks.square().sum((-1, -2))
    else:
        x = tokens.double().unflatten(-1, (-1, block)).transpose(0, 1)  # [K / B, *, B]
        hessian = x.mT @ x / max(len(tokens), 1)
        scores = ((blocks @ hessian) * blocks).sum((-1, -2))
    scores = torch.where(scores.isnan(), torch.inf, scores)
    whole = scores.sum()
    return scores / whole if 0 < whole < torch.inf else scores


def choose_blocks(
    scores: Mapping[str, torch.Tensor], density: Mapping[str, float], budget: float | None
) -> dict[str, torch.Tensor]:
    """{layer: bool [N / B, K / B]}: of each layer its share, or of all of them together that of the budget.

    The largest scores stay, of equal ones the first; within a budget every layer keeps one block at least.
    """
    groups = [(dict(scores), budget)] if budget is not None else [({n: s}, density[n]) for n, s in scores.items()]
    kept = {}
    for group, share in groups:
        flat = [s.flatten().clone() for s in group.values()]
        if budget is not None:
            for s in flat:
                if len(s):
                    s[s.argmax()] = torch.inf
        together = torch.cat([s.cpu() for s in flat]) if flat else torch.zeros(0)
        order = together.sort(descending=True, stable=True).indices[: round(share * len(together))]
        mask = torch.zeros(len(together), dtype=torch.bool).index_fill_(0, order, True)
        parts = mask.split([len(s) for s in flat])
        for (name, s), part in zip(group.items(), parts, strict=True):
            kept[name] = part.view(s.shape).to(s.device)
    return kept


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
    pattern: str = "2:4",
    strength: float = 2e-4,
    decay: str = "none",
    steps: int = 0,
    block: int = 16,
    density: float = 0.5,
    densities: Mapping[str, float] | None = None,
    spread: str = "layer",
    score: str = "magnitude",
    calibration: Iterable | None = None,
    batches: int | None = None,
    skip: Sequence[str] | None = None,
    progress: bool = True,
    verbose: bool = True,
) -> Sparsity:
    """Put masks on the linear layers of `model`, in place, for training; `effvit.unsparsify_` takes them off.

    Each weight becomes a parametrisation (torch.nn.utils.parametrize): the dense parameter stays the same object, so
    an optimizer made before or after trains it, and `weight` is what the mask leaves. Then `effvit.quantize_` with kind
    "sparse24_int8" makes int8 layers of the model, or `Sparse24Linear.from_linear` 16-bit ones of its layers. Of blocks
    kinds "block_sparse_int8" and "block_sparse" do, the latter in floating point.

    Args:
        algorithm: of pattern "2:4": "magnitude": the two largest of every four; "transposable": a mask that is 2:4
            along both dims, for a sparse backward as well.
        pattern: "2:4", found anew in every call; or "block" (LPViT, arXiv:2407.02068): some blocks of each weight,
            chosen once.
        strength: of "2:4", SR-STE's lambda, what pulls masked weights towards 0; 0 is the plain straight-through
            gradient.
        decay: "none": masked weights are 0 at once; "linear" or "exponential": their factor falls from 1 to 0 within
            `steps` calls of `step()` of what is returned.
        block: of pattern "block", 16 or 32: blocks of 16 x 16 or 32 x 32.
        density: the share of blocks to keep, between 0 and 1; densities: {pattern of names: share} for layers that
            match, the first one counts.
        spread: "layer": that share of every layer; "global": of all blocks of the model, where they matter most to
            their layer, and in each layer one at least; densities must then be left out.
        score: what a block is worth: "magnitude", its norm; or "second_order", what leaving it out changes in the
            layer's output on the calibration data.
        calibration: of score "second_order", batches as of `QuantizeConfig`; batches: how many of them to use.
        skip: patterns of names to leave alone (fnmatch); None: those of `QuantizeConfig`.
        progress: show a bar for calibration. verbose: print the report.

    Returns:
        A Sparsity: the report, with the error of each weight, and `step()`.
    """
    from ._calibrate import calibrate
    from .layers.block_sparse import reason_not as block_reason
    from .quantize import QuantizeConfig, Report, Row, _check_model, matching, relative, scan, size_of

    _check_model("sparsify_", model)
    _checks.index_of("sparsify_", "algorithm", algorithm, ("magnitude", "transposable"))
    _checks.index_of("sparsify_", "decay", decay, DECAYS)
    if _checks.as_finite("sparsify_", "strength", strength) < 0:
        raise _checks.value_error("sparsify_", "strength", "at least 0", strength)
    if (decay != "none") != (_checks.as_int("sparsify_", "steps", steps, None) > 0):
        expected = "positive with a decay" if decay != "none" else "0 without a decay"
        raise _checks.value_error("sparsify_", "steps", expected, steps)
    _checks.index_of("sparsify_", "pattern", pattern, PATTERNS)
    blocks = pattern == "block"
    _check_blocks(block, {"density": density, **(densities or {})}, densities, spread, score, calibration, blocks)

    def reason_not(module):
        if is_sparsified(module):
            return "already sparse"
        if blocks:
            return block_reason(module.in_features, module.out_features, block)
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
    seen = {}
    if blocks:
        if score == "second_order":
            seen = calibrate(model, chosen, calibration, batches, progress)
            for name in [n for n in chosen if not seen[n].batches]:
                module = chosen.pop(name)
                rows.append(Row(name, class_name(module), False, "never called on the calibration data"))
        scores = {n: block_scores(m.weight, block, seen[n].tokens if seen else None) for n, m in chosen.items()}
        shares = {n: (densities or {}).get(matching(n, densities or ()), density) for n in chosen}
        kept_blocks = choose_blocks(scores, shares, density if spread == "global" else None)
    masks, changed = [], []
    first = 1.0 if decay != "none" else 0.0
    for name, module in chosen.items():
        weight, size = module.weight.detach(), size_of(module)
        if blocks:
            mask = BlockMask(kept_blocks[name], block, first)
            there, count = mask.entries(), int(mask.blocks.sum())
            values, meta = count * block**2 * weight.element_size(), 4 * (count + len(mask.blocks) + 1)
            detail = f"{count} of {mask.blocks.numel()} blocks of {block} x {block}, {score}"
        else:
            mask = Sparse24Mask(algorithm, strength, first)
            there = _ops.sparse24_mask(weight, algorithm=algorithm)
            values, meta = weight.numel() // 2 * weight.element_size(), weight.numel() // 8
            detail = f"2:4 {algorithm}"
        kept = weight * there
        after = size - weight.numel() * weight.element_size() + values + meta  # once it is stored as sparse
        detail += f", {decay} decay in {steps} steps" if steps else ""
        errors = relative(kept, weight), _output_error(module, kept, seen.get(name))
        changed.append(Row(name, class_name(module), True, detail, *errors, size, after))
        masks.append(mask)
        parametrize.register_parametrization(module, "weight", mask)
    result = Sparsity(Report(changed + rows, "not sparse"), masks, decay, steps)
    if verbose:
        print(result)
    return result


@torch.no_grad()
def _output_error(module, kept, seen) -> float | None:
    """Of the product alone, on the calibration data."""
    from .quantize import relative

    if seen is None:
        return None
    x = seen.tokens
    return relative(torch.nn.functional.linear(x, kept), torch.nn.functional.linear(x, module.weight))


def _check_blocks(block, shares, densities, spread, score, calibration, blocks) -> None:
    error = _checks.value_error
    if not _checks.is_int(block) or block not in block_sparse.BLOCKS:
        raise error("sparsify_", "block", "16 or 32", block)
    for name, share in shares.items():
        shown = name if name == "density" else f"densities[{name!r}]"
        if not 0 <= _checks.as_finite("sparsify_", shown, share) <= 1:
            raise error("sparsify_", shown, "between 0 and 1", share)
    _checks.index_of("sparsify_", "spread", spread, ("layer", "global"))
    _checks.index_of("sparsify_", "score", score, SCORES)
    if spread == "global" and densities:
        raise error("sparsify_", "densities", "left out where spread is global", densities)
    if (score == "second_order") != (calibration is not None):
        expected = "batches of data for score second_order" if calibration is None else "None for score magnitude"
        raise error("sparsify_", "calibration", expected, None if calibration is None else "data")
    asked = {
        "block": block != 16,
        "densities": bool(densities),
        "spread": spread != "layer",
        "score": score != SCORES[0],
    }
    if not blocks and any(asked.values()):
        name = next(n for n, x in asked.items() if x)
        raise error("sparsify_", name, "left out where the pattern is 2:4", "given")


def unsparsify_(model: nn.Module, keep_zeros: bool = False, verbose: bool = True) -> list[str]:
    """Take off the masks of `effvit.sparsify_`, in place: classes, parameters and their order are what they were.

    Args:
        keep_zeros: write the masked weights into the parameters, which are then sparse, and dense in memory.

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
