"""effvit: PyTorch kernels for efficient vision models. `python -m effvit info` tells what runs here and why."""

from . import _load, ops
from ._explain import explain
from ._export import decompositions, register_flop_formulas
from .ops import *  # noqa: F403
from .patch import patch, unpatch

__version__ = "0.1.0"
_FLOWS = {
    "PTQConfig": "ptq", "QuantizeConfig": "quantize", "calibrate_ptq": "ptq", "convert_": "quantize",
    "deploy_ptq_": "ptq", "load_quantized_": "quantize", "prepare_integer": "integer_models", "prepare_ptq": "ptq",
    "quantize_": "quantize", "save_quantized": "quantize", "sparsify_": "sparsify", "to_integer": "integer_models",
    "unquantize_": "quantize", "unsparsify_": "sparsify",
}  # fmt: skip
_MODULES = (
    "block_sparse", "distributed", "integer", "integer_models", "layers", "ptq", "quantize", "quantizers", "recipes",
    "reference", "sparse24_formats", "sparsify", "testing",
)  # fmt: skip
__all__ = ["decompositions", "explain", "ops", "patch", "unpatch"] + list(_FLOWS) + ops.__all__

_load.load()
register_flop_formulas()


def __getattr__(name):  # what is not imported with the operators
    if name in _FLOWS:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_FLOWS[name]}"), name)
    if name in _MODULES:
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
