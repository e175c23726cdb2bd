"""effvit.patch(model): run a model's attention on effvit's operators, checked against the original, and reversibly."""

from __future__ import annotations

import collections
import copy
import dataclasses

import torch
from torch.utils._pytree import tree_flatten, tree_map

from ._report import class_name, grouped, number, table
from .adapters import Adapter, Fused, adapters
from .layers.int8 import QATLinear, QuantisedLinear
from .quantize import effective_weight
from .reference.int8_linear import ACTIVATIONS


@dataclasses.dataclass
class Row:
    """One module of the report. Errors are maxima, relative to the largest output of a token; None if not verified."""

    name: str
    module: str
    replaced: bool
    detail: str = ""  # geometry of a replaced module, or why it was not replaced
    dtype: str = ""
    error_original: float | None = None
    error_effvit: float | None = None
    bound: float | None = None
    ok: bool = True


@dataclasses.dataclass
class Report:
    """What `effvit.patch` did: rows of replaced modules and of attention that was left alone, with reasons."""

    rows: list[Row]

    @property
    def replaced(self) -> list[Row]:
        return [r for r in self.rows if r.replaced]

    @property
    def not_replaced(self) -> list[Row]:
        return [r for r in self.rows if not r.replaced]

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        head = ("module", "class", "dtype", "error before", "after", "bound", "")
        lines = table(
            head,
            (
                (r.name, r.module, r.dtype, number(r.error_original), number(r.error_effvit), number(r.bound), r.detail)
                for r in self.replaced
            ),
        )
        if lines:
            lines.append(
                "errors: largest |y - y64| relative to its token's largest |y64|, y64 being the original in float64; "
                "bound: 2 * before + 2 * eps"
            )
        lines += grouped("not replaced", ((r.name, r.module, r.detail) for r in self.not_replaced))
        return "\n".join(lines)


class VerificationError(RuntimeError):
    """A replacement disagrees with the original. `report` holds the errors; the model was left as it was."""

    def __init__(self, message, report):
        super().__init__(message)
        self.report = report


def compare(original, effvit, exact):
    """The project's rule (effvit._accuracy) on two outputs and a float64 one: (before, after, bound, ok)."""
    from ._accuracy import measure

    exact = exact.double()
    try:
        after = measure(effvit, exact, original)
    except AssertionError:  # another shape or not floating point
        return float("nan"), float("inf"), float("nan"), False
    before = measure(original, exact)
    return before.max_error, float("inf") if after.problem else after.max_error, after.max_allowed, after.ok


def _clone(module):
    """A copy with parameters of its own and without hooks: they must neither fire nor be copied."""
    memo = {}
    for m in module.modules():
        for name, value in vars(m).items():
            if "hook" in name and isinstance(value, dict):
                memo[id(value)] = collections.OrderedDict()
    copied = copy.deepcopy(module, memo)
    for m in list(copied.modules()):
        for name, child in m.named_children():
            if hasattr(child, "_weight_bias"):
                setattr(m, name, _dequantised(child))
            elif isinstance(child, (QuantisedLinear, QATLinear)):
                setattr(m, name, _Unrounded(child))
    return copied.eval()


def _dequantised(linear):
    """A quantised linear layer with the same weights in floating point: what is verified also runs in float64."""
    weight, bias = linear._weight_bias()
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    with torch.no_grad():
        plain.weight.copy_(weight.dequantize())
        if bias is not None:
            plain.bias.copy_(bias)
    return plain


class _Unrounded(torch.nn.Linear):
    """An int8 layer with the same weights and x in floating point: rounding makes steps of the smallest differences."""

    def __init__(self, layer):
        trained = isinstance(layer, QATLinear)
        like = layer.linear if trained else layer
        dtype = like.weight.dtype if trained else layer.dtype
        with torch.no_grad():
            weight = effective_weight(layer, None).to(dtype)
        super().__init__(layer.in_features, layer.out_features, False, weight.device, dtype)
        self.weight, self.bias, self.activation = torch.nn.Parameter(weight), like.bias, layer.activation
        divides = trained and layer.smooth is not None and not layer.folded
        self.register_buffer("factors", layer.smooth.reciprocal() if divides else None if trained else layer.smooth)

    def forward(self, x):
        x = x if self.factors is None else (x * self.factors).to(x.dtype)
        return ACTIVATIONS[self.activation](super().forward(x))


def _float_parameter(module):
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            return t
    return torch.empty(())


def _verify(module, adapter, generator):
    """(dtype, error before, error after, bound, ok) of one module on random input at its own resolution."""
    original, fused = _clone(module), _clone(module)
    like = _float_parameter(original).detach()  # which double() below does not reach
    adapter.swap(fused)
    with torch.device("cpu"):  # whatever the default is, the generator is there
        inputs = [x.to(like.device, like.dtype) for x in adapter.sample(module, generator)]
    with torch.no_grad(), torch.device(like.device), torch.autocast(like.device.type, enabled=False):
        before, after = adapter.run(original, *inputs), adapter.run(fused, *inputs)
        exact = adapter.run(original.double(), *(x.double() for x in inputs))
    return (str(like.dtype).removeprefix("torch."), *compare(before, after, exact))


def _verify_model(model, chosen, example):
    """The same for the whole model on `example`, a tensor or a tuple of positional arguments."""
    args = example if isinstance(example, tuple) else (example,)
    names = {name for name, _, _ in chosen}
    original, fused = _clone(model), _clone(model)
    like = _float_parameter(original).detach()  # which double() below does not reach
    found = adapters()
    for name, module in list(fused.named_modules()):
        if name in names:
            found[type(module)].swap(module)

    def tensors(outputs):
        return [t for t in tree_flatten(outputs)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    with torch.no_grad():
        before, after = tensors(original(*args)), tensors(fused(*args))
        with torch.autocast(like.device.type, enabled=False):
            exact = tensors(original.double()(*tree_map(double, args)))
    compared = [compare(*t) for t in zip(before, after, exact, strict=True)]
    worst = max(compared, key=lambda c: (not c[3], c[1] / c[2]))
    return (str(like.dtype).removeprefix("torch."), *worst)


def _scan(model):
    """(modules to replace with their adapters, rows of the others that matter)."""
    found = adapters()
    chosen: list[tuple[str, torch.nn.Module, Adapter]] = []
    rows, done = [], ()
    for name, module in model.named_modules():
        if name.startswith(done):
            continue
        cls = type(module)
        adapter, detail = found.get(cls), None
        if adapter is not None:
            detail = adapter.reason_not(module)
            if detail is None:
                chosen.append((name, module, adapter))
        elif issubclass(cls, Fused):
            detail = "already patched"
        else:
            base = next((c for c in found if isinstance(module, c)), None)
            if base is not None:
                detail = f"a subclass of {base.__qualname__}, which may compute something else"
            elif any(w in cls.__name__.lower() for w in ("attention", "attn")):
                detail = "no effvit adapter for this class"
        if adapter is not None or detail is not None:
            done = (*done, f"{name}." if name else "")
        if detail is not None:
            rows.append(Row(name, class_name(module), False, detail))
    return chosen, rows


def patch(model: torch.nn.Module, verify: bool = True, example=None, verbose: bool = True) -> Report:
    """Replace the attention of `model`, in place, by effvit's operators.

    Now: of timm, the blocks of Swin v1, the linear attention of EfficientViT (MIT), and the attention of ViT, DeiT and
    other models on timm's `Attention`, on the CPU.

    Parameters, buffers and hooks stay the same objects, so a state_dict, an optimizer, DDP, deepcopy and pickle remain
    valid, before and after; `effvit.unpatch(model)` is the exact way back. Patch before torch.compile and before FSDP.

    Args:
        model: any module; every supported block inside it is replaced, whatever the model around it is.
        verify: run every block, original and replaced, on random input at its own resolution, dtype and device, and
            raise VerificationError if the replacement's error against the original in float64 exceeds twice the
            original's own plus two roundings. The model is changed only after every block has passed. Layers that are
            int8 already take part with the same weights in floating point.
        example: with verify, also an input of the whole model (a tensor or a tuple of arguments) to compare on.
        verbose: print the report.

    Returns:
        A Report of the replaced modules with their errors, and of the attention that was not replaced, with reasons.
        Patching a patched model does nothing.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: nothing in the model can be replaced and nothing has been; the message names what was found.
        VerificationError: a replacement disagrees; the model is as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"effvit.patch: model must be a torch.nn.Module, got {type(model).__name__}")
    chosen, others = _scan(model)
    if not chosen and not any(r.detail == "already patched" for r in others):
        kinds = collections.Counter((r.module, r.detail) for r in others)
        what = "; ".join(f"{n} x {module}: {detail}" for (module, detail), n in kinds.items()) or "no attention module"
        raise ValueError(
            "effvit.patch: model must contain a block that effvit replaces (timm's Swin v1 SwinTransformerBlock, "
            f"EfficientViT (MIT) LiteMLA, ViT Attention), got {class_name(model)} with {what}"
        )
    rows, wrong = [], []
    generator = torch.Generator().manual_seed(0)
    for name, module, adapter in chosen:
        row = Row(name, class_name(module), True, adapter.describe(module))
        if verify and _float_parameter(module).is_meta:
            raise ValueError("effvit.patch: model must have materialised parameters to be verified, got meta tensors")
        if verify:
            row.dtype, row.error_original, row.error_effvit, row.bound, row.ok = _verify(module, adapter, generator)
            if not row.ok:
                wrong.append(row)
        rows.append(row)
    if verify and example is not None and chosen:
        row = Row("(whole model)", class_name(model), True, "on the example")
        row.dtype, row.error_original, row.error_effvit, row.bound, row.ok = _verify_model(model, chosen, example)
        if not row.ok:
            wrong.append(row)
        rows.append(row)
    report = Report(rows + others)
    if wrong:
        raise VerificationError(
            f"effvit.patch: {len(wrong)} of {len(rows)} replacements disagree with the original, the model is "
            f"unchanged\n{Report(wrong)}",
            report,
        )
    for _, module, adapter in chosen:
        adapter.swap(module)
    if verbose:
        print(report)
    return report


def _unfused(cls):
    """The class that `patch` found, below what was put on it since: parametrisations and fully_shard derive classes."""
    if "original" in vars(cls):
        return cls.original
    bases = tuple(_unfused(b) if issubclass(b, Fused) else b for b in cls.__bases__)
    body = {name: x for name, x in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__.replace("Fused", "", 1), bases, body)


def unpatch(model: torch.nn.Module, verbose: bool = True) -> list[str]:
    """Undo `effvit.patch` exactly, in place. Returns the names of the restored modules; none if there were none."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"effvit.unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    restored = []
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            module.__class__ = _unfused(type(module))
            restored.append(name)
    if verbose and not restored:
        print(f"effvit.unpatch: nothing to undo, {class_name(model)} is not patched")
    return restored
