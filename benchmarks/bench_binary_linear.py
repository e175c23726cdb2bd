"""binary_linear against float32 and int8 linear layers of the same shape, and against bits counted in eager PyTorch.

The other layers compute on numbers of their own, so their results are not compared; effvit's is, with the definition.
"""

import functools

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit
from effvit.ops._op import Cost
from effvit.reference.binary_linear import binary_linear as definition

SHAPES = {  # M, K, N, tag
    "DeiT-S qkv 197x384x1152": (197, 384, 1152, "default"),
    "DeiT-S fc1 197x384x1536": (197, 384, 1536, "default"),
    "DeiT-S fc2 197x1536x384": (197, 1536, 384, "default"),
    "DeiT-B fc1 8x197x768x3072": (1576, 768, 3072, "default"),
    "Swin-T stage 1 fc1 2x3136x96x384": (6272, 96, 384, "default"),
    "Swin-T stage 4 fc2 2x49x3072x768": (98, 3072, 768, "default"),
    "1 row 1x768x3072": (1, 768, 3072, "default"),
    "smoke 5x20x12": (5, 20, 12, "smoke"),
}


def inputs(m, k, n, dtype, device):
    x, w = torch.randn(m, k), torch.randn(n, k)
    (xb, xs), (wb, ws) = effvit.sign_bits(x), effvit.sign_bits(w)
    tensors = {"x": xb, "w": wb, "x_scale": xs, "w_scale": ws, "bias": torch.randn(n)}
    return {name: t.to(device) for name, t in tensors.items()}


def ours(x, w, x_scale, w_scale, bias, k):
    return functools.partial(effvit.binary_linear, x, w, x_scale, w_scale, bias, depth=k)


def exact(x, w, x_scale, w_scale, bias, k):
    return lambda: definition(x, w, x_scale, w_scale, bias, depth=k, out_dtype=torch.float64)


def int8(x, w, x_scale, w_scale, bias, k):
    q = torch.randint(-127, 128, (x.shape[0], k), dtype=torch.int8, device=x.device)
    plain = torch.randint(-127, 128, (w.shape[0], k), dtype=torch.int8, device=x.device)
    weight = effvit.int8_prepack(plain) if x.device.type == "cpu" else plain
    return functools.partial(effvit.int8_linear, q, weight, x_scale, w_scale, bias)


def floats(x, w, x_scale, w_scale, bias, k):
    xf, wf = (torch.randn(t.shape[0], k, device=x.device) for t in (x, w))
    return lambda: F.linear(xf, wf, bias)


def cases():
    for name, (m, k, n, tag) in SHAPES.items():

        def of(make, k=k):
            return functools.partial(make, k=k)

        yield Case(
            shape=name,
            inputs=functools.partial(inputs, m, k, n),
            effvit=of(ours),
            peers={"int8_linear": of(int8), "float32": of(floats)},
            reference=of(exact),
            cost=lambda direction, dtype, m=m, k=k, n=n: Cost(2 * m * n * k, (m + n) * (k // 8) + 4 * m * n),
            baseline="float32",
            compiled="float32",
            unchecked=("int8_linear", "float32", "compile"),
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("binary_linear", cases()))
