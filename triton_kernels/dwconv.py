"""dwconv in Triton: forward and backward, by the kernels of _stencil.py."""

import torch

from ._common import run
from ._stencil import Problem, gradient_of
from .glu import NONE, SILU

_DEFAULTS = {"before": (0, 0), "after": (0, 0), "dilation": (1, 1), "window": (0, 0), "act": NONE.value}


def _plan_forward(x, weight, bias=None, pregate=None, postgate=None, state=None, **options):
    """(out, launches). Works on meta tensors."""
    p = Problem("dwconv", x, weight, bias, pregate, postgate, state, **_DEFAULTS | options)
    out = torch.empty(p.out_shape, dtype=x.dtype, device=x.device)
    return out, p.forward(out) if out.numel() else []


def _plan_backward(grad_out, x, weight, bias=None, pregate=None, postgate=None, state=None, **options):
    """((dx, dweight, dbias, dpregate, dpostgate, dstate), launches). Works on meta tensors."""
    p = Problem("dwconv", x, weight, bias, pregate, postgate, state, **_DEFAULTS | options)
    results = (
        gradient_of(x, x), gradient_of(weight, x), gradient_of(bias, x, torch.float32), gradient_of(pregate, x),
        gradient_of(postgate, x), gradient_of(state, x),
    )  # fmt: skip
    if grad_out.numel() == 0:
        return tuple(t.zero_() for t in results), []
    return results, p.backward(grad_out, *results)


def forward(x, weight, bias=None, pregate=None, postgate=None, state=None, **options):
    """effvit::dwconv. The arguments must have been validated."""
    out, launches = _plan_forward(x, weight, bias, pregate, postgate, state, **options)
    run(launches, x.device)
    return out


def backward(grad_out, x, weight, bias=None, pregate=None, postgate=None, state=None, **options):
    """effvit::dwconv_backward: dx, dweight, dbias, dpregate, dpostgate, dstate."""
    results, launches = _plan_backward(grad_out, x, weight, bias, pregate, postgate, state, **options)
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    none = (0, 0)
    cases = {  # shape, k, before, after, window, gates, state, act
        "7x7-bf16": (torch.bfloat16, (8, 56, 56, 96), (7, 7), (3, 3), (3, 3), none, False, False, NONE),
        "causal-gated-fp32": (torch.float32, (8, 1, 2048, 768), (1, 3), (0, 2), none, none, True, False, NONE),
        "state-silu-fp16": (torch.float16, (8, 1, 100, 1536), (1, 4), (0, 3), none, none, False, True, SILU),
        "stripes-bf16": (torch.bfloat16, (8, 56, 56, 64), (3, 3), (1, 1), (1, 1), (56, 7), False, False, NONE),
    }
    for name, (dtype, shape, k, before, after, window, gated, has_state, act) in cases.items():
        x = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty((shape[3], *k), dtype=torch.float32, device="meta")
        state = x.new_empty(shape[0], shape[1], before[1], shape[3]) if has_state else None
        gates = (x, x) if gated else (None, None)
        options = {"before": before, "after": after, "window": window, "act": act.value}
        args = (x, weight, weight.new_empty(shape[3]), *gates, state)
        out, launches = _plan_forward(*args, **options)
        _, backward_launches = _plan_backward(out, *args, **options)
        for launch in launches + backward_launches:
            yield launch.aot(name)
