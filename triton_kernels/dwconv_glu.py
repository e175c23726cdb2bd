"""dwconv_glu in Triton: forward and backward, by the kernels of _stencil.py, its gates being their postgate."""

import torch

from ._common import run
from ._stencil import Problem, gradient_of


def _halves(x, v, C, gate_first):
    """(x, v), of which x may hold both."""
    if v is not None:
        return x, v
    gates = x.shape[-1] - C
    return x.split((gates, C), -1)[::-1] if gate_first else x.split((C, gates), -1)


def _problem(x, v, weight, bias, act, gate_first):
    x, v = _halves(x, v, weight.shape[0], gate_first)
    v, reach = v if v.shape[-1] else None, (weight.shape[-1] // 2,) * 2
    return Problem(
        "dwconv_glu", x, weight, bias, None, v, None, before=reach, after=reach, dilation=(1, 1), window=(0, 0), act=act
    )


def _plan_forward(x, v, weight, bias=None, *, act=1, gate_first=False):
    """(out, launches). Works on meta tensors."""
    p = _problem(x, v, weight, bias, act, gate_first)
    out = torch.empty(p.out_shape, dtype=x.dtype, device=x.device)
    return out, p.forward(out) if out.numel() else []


def _plan_backward(grad_out, x, weight, v=None, bias=None, *, act=1, gate_first=False):
    """((dx, dv, dweight, dbias), launches). Works on meta tensors."""
    p = _problem(x, v, weight, bias, act, gate_first)
    dx, dv, dweight = (gradient_of(t, x) for t in (x, v, weight))
    dbias = gradient_of(bias, x, torch.float32)
    results = (dx, dv, dweight, dbias)
    if grad_out.numel() == 0:
        return tuple(t.zero_() for t in results), []
    to_x, to_v = _halves(dx, None if v is None else dv, weight.shape[0], gate_first)
    return results, p.backward(grad_out, to_x, dweight, dbias, None, to_v, None)


def forward(x, v, weight, bias=None, *, act=1, gate_first=False):
    """effvit::dwconv_glu. The arguments must have been validated."""
    out, launches = _plan_forward(x, v, weight, bias, act=act, gate_first=gate_first)
    run(launches, x.device)
    return out


def backward(grad_out, x, weight, v=None, bias=None, *, act=1, gate_first=False):
    """effvit::dwconv_glu_backward: dx, dv, dweight, dbias."""
    results, launches = _plan_backward(grad_out, x, weight, v, bias, act=act, gate_first=gate_first)
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    cases = {
        "convglu-bf16": (torch.bfloat16, (8, 56, 56, 768), (384, 3, 3), 1, False),
        "gnconv-fp32": (torch.float32, (8, 56, 56, 128), (96, 7, 7), 5, True),
        "silu-fp16": (torch.float16, (8, 28, 28, 200), (100, 5, 5), 2, False),
    }
    for name, (dtype, shape, weight_shape, act, gate_first) in cases.items():
        x = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty(weight_shape, dtype=torch.float32, device="meta")
        bias = weight.new_empty(weight_shape[0])
        out, launches = _plan_forward(x, None, weight, bias, act=act, gate_first=gate_first)
        _, backward_launches = _plan_backward(out, x, weight, None, bias, act=act, gate_first=gate_first)
        for launch in launches + backward_launches:
            yield launch.aot(name)
