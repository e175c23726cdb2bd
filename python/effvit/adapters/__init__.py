"""Model families that `effvit.patch` knows: one file per family, named <library>_<family>.py, found by its name.

A family's file holds `ADAPTERS`, a list of `Adapter` instances. It may import its library at the top: it is imported
only where that library already is (a model of a family cannot exist without its library).
"""

import importlib
import pkgutil
import sys

import torch


class Fused:
    """Base of every class that stands in for a library's class. `original` is the class it replaces.

    A replacement is a subclass of the original with other methods and no attributes of its own, and a module becomes
    one by assignment to `__class__`. So parameters, buffers, hooks, optimizer references, state_dict, DDP, deepcopy
    and pickle are untouched, `isinstance` still holds, and the way back is another assignment.
    """

    original: type

    def __prepare_scriptable__(self):
        raise RuntimeError(
            "effvit: torch.jit.script cannot compile a patched model, call effvit.unpatch(model) first, or use "
            "torch.jit.trace, torch.export or torch.compile"
        )


class Adapter:
    """How one class of one library is replaced."""

    fused: type  # subclass of Fused and of fused.original

    def reason_not(self, module: torch.nn.Module) -> str | None:
        """Why this instance of fused.original cannot be replaced, or None."""
        return None

    def parts(self, module: torch.nn.Module) -> list[tuple[torch.nn.Module, type]]:
        """The modules that change class together, each with its new class; `module` itself among them."""
        return [(module, self.fused)]

    def sample(self, module: torch.nn.Module, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Random float32 input on the CPU, at the module's own resolution."""
        raise NotImplementedError

    def run(self, module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """What is compared before and after: the part of the module's forward that the replacement changes."""
        return module(*inputs)

    def describe(self, module: torch.nn.Module) -> str:
        """Geometry, for the report."""
        return ""

    def swap(self, module: torch.nn.Module) -> None:
        for part, fused in self.parts(module):
            part.__class__ = fused


def adapters() -> dict[type, Adapter]:
    """The adapter of every replaceable class of the libraries imported so far."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name.split("_")[0] in sys.modules:
            for adapter in importlib.import_module(f"{__name__}.{info.name}").ADAPTERS:
                found[adapter.fused.original] = adapter
    return found
