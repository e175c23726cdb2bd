"""Triton implementations of the operators; importing this package never needs triton itself."""

import importlib.util


def can_run(device_type="cuda"):
    """None when the Triton kernels can run on tensors of ``device_type``, else the reason why not.

    ``effvit.triton_kernels.<op>`` imports triton, so ask here first.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device_type == "cuda":
        return None
    from . import _common

    if device_type == "cpu":
        return None if _common.INTERPRETED else "Triton runs on CPU tensors only under TRITON_INTERPRET=1"
    return f"the Triton kernels run on CUDA and ROCm devices, not on {device_type}"
