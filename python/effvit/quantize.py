"""effvit.quantize_(model, config): linear layers in int8, 2:4 sparse int8 or LLM.int8(), reversibly, with a report."""

from __future__ import annotations

import collections
import copy
import dataclasses
import fnmatch
import json
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import _quantizable, _quantize_attention
from ._calibrate import Statistics, calibrate
from ._report import Report, Row, class_name
from .adapters import Fused
from .layers.block_sparse import BlockSparseInt8Linear, BlockSparseLinear, reason_not
from .layers.int8 import Int8Linear, OutlierLinear, QATLinear, QuantisedLinear
from .layers.sparse24 import Sparse24Int8Linear, Sparse24Linear
from .ops import _checks
from .ops.block_sparse_linear import BLOCKS

KINDS = ("int8", "sparse24_int8", "block_sparse_int8", "block_sparse", "outlier", "float")
QAT_KINDS = ("int8", "sparse24_int8", "block_sparse_int8")
ORIGINAL = "_effvit_original"  # of a module that stands in for another: (that one,), where it was kept
LAYERS = {
    cls.__name__: cls
    for cls in (BlockSparseInt8Linear, BlockSparseLinear, Int8Linear, OutlierLinear, Sparse24Int8Linear, Sparse24Linear)
}


@dataclasses.dataclass
class QuantizeConfig:
    """What `effvit.quantize_` does.

    Args:
        mode: "dynamic": activations get a scale per token, found in every call; "static": one per layer, from the
            calibration data.
        kind: what linear layers become: "int8", "sparse24_int8", "block_sparse_int8", "block_sparse" (in floating
            point), "outlier" (LLM.int8()), "float" (nothing), or "auto": for each layer the one of `candidates` that
            keeps the errors of the layers small within `budget`.
        layers: {pattern: kind} for layers whose name matches (fnmatch); the first match counts, over `kind`; a
            pattern without a match is an error.
        skip: patterns of names to leave alone, or one pattern.
        smooth: SmoothQuant's alpha, between 0 and 1: how much of the range of the activations moves into the weights.
            The factors go into the LayerNorm before, in timm's ViT, DeiT and Swin blocks, else into the layer; with
            `qat` only in `effvit.convert_`, so that the norms that are trained are the model's own.
        calibration: batches: an input, (input, target, ...) or a mapping of keyword arguments each.
        batches: how many of them to use; None: all.
        fuse: in timm's Mlp, GELU (ReLU, SiLU) becomes part of fc1, whose result goes to a static fc2 as int8.
        threshold: of kind "outlier", the |x| from which a column stays in floating point; with mode "static" the
            columns are those of the calibration data.
        keep_weight: of kind "outlier", multiply these columns with the float weights, which are kept; else with the
            int8 ones.
        algorithm: of kind "sparse24_int8", how to prune: "magnitude" or "transposable".
        block, density: of the block-sparse kinds, the blocks and the share of them to keep, where `effvit.sparsify_`
            has not chosen them.
        budget: of kind "auto", the share of the float layers' size or time that the chosen ones may take.
        budget_of: "size" or "latency".
        candidates: of kind "auto".
        attention: "int8": that of timm's ViT, DeiT and Swin runs on `effvit.int8_attention`, whose scales are found
            in every call; "float" leaves it alone.
        qat: make `QATLinear`s, to be trained, and then turned into int8 layers by `effvit.convert_`.
        keep_original: keep the float layers for `effvit.unquantize_`; False saves their memory.
        progress: show a bar for calibration.
    """

    mode: str = "dynamic"
    kind: str = "int8"
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skip: Sequence[str] = ("head", "head.*", "head_dist", "*patch_embed*", "classifier", "heads.*")
    smooth: float | None = None
    calibration: Iterable | None = None
    batches: int | None = None
    fuse: bool = True
    threshold: float = 6.0
    keep_weight: bool = True
    algorithm: str = "magnitude"
    block: int = 16
    density: float = 0.5
    budget: float | None = None
    budget_of: str = "size"
    candidates: Sequence[str] = ("float", "int8", "sparse24_int8")
    attention: str = "float"
    qat: bool = False
    keep_original: bool = True
    progress: bool = True

    def check(self) -> None:
        def one_of(name, value, choices):
            _checks.index_of("quantize_", name, value, choices)

        _quantizable.check_collections(self.layers, self.candidates)
        one_of("mode", self.mode, ("dynamic", "static"))
        one_of("kind", self.kind, (*KINDS, "auto"))
        for pattern, kind in self.layers.items():
            one_of(f"layers[{pattern!r}]", kind, (*KINDS, "auto"))
        for i, kind in enumerate(self.candidates):
            one_of(f"candidates[{i}]", kind, KINDS)
        one_of("algorithm", self.algorithm, ("magnitude", "transposable"))
        if self.block not in BLOCKS:
            raise _checks.value_error("quantize_", "block", "16 or 32", self.block)
        if not 0 <= _checks.as_finite("quantize_", "density", self.density) <= 1:
            raise _checks.value_error("quantize_", "density", "between 0 and 1", self.density)
        one_of("budget_of", self.budget_of, ("size", "latency"))
        one_of("attention", self.attention, ("float", "int8"))
        if self.smooth is not None and not 0 <= _checks.as_finite("quantize_", "smooth", self.smooth) <= 1:
            raise _checks.value_error("quantize_", "smooth", "between 0 and 1", self.smooth)
        chooses = "auto" in (self.kind, *self.layers.values())
        if chooses != (self.budget is not None):
            expected = "given with kind auto" if chooses else "None without a kind auto"
            raise _checks.value_error("quantize_", "budget", expected, self.budget)
        if chooses and not 0 < _checks.as_finite("quantize_", "budget", self.budget) <= 1:
            raise _checks.value_error("quantize_", "budget", "above 0 and at most 1", self.budget)
        for kind in (self.kind, *self.layers.values()):
            if self.qat and kind in ("outlier", "block_sparse"):
                raise _checks.value_error("quantize_", "kind", f"one of {', '.join(QAT_KINDS)} with qat", kind)
        needs = [
            what
            for what, asked in (("mode static", self.mode == "static"), ("smooth", self.smooth is not None),
                                ("kind auto", chooses))
            if asked
        ]  # fmt: skip
        if needs and self.calibration is None:
            raise _checks.value_error("quantize_", "calibration", f"batches of data, for {needs[0]}", None)


# ---- which layers ----------------------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """An nn.Linear, or one whose weight `effvit.sparsify_` has parametrised."""
    from .sparsify import is_sparsified

    return type(module) is nn.Linear or is_sparsified(module)


def matching(name: str, patterns: Iterable[str]) -> str | None:
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def scan(model: nn.Module, skip: Sequence[str], reason_not) -> tuple[dict[str, nn.Module], list[Row]]:
    """(layers to change by name, rows of linear layers that are left alone); a layer with two names has its first."""
    chosen, rows, inside, skip = {}, [], (), [skip] if isinstance(skip, str) else skip
    read = {m for layer in model.modules() if isinstance(layer, nn.TransformerEncoderLayer)
            for m in (layer.linear1, layer.linear2)}  # fmt: skip
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        kind = class_name(module)
        if isinstance(module, (QuantisedLinear, QATLinear, Sparse24Linear, BlockSparseLinear)):
            rows.append(Row(name, kind, False, "already quantised or sparse"))
            inside = (*inside, f"{name}.")
        elif is_linear(module):
            pattern = matching(name, skip)
            reason = f"skipped by the pattern {pattern!r}" if pattern is not None else _quantizable.not_plain(module)
            reason = reason_not(module) if reason is None else reason
            if module in read:
                reason = "nn.TransformerEncoderLayer reads its weight itself, in evaluation"
            if reason is None:
                chosen[name] = module
            else:
                rows.append(Row(name, kind, False, reason))
        elif parametrize.is_parametrized(module) and isinstance(module, nn.Linear):
            rows.append(Row(name, kind, False, "its parameters are parametrised"))
        elif isinstance(module, nn.Linear):
            rows.append(Row(name, kind, False, "a subclass of Linear, which may compute something else"))
    return chosen, rows


def size_of(module: nn.Module) -> int:
    """Bytes of what its state_dict holds."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def put(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """`other` wherever the model has `module`."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = other


def stand_in(model: nn.Module, module: nn.Module, other: nn.Module, keep: bool = True) -> None:
    """Puts `other` in the place of `module`: its mode, its hooks, and the way back. A tuple hides it from the model."""
    other.training = module.training
    for name, hooks in vars(module).items():
        if "hook" in name and isinstance(hooks, dict) and hooks and "state_dict" not in name:
            vars(other)[name] = hooks
    vars(other)[ORIGINAL] = (module,) if keep else None
    put(model, module, other)


class FusedActivation(nn.Identity):
    """In the place of an activation that is now part of the linear layer before it."""


# ---- SmoothQuant -----------------------------------------------------------------------------------------------------

# {class: (norm, the linear layer that is all that reads it)}
_FOLDS = {
    ("timm.models.vision_transformer", "Block"): (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")),
    ("timm.models.swin_transformer", "SwinTransformerBlock"): (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")),
    ("timm.models.swin_transformer", "PatchMerging"): (("norm", "reduction"),),
    ("effvit.layers.swin_block", "SwinTransformerBlock"): (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")),
}  # fmt: skip
_NORMS = (("torch.nn.modules.normalization", "LayerNorm"), ("timm.layers.norm", "LayerNorm"))


def _key(module):
    cls = type(module)
    cls = cls.original if isinstance(module, Fused) else cls
    return cls.__module__, cls.__qualname__


def places(model: nn.Module) -> collections.Counter:
    """How often each module is a child of another: what has several places is several things at once."""
    return collections.Counter(child for m in model.modules() for child in m._modules.values() if child is not None)


def foldable(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """{linear layer: the LayerNorm whose output it alone reads}."""
    found, count = {}, places(model)
    for module in model.modules():
        for norm, linear in _FOLDS.get(_key(module), ()):
            block, path = module, linear.split(".")
            if len(path) == 2:  # attention or MLP, of which only the known ones read their input once
                block = getattr(module, path[0])
                known = ("Attention", "WindowAttention") if path[0] == "attn" else ("Mlp",)
                library, name = _key(block)[0].split(".")[0], _key(block)[1]
                if library not in ("timm", "effvit") or name not in known or getattr(block, "gate", None) is not None:
                    continue
            before, layer = getattr(module, norm), getattr(block, path[-1], None)
            once = count[before] == count[layer] == 1
            if once and _key(before) in _NORMS and before.weight is not None:
                found[layer] = before
    return found


def smoothing(weight: torch.Tensor, largest: torch.Tensor, alpha: float) -> torch.Tensor:
    """SmoothQuant's factors [K]: what the activations are divided by; 1 for channels that are 0 in x or in W."""
    of_weight = weight.detach().abs().amax(0).float()
    dead = (largest == 0) | (of_weight == 0)
    factors = largest.clamp(min=1e-5) ** alpha / of_weight.clamp(min=1e-5) ** (1 - alpha)
    return torch.where(dead, 1.0, factors.clamp(min=1e-5))


def folded(norm: nn.Module, factors: torch.Tensor) -> nn.Module:
    """A norm whose output is that of `norm` divided by the factors."""
    other = copy.deepcopy(norm)
    vars(other).pop(ORIGINAL, None)
    with torch.no_grad():
        for p in (other.weight, other.bias):
            if p is not None:
                p.div_(factors.to(p.dtype))
    return other


# ---- one layer -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What one layer becomes."""

    name: str
    module: nn.Module
    kind: str
    seen: Statistics | None
    smooth: torch.Tensor | None = None
    norm: nn.Module | None = None  # which takes the factors
    layer: nn.Module | None = None

    def input_scale(self) -> float:
        largest = self.seen.largest if self.smooth is None else self.seen.largest / self.smooth
        return float(largest.max().clamp(min=1e-12)) / 127

    def build(self, config: QuantizeConfig) -> None:
        from .sparsify import BlockMask, mask_of

        static = config.mode == "static" and self.kind not in ("outlier", "block_sparse")
        options = {"input_scale": self.input_scale() if static else None}
        if self.smooth is not None:
            options |= {"smooth": self.smooth, "folded": self.norm is not None}
        blocks = {}
        if self.kind.startswith("block_sparse") and not isinstance(mask_of(self.module), BlockMask):
            blocks = {"block": config.block, "density": config.density}
        if config.qat:
            self.layer = QATLinear(self.module, self.kind, algorithm=config.algorithm, **options)
        elif self.kind == "outlier":
            columns = (self.seen.largest >= config.threshold).nonzero()[:, 0] if config.mode == "static" else None
            self.layer = OutlierLinear.from_linear(
                self.module, threshold=config.threshold, keep_weight=config.keep_weight, columns=columns
            )
        elif self.kind == "block_sparse":
            self.layer = BlockSparseLinear.from_linear(self.module, **blocks)
        elif self.kind == "block_sparse_int8":
            self.layer = BlockSparseInt8Linear.from_linear(self.module, **blocks, **options)
        elif self.kind == "sparse24_int8":
            self.layer = Sparse24Int8Linear.from_linear(self.module, algorithm=config.algorithm, **options)
        else:
            self.layer = Int8Linear.from_linear(self.module, **options)

    @torch.no_grad()
    def errors(self) -> tuple[float, float | None]:
        """(of the weight, of the output or None): norms of differences, relative."""
        w = self.module.weight.detach().float()
        error = relative(effective_weight(self.layer, self.smooth), w)
        tokens = None if self.seen is None else self.seen.tokens
        if tokens is None:
            return error, None
        given = tokens if self.norm is None else (tokens / self.smooth).to(tokens.dtype)
        return error, relative(self.layer(given), self.module(tokens))


def effective_weight(layer: nn.Module, smooth: torch.Tensor | None) -> torch.Tensor:
    """What multiplies x: [N, K] in float32."""
    if isinstance(layer, QATLinear):
        w = layer.rounded(layer.weight()).float()
    elif isinstance(layer, BlockSparseLinear):
        w = layer.plain_weight().float()
    else:
        w = layer.plain_weight().float() * layer.weight_scale[:, None]
    return w if smooth is None else w / smooth


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    size = truth.float().norm()
    return 0.0 if size == 0 else float((x.float() - truth.float()).norm() / size)


def check_kind(kind: str, module: nn.Module, config: QuantizeConfig) -> str | None:
    """Why a layer cannot be of a kind."""
    from .sparsify import BlockMask, mask_of

    reason = _quantizable.too_large(kind, module, config.algorithm)
    if reason is not None:
        return reason
    if kind.startswith("block_sparse"):
        mask = mask_of(module)
        if isinstance(mask, BlockMask):
            return None
        if config.qat:
            return "effvit.sparsify_ has not cut it into blocks"
        return reason_not(module.in_features, module.out_features, config.block)
    if kind == "sparse24_int8" and module.in_features % 4:
        return f"in_features {module.in_features} is no multiple of 4, for 2:4"
    return None


# ---- fusing ----------------------------------------------------------------------------------------------------------


def _activation_name(act: nn.Module) -> str | None:
    kinds = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
    known = _key(act)[0] in ("torch.nn.modules.activation", "timm.layers.activations")
    if not known or getattr(act, "approximate", "none") != "none":
        return None
    return kinds.get(type(act).__name__)


def fuse_mlps(model: nn.Module, keep: bool) -> dict[nn.Module, str]:
    """In every timm Mlp: fc1 with its activation, and int8 to a static fc2. Returns what to add to the report."""
    notes, count = {}, places(model)
    for mlp in list(model.modules()):
        if _key(mlp) != ("timm.layers.mlp", "Mlp") or not isinstance(mlp.fc1, QuantisedLinear):
            continue
        if count[mlp.fc1] > 1 or count[mlp.act] > 1:
            continue
        name = _activation_name(mlp.act)
        if name is None or mlp.fc1.activation != "none":
            continue
        fc2 = mlp.fc2
        between = type(mlp.norm) is nn.Identity and mlp.drop1.p == 0
        takes = isinstance(fc2, QuantisedLinear) and fc2.input_scale is not None and fc2.smooth is None
        to_int8 = between and takes and mlp.fc1.input_scale is not None
        mlp.fc1.fuse(name, fc2.input_scale if to_int8 else None)
        notes[mlp.fc1] = f"{name} fused" + (", int8 out" if to_int8 else "")
        stand_in(model, mlp.act, FusedActivation(), keep)
    return notes


# ---- the choice of a kind by measured errors -------------------------------------------------------------------------


@torch.no_grad()
def seconds(layer: nn.Module, tokens: torch.Tensor, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        start = time.perf_counter()
        layer(tokens)
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def choose(options: Mapping[str, Mapping[str, tuple[float, float]]], budget: float) -> dict[str, str]:
    """A kind for every layer, from {layer: {kind: (cost, error)}}: small squared errors within a sum of costs.

    Starts with the most accurate of each and takes, until the costs fit, the step that adds the least squared error
    for what it saves: the greedy solution of this knapsack.
    """
    chosen = {name: min(kinds, key=lambda k: (kinds[k][1], kinds[k][0])) for name, kinds in options.items()}

    def total():
        return sum(options[name][kind][0] for name, kind in chosen.items())

    while total() > budget * (1 + 1e-9):
        steps = []
        for name, kind in chosen.items():
            cost, error = options[name][kind]
            for other, (c, e) in options[name].items():
                if c < cost:
                    steps.append(((e**2 - error**2) / (cost - c), name, other))
        if not steps:
            raise _checks.value_error(
                "quantize_", "budget", f"at least what the cheapest kinds take, {total():.4g}", f"{budget:.4g}"
            )
        _, name, other = min(steps)
        chosen[name] = other
    return chosen


def choose_kinds(plans: Sequence[Plan], config: QuantizeConfig) -> None:
    """For plans of kind "auto"."""
    open_ = [p for p in plans if p.kind == "auto"]
    options, whole = {}, 0.0
    by_time = config.budget_of == "latency"
    for plan in open_:
        tokens = plan.seen.tokens
        float_cost = seconds(plan.module, tokens) if by_time else size_of(plan.module)
        whole += float_cost
        options[plan.name] = {}
        for kind in config.candidates:
            if kind == "float":
                options[plan.name][kind] = (float_cost, 0.0)
            elif check_kind(kind, plan.module, config) is None:
                tried = dataclasses.replace(plan, kind=kind, smooth=None, norm=None)
                tried.build(dataclasses.replace(config, qat=False))
                cost = seconds(tried.layer, tokens) if by_time else size_of(tried.layer)
                options[plan.name][kind] = (cost, tried.errors()[1])
    for name, kind in (choose(options, config.budget * whole) if options else {}).items():
        next(p for p in open_ if p.name == name).kind = kind


# ---- the flows -------------------------------------------------------------------------------------------------------


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"effvit.{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    if is_linear(model):
        raise ValueError(
            f"effvit.{function}: model must contain the layers to change, got a Linear itself: put it into an "
            "nn.Sequential"
        )


def quantize_(model: nn.Module, config: QuantizeConfig | None = None, verbose: bool = True, **options) -> Report:
    """Turn the linear layers of `model`, in place, into int8 ones; `effvit.unquantize_(model)` is the exact way back.

    Every nn.Linear that no pattern of `skip` names becomes an `Int8Linear`, or what the configuration says: a
    `Sparse24Int8Linear`, an `OutlierLinear`, or with `qat` a `QATLinear`. Subclasses of Linear, layers whose weight
    another module's forward reads, and layers that the calibration data never reaches are left alone; the report says
    so.

    Args:
        model: any module; in evaluation or in training mode, on any device.
        config: a `QuantizeConfig`; None: the defaults, changed by `options`, its fields by name.
        verbose: print the report.

    Returns:
        A Report with a row for every linear layer: what it became, errors of weight and output, bytes before and after.

    Raises:
        TypeError, ValueError: model or configuration is not what is described here; the model is then as it was.
    """
    _check_model("quantize_", model)
    if config is not None and options:
        raise _checks.value_error("quantize_", "config", "None where its fields are given", type(config).__name__)
    config = QuantizeConfig(**options) if config is None else config
    if not isinstance(config, QuantizeConfig):
        raise _checks.type_error("quantize_", "config", "a QuantizeConfig or None", type(config).__name__)
    config.check()
    _quantizable.check_materialised("quantize_", model)
    chosen, rows = scan(model, config.skip, _quantizable.needs_floats(model))
    if not chosen and not any("already" in r.detail for r in rows):
        raise ValueError(
            f"effvit.quantize_: model must contain a Linear to quantise, got {class_name(model)} with "
            f"{Report(rows) if rows else 'no Linear'}"
        )
    _quantizable.check_patterns(config.layers, [*chosen, *(r.name for r in rows)])
    attention, left = _quantize_attention.scan(model, config.skip) if config.attention == "int8" else ({}, [])
    seen: dict[str, Statistics | None] = dict.fromkeys(chosen)
    if config.calibration is not None:
        seen.update(calibrate(model, chosen, config.calibration, config.batches, config.progress))
    plans = []
    for name, module in chosen.items():
        pattern = matching(name, config.layers)
        kind = config.kind if pattern is None else config.layers[pattern]
        reason = "kind float" if kind == "float" else check_kind(kind, module, config)
        if seen[name] is not None and not seen[name].batches:
            reason = "never called on the calibration data: what uses its weight directly needs floats"
        if reason is None:
            _quantizable.check_finite(name, module)
            plans.append(Plan(name, module, kind, seen[name]))
        else:
            rows.append(Row(name, class_name(module), False, reason))
    choose_kinds(plans, config)
    norms = foldable(model) if config.smooth is not None and not config.qat else {}  # convert_ folds what is trained
    for plan in [*plans]:
        if plan.kind == "float":
            plans.remove(plan)
            rows.append(Row(plan.name, class_name(plan.module), False, "float is what the budget allows"))
            continue
        if config.smooth is not None and plan.kind not in ("outlier", "block_sparse"):
            plan.smooth = smoothing(plan.module.weight, plan.seen.largest, config.smooth)
            plan.norm = norms.get(plan.module)
        plan.build(config)
    changed = []
    for plan in plans:
        errors = plan.errors()
        how = plan.kind if config.qat else "" if plan.kind == "block_sparse" else config.mode
        detail = f"{type(plan.layer).__name__} {how}".strip()
        if plan.smooth is not None:
            detail += ", smooth in the norm" if plan.norm is not None else ", smooth"
        changed.append(
            Row(plan.name, class_name(plan.module), True, detail, *errors, size_of(plan.module), size_of(plan.layer))
        )  # fmt: skip
    for plan in plans:
        stand_in(model, plan.module, plan.layer, config.keep_original)
        if plan.norm is not None:
            stand_in(model, plan.norm, folded(plan.norm, plan.smooth), config.keep_original)
    _note(changed, [p.layer for p in plans], fuse_mlps(model, config.keep_original) if config.fuse else {})
    changed += _quantize_attention.change_(attention, config.keep_original)
    report = Report(changed + rows + left)
    if verbose:
        print(report)
    return report


def _note(rows, layers, notes):
    for row, layer in zip(rows, layers, strict=True):
        if layer in notes:
            row.detail += f", {notes[layer]}"


def convert_(model: nn.Module, fuse: bool = True, verbose: bool = True) -> Report:
    """Turn the `QATLinear`s of a trained model, in place, into the int8 layers that they were trained to be.

    Parametrisations of `effvit.sparsify_` end here: the sparse layer holds what their masks keep. `effvit.unquantize_`
    brings back the float layers, parametrised as they were, with the trained weights.

    Args:
        fuse: as in `QuantizeConfig`. verbose: print the report.
    """
    _check_model("convert_", model)
    found = {name: m for name, m in model.named_modules() if isinstance(m, QATLinear)}
    if not found:
        raise ValueError(
            f"effvit.convert_: model must contain QATLinear layers (effvit.quantize_ with qat=True), got "
            f"{class_name(model)} without"
        )
    rows, made, layers, norms = [], [], [], foldable(model)
    for name, module in found.items():
        layer = _quantizable.deployed(name, module)
        error = relative(effective_weight(layer, module.smooth), module.linear.weight.detach())
        norm = norms.get(module) if layer.smooth is not None else None
        detail = type(layer).__name__ + _quantizable.unfinished(module)
        if norm is not None:
            layer.hold("smooth", None)
            detail += ", smooth in the norm"
        rows.append(Row(name, class_name(module), True, detail, error, None, size_of(module), size_of(layer)))
        layers.append(layer)
        made.append((module, layer, norm))
    for module, layer, norm in made:
        if norm is not None:
            stand_in(model, norm, folded(norm, module.smooth))
        kept = vars(module).get(ORIGINAL, (module.linear,))
        stand_in(model, module, layer)
        vars(layer)[ORIGINAL] = kept
    _note(rows, layers, fuse_mlps(model, True) if fuse else {})
    report = Report(rows)
    if verbose:
        print(report)
    return report


def unquantize_(model: nn.Module, verbose: bool = True) -> list[str]:
    """Undo `effvit.quantize_` and `effvit.convert_` exactly, in place: the float modules themselves come back.

    Returns the names of the restored modules, none if there were none. They are moved to where their replacements are,
    and cast where the model has been cast since.

    Raises:
        ValueError: the originals were not kept (`keep_original=False`, or the model was loaded).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"effvit.unquantize_: model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: m for name, m in model.named_modules() if ORIGINAL in vars(m)}
    attention = _quantize_attention.find(model)
    lost = [name for name, m in found.items() if vars(m)[ORIGINAL] is None]
    lost += [name for name, m in attention.items() if vars(m)[_quantize_attention.CLASS] == (None,)]
    if lost:
        raise ValueError(
            f"effvit.unquantize_: model must have kept its float layers (keep_original=True), got {len(lost)} without "
            f"({', '.join(lost[:3])})"
        )
    for module in found.values():
        (original,) = vars(module)[ORIGINAL]
        here = next((t for t in (*module.parameters(), *module.buffers())), None)
        original.train(module.training)
        put(model, module, original if here is None else _quantizable.moved(original, module, here.device))
    _quantize_attention.restore_(model)
    if verbose and not (found or attention):
        print(f"effvit.unquantize_: nothing to undo, {class_name(model)} is not quantised")
    return [*found, *attention]


# ---- files -----------------------------------------------------------------------------------------------------------


def _safetensors(function: str):
    try:
        import safetensors.torch
    except ImportError as e:
        raise ImportError(f"effvit.{function}: safetensors must be installed (pip install safetensors)") from e
    return safetensors


def save_quantized(model: nn.Module, path) -> None:
    """The state_dict of a quantised model as a safetensors file, with what `effvit.load_quantized_` needs to know.

    Nothing in it depends on the machine, and nothing is a pickle. Layers in training (`QATLinear`, masks of
    `effvit.sparsify_`) are refused.
    """
    _check_model("save_quantized", model)
    _quantizable.check_saveable(model)
    safetensors = _safetensors("save_quantized")
    layers = {
        name: [type(m).__name__, m.options()] for name, m in model.named_modules() if type(m) in LAYERS.values()
    }  # fmt: skip
    attention = list(_quantize_attention.find(model))
    if not (layers or attention):
        raise ValueError(f"effvit.save_quantized: model must have quantised layers, got {class_name(model)} without")
    acts = [name for name, m in model.named_modules() if isinstance(m, FusedActivation)]
    plan = {"version": 1, "layers": layers, "fused": acts} | ({"attention": attention} if attention else {})
    metadata = {"effvit": json.dumps(plan)}
    safetensors.torch.save_model(model, str(path), metadata=metadata)


def load_quantized_(model: nn.Module, path, strict: bool = True) -> nn.Module:
    """Make the float `model` that which `effvit.save_quantized` wrote: its layers in place, then its tensors.

    Returns model. Raises ValueError where the file is not one of these or was made from another architecture; the model
    is then as it was.
    """
    _check_model("load_quantized_", model)
    _quantizable.check_materialised("load_quantized_", model)
    safetensors = _safetensors("load_quantized_")
    plan, shapes = _quantizable.header(safetensors, path)
    made = {}
    for name, (cls, options) in plan["layers"].items():
        module = dict(model.named_modules()).get(name)
        if not isinstance(module, nn.Linear) or cls not in LAYERS:
            given = "no such module" if module is None else class_name(module)
            raise ValueError(f"effvit.load_quantized_: model must have a Linear {name} for a {cls}, got {given}")
        _quantizable.check_options(name, module, options)
        weight = module.weight
        made[name] = module, LAYERS[cls](**options, device=weight.device, dtype=weight.dtype)
    attention = _quantize_attention.named(model, plan.get("attention", ()))
    _quantizable.check_tensors(model, dict(made.values()), shapes, strict)
    for module, layer in made.values():
        stand_in(model, module, layer, keep=False)
    for name in plan["fused"]:
        stand_in(model, model.get_submodule(name), FusedActivation(), keep=False)
    _quantize_attention.change_(attention, keep=False)
    safetensors.torch.load_model(model, str(path), strict=strict)
    return model


__all__ = ["QuantizeConfig", "convert_", "load_quantized_", "quantize_", "save_quantized", "unquantize_"]
