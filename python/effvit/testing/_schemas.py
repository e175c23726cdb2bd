"""Schemas that torchvision's Python package expects where its compiled operators do not load (a CPU-only torch)."""

import contextlib
import importlib
import importlib.util

import torch

_library = None  # the definitions live as long as this object


def torchvision_schemas():
    """Makes ``import torchvision`` (and so timm) work beside a torch that its binary does not match.

    Does nothing where torchvision is absent or its operators load. Returns whether schemas were defined.
    """
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return False
    # Its fake kernels need the schemas below; loading its operators comes first and may fail.
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        importlib.import_module("torchvision.extension")
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True
