"""effvit.calibrate_ptq(model, data): post-training quantisation of vision transformers to few bits, with a report."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from . import _ptq_search, _quantizable, _quantize_attention
from ._calibrate import evaluating, run
from ._progress import progress
from ._ptq_relevance import hessian, relevance
from ._report import Report, Row, class_name
from .layers.ptq import FakeQuantizer, PTQLinear
from .ops import _checks
from .quantize import choose, foldable, put, relative, scan
from .quantizers import SCHEMES, Quantizer

_NAME = "calibrate_ptq"
ROLES = ("softmax", "gelu", "norm", "input")
TOKENS, PAIRS = 256, 12  # of a layer, and attention matrices, kept for measuring


@dataclasses.dataclass
class PTQConfig:
    """What `effvit.calibrate_ptq` does.

    Args:
        weight_bits, activation_bits: 2 to 8; weight_bits 0: weights stay as they are. Operands of attention's products
            have activation_bits too.
        softmax, gelu, norm, input: the quantiser of attention probabilities, of what follows a GELU, of what follows a
            LayerNorm, and of everything else: a scheme of :mod:`effvit.quantizers`, "int8" (symmetric, which
            :func:`effvit.deploy_ptq_` can turn into integers; 8 bits), "auto" (of `candidates` the one of least
            error in the product that reads it), or "none".
        candidates: of "auto".
        zero: how the logarithmic schemes count their zero, see :func:`effvit.quantizers.log2`.
        reparameterize: give the channels after a LayerNorm one range by changing the norm and the layer that alone
            reads it (RepQ-ViT, arXiv:2212.08254), where norm is "uniform" or "auto". Exact up to rounding.
        target: the one scale that channels then have: "mean" of theirs, as RepQ-ViT, or "median", the one with the
            least mean deviation from them (DopQ-ViT, arXiv:2408.03291), which outliers do not move.
        weights: "mse": the scale of least squared error; "percentile"; "max".
        average_bits: a budget: linear layers get bits of `bit_choices`, for weight and input alike, of which the mean
            over all weights is at most that; layers with more relevance get more.
        sensitivity: what a layer's error is weighted with there: "lrp", its relevance (LRP-QViT, arXiv:2401.11243), or
            "hessian", the second derivatives of the loss by its outputs, channel by channel (Q-HyViT,
            arXiv:2303.12557).
        bit_choices: 2 to 8.
        skip: patterns of names of linear layers to leave alone, or one pattern.
        batches: how many of the calibration data to use; None: all.
        progress: show bars.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    softmax: str = "auto"
    gelu: str = "auto"
    norm: str = "uniform"
    input: str = "uniform"
    candidates: Sequence[str] = tuple(SCHEMES)
    zero: str = "extra"
    reparameterize: bool = True
    target: str = "mean"
    weights: str = "mse"
    average_bits: float | None = None
    sensitivity: str = "lrp"
    bit_choices: Sequence[int] = (4, 6, 8)
    skip: Sequence[str] = ("head", "head.*", "head_dist", "*patch_embed*", "classifier", "heads.*")
    batches: int | None = None
    progress: bool = True

    def check(self) -> None:
        for name, least in (("weight_bits", 0), ("activation_bits", 2)):
            bits = _checks.as_int(_NAME, name, getattr(self, name), (least, 8))
            if bits == 1:
                raise _checks.value_error(_NAME, name, "0 or 2 to 8", bits)
        for role in ROLES:
            scheme = getattr(self, role)
            _checks.index_of(_NAME, role, scheme, (*SCHEMES, "int8", "auto", "none"))
            if scheme == "int8" and (self.activation_bits != 8 or self.average_bits is not None):
                raise _checks.value_error(_NAME, role, "another than int8 where activations have other bits", scheme)
        for name in ("candidates", "bit_choices"):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence) or not given:
                raise _checks.type_error(_NAME, name, "a sequence of at least one", repr(given))
        for i, scheme in enumerate(self.candidates):
            _checks.index_of(_NAME, f"candidates[{i}]", scheme, tuple(SCHEMES))
        for i, bits in enumerate(self.bit_choices):
            _checks.as_int(_NAME, f"bit_choices[{i}]", bits, (2, 8))
        _checks.index_of(_NAME, "zero", self.zero, ("extra", "last"))
        _checks.index_of(_NAME, "target", self.target, ("mean", "median"))
        _checks.index_of(_NAME, "weights", self.weights, ("mse", "percentile", "max"))
        _checks.index_of(_NAME, "sensitivity", self.sensitivity, ("lrp", "hessian"))
        _checks.as_bool(_NAME, "reparameterize", self.reparameterize)
        if self.average_bits is not None:
            least = min(self.bit_choices)
            if _checks.as_finite(_NAME, "average_bits", self.average_bits) < least:
                raise _checks.value_error(_NAME, "average_bits", f"at least the least of bit_choices, {least}",
                                          self.average_bits)  # fmt: skip
        if self.batches is not None and _checks.as_int(_NAME, "batches", self.batches, None) < 1:
            raise _checks.value_error(_NAME, "batches", "positive or None", self.batches)


# ---- RepQ-ViT's re-parameterisation ------------------------------------------------------------------------------


def channel_ranges(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale [C], zero point [C], not rounded) of the channels' own uniform quantisers."""
    scale = (high - low).double() / (2**bits - 1)
    dead = scale <= scale.max() * 1e-8  # a constant channel has no range of its own
    scale = torch.where(dead, scale[~dead].mean() if bool((~dead).any()) else torch.ones_like(scale), scale)
    return scale, -low.double() / scale


def common_range(
    scale: torch.Tensor, zero_point: torch.Tensor, target: str, bits: int | None = None
) -> tuple[float, int]:
    """(scale, zero point) of one quantiser in place of the channels'; of so many bits the zero point is a code."""
    pick = torch.mean if target == "mean" else torch.median
    s, z = float(pick(scale)), round(float(pick(zero_point)))
    return s, z if bits is None else min(max(z, 0), 2**bits - 1)


@torch.no_grad()
def reparameterize(
    norm: nn.Module,
    linear: nn.Module,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    *,
    target: str = "mean",
    bits: int | None = None,
) -> tuple[float, int]:
    """Fold channel-wise scales after a LayerNorm into the norm and the layer after it, in place: RepQ-ViT's step from
    channel-wise to layer-wise quantisation, and that of I&S-ViT's smooth optimisation strategy (arXiv:2311.10126).

    With r = scale / s~ and b = -zero_point scale / r + z~ s~, the norm's weight and bias become gamma / r and
    beta / r - b, so that every channel has the range of the quantiser (s~, z~); the layer's become W diag(r) and
    bias + W diag(r) b, so that it computes what it did. A missing bias of the layer is made.

    Args:
        norm: a LayerNorm with weight and bias. linear: the one layer that reads it.
        scale, zero_point: [C], of the channels' own uniform quantisers.
        target: as of `PTQConfig`.
        bits: the zero point is to be a code of so many bits. Any will do, as channels are moved to where it says; the
            mean of channels that lie far from 0 need not be one. None: it may be any integer.

    Returns:
        (s~, z~): the one scale and the one zero point.
    """
    name = "reparameterize"
    if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None:
        raise _checks.value_error(name, "norm", "a LayerNorm with weight and bias", class_name(norm))
    for argument, t in (("scale", scale), ("zero_point", zero_point)):
        if t.shape != norm.weight.shape:
            raise _checks.value_error(name, argument, f"[{norm.weight.numel()}]", _checks.shape(t))
    if linear.in_features != norm.weight.numel():
        raise _checks.value_error(name, "linear", f"of {norm.weight.numel()} inputs", linear.in_features)
    _checks.check_scales(name, {"scale": scale.detach().cpu()}, "scale")
    _checks.index_of(name, "target", target, ("mean", "median"))
    s, z = common_range(scale.double(), zero_point.double(), target, bits)
    r, b = _factors(scale, zero_point, s, z)
    weight = linear.weight.double() * r
    moved = weight @ b
    norm.weight.copy_(norm.weight.double() / r)
    norm.bias.copy_(norm.bias.double() / r - b)
    linear.weight.copy_(weight)
    if linear.bias is None:
        linear.bias = nn.Parameter(moved.to(linear.weight.dtype))
    else:
        linear.bias.copy_(linear.bias.double() + moved)
    return s, z


def _factors(scale, zero_point, s, z):
    r = scale.double() / s
    return r, -zero_point.double() * scale.double() / r + z * s


# ---- what calibration sees -------------------------------------------------------------------------------------------


class Seen:
    """Of one quantiser's input: range, channels' ranges, some tokens [*, C]; of softmax: matrices with their values."""

    def __init__(self, matrices: bool):
        self.matrices, self.calls, self.kept, self.pairs = matrices, 0, [], []
        self.low = self.high = None

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None) -> None:
        self.calls += 1
        if x.numel() == 0:
            return
        low, high = x.float().flatten(0, -2).aminmax(dim=0)
        self.low = low if self.low is None or self.matrices else torch.minimum(self.low, low)
        self.high = high if self.high is None or self.matrices else torch.maximum(self.high, high)
        if self.matrices:
            a, v = x.flatten(0, -3), other.flatten(0, -3)
            step = max(len(a) // 4, 1)
            self.pairs += [(m.clone(), n.clone()) for m, n in zip(a[::step][:4], v[::step][:4], strict=True)]
            self.pairs = self.pairs if len(self.pairs) <= 2 * PAIRS else self.pairs[::2]
            return
        rows = x.flatten(0, -2)
        self.kept.append(rows[:: max(len(rows) * 4 // TOKENS, 1)][: TOKENS // 4].clone())
        if len(self.kept) > 8:
            self.kept = self.kept[::2]

    @property
    def tokens(self) -> torch.Tensor:
        return torch.cat(self.kept)[:TOKENS]

    @property
    def range(self) -> tuple[float, float]:
        if self.matrices:
            return 0.0, max(float(a.max()) for a, _ in self.pairs)
        return float(self.low.min()), float(self.high.max())


def _batches(calibration: Iterable, config: PTQConfig) -> list:
    """They are read more than once."""
    if isinstance(calibration, (torch.Tensor, Mapping)):
        expected = "an iterable of batches"
        raise _checks.type_error(_NAME, "calibration", expected, type(calibration).__name__)
    found = []
    for batch in calibration:
        if config.batches is not None and len(found) == config.batches:
            break
        found.append(batch)
    if not found:
        raise _checks.value_error(_NAME, "calibration", "at least one batch", "none: empty, or a generator used before")
    return found


# ---- one layer -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What a linear layer becomes at some bits."""

    bits: tuple[int, int]  # weight, input
    quantizer: Quantizer | None
    int8_scale: float | None
    ranges: tuple | None  # of channels: (scale, zero point)
    weight_scale: torch.Tensor | None
    weight_error: float
    error: float
    squares: torch.Tensor  # [out]: of the errors of an output, on average


@dataclasses.dataclass
class Target:
    """A linear layer to quantise."""

    name: str
    layer: PTQLinear
    role: str
    norm: nn.Module | None
    seen: Seen

    def plan(self, weight_bits: int, activation_bits: int, config: PTQConfig) -> Plan:
        scheme, weight, x = getattr(config, self.role), self.layer.weight.detach().float(), self.seen.tokens.float()
        truth, ranges, start = F.linear(x, weight), None, None
        (low, high), add = self.seen.range, None
        folds = config.reparameterize and self.norm is not None and scheme in ("uniform", "auto")
        if folds:
            ranges = channel_ranges(self.seen.low, self.seen.high, activation_bits)
            s, z = common_range(*ranges, config.target, activation_bits)
            r, b = _factors(*ranges, s, z)
            x = (x.double() / r - b).float()
            weight = (weight.double() * r).float()
            add = weight.double() @ b  # is in the bias: what comes out is that much less
            start = (s, z)

        def output(act, w=None):
            y = F.linear(act(x), weight if w is None else w)
            return y if add is None else (y.double() + add).float()

        def error(act):
            return relative(output(act), truth)

        quantizer = int8_scale = None
        if scheme == "int8":
            int8_scale, _ = _ptq_search.search_int8(low, high, error)
        elif folds:
            quantizer = _best_scale(*start, activation_bits, error)
        elif scheme != "none":
            schemes = config.candidates if scheme == "auto" else (scheme,)
            quantizer, _ = _ptq_search.search(schemes, activation_bits, low, high, error, config.zero, x.device)
        scale, rounded = None, weight
        if weight_bits:
            scale = _ptq_search.weight_scales(weight, weight_bits, config.weights)
            n = 2 ** (weight_bits - 1) - 1
            rounded = (weight / scale[:, None]).round().clamp(-n, n) * scale[:, None]
        act = FakeQuantizer().use_int8(int8_scale, x.device) if int8_scale else FakeQuantizer().use(quantizer, x.device)
        result = output(act, rounded)
        squares = (result - truth).double().flatten(0, -2).square().mean(0)
        return Plan((weight_bits, activation_bits), quantizer, int8_scale, ranges, scale, relative(rounded, weight),
                    relative(result, truth), squares)  # fmt: skip

    def apply(self, plan: Plan, config: PTQConfig) -> None:
        if plan.ranges is not None:
            reparameterize(self.norm, self.layer, *plan.ranges, target=config.target, bits=plan.bits[1])
        if plan.int8_scale is not None:
            self.layer.act.use_int8(plan.int8_scale)
        else:
            self.layer.act.use(plan.quantizer)
        self.layer.use_weight(plan.bits[0], plan.weight_scale)

    def row(self, plan: Plan, sensitivity: float | torch.Tensor | None) -> Row:
        layer, before = self.layer, self.layer.weight.numel() * self.layer.weight.element_size()
        after = (layer.weight.numel() * plan.bits[0] + 7) // 8 + 4 * layer.out_features if plan.bits[0] else before
        detail = f"W{plan.bits[0] or 'float'}, {self.role}: {layer.act.text}"
        detail += ", re-parameterised" if plan.ranges is not None else ""
        if isinstance(sensitivity, torch.Tensor):
            detail += f", adds {float(sensitivity @ plan.squares) / 2:.1e} to the loss of a token"
        elif sensitivity is not None:
            detail += f", relevance {sensitivity:.3f}"
        return Row(self.name, "Linear", True, detail, plan.weight_error, plan.error, before, after)


def _best_scale(scale: float, zero_point: int, bits: int, error) -> Quantizer:
    """The uniform quantiser of the common range, or of a narrower one about the same zero."""
    best = None
    for f in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6):
        made = _ptq_search.made("uniform", bits, {"scale": f * scale, "zero_point": zero_point}, "extra")
        e = error(made)
        best = (e, made) if best is None or e < best[0] else best
    return best[1]


def _operand(role: str, act: FakeQuantizer, seen: Seen, config: PTQConfig) -> tuple[str, float]:
    """Finds the quantiser of an operand of attention's products. (detail, error) for the report."""
    scheme, bits = getattr(config, role), config.activation_bits
    if role == "softmax":

        def error(quantise):
            squares = [((quantise(a) - a) @ v).float().square().sum() for a, v in seen.pairs]
            return float(torch.stack(squares).sum() / sizes)

        sizes = torch.stack([(a @ v).float().square().sum() for a, v in seen.pairs]).sum().clamp(min=1e-30)
    else:
        tokens = seen.tokens.float()

        def error(quantise):
            return relative(quantise(tokens), tokens)

    low, high = seen.range
    if scheme == "none":
        return "float", 0.0
    if scheme == "int8":
        scale, e = _ptq_search.search_int8(low, high, error)
        act.use_int8(scale)
    else:
        schemes = config.candidates if scheme == "auto" else (scheme,)
        quantizer, e = _ptq_search.search(schemes, bits, low, high, error, config.zero, act.thresholds.device)
        act.use(quantizer)
    return act.text, e**0.5 if role == "softmax" else e


# ---- the flow --------------------------------------------------------------------------------------------------------


def _gelu_readers(model: nn.Module) -> set[nn.Module]:
    """Linear layers whose input follows a GELU: fc2 of timm's Mlp."""
    found = set()
    for m in model.modules():
        if type(m).__name__ == "Mlp" and "GELU" in type(getattr(m, "act", None)).__name__ and hasattr(m, "fc2"):
            found.add(m.fc2)
    return found


def _attentions(model: nn.Module) -> tuple[dict[str, nn.Module], list[Row]]:
    """(attention whose products are quantised, rows of what is like it but left alone)"""
    if "timm" not in sys.modules:
        return {}, []
    from ._ptq_timm import CLASSES

    found, rows = {}, []
    for name, m in model.named_modules():
        base = next((cls.__name__ for cls in CLASSES if isinstance(m, cls)), None)
        if type(m) in CLASSES and "forward" not in vars(m):
            found[name] = m
        elif base is not None:
            why = "its forward is replaced on the instance" if type(m) in CLASSES else f"a subclass of timm's {base}"
            rows.append(Row(name, class_name(m), False, f"{why}: its products stay in floating point"))
    return found, rows


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise _checks.type_error(_NAME, "model", "a torch.nn.Module", type(model).__name__)
    if isinstance(model, nn.Linear):
        raise _checks.value_error(_NAME, "model", "a module that contains the layers to quantise", "a Linear itself")
    _quantizable.check_materialised(_NAME, model)
    from .adapters import Fused

    int8 = list(_quantize_attention.find(model))
    if int8:
        expected = "in floating point (call effvit.unquantize_ first)"
        raise _checks.value_error(_NAME, "model", expected, f"int8 attention in {int8[0]}")
    patched = [name for name, m in model.named_modules() if isinstance(m, Fused)]
    if patched:
        raise _checks.value_error(_NAME, "model", "unpatched (call effvit.unpatch first)", f"a patched {patched[0]}")
    doubles = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype == torch.float64}
    if doubles:
        raise _checks.type_error(_NAME, "model", "in float32, bfloat16 or float16", "torch.float64")


def prepare_ptq(model: nn.Module, skip: Sequence[str] = PTQConfig.skip) -> tuple[nn.Module, dict, dict, list[Row]]:
    """A copy of the model with `PTQLinear`s and attention on quantisers, none of which does anything yet.

    Returns (copy, {name: (PTQLinear, its LayerNorm or None, role)}, {name: attention}, rows of what is left alone). A
    state_dict of a model that `calibrate_ptq` returned can be loaded into the copy.
    """
    _check_model(model)
    model = copy.deepcopy(model)
    chosen, rows = scan(model, skip, _quantizable.needs_floats(model))
    if not chosen:
        raise _checks.value_error(_NAME, "model", "one with a Linear to quantise", class_name(model))
    norms, gelus, (attentions, left), layers = foldable(model), _gelu_readers(model), _attentions(model), {}
    for name, linear in chosen.items():
        layer, norm = PTQLinear.from_linear(linear), norms.get(linear)
        put(model, linear, layer)
        if norm is not None and (norm.weight is None or norm.bias is None):
            norm = None
        role = "norm" if linear in norms else "gelu" if linear in gelus else "input"
        layers[name] = (layer, norm, role)
    for attention in attentions.values():
        from ._ptq_timm import swap

        swap(attention)
    return model, layers, attentions, rows + left


@torch.no_grad()
def calibrate_ptq(
    model: nn.Module, calibration: Iterable, config: PTQConfig | None = None, *, verbose: bool = True, **options
) -> tuple[nn.Module, Report]:
    """A copy of `model`, quantised after training to few bits, with the quantisers that the data asks for.

    Linear layers get rounded weights and a quantised input; in timm's ViT, DeiT and Swin so do both operands of both
    products of attention. Which quantiser an activation gets is the configuration's choice, or with "auto" the one
    under which the product that reads it is closest to the float one, over the calibration data; its scale, base,
    shift or angle is searched the same way. The copy computes in floating point what integers would: it is for
    measuring accuracy, for training on (gradients go straight through), and, where int8 was chosen, for
    :func:`effvit.deploy_ptq_`.

    Args:
        model: any module in float32, bfloat16 or float16; it is not changed.
        calibration: batches: an input, (input, target, ...) or a mapping of keyword arguments each.
        config: a `PTQConfig`; None: the defaults, changed by `options`, its fields by name.
        verbose: print the report.

    Returns:
        (the copy, a Report with a row for every linear layer and every operand of attention: what it became, errors
        of weight and output relative to the float ones, bytes before and after). Errors of an operand are those of the
        operand itself; of softmax, those of its product with v.

    Raises:
        TypeError, ValueError: model, calibration or configuration is not what is described here.
    """
    if config is not None and options:
        raise _checks.value_error(_NAME, "config", "None where its fields are given", type(config).__name__)
    config = PTQConfig(**options) if config is None else config
    if not isinstance(config, PTQConfig):
        raise _checks.type_error(_NAME, "config", "a PTQConfig or None", type(config).__name__)
    config.check()
    quantised, layers, attentions, rows = prepare_ptq(model, config.skip)
    batches = _batches(calibration, config)
    watched = {layer.act: Seen(False) for layer, _, _ in layers.values()}
    for attention in attentions.values():
        watched |= {getattr(attention, n): Seen(n == "softmax_act") for n in ("q_act", "k_act", "softmax_act", "v_act")}
    for act, seen in watched.items():
        act.observer = seen
    try:
        with evaluating(quantised):
            for batch in progress(batches, "calibrating", enabled=config.progress):
                run(quantised, batch)
    finally:
        for act in watched:
            act.observer = None
    names = {m: name for name, m in quantised.named_modules()}
    for act, seen in watched.items():
        if (seen.kept or seen.pairs) and not all(map(math.isfinite, seen.range)):
            raise _checks.value_error(_NAME, "calibration", "such that activations are finite",
                                      f"NaN or infinity in {names[act]}")  # fmt: skip
    targets, shares = [], {}
    for name, (layer, norm, role) in layers.items():
        if watched[layer.act].kept:
            _quantizable.check_finite(name, layer)
            targets.append(Target(name, layer, role, norm, watched[layer.act]))
        else:
            rows.append(Row(name, class_name(layer), False, "never called on the calibration data"))
    if config.average_bits is not None:
        measured = hessian if config.sensitivity == "hessian" else relevance
        shares = measured(quantised, {t.name: t.layer for t in targets}, batches, config.progress)
    plans = _plans(targets, shares, config)
    changed = []
    for target in targets:
        target.apply(plans[target.name], config)
        changed.append(target.row(plans[target.name], shares.get(target.name)))
    for name, attention in progress(attentions.items(), "attention", enabled=config.progress):
        for part, role in (("q_act", "input"), ("k_act", "input"), ("softmax_act", "softmax"), ("v_act", "input")):
            act = getattr(attention, part)
            if watched[act].calls and (watched[act].kept or watched[act].pairs):
                detail, e = _operand(role, act, watched[act], config)
                changed.append(Row(f"{name}.{part}", "operand", True, f"{role}: {detail}", None, e))
    report = Report(changed + rows)
    if verbose:
        print(report)
    return quantised, report


def _cost(plan: Plan, sensitivity: float | torch.Tensor) -> float:
    """Of a plan, such that its square is what is added up over layers."""
    if isinstance(sensitivity, torch.Tensor):
        return float(sensitivity @ plan.squares) ** 0.5
    return sensitivity**0.5 * plan.error


def _plans(targets: Sequence[Target], shares: Mapping[str, float | torch.Tensor], config: PTQConfig) -> dict[str, Plan]:
    """For every layer; with a budget, bits by squared error times sensitivity: a knapsack, solved greedily."""
    found: dict[str, dict[int, Plan]] = {}
    for target in progress(targets, "layers", enabled=config.progress):
        if config.average_bits is None:
            found[target.name] = {0: target.plan(config.weight_bits, config.activation_bits, config)}
        else:
            found[target.name] = {bits: target.plan(bits, bits, config) for bits in sorted(set(config.bit_choices))}
    if config.average_bits is None:
        return {name: plans[0] for name, plans in found.items()}
    sizes = {t.name: t.layer.weight.numel() for t in targets}
    options = {
        name: {bits: (bits * sizes[name], _cost(plan, shares[name])) for bits, plan in plans.items()}
        for name, plans in found.items()
    }
    chosen = choose(options, config.average_bits * sum(sizes.values())) if options else {}
    return {name: found[name][bits] for name, bits in chosen.items()}


def reconstruct_(
    quantised: nn.Module,
    model: nn.Module,
    calibration: Iterable,
    *,
    steps: int = 100,
    rate: float = 4e-5,
    bar: bool = True,
) -> dict[str, tuple[float, float]]:
    """Train the blocks of a model of `calibrate_ptq`, in place and one by one, to give what those of `model` give: the
    last stage of I&S-ViT's smooth optimisation strategy (arXiv:2311.10126), after its re-parameterisation.

    A block is a module with `attn` and `mlp`. It sees the inputs that the float one sees; Adam moves weights, biases
    and norms, straight through the quantisers, which stay; a block that training does not bring closer stays too.

    Args:
        quantised: what `calibrate_ptq` returned. model: the float model that it was made from.
        calibration: batches, as there; their inputs to all blocks are kept.
        steps: of a block, each on one batch. rate: Adam's, at the first of them; it falls to 0 along a cosine.

    Returns:
        {block: (error before, error after)}: of its outputs, in the norm, relative to the float block's.
    """
    name = "reconstruct_"
    steps, rate = _checks.as_int(name, "steps", steps, (1, 10**9)), _checks.as_positive(name, "rate", rate)
    own = dict(quantised.named_modules())
    blocks = {n: m for n, m in model.named_modules() if hasattr(m, "attn") and hasattr(m, "mlp") and n in own}
    blocks = {n: m for n, m in blocks.items() if any(isinstance(x, FakeQuantizer) for x in own[n].modules())}
    if not blocks:
        raise _checks.value_error(name, "model", "the one that quantised was made from, with blocks of attn and mlp",
                                  class_name(model))  # fmt: skip
    seen: dict[str, list] = {n: [] for n in blocks}

    def watch(n):
        return lambda module, args, y: seen[n].append((args[0].detach(), y.detach()))

    handles = [m.register_forward_hook(watch(n)) for n, m in blocks.items()]
    try:
        with evaluating(model):
            for batch in _batches(calibration, PTQConfig()):
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    with evaluating(quantised):
        for n in progress(blocks, "reconstructing", enabled=bar):
            found[n] = _reconstruct(own[n], seen.pop(n), steps, rate)
    return found


def _reconstruct(block, pairs, steps, rate):
    def error():
        with torch.no_grad():
            off = sum((block(x) - y).float().square().sum() for x, y in pairs)
            return float((off / sum(y.float().square().sum() for _, y in pairs)).sqrt())

    before, kept = error(), copy.deepcopy(block.state_dict())
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in parameters]
    with torch.enable_grad():
        for p in parameters:
            p.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for i in range(steps):
            x, y = pairs[i % len(pairs)]
            loss = F.mse_loss(block(x).float(), y.float())
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g
            optimizer.step()
            schedule.step()
    for p, flag in zip(parameters, flags, strict=True):
        p.grad = None
        p.requires_grad_(flag)
    after = error()
    if not after < before:
        block.load_state_dict(kept)
        after = before
    return before, after


def deploy_ptq_(model: nn.Module, verbose: bool = True) -> list[str]:
    """Turn every `PTQLinear` with an int8 input and a rounded weight, in place, into an `Int8Linear` that computes the
    same on integers; the others stay. Returns the names of the layers.

    Raises:
        ValueError: there is none: calibrate with ``norm="int8", gelu="int8", input="int8"``.
    """
    if not isinstance(model, nn.Module):
        raise _checks.type_error("deploy_ptq_", "model", "a torch.nn.Module", type(model).__name__)
    found = {n: m for n, m in model.named_modules() if isinstance(m, PTQLinear)}
    ready = {n: m for n, m in found.items() if m.act.scheme == "int8" and m.weight_bits}
    if not ready:
        expected = 'one with int8 inputs (calibrate_ptq with norm, gelu and input "int8")'
        raise _checks.value_error("deploy_ptq_", "model", expected, f"{len(found)} PTQLinear layers without")
    for module in ready.values():
        put(model, module, module.deployed())
    if verbose:
        print(f"effvit.deploy_ptq_: {len(ready)} layers in int8, {len(found) - len(ready)} left in floating point")
    return list(ready)
