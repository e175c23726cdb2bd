"""effvit: PyTorch kernels for efficient vision models. `python -m effvit info` tells what runs here and why."""

from . import _load, ops
from ._explain import explain
from ._export import decompositions, register_flop_formulas
from .ops import *  # noqa: F403
from .patch import patch, unpatch

__version__ = "0.1.0"
__all__ = ["decompositions", "explain", "ops", "patch", "unpatch"] + ops.__all__

_load.load()
register_flop_formulas()


def __getattr__(name):
    if name in ("distributed", "layers", "reference", "testing"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
