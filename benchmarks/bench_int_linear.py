"""int_linear with int8 results against PyTorch's int8 product followed by effvit's requantize, int8_linear with int8
results (floats in its epilogue) and a float32 linear layer of the same shape. Weights are packed, as a deployed layer's
are. With a residual, of int16 and to int16, as on the way around a block.

int8_linear and the float layer compute something else in the last bit, so only integers are compared: bit by bit.
"""

import functools

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit
from effvit.integer import linear_constants, multipliers
from effvit.ops._op import Cost
from effvit.reference.int_linear import int_linear as definition

SHAPES = {  # M, K, N, with a residual, tag
    "DeiT-S qkv 197x384x1152": (197, 384, 1152, False, "default"),
    "DeiT-S proj 197x384x384 + residual": (197, 384, 384, True, "default"),
    "DeiT-S fc1 197x384x1536": (197, 384, 1536, False, "default"),
    "DeiT-S fc2 197x1536x384": (197, 1536, 384, False, "default"),
    "DeiT-S fc2 197x1536x384 + residual": (197, 1536, 384, True, "default"),
    "DeiT-B fc1 8x197x768x3072": (1576, 768, 3072, False, "default"),
    "DeiT-B fc2 8x197x3072x768 + residual": (1576, 3072, 768, True, "default"),
    "Swin-T stage 1 fc1 2x3136x96x384": (6272, 96, 384, False, "default"),
    "Swin-T stage 1 fc2 2x3136x384x96 + residual": (6272, 384, 96, True, "default"),
    "Swin-T stage 4 fc2 2x49x3072x768": (98, 3072, 768, False, "default"),
    "1 row 1x768x3072": (1, 768, 3072, False, "default"),
    "16 rows 16x768x3072": (16, 768, 3072, False, "default"),
    "smoke 5x20x12": (5, 20, 12, True, "smoke"),
}
X_SCALE = 0.02


def inputs(m, k, n, residual, dtype, device):
    weight, bias = torch.randn(n, k) / k**0.5, torch.randn(n)
    out_scale = 1e-4 if residual else 0.03
    w, b, multiplier, shift = linear_constants(weight, bias, X_SCALE, out_scale)
    made = {
        "x": torch.randint(-127, 128, (m, k), dtype=torch.int8), "w": w, "bias": b, "multiplier": multiplier,
        "shift": shift, "w_scale": weight.abs().amax(1) / 127, "float_bias": bias,
    }  # fmt: skip
    if residual:
        made["residual"] = torch.randint(-20_000, 20_000, (m, n), dtype=torch.int16)
        made["residual_multiplier"], made["residual_shift"] = multipliers(0.7e-4, out_scale, made["residual"])
    return {name: t.to(device) for name, t in made.items()}


def _rescaling(t):
    """(the residual's three, options)."""
    if "residual" not in t:
        return (), {}
    names = ("residual", "residual_multiplier", "residual_shift")
    return [t[name] for name in names], {"bits": 16, "out_dtype": torch.int16}


def ours(**t):
    rest, options = _rescaling(t)
    weight = effvit.int8_prepack(t["w"]) if t["x"].device.type == "cpu" else t["w"]
    return functools.partial(
        effvit.int_linear, t["x"], weight, t["multiplier"], t["shift"], t["bias"], *rest, **options
    )


def exact(**t):
    rest, options = _rescaling(t)
    w = t["w"]
    options = options or {"bits": 8, "out_dtype": torch.int8}
    return lambda: definition(t["x"], w, t["multiplier"], t["shift"], t["bias"], *rest, **options).double()


def int_mm(**t):
    (residual, *rest), options = _rescaling(t) if "residual" in t else ((None, None, None), {})
    x, wt, m, c, bias = t["x"], t["w"].t(), t["multiplier"], t["shift"], t["bias"]

    def run():
        to_add = None if residual is None else residual.int()
        return effvit.requantize(torch._int_mm(x, wt) + bias, m, c, to_add, *rest, **options)

    return run


def int8_linear(**t):
    """With a residual: in float32 and to bfloat16, which have as many bytes."""
    x, device = t["x"], t["x"].device
    weight = effvit.int8_prepack(t["w"]) if device.type == "cpu" else t["w"]
    scales = torch.full((1,), X_SCALE, device=device), t["w_scale"]
    if "residual" not in t:
        options = {"out_dtype": torch.int8, "out_scale": 0.03}
        return functools.partial(effvit.int8_linear, x, weight, *scales, t["float_bias"], **options)
    residual = t["residual"].bfloat16()
    return functools.partial(
        effvit.int8_linear, x, weight, *scales, t["float_bias"], residual, out_dtype=torch.bfloat16
    )


def float32(**t):
    x, w, bias = t["x"] * X_SCALE, t["w"] * t["w_scale"][:, None], t["float_bias"]
    if "residual" not in t:
        return lambda: F.linear(x, w, bias)
    residual = t["residual"].float()
    return lambda: F.linear(x, w, bias) + residual


def cases():
    for name, (m, k, n, residual, tag) in SHAPES.items():
        yield Case(
            shape=name,
            inputs=functools.partial(inputs, m, k, n, residual),
            effvit=ours,
            peers={"int_mm": int_mm, "int8_linear": int8_linear, "float32": float32},
            reference=exact,
            cost=lambda direction, dtype, m=m, k=k, n=n, residual=residual: Cost(
                2 * m * n * k, m * k + n * k + (4 if residual else 1) * m * n
            ),
            baseline="int_mm",
            compiled=None,
            approximate={"effvit": 0.0, "int_mm": 0.0},  # not at all
            unchecked=("int8_linear", "float32"),
            products=torch.int8,
            directions=("forward",),
            dtypes=("float32",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("int_linear", cases()))
