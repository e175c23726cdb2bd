"""Attention of a model on int8 products, in place and reversibly: the `attention` option of effvit.quantize_."""

from __future__ import annotations

import fnmatch
import importlib
import sys

from torch import nn

from ._report import Row, class_name
from .ops import _checks

CLASS = "_effvit_attention"  # of a module whose class was replaced: (the one before, or None where it was not kept)


def _family():
    """The classes of timm, where it has been imported: a model of a library cannot exist without it."""
    return importlib.import_module("effvit.adapters.int8_timm") if "timm" in sys.modules else None


def find(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name whose attention is on int8 products."""
    return {name: m for name, m in model.named_modules() if CLASS in vars(m)}


def scan(model: nn.Module, skip) -> tuple[dict[str, nn.Module], list[Row]]:
    """(modules to change by name, rows of attention that is left alone): patterns of names to skip.

    ValueError: there is neither, nor any that was changed before.
    """
    family, chosen, rows = _family(), {}, []
    skip = [skip] if isinstance(skip, str) else skip
    known = tuple(family.INT8) if family else ()
    for name, module in model.named_modules():
        if not isinstance(module, known) or CLASS in vars(module):
            continue
        pattern = next((p for p in skip if fnmatch.fnmatchcase(name, p)), None)
        if pattern is not None:
            rows.append(Row(name, class_name(module), False, f"skipped by the pattern {pattern!r}"))
        elif type(module) in family.PATCHED:
            rows.append(Row(name, class_name(module), False, family.PATCHED[type(module)]))
        elif type(module) not in family.INT8:
            base = next(cls for cls in known if isinstance(module, cls)).__name__
            rows.append(Row(name, class_name(module), False, f"a subclass of {base}, which may compute something else"))
        else:
            reason = family.reason_not(module)
            if reason is None:
                chosen[name] = module
            else:
                rows.append(Row(name, class_name(module), False, reason))
    if not (chosen or rows or find(model)):
        expected = "int8 for a model with timm's Attention or WindowAttention"
        raise _checks.value_error("quantize_", "attention", expected, class_name(model))
    return chosen, rows


def named(model: nn.Module, names) -> dict[str, nn.Module]:
    """The modules that a file of a quantised model names."""
    family, modules = _family(), dict(model.named_modules())
    for name in names:
        module = modules.get(name)
        if family is None or type(module) not in family.INT8:
            given = "no such module" if module is None else class_name(module)
            raise ValueError(f"effvit.load_quantized_: model must have an attention {name} of timm's, got {given}")
    return {name: modules[name] for name in names}


def change_(modules: dict[str, nn.Module], keep: bool) -> list[Row]:
    """Rows of the report. A module becomes the other by its class: parameters, hooks and state_dict stay."""
    family, rows = _family() if modules else None, []
    for name, module in modules.items():
        before = type(module)
        vars(module)[CLASS] = (before if keep else None,)
        module.__class__ = family.INT8[before]
        rows.append(
            Row(name, class_name(family.INT8[before].original), True, f"{type(module).__name__} int8_attention")
        )
    return rows


def restore_(model: nn.Module) -> list[str]:
    """The classes before."""
    found = find(model)
    for module in found.values():
        (module.__class__,) = vars(module).pop(CLASS)
    return list(found)
