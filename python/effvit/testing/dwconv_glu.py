"""dwconv_glu's samples, bad inputs and error magnitudes."""

import torch
import torch.nn.functional as F

from effvit.ops.dwconv_glu import NAMES
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._depthwise import (
    GELU,
    NONE,
    RELU,
    SIGMOID,
    SILU,
    TANH,
    activation_magnitudes,
    away_from_kink,
    halves,
    width_first,
)
from effvit.testing._samples import changed, misaligned, sliced
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call


def _parts(args, kwargs):
    """(the map, its gates): x may hold both."""
    x, v, w, _ = args
    if v is None:
        C, G = w.shape[0], x.shape[-1] - w.shape[0]
        v, x = x.split((G, C), -1) if kwargs["gate_first"] else x.split((C, G), -1)[::-1]
    return x, v


def _convolve(x, w, b):
    y = F.conv2d(x.permute(0, 3, 1, 2), w[:, None], b, padding=w.shape[-1] // 2, groups=w.shape[0])
    return y.permute(0, 2, 3, 1)


def _terms(args, kwargs):
    """What the activation is of, and the sum of its absolute terms."""
    given = (_parts(args, kwargs)[0], *args[2:])
    return _convolve(*given), _convolve(*(None if t is None else t.abs() for t in given))


def _sample(
    name, B, H, W, C, k=3, *, act=GELU, gates=None, packed=False, gate_first=False, bias=True, weights=None, size=1.0,
    layout=None, tags="", dtypes=FLOAT_DTYPES,
):  # fmt: skip
    """gates: None is C; packed: x holds them. weights: the dtype of weight and bias, if not that of x."""

    def draw(dtype, device, generator):
        G = C if gates is None else gates
        x, v = (torch.randn(B, H, W, n, generator=generator) * size for n in (C, G))
        w, b = torch.randn(C, k, k, generator=generator) / k, torch.randn(C, generator=generator)
        if packed:
            x, v = torch.cat((v, x) if gate_first else (x, v), -1), None
        place = lambda t: layout(t) if layout and t.numel() else t
        x, v = (None if t is None else place(t.to(device, dtype)) for t in (x, v))
        w, b = (t.to(device, weights or dtype) for t in (w, b))
        return (x, v, w, b if bias else None), {"act": act, "gate_first": gate_first}

    make = away_from_kink(draw, _terms) if act == RELU else draw
    return Sample(name, make, frozenset(tags.split()), dtypes)


def random_sample(name, choose):
    """Any options and layouts at a small size; `choose` is a random.Random."""
    C = choose.choice((1, 3, 8, 16, 17, 33, 40))
    return _sample(
        name, choose.randint(1, 3), choose.choice((1, 2, 5, 9)), choose.choice((1, 3, 7, 8, 10)), C,
        choose.choice((3, 3, 5, 7)), act=choose.randrange(6), gates=choose.choice((None, None, 0, C // 2)),
        packed=choose.random() < 0.5, gate_first=choose.random() < 0.5, bias=choose.random() < 0.7,
        weights=choose.choice((None, None, torch.float32, torch.bfloat16)),
        layout=choose.choice((None, misaligned, width_first, halves)),
    )  # fmt: skip


# fmt: off
SAMPLES = [
    _sample("convglu_14x14x96", 1, 14, 14, 96, packed=True, tags="vit"),
    _sample("gnconv_28x28", 1, 28, 28, 48, 7, act=NONE, gates=16, packed=True, gate_first=True, tags="vit"),
    _sample("small", 2, 5, 7, 20, tags="small framework"),
    _sample("small_packed", 2, 4, 3, 16, 5, act=SILU, packed=True, tags="small framework"),
    _sample("small_some_gates", 1, 6, 9, 17, 7, act=NONE, gates=5, packed=True, gate_first=True, bias=False,
            weights=torch.float32, tags="small"),
    _sample("small_tanh", 1, 3, 8, 9, act=TANH, weights=torch.bfloat16, layout=halves, tags="small"),
    _sample("small_no_gate", 2, 3, 2, 5, 3, act=SIGMOID, gates=0, packed=True, tags="small nasty"),
    _sample("tiny", 2, 3, 2, 2, act=GELU, tags="tiny nasty"),
    _sample("bands", 1, 70, 9, 35, 5, act=RELU, tags="nasty"),
    _sample("far", 2, 9, 11, 24, act=SILU, size=10.0, bias=False, tags="nasty"),
    _sample("channels_70", 1, 12, 13, 70, 7, tags="nasty"),
    _sample("larger_than_the_map", 3, 2, 3, 18, 7, act=TANH, tags="nasty"),
    _sample("width_first", 2, 6, 8, 24, act=SIGMOID, layout=width_first, tags="strided"),
    _sample("misaligned", 2, 7, 5, 33, layout=misaligned, tags="strided"),
    _sample("sliced_columns", 2, 5, 6, 16, act=SILU, layout=lambda t: sliced(t, 2), tags="strided"),
    _sample("expanded", 3, 4, 6, 16, act=RELU, layout=lambda t: t[:1].expand_as(t), tags="strided"),
    _sample("empty_batch", 0, 4, 5, 8, tags="empty"),
    _sample("huge_batch", 70_001, 1, 2, 3, tags="huge", dtypes=(torch.float32,)),
]
# fmt: on


# ---- error magnitudes ----------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of absolute terms: of the convolution, what its rounding makes of the activation, and the product."""
    (x, v), (w, b), name = _parts(args, kwargs), args[2:], NAMES[kwargs["act"]]
    packed, first, G = args[1] is None, kwargs["gate_first"], v.shape[-1]
    z = _convolve(x, w, b)
    positive = [None if t is None else t.abs().requires_grad_() for t in (x, w, b)]
    with torch.enable_grad():
        m = _convolve(*positive)
    act, slope = activation_magnitudes(name, z, m.detach())
    gate = torch.cat((v.abs(), torch.ones_like(act[..., G:])), -1)
    outputs = {"out": act * gate}
    if output_grads is None:
        return outputs, {}
    g = output_grads[0].abs()
    given = [t for t in positive if t is not None]
    dx, *weights = torch.autograd.grad(m, given, g * gate * slope)
    dv = (g * act)[..., :G]
    gradients = dict(zip(("weight", "bias"), weights, strict=False))
    if packed:
        return outputs, gradients | {"x": torch.cat((dv, dx) if first else (dx, dv), -1)}
    return outputs, gradients | {"x": dx, "v": dv}


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def resize(args, kwargs):
    x, v, w, b = args
    x, v = (None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in (x, v))
    return (x, v, w, b), kwargs


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 56, 56, 192, generator=generator).to(dtype)
    w, b = torch.randn(96, 3, 3, generator=generator), torch.randn(96, generator=generator)
    return [("16x56x56x96", (x, None, w, b), {"act": GELU})]


def good_call():
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, 3, 4, 6, generator=generator)
    w, b = torch.randn(6, 3, 3, generator=generator), torch.randn(6, generator=generator)
    return {"x": x, "v": v, "weight": w, "bias": b, "act": GELU, "gate_first": False}


def _bad(name, match, **changes):
    make = lambda: split_call(changed(good_call(), changes), OPS["dwconv_glu"].names)
    return BadInput(name, make, ValueError, match, declared=True)


BAD_INPUTS = [
    _bad("weight_even", r"weight must be \[C, k, k\] with an odd k from 3 to 7, got \[6, 4, 4\]",
         weight=torch.zeros(6, 4, 4)),
    _bad("weight_1", r"weight must be \[C, k, k\] with an odd k from 3 to 7, got \[6, 1, 1\]",
         weight=torch.zeros(6, 1, 1)),
    _bad("weight_9", r"weight must be \[C, k, k\] with an odd k from 3 to 7, got \[6, 9, 9\]",
         weight=torch.zeros(6, 9, 9)),
    _bad("weight_not_square", r"weight must be \[C, k, k\]", weight=torch.zeros(6, 3, 5)),
    _bad("weight_channels", r"x must be \[B, H, W, C\] with the 5 channels of weight, got \[1, 3, 4, 6\]",
         weight=torch.zeros(5, 3, 3)),
    _bad("v_wide", r"v must be \[B, H, W, G\] with at most 6 channels, got \[1, 3, 4, 7\]",
         v=torch.zeros(1, 3, 4, 7)),
    _bad("x_too_narrow", r"x must be \[B, H, W, C \+ G\] with C = 6 .*, got \[1, 3, 4, 5\]",
         v=None, x=torch.zeros(1, 3, 4, 5)),
    _bad("x_too_wide", r"x must be \[B, H, W, C \+ G\] with C = 6 .*, got \[1, 3, 4, 13\]",
         v=None, x=torch.zeros(1, 3, 4, 13)),
]  # fmt: skip


def public_kwargs(kwargs):
    return {**kwargs, "act": NAMES[kwargs["act"]]} if kwargs else {}


SPEC = OpSpec(
    name="dwconv_glu",
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[*declared_bad_inputs("dwconv_glu", good_call), *BAD_INPUTS],
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B H W",
    resize=resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)
