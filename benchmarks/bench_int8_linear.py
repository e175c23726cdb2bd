"""int8_linear, and its 2:4-sparse form, against PyTorch's int8 product with an eager epilogue, oneDNN's fused quantised
linear layer with prepacked weights, and float32 and bfloat16 linear layers of the same shape. On a GPU, where CUTLASS's
kernels were built, also against our own in their place.

The int8 peers are exact: oneDNN gets x + 128 with a zero point of 128, the form that it is fast in without AMX. The
float layers compute on rounded values of the same weights, so their results are not compared.
"""

import functools

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit
from effvit import _cutlass, _load
from effvit.ops._op import Cost
from effvit.reference.int8_linear import int8_linear as definition

SHAPES = {  # M, K, N, tag
    "DeiT-S qkv 197x384x1152": (197, 384, 1152, "default"),
    "DeiT-S fc1 197x384x1536": (197, 384, 1536, "default"),
    "DeiT-S fc2 197x1536x384": (197, 1536, 384, "default"),
    "DeiT-B fc1 8x197x768x3072": (1576, 768, 3072, "default"),
    "DeiT-B fc2 8x197x3072x768": (1576, 3072, 768, "default"),
    "Swin-T stage 1 fc1 2x3136x96x384": (6272, 96, 384, "default"),
    "Swin-T stage 1 fc2 2x3136x384x96": (6272, 384, 96, "default"),
    "Swin-T stage 3 fc1 2x196x384x1536": (392, 384, 1536, "default"),
    "Swin-T stage 4 fc2 2x49x3072x768": (98, 3072, 768, "default"),
    "1 row 1x768x3072": (1, 768, 3072, "default"),
    "16 rows 16x768x3072": (16, 768, 3072, "default"),
    "smoke 5x20x12": (5, 20, 12, "smoke"),
}
GELU_OF = ("fc1", "smoke")


def inputs(m, k, n, sparse, dtype, device):
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    if sparse:
        order = torch.rand(n, k // 4, 4, device=device).argsort(-1)
        w = torch.where(order < 2, w.view(n, k // 4, 4), 0).view(n, k)
    return {
        "x": torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device),
        "w": w,
        "x_scale": torch.full((m,), 0.02, device=device),
        "w_scale": (0.5 + torch.rand(n, device=device)) / (100 * k**0.5),
        "bias": torch.randn(n, device=device),
    }


def ours(x, w, x_scale, w_scale, bias, activation, out_dtype, sparse):
    options = {"activation": activation, "out_dtype": out_dtype}
    if sparse:
        values, meta = effvit.sparse24_compress(w)
        weights = (effvit.sparse24_prepack(values, meta), None) if x.device.type == "cpu" else (values, meta)
        return functools.partial(effvit.sparse24_int8_linear, x, *weights, x_scale, w_scale, bias, **options)
    weight = effvit.int8_prepack(w) if x.device.type == "cpu" else w
    return functools.partial(effvit.int8_linear, x, weight, x_scale, w_scale, bias, **options)


def exact(x, w, x_scale, w_scale, bias, activation):
    return lambda: definition(x, w, x_scale, w_scale, bias, activation=activation, out_dtype=torch.float64)


def int_mm(x, w, x_scale, w_scale, bias, activation, out_dtype):
    wt = w.t()

    def run():
        y = torch._int_mm(x, wt) * (x_scale[:, None] * w_scale) + bias
        return (F.gelu(y) if activation == "gelu" else y).to(out_dtype)

    return run


def onednn(x, w, x_scale, w_scale, bias, activation, out_dtype):
    packed = torch.ops.onednn.qlinear_prepack(w, list(x.shape))
    zeros, u8 = torch.zeros(w.shape[0], dtype=torch.int32), (x.int() + 128).to(torch.uint8)
    post = ("gelu" if activation == "gelu" else "none", [], "none")
    return lambda: torch.ops.onednn.qlinear_pointwise(
        u8, float(x_scale[0]), 128, packed, w_scale, zeros, bias, 1.0, 0, out_dtype, *post
    )


def floats(x, w, x_scale, w_scale, bias, activation, dtype):
    xf, wf, bf = ((x * x_scale[:, None]).to(dtype), (w * w_scale[:, None]).to(dtype), bias.to(dtype))
    return lambda: F.gelu(F.linear(xf, wf, bf)) if activation == "gelu" else F.linear(xf, wf, bf)


def dense(x, w, x_scale, w_scale, bias, activation, out_dtype):
    return ours(x, w, x_scale, w_scale, bias, activation, out_dtype, sparse=False)


def without_cutlass(sparse):
    """effvit's own CUDA kernel, where the library has CUTLASS's as well."""

    def make(**tensors):
        call = ours(**tensors, sparse=sparse)

        def run():
            _cutlass.use(False)
            try:
                return call()
            finally:
                _cutlass.use(True)

        return run

    return make


def has_cutlass():
    return _load.load()["effvit_cuda"].handle is not None and _load.build_status("cutlass").startswith("CUTLASS")


def cases(sparse=False):
    for name, (m, k, n, tag) in SHAPES.items():
        for activation in ("none", "gelu"):
            if activation == "gelu" and not any(part in name for part in GELU_OF):
                continue

            def of(make, activation=activation, **options):
                return functools.partial(make, activation=activation, **options)

            def typed(make, activation=activation):
                return lambda x, out_dtype=torch.float32, **rest: make(
                    x=x, activation=activation, out_dtype=out_dtype, **rest
                )

            peers = {
                "int_mm": typed(int_mm),
                "onednn": typed(onednn),
                "float32": of(floats, dtype=torch.float32),
                "bfloat16": of(floats, dtype=torch.bfloat16),
            }
            if sparse:
                peers["dense int8"] = typed(dense)
            if has_cutlass():
                peers["without CUTLASS"] = typed(without_cutlass(sparse))
            yield Case(
                shape=name + (" + gelu" if activation == "gelu" else ""),
                inputs=functools.partial(inputs, m, k, n, sparse),
                effvit=lambda activation=activation, **t: ours(
                    **t, activation=activation, out_dtype=torch.float32, sparse=sparse
                ),
                peers=peers,
                reference=of(exact),
                cost=lambda direction, dtype, m=m, k=k, n=n: Cost(
                    2 * m * n * k // (2 if sparse else 1), m * k + (n * k * 5 // 8 if sparse else n * k) + 4 * m * n
                ),
                baseline="int_mm",
                compiled="int_mm",
                unchecked=("float32", "bfloat16"),
                products=torch.int8,
                directions=("forward",),
                tags=(tag,),
            )


if __name__ == "__main__":
    raise SystemExit(main("int8_linear", cases()))
