"""glu's samples, bad inputs and error magnitudes."""

import torch

from effvit.ops.glu import NAMES
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._depthwise import GELU, SIGMOID, SILU, TANH, activation_magnitudes
from effvit.testing._samples import in_order, misaligned, sliced
from effvit.testing._spec import FLOAT_DTYPES, OpSpec, Sample


def _sample(name, shape, *, act=SIGMOID, packed=False, size=1.0, layout=None, tags="", dtypes=FLOAT_DTYPES):
    def make(dtype, device, generator):
        a, b = (torch.randn(shape, generator=generator) * size for _ in range(2))
        tensors = (torch.cat((a, b), -1), None) if packed else (a, b)
        place = layout or (lambda t: t)
        return tuple(None if t is None else place(t.to(device, dtype)) for t in tensors), {"act": act}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _transposed(t):
    return in_order(t, (*range(t.ndim - 2, -1, -1), t.ndim - 1))


def random_sample(name, choose):
    """Any shape, layout and activation, small; `choose` is a random.Random."""
    shape = [choose.randint(1, 5) for _ in range(choose.randint(0, 4))]
    shape.append(choose.choice((1, 3, 8, 16, 17, 31, 32, 64, 100)))
    layout = choose.choice((None, misaligned, *((_transposed,) if len(shape) > 2 else ())))
    return _sample(name, shape, act=choose.randrange(5), packed=choose.random() < 0.5, size=2.0, layout=layout)


SAMPLES = [
    _sample("convglu_56x56", (1, 56, 56, 170), act=GELU, packed=True, tags="vit"),
    _sample("swiglu_197x1024", (2, 197, 1024), act=SILU, tags="vit"),
    _sample("vmamba_gate", (1, 28, 28, 192), act=SILU, packed=True, tags="vit"),
    *(_sample(f"small_{n}", (2, 3, 20), act=i, tags="small framework", size=2.0) for i, n in enumerate(NAMES)),
    *(_sample(f"small_{n}_packed", (3, 2, 17), act=i, packed=True, tags="small") for i, n in enumerate(NAMES)),
    _sample("small_packed", (2, 4, 5, 16), act=GELU, packed=True, tags="small framework"),
    *(_sample(f"far_{n}", (4, 300), act=i, size=20.0, tags="nasty small") for i, n in enumerate(NAMES)),
    *(_sample(f"near_0_{n}", (4, 300), act=i, size=1e-3, tags="nasty") for i, n in enumerate(NAMES)),
    *(_sample(f"tiny_{n}", (2, 3), act=i, packed=i % 2 == 0, tags="tiny small") for i, n in enumerate(NAMES)),
    _sample("one_row", (65,), act=TANH, tags="nasty small"),
    _sample("one_column", (5, 1), act=GELU, tags="nasty small"),
    _sample("six_dims", (2, 1, 3, 2, 2, 9), act=SILU, packed=True, tags="nasty small"),
    _sample("misaligned", (3, 7, 33), act=GELU, layout=misaligned, tags="strided small"),
    _sample("transposed", (3, 4, 5, 24), act=TANH, packed=True, layout=_transposed, tags="strided small"),
    _sample("sliced_rows", (2, 5, 16), act=SILU, layout=lambda t: sliced(t, 1), tags="strided"),
    _sample("expanded", (4, 1, 16), act=SILU, layout=lambda t: t.expand(4, 3, t.shape[-1]), tags="strided small"),
    _sample("empty_rows", (0, 8), tags="empty"),
    _sample("empty_columns", (2, 3, 0), act=GELU, packed=True, tags="empty"),
    _sample("huge_rows", (200_000, 2), act=SILU, tags="huge", dtypes=FLOAT_DTYPES[:1]),
]


def magnitudes(args, kwargs, output_grads, eps):
    """A product has one term. The derivative of gelu and of silu has two: act(b)/b and the slope times b."""
    a, b = args
    packed = b is None
    a, b = a.chunk(2, -1) if packed else (a, b)
    act, slope = activation_magnitudes(NAMES[kwargs["act"]], b, torch.zeros_like(b))
    outputs = {"out": a.abs() * act}
    if output_grads is None:
        return outputs, {}
    g = output_grads[0].abs()
    da, db = g * act, g * a.abs() * slope
    return outputs, {"a": torch.cat((da, db), -1)} if packed else {"a": da, "b": db}


def resize(args, kwargs):
    return tuple(None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in args), kwargs


def memory_calls(dtype):
    a, b = torch.randn(2, 64, 3136, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [("64x3136x96", (a, b), {"act": GELU})]


def good_call():
    a, b = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    return {"a": a, "b": b, "act": GELU}


def public_kwargs(kwargs):
    return {"act": NAMES[kwargs["act"]]} if kwargs else {}


SPEC = OpSpec(
    name="glu",
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=declared_bad_inputs("glu", good_call),
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="...",
    resize=resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)
