"""effvit.to_integer(model, calibration): timm's ViT, DeiT, Swin by integers alone; prepare_integer trains them so."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ._calibrate import evaluating
from ._progress import progress as progress_bar
from ._report import number, table
from .layers import integer
from .layers.integer import IntGELU, IntLayerNorm, IntSoftmax, QuantAct, QuantConv2d, QuantLinear, QuantMatMul
from .layers.integer_inference import IntegerSwin, IntegerViT
from .layers.integer_training import (
    IntegerBits,
    QuantAttention,
    QuantBlock,
    QuantMLP,
    QuantPatchMerging,
    QuantStage,
    QuantSwin,
    QuantViT,
)
from .ops import _checks

METHODS = ("max", "percentile", "mse")
LAYERS = (QuantAct, QuantLinear, QuantConv2d, QuantMatMul, IntSoftmax, IntGELU)
PERCENTILE = 99.99
IMAGES = 4  # of the first batch, on which the report measures errors
_MASKED = "parametrizations.weight.original"  # in the name of a weight that effvit.sparsify_ has masked


def _refuse(name: str, expected: str, given: object):
    given = type(given).__name__ if isinstance(given, nn.Module) else given
    return _checks.value_error("to_integer", name, expected, given)


# ---- from timm's modules ---------------------------------------------------------------------------------------------


def _is(module: object, *names: str) -> bool:
    return type(module).__name__ in names


def _is_timms(model: object, *names: str) -> bool:
    return _is(model, *names) and type(model).__module__.startswith("timm.")


def _norm(name: str, module: nn.Module) -> IntLayerNorm | None:
    """An identity is None."""
    if module is None or isinstance(module, nn.Identity):
        return None
    if not isinstance(module, nn.LayerNorm) or not _is(module, "LayerNorm", "LayerNormFp32"):
        raise _refuse(name, "a LayerNorm", module)
    if len(module.normalized_shape) != 1:
        raise _refuse(name, "a LayerNorm over the last dim", list(module.normalized_shape))
    return IntLayerNorm.from_norm(module)


def _linear(name: str, module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise _refuse(name, "an nn.Linear", module)
    return module


def _conv(name: str, module: nn.Module, bits: IntegerBits) -> QuantConv2d:
    if type(module) is not nn.Conv2d:
        raise _refuse(name, "an nn.Conv2d", module)
    if module.stride != module.kernel_size or module.dilation != (1, 1) or module.groups != 1:
        raise _refuse(name, "a convolution of patches that do not overlap", module.extra_repr())
    if module.padding != (0, 0):
        raise _refuse(name, "a convolution without padding", module.extra_repr())
    return QuantConv2d.from_conv(module, bits.weights)


def _mlp(name: str, module: nn.Module, bits: IntegerBits) -> QuantMLP:
    if not _is(module, "Mlp") or not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        raise _refuse(name, "timm's Mlp without a norm", module)
    act = module.act
    if _is(act, "QuickGELU", "QuickGELUActivation"):
        approximate = "quick"
    elif _is(act, "GELUTanh"):
        approximate = "tanh"
    elif _is(act, "GELU"):
        approximate = getattr(act, "approximate", "none")
    else:
        raise _refuse(f"{name}.act", "GELU, which ShiftGELU stands for", act)
    return QuantMLP(_linear(f"{name}.fc1", module.fc1), _linear(f"{name}.fc2", module.fc2), bits, approximate)


def _scale(name: str, module: nn.Module) -> torch.Tensor | None:
    """Layer scale's gamma."""
    if module is None or isinstance(module, nn.Identity):
        return None
    if not _is(module, "LayerScale"):
        raise _refuse(name, "LayerScale or an identity", module)
    return module.gamma


def _vit_block(name: str, block: nn.Module, bits: IntegerBits) -> QuantBlock:
    if not _is(block, "Block"):
        raise _refuse(name, "timm's Block", block)
    attn = block.attn
    if not _is(attn, "Attention") or getattr(attn, "gate", None) is not None:
        raise _refuse(f"{name}.attn", "timm's Attention without a gate", attn)
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise _refuse(f"{name}.attn.norm", "no norm before the projection", attn.norm)
    norms = [_norm(f"{name}.attn.{n}", getattr(attn, n, None)) for n in ("q_norm", "k_norm")]
    made = QuantAttention(
        _linear(f"{name}.attn.qkv", attn.qkv), _linear(f"{name}.attn.proj", attn.proj), attn.num_heads, attn.head_dim,
        bits, *norms,
    )  # fmt: skip
    return _block(name, block, made, bits)


def _block(name, block, attn, bits):
    mlp = _mlp(f"{name}.mlp", block.mlp, bits)
    norm1, norm2 = (_norm(f"{name}.{n}", getattr(block, n)) for n in ("norm1", "norm2"))
    for n, norm in (("norm1", norm1), ("norm2", norm2)):
        if norm is None:
            raise _refuse(f"{name}.{n}", "a LayerNorm", nn.Identity())
    scales = [_scale(f"{name}.{n}", getattr(block, n, None)) for n in ("ls1", "ls2")]
    return QuantBlock(norm1, attn, norm2, mlp, bits, *scales)


def _head(name: str, module: nn.Module, bits: IntegerBits) -> QuantLinear:
    return QuantLinear.from_linear(_linear(name, module), bits.weights)


def _vit(model: nn.Module, bits: IntegerBits) -> QuantViT:
    distilled = _is(model, "VisionTransformerDistilled")
    if getattr(model, "dynamic_img_size", False):
        raise _refuse("model", "of a fixed image size", "dynamic_img_size=True")
    embed = model.patch_embed
    if not isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity) or not hasattr(embed, "proj"):
        raise _refuse("patch_embed", "timm's PatchEmbed without a norm", embed)
    if getattr(model, "attn_pool", None) is not None:
        raise _refuse("attn_pool", "none", model.attn_pool)
    if not distilled and model.global_pool not in ("token", "avg"):
        raise _refuse("global_pool", "token or avg", repr(model.global_pool))
    names = ("cls_token", "dist_token") if distilled else ("cls_token", "reg_token")
    prefix = {n: getattr(model, n) for n in names if getattr(model, n, None) is not None}
    count = sum(t.shape[1] for t in prefix.values())
    if distilled:
        pooling = (0, 2, "distilled")
    elif model.global_pool == "token":
        pooling = (0, 1, "token")
    else:
        pooling = (0 if getattr(model, "pool_include_prefix", False) else count, None, "mean")
    head = _head("head", model.head, bits)
    dist = _head("head_dist", model.head_dist, bits) if distilled else None
    norm, fc_norm = _norm("norm", model.norm), _norm("fc_norm", getattr(model, "fc_norm", None))
    return QuantViT(
        _conv("patch_embed.proj", embed.proj, bits), prefix, model.pos_embed,
        [_vit_block(f"blocks.{i}", block, bits) for i, block in enumerate(model.blocks)], bits, embed.img_size,
        getattr(model, "no_embed_class", False), pooling, _norm("norm_pre", getattr(model, "norm_pre", None)), norm,
        fc_norm, head, dist,
    )  # fmt: skip


def _swin_block(name: str, block: nn.Module, bits: IntegerBits) -> QuantBlock:
    if not _is(block, "SwinTransformerBlock"):
        raise _refuse(name, "timm's SwinTransformerBlock", block)
    attn = block.attn
    if not _is(attn, "WindowAttention"):
        raise _refuse(f"{name}.attn", "timm's WindowAttention", attn)
    if getattr(block, "dynamic_mask", False):
        raise _refuse(name, "of a fixed image size", "dynamic_mask=True")
    made = QuantAttention(
        _linear(f"{name}.attn.qkv", attn.qkv), _linear(f"{name}.attn.proj", attn.proj), attn.num_heads,
        attn.qkv.out_features // (3 * attn.num_heads), bits, window=block.window_size, shift=block.shift_size,
        table=attn.relative_position_bias_table, index=attn.relative_position_index, mask=block.attn_mask,
    )  # fmt: skip
    return _block(name, block, made, bits)


def _swin(model: nn.Module, bits: IntegerBits) -> QuantSwin:
    embed, head = model.patch_embed, model.head
    if model.global_pool != "avg" or not _is(head, "ClassifierHead") or head.use_conv:
        raise _refuse("head", "a ClassifierHead with global_pool avg and a linear layer", head)
    stages = []
    for i, stage in enumerate(model.layers):
        merging = stage.downsample
        if isinstance(merging, nn.Identity):
            merging = None
        elif not _is(merging, "PatchMerging"):
            raise _refuse(f"layers.{i}.downsample", "timm's PatchMerging", merging)
        else:
            reduction = _head(f"layers.{i}.downsample.reduction", merging.reduction, bits)
            merging = QuantPatchMerging(_norm(f"layers.{i}.downsample.norm", merging.norm), reduction, bits)
        blocks = [_swin_block(f"layers.{i}.blocks.{j}", block, bits) for j, block in enumerate(stage.blocks)]
        stages.append(QuantStage(merging, blocks))
    fc = _head("head.fc", head.fc, bits)
    norm = _norm("norm", model.norm)
    if norm is None:
        raise _refuse("norm", "a LayerNorm", model.norm)
    return QuantSwin(
        _conv("patch_embed.proj", embed.proj, bits), _norm("patch_embed.norm", embed.norm), stages, norm, fc, bits,
        embed.img_size,
    )  # fmt: skip


# ---- calibration -----------------------------------------------------------------------------------------------------


def _image_of(batch: object, device, dtype) -> torch.Tensor:
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()))
    elif isinstance(batch, (tuple, list)):
        batch = batch[0]
    return batch.to(device, dtype)


@contextlib.contextmanager
def _as_float(model: QuantViT | QuantSwin):
    """The model computes what the float model does."""
    was = model.input_act.quantising
    model.float_()
    try:
        yield
    finally:
        model.input_act.quantising = was


def calibrate(
    model: QuantViT | QuantSwin,
    batches: Iterable,
    total: int | None = None,
    *,
    limit: int | None = None,
    method: str = "max",
    percentile: float = PERCENTILE,
    bar: bool = True,
) -> None:
    """Ranges of a model of :func:`prepare_integer` from its float activations on batches, and the best n of its
    Shiftmax and ShiftGELU, in place; whatever it had is forgotten.

    Args:
        batches: images, (images, ...) or a mapping that begins with them. total: how many, for the bar, where they have
            no length. limit: how many of them to use; None: all.
        method, percentile: as of :func:`prepare_integer`. bar: show one.

    Raises:
        ValueError: no batch; NaN or infinity in an activation, and the message names it.
    """
    _checks.index_of("to_integer", "method", method, METHODS)
    if limit is not None:
        _checks.as_int("to_integer", "batches", limit, (1, 2**62))
    if not 0 < percentile <= 100:
        raise _checks.value_error("to_integer", "percentile", "above 0 and at most 100", percentile)
    parameter = next(model.parameters())
    total = len(batches) if hasattr(batches, "__len__") else total
    if limit is not None:
        total = limit if total is None else min(limit, total)
    done = 0
    with calibrating(model, method, percentile), evaluating(model), _as_float(model):
        # zip stops before it takes a batch too many
        numbered = zip(range(limit), batches, strict=False) if limit is not None else enumerate(batches)
        for _, batch in progress_bar(numbered, "calibrating", total, bar):
            model(_image_of(batch, parameter.device, parameter.dtype))
            done += 1
        if not done:
            raise _checks.value_error("to_integer", "calibration", "at least one batch", "none: empty, or used before")
        for name, m in model.named_modules():
            if isinstance(m, QuantAct):
                _check_seen(name, m)


def _check_seen(name: str, act: QuantAct) -> None:
    try:
        act.seen()
    except ValueError:
        expected = "such that activations are finite"
        raise _checks.value_error("to_integer", "calibration", expected, f"NaN or infinity in {name}") from None


@contextlib.contextmanager
def calibrating(module: nn.Module, method: str = "max", percentile: float = PERCENTILE):
    """What the module computes meanwhile, in floating point, sets its ranges, and then the n of its exponentials."""
    acts = [m for m in module.modules() if isinstance(m, QuantAct)]
    exponentials = [m for m in module.modules() if isinstance(m, integer._Exponential)]
    for act in acts:
        act.calibrate(method)
    for m in exponentials:
        m.samples = []
    try:
        yield
        for act in acts:
            act.calibrated(method, percentile)
        for m in module.modules():
            if isinstance(m, QuantAttention):
                m.softmax.choose_n(m.scores_act.scale[0])
            elif isinstance(m, QuantMLP):
                m.act.choose_n(m.fc1_act.scale[0])
    finally:
        for act in acts:
            act.histogram, act.calibrating = None, False
        for m in exponentials:
            m.samples = None


# ---- what was done ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class IntegerRow:
    """One layer: `scale` is what a step of its result is worth (the largest, of several), `error` the norm of what the
    result differs by relative to the float model's, `weight_error` that of rounded weights; `saturated` the share of
    results at the ends of the range. None: not measured, or there is none."""

    name: str
    kind: str
    bits: int
    scale: float | None = None
    error: float | None = None
    weight_error: float | None = None
    saturated: float | None = None
    n: int | None = None  # of Shiftmax or ShiftGELU


@dataclasses.dataclass
class IntegerReport:
    """What `effvit.to_integer` made: a row for every layer, and the error of the logits."""

    rows: list[IntegerRow]
    error: float | None  # of the logits, relative to the float model's
    cosine: float | None  # of logits, mean over images

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        head = ("layer", "kind", "bits", "scale", "error", "weight error", "saturated", "")
        rows = (
            (r.name, r.kind, str(r.bits), number(r.scale), number(r.error), number(r.weight_error),
             "-" if r.saturated is None else f"{r.saturated:.3%}", "" if r.n is None else f"n = {r.n}")
            for r in self.rows
        )  # fmt: skip
        lines = table(head, rows)
        cosine = "-" if self.cosine is None else f"{self.cosine:.6f}"
        lines.append(f"logits: error {number(self.error)}, cosine {cosine}; errors: norm of the difference from float")
        return "\n".join(lines)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@torch.no_grad()
def _report(model, images: torch.Tensor | None) -> IntegerReport:
    rows: dict[str, IntegerRow] = {}
    exact: dict[str, torch.Tensor] = {}
    logits: list[torch.Tensor] = []
    for name, m in model.named_modules():
        if isinstance(m, LAYERS):
            rows[name] = row = IntegerRow(name, type(m).__name__, getattr(m, "bits", 32))
            if isinstance(m, QuantAct):
                row.scale = float(m.scale.max())
            elif isinstance(m, (QuantLinear, QuantConv2d)):
                q, _, scale = m.integers(torch.ones((), dtype=torch.float64, device=m.weight.device))
                row.weight_error = _relative(integer.steps(q, scale[:, None], torch.float64), m.weight.flatten(1))
            elif isinstance(m, integer._Exponential):
                row.n = int(m.n) or m.usual_n

    def measure(name, m, out):
        if out.integers is None:
            exact[name] = out.value
            return
        row = rows[name]
        row.scale, row.error = float(out.scale.abs().max()), _relative(out.value, exact.pop(name))
        if isinstance(m, QuantAct):
            low, high = integer.ends(m.bits)
            row.saturated = float(((out.integers <= low) | (out.integers >= high)).double().mean())

    if images is None:
        return IntegerReport(list(rows.values()), None, None)
    layers = dict(model.named_modules())
    handles = [
        layers[name].register_forward_hook(lambda m, args, out, name=name: measure(name, m, out)) for name in rows
    ]
    try:
        with evaluating(model):
            with _as_float(model):
                logits.append(model(images))
            logits.append(model(images))
    finally:
        for handle in handles:
            handle.remove()
    cosine = torch.nn.functional.cosine_similarity(logits[1].double(), logits[0].double(), -1).mean()
    return IntegerReport(list(rows.values()), _relative(logits[1], logits[0]), float(cosine))


# ---- the public functions --------------------------------------------------------------------------------------------


def _bits(bits: object) -> IntegerBits:
    """What `bits` says."""
    if bits is None or isinstance(bits, IntegerBits):
        return IntegerBits() if bits is None else bits
    if not isinstance(bits, Mapping):
        expected = "IntegerBits, a mapping of its fields or None"
        raise _checks.type_error("to_integer", "bits", expected, type(bits).__name__)
    names = [field.name for field in dataclasses.fields(IntegerBits)]
    for name in bits:
        _checks.index_of("to_integer", "a name in bits", name, names)
    return IntegerBits(**bits)


def prepare_integer(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    bits: IntegerBits | Mapping | None = None,
    batches: int | None = None,
    method: str = "max",
    percentile: float = PERCENTILE,
    progress: bool = True,
) -> QuantViT | QuantSwin:
    """A copy of a timm model that computes, and trains with, the integers of :func:`to_integer`'s.

    Args:
        model: timm's VisionTransformer (ViT, DeiT, distilled DeiT; layer scale, qk norm, registers, a norm before the
            blocks) or SwinTransformer, of a fixed image size. Dropout and stochastic depth are left out.
        calibration: batches to find ranges and the n of Shiftmax and ShiftGELU on: images, (images, ...) or a mapping
            that begins with them. None: the first batch of training sets them, and ranges follow those after it; or
            :func:`effvit.integer_models.calibrate` later.
        bits: :class:`effvit.layers.IntegerBits`, or a mapping of its fields.
        batches: how many of them to use; None: all.
        method: "max": ranges hold all that was seen. "percentile": of what is in 8 bits or fewer, `percentile` percent
            of |x|. "mse": the range of least mean squared error.
        progress: show a bar.

    Returns:
        A module like the model: float images [B, C, H, W] to float logits, gradients straight through. Its parameters
        have the names of timm's, and are frozen where those are. `deployed()`, or :func:`to_integer`, makes the
        integer-only model.

    Raises:
        TypeError: bits is no IntegerBits, mapping or None.
        ValueError: a module has no integer-only form, or an activation is not finite; the message names it.
    """
    bits = _bits(bits)
    if isinstance(model, (QuantViT, QuantSwin)):
        raise _checks.value_error("prepare_integer", "model", "one of timm's", "one that is prepared already")
    if _is_timms(model, "VisionTransformer", "VisionTransformerDistilled"):
        made = _vit(model, bits)
    elif _is_timms(model, "SwinTransformer"):
        made = _swin(model, bits)
    else:
        raise _refuse("model", "timm's VisionTransformer, VisionTransformerDistilled or SwinTransformer", model)
    parameter = next(model.parameters())
    made = made.to(parameter.device).train(model.training)
    trained = {name.replace(_MASKED, "weight"): p.requires_grad for name, p in model.named_parameters()}
    for name, p in made.named_parameters():
        p.requires_grad_(trained.get(name, p.requires_grad))
    if calibration is not None:
        calibrate(made, calibration, limit=batches, method=method, percentile=percentile, bar=progress)
    return made


def to_integer(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    bits: IntegerBits | Mapping | None = None,
    batches: int | None = None,
    method: str = "max",
    percentile: float = PERCENTILE,
    progress: bool = True,
    verbose: bool = False,
) -> tuple[IntegerViT | IntegerSwin, IntegerReport]:
    """An integer-only model of a timm ViT, DeiT or Swin: int8 images to integer logits, without floating point.

    Args:
        model: as :func:`prepare_integer` takes it; or what that made, trained: then the result computes the integers
            of its training, and bits, batches, method and percentile must be left out.
        calibration: batches to find ranges on, as in :func:`prepare_integer`. For a trained model it only serves the
            report, and may be None.
        bits, batches, method, percentile, progress: as in :func:`prepare_integer`.
        verbose: print the report.

    Returns:
        (model, report). `model.quantize_input(images)` is what `model(...)` takes, `model.predict(images)` does both
        and returns float logits. The model is float's copy: the original is unchanged.

    Raises:
        TypeError: bits is no IntegerBits, mapping or None.
        ValueError: no calibration; a module has no integer-only form, or an activation is not finite, and the message
            names it.

    Source: I-ViT (arXiv:2207.01405).
    """
    images = None
    if isinstance(model, (QuantViT, QuantSwin)):
        defaults = {"bits": (bits, None), "batches": (batches, None), "method": (method, "max"),
                    "percentile": (percentile, PERCENTILE)}  # fmt: skip
        for name, (given, default) in defaults.items():
            if given != default:
                raise _checks.value_error("to_integer", name, "left out: the model is prepared and trained", given)
        trained = model
    else:
        if calibration is None:
            raise _checks.value_error("to_integer", "calibration", "batches of images", None)
        trained = prepare_integer(model, bits=bits)
    if calibration is not None:
        rest = iter(calibration)
        first = list(itertools.islice(rest, 1))
        if trained is not model:
            total = len(calibration) if hasattr(calibration, "__len__") else None
            again = itertools.chain(first, rest)
            calibrate(trained, again, total, limit=batches, method=method, percentile=percentile, bar=progress)
        parameter = next(trained.parameters())
        images = _image_of(first[0], parameter.device, parameter.dtype)[:IMAGES] if first else None
    report = _report(trained, images)
    if verbose:
        print(report)
    return trained.deployed().eval(), report
