"""Which linear layers may become other modules, and what is checked before anything changes."""

from __future__ import annotations

import dis
import fnmatch
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from .layers.int8 import QATLinear
from .ops import _checks
from .ops._int8 import MAX_K

# ---- whose weight something else reads -------------------------------------------------------------------------------


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _weights_read(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """("attn", "qkv") for every `self.attn.qkv.weight` of a function's code, whatever self is called."""
    path = None
    for step in dis.get_instructions(code):
        if "LOAD_FAST" in step.opname or "LOAD_DEREF" in step.opname:
            path = ()
        elif step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and path is not None:
            if step.argval == "weight" and path:
                yield path
            path = (*path, step.argval)
        elif not step.opname.startswith(("CACHE", "COPY_FREE_VARS")):
            path = None


def _paths(cls: type) -> set[tuple[str, ...]]:
    """The paths of modules whose `weight` the class reads in `forward` or in methods that this one names."""
    own = [c for c in cls.__mro__ if c not in (nn.Module, object)]
    names, done, found = {"forward"}, set(), set()
    while names - done:
        name = (names - done).pop()
        done.add(name)
        for c in own:
            f = vars(c).get(name)
            f = f.fget if isinstance(f, property) else getattr(f, "__wrapped__", f)
            if isinstance(f, types.FunctionType):
                for code in _codes(f.__code__):
                    found.update(_weights_read(code))
                    names.update(code.co_names)
    return found


def readers(model: nn.Module) -> dict[nn.Module, str]:
    """{linear layer: the class of a module that reads its weight itself}, by the code of the classes' forwards."""
    found, paths = {}, {}
    for module in model.modules():
        cls = type(module)
        if cls not in paths:
            paths[cls] = _paths(cls)
        for path in paths[cls]:
            layer = module
            for name in path:
                layer = getattr(layer, "_modules", {}).get(name)
            if isinstance(layer, nn.Linear):
                found.setdefault(layer, cls.__name__)
    return found


# ---- what a layer is -------------------------------------------------------------------------------------------------


def not_plain(linear: nn.Linear) -> str | None:
    """Why a linear layer cannot be taken for its weight and bias: a hook makes one of them before every call."""
    kept = {"bias"} if parametrize.is_parametrized(linear) else {"weight", "bias"}
    made = kept - set(linear._parameters)
    if made:
        return (
            f"its {min(made)} is not a parameter but made anew in every call, as by torch.nn.utils.prune or weight_norm"
        )
    return None


def needs_floats(model: nn.Module) -> Callable[[nn.Linear], str | None]:
    """Why a linear layer of this model cannot become a module of another kind."""
    read = readers(model)

    def reason(linear):
        if linear in read:
            return f"{read[linear]} reads its weight itself"
        return "its forward has been replaced on the instance" if "forward" in vars(linear) else None

    return reason


def too_large(kind: str, linear: nn.Linear, algorithm: str) -> str | None:
    """Why a layer has the wrong size for a kind, beyond what 2:4 asks of its rows."""
    if kind == "sparse24_int8" and algorithm == "transposable" and linear.out_features % 4:
        return f"out_features {linear.out_features} is no multiple of 4, for a transposable mask"
    if kind not in ("float", "block_sparse") and linear.in_features > MAX_K:
        return f"in_features {linear.in_features} is above {MAX_K}: the int32 sums could overflow"
    return None


def check_finite(name: str, linear: nn.Linear) -> None:
    """What the layers check too, which do not know their names."""
    if not bool(torch.isfinite(linear.weight.detach()).all()):
        raise _checks.value_error("quantize_", f"the weight of {name}", "finite", "NaN or infinity")


def check_collections(layers: object, candidates: object) -> None:
    if not isinstance(layers, Mapping):
        raise _checks.type_error("quantize_", "layers", "a mapping of patterns to kinds", type(layers).__name__)
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        raise _checks.type_error("quantize_", "candidates", "a sequence of kinds", type(candidates).__name__)
    if not candidates:
        raise _checks.value_error("quantize_", "candidates", "at least one kind", "none")


def check_patterns(patterns: Mapping[str, str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise _checks.value_error(
                "quantize_", f"layers[{pattern!r}]", "a linear layer's name or pattern", "no match"
            )


def unfinished(layer: QATLinear) -> str:
    """For a report: its mask still lets through what the layer that it becomes leaves out."""
    masks = layer.linear.parametrizations.weight if parametrize.is_parametrized(layer.linear, "weight") else ()
    decay = max((getattr(mask, "decay", 0.0) for mask in masks), default=0.0)
    return f", before its mask's decay was 0: {decay:.3g}" if decay > 0 else ""


def deployed(name: str, layer: QATLinear) -> nn.Module:
    """layer.deployed(), whose errors say which layer it was."""
    try:
        return layer.deployed()
    except ValueError as e:
        raise ValueError(f"{e}, in {name}") from e


def moved(original: nn.Module, module: nn.Module, device: torch.device) -> nn.Module:
    """The original of a module that stood in for it, on the device and in the dtype that this one now has."""
    before = getattr(original, "weight", None)
    now = getattr(module, "dtype", None)  # of int8 layers
    if now is None:
        now = next((t.dtype for t in module.parameters() if t.is_floating_point()), None)
    cast = isinstance(before, torch.Tensor) and now is not None and now != before.dtype
    return original.to(device, now) if cast else original.to(device)


# ---- files -----------------------------------------------------------------------------------------------------------


def check_materialised(function: str, model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"effvit.{function}: model must have materialised parameters, got meta tensors")


def check_saveable(model: nn.Module) -> None:
    """A float model of the same architecture could not load what training needs."""
    from .sparsify import is_sparsified

    for what, first, here in (
        ("QATLinear layers", "effvit.convert_(model)", lambda m: isinstance(m, QATLinear)),
        ("masks", "effvit.unsparsify_(model, keep_zeros=True)", is_sparsified),
    ):
        names = [name for name, m in model.named_modules() if here(m)]
        if names:
            raise ValueError(
                f"effvit.save_quantized: model must have no {what} (call {first} first), got {len(names)} "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            )


def header(safetensors: types.ModuleType, path: object) -> tuple[dict, dict[str, list[int]]]:
    """(what effvit.save_quantized wrote about the layers, {name: shape of the tensor}) of a file."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get("effvit")
            shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    except safetensors.SafetensorError as e:
        raise ValueError(f"effvit.load_quantized_: path must be a safetensors file, got {path}: {e}") from e
    if text is None:
        raise ValueError(f"effvit.load_quantized_: path must be a file of effvit.save_quantized, got {path}")
    plan = json.loads(text)
    if plan.get("version") != 1:
        raise ValueError(f"effvit.load_quantized_: path must be of version 1, got {plan.get('version')}")
    return plan, shapes


def check_options(name: str, linear: nn.Linear, options: dict) -> None:
    """The layer of a file has the sizes of the one that it is to replace."""
    own = {k: getattr(linear, k) for k in ("in_features", "out_features")} | {"bias": linear.bias is not None}
    for key, value in own.items():
        if options.get(key) != value:
            raise ValueError(
                f"effvit.load_quantized_: model must have a Linear {name} with {key} {options.get(key)}, got {value}"
            )


def check_tensors(
    model: nn.Module, replaced: dict[nn.Module, nn.Module], shapes: dict[str, list[int]], strict: bool
) -> None:
    """The tensors of a file are those the model will have. Of tensors that share memory a file has one."""
    own = model.state_dict(keep_vars=True)
    for name, m in model.named_modules(remove_duplicate=False):
        if m in replaced:
            own = {k: t for k, t in own.items() if not k.startswith(f"{name}.")}
            own |= replaced[m].state_dict(prefix=f"{name}.", keep_vars=True)

    def memory(t):
        return t.untyped_storage().data_ptr(), t.storage_offset(), t.shape

    given = {memory(own[name]) for name in shapes if name in own}
    wrong = [
        f"{name} {list(own[name].shape)} where the file has {list(shape)}"
        for name, shape in shapes.items()
        if name in own and list(own[name].shape) != list(shape)
    ]
    if strict:
        wrong += [f"no {name}" for name in shapes if name not in own]
        wrong += [f"{name}, which the file has not" for name, t in own.items()
                  if name not in shapes and memory(t) not in given]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"effvit.load_quantized_: model must have the file's tensors, got {', '.join(wrong[:3])}{more}"
        )
