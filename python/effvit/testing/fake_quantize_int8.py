"""fake_quantize_int8's samples, bad inputs and error magnitudes."""

import torch

from effvit.ops.quantize_int8 import NAMES
from effvit.reference.quantize_int8 import row_scale
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call


def _sample(name, shape, *, given=False, round=0, size=3.0, layout=None, tags="", dtypes=FLOAT_DTYPES):
    """Values well inside of the steps: which of two neighbours a tie goes to is quantize_int8's test."""

    def make(dtype, device, generator):
        x = (torch.randn(shape, generator=generator) * size).to(dtype)
        scale = row_scale(x.float()) * (0.5 + torch.rand(shape[:-1], generator=generator)) if given else None
        x = x if layout is None else layout(x)
        return tuple(None if t is None else t.to(device) for t in (x, scale)), {"round": round}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _transposed(t):
    return in_order(t, (*range(t.ndim - 2, -1, -1), t.ndim - 1))


def _zero_rows(t):
    t = t.clone()
    t[..., 0, :] = 0
    return t


def random_sample(name, choose):
    shape = [choose.randint(1, 5) for _ in range(choose.randint(0, 3))]
    shape.append(choose.choice((1, 3, 8, 16, 17, 31, 32, 64, 100, 257)))
    layout = choose.choice((None, misaligned, *((_transposed,) if len(shape) > 2 else ())))
    return _sample(name, shape, given=choose.random() < 0.5, round=choose.randrange(2), layout=layout)


SAMPLES = [
    _sample("deit_s_tokens", (2, 197, 384), tags="vit"),
    _sample("deit_s_weight", (384, 1536), size=0.02, tags="vit"),
    *(_sample(f"small_{n}", (2, 3, 20), round=i, tags="small framework") for i, n in enumerate(NAMES)),
    _sample("small_given", (2, 5, 33), given=True, tags="small framework"),
    *(_sample(f"columns_{n}", (3, n), tags="small" if n < 18 else "") for n in (1, 2, 15, 16, 17, 65, 1000)),
    _sample("large", (2, 50), size=1e30, tags="nasty", given=True, dtypes=FLOAT_DTYPES[:2]),
    _sample("zero_rows", (2, 3, 24), layout=_zero_rows, tags="nasty small"),
    _sample("vector", (65,), tags="nasty small"),
    _sample("six_dims", (2, 1, 3, 2, 2, 9), given=True, tags="nasty small"),
    _sample("misaligned", (3, 7, 33), layout=misaligned, tags="strided small"),
    _sample("transposed", (3, 4, 5, 24), given=True, layout=_transposed, tags="strided small"),
    _sample("expanded", (4, 1, 16), layout=lambda t: t.expand(4, 3, t.shape[-1]), tags="strided small"),
    _sample("empty_rows", (0, 8), tags="empty"),
    _sample("empty_columns", (2, 3, 0), given=True, tags="empty"),
    _sample("tall", (200_000, 2), tags="huge", dtypes=FLOAT_DTYPES[:1]),
]


def magnitudes(args, kwargs, output_grads, eps):
    """A result is one product of an integer. The scale's gradient is a sum over its row of two terms each."""
    x, scale = args
    step = (row_scale(x) if scale is None else scale)[..., None]
    steps = (x / step).abs()
    outputs = {"out": steps.round().clamp(max=127) * step}
    if output_grads is None:
        return outputs, {}
    g = output_grads[0].abs()
    gradients = {"x": g}
    if scale is not None:
        gradients["scale"] = (2 * g * steps.clamp(max=127)).sum(-1)
    return outputs, gradients


def good_call():
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 3, 8, generator=generator), "scale": 0.1 + torch.rand(2, 3, generator=generator), "round": 0
    }  # fmt: skip


def _bad_scale(value):
    def make():
        call = good_call()
        call["scale"][1, 2] = value
        return split_call(call, ("x", "scale"))

    return BadInput(
        f"scale_{value}", make, ValueError, r"scale must be positive and finite, got .* at \[1, 2\]", public=False
    )


def resize(args, kwargs):
    return tuple(None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in args), kwargs


def memory_calls(dtype):
    x = torch.randn(20_000, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [("20000x1536", (x, None), {})]


SPEC = OpSpec(
    name="fake_quantize_int8",
    random_calls=160,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("fake_quantize_int8", good_call),
        *(_bad_scale(value) for value in (0.0, -1.0, float("nan"), float("inf"))),
    ],
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="...",
    resize=resize,
    public_kwargs=lambda kwargs: {"round": NAMES[kwargs["round"]]} if kwargs else {},
    memory_calls=memory_calls,
)
