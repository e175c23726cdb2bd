"""pow2_linear against float32 and int8 linear layers of the same shape: int8 x with codes of 4 bits, which runs as an
int8 product, and MatShift, int32 x with codes of 5 bits, which is shifted and added term by term.

The other layers compute on numbers of their own, so their results are not compared; effvit's is, with the definition.
"""

import functools

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit
from effvit.ops._op import Cost
from effvit.reference.pow2_linear import pow2_linear as definition

SHAPES = {  # M, K, N, tag
    "DeiT-S qkv 197x384x1152": (197, 384, 1152, "default"),
    "DeiT-S fc1 197x384x1536": (197, 384, 1536, "default"),
    "DeiT-S fc2 197x1536x384": (197, 1536, 384, "default"),
    "Swin-T stage 4 fc2 2x49x3072x768": (98, 3072, 768, "default"),
    "1 row 1x768x3072": (1, 768, 3072, "default"),
    "smoke 5x20x12": (5, 20, 12, "smoke"),
}
FORMS = {"4 bits": {}, "MatShift": {"bits": 5, "right": 14}}


def inputs(m, k, n, options, dtype, device):
    shift = "right" in options
    high, most = (1 << 16, 15) if shift else (127, 7)
    x = torch.randint(-high, high + 1, (m, k)).to(torch.int32 if shift else torch.int8)
    tensors = {
        "x": x, "w": torch.randint(-most, most + 1, (n, k), dtype=torch.int8), "x_scale": torch.full((m,), 1 / high),
        "w_scale": torch.full((n,), 2.0 ** (0 if shift else -6)), "bias": torch.randn(n),
    }  # fmt: skip
    return {name: t.to(device) for name, t in tensors.items()}


def ours(x, w, x_scale, w_scale, bias, options):
    return functools.partial(effvit.pow2_linear, x, w, x_scale, w_scale, bias, **options)


def exact(x, w, x_scale, w_scale, bias, options):
    return lambda: definition(x, w, x_scale, w_scale, bias, out_dtype=torch.float64, **options)


def int8(x, w, x_scale, w_scale, bias, options):
    weight = torch.randint(-127, 128, w.shape, dtype=torch.int8, device=x.device)
    weight = effvit.int8_prepack(weight) if x.device.type == "cpu" else weight
    return functools.partial(effvit.int8_linear, x.to(torch.int8), weight, x_scale, w_scale, bias)


def plain(x, w, x_scale, w_scale, bias, options):
    """int8_linear that packs its weight in every call, as this op does."""
    weight = torch.randint(-127, 128, w.shape, dtype=torch.int8, device=x.device)
    return functools.partial(effvit.int8_linear, x.to(torch.int8), weight, x_scale, w_scale, bias)


def floats(x, w, x_scale, w_scale, bias, options):
    xf, wf = x.float(), w.float()
    return lambda: F.linear(xf, wf, bias)


def cases():
    for name, (m, k, n, tag) in SHAPES.items():
        for form, options in FORMS.items():

            def of(make, options=options):
                return functools.partial(make, options=options)

            wide = 4 if options else 1
            yield Case(
                shape=f"{name} {form}",
                inputs=functools.partial(inputs, m, k, n, options),
                effvit=of(ours),
                peers={"int8_linear": of(int8), "not packed": of(plain), "float32": of(floats)},
                reference=of(exact),
                cost=lambda direction, dtype, m=m, k=k, n=n, wide=wide: Cost(
                    2 * m * n * k, wide * m * k + n * k + 4 * m * n
                ),
                baseline="float32",
                compiled="float32",
                unchecked=("int8_linear", "not packed", "float32", "compile"),
                directions=("forward",),
                tags=(tag,),
            )


if __name__ == "__main__":
    raise SystemExit(main("pow2_linear", cases()))
