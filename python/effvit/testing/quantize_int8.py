"""quantize_int8's samples and bad inputs."""

import torch

from effvit.ops.quantize_int8 import NAMES
from effvit.reference.quantize_int8 import row_scale, steps
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call


def _sample(name, shape, *, given=False, excluded=False, round=0, size=3.0, layout=None, ties=False, tags=""):
    def make(dtype, device, generator):
        x = torch.randn(shape, generator=generator) * (size if dtype != torch.float16 else min(size, 1e4))
        x = x.to(dtype)
        scale = row_scale(x.float()) * (0.5 + torch.rand(shape[:-1], generator=generator)) if given else None
        if ties:  # halves of steps of 1, 0.5 and so on, beyond both ends too
            x = torch.randint(-300, 301, shape, generator=generator).to(dtype) * 0.5
            scale = torch.full(shape[:-1], 1.0)
        columns = (torch.rand(shape[-1], generator=generator) < 0.3).to(torch.int8) if excluded else None
        if layout is not None:
            x = layout(x)
        tensors = tuple(None if t is None else t.to(device) for t in (x, scale, columns))
        return tensors, {"round": round}

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES)


def random_sample(name, choose):
    shape = [choose.randint(1, 5) for _ in range(choose.randint(0, 3))]
    shape.append(choose.choice((1, 3, 8, 16, 17, 31, 32, 64, 100, 257)))
    layout = choose.choice((None, misaligned, *((_transposed,) if len(shape) > 2 else ())))
    return _sample(
        name, shape, given=choose.random() < 0.5, excluded=choose.random() < 0.3, round=choose.randrange(2),
        ties=choose.random() < 0.2, layout=layout,
    )  # fmt: skip


def _transposed(t):
    return in_order(t, (*range(t.ndim - 2, -1, -1), t.ndim - 1))


def _zero_rows(t):
    t = t.clone()
    t[..., 0, :] = 0
    return t


SAMPLES = [
    _sample("deit_s_tokens", (2, 197, 384), tags="vit"),
    _sample("swin_hidden", (1, 784, 384), given=True, tags="vit"),
    *(_sample(f"small_{n}", (2, 3, 20), round=i, tags="small framework") for i, n in enumerate(NAMES)),
    _sample("small_given", (2, 5, 33), given=True, tags="small framework"),
    _sample("small_excluded", (3, 4, 40), excluded=True, tags="small framework"),
    _sample("small_given_excluded", (3, 40), given=True, excluded=True, tags="small"),
    *(_sample(f"ties_{n}", (6, 70), ties=True, round=i, tags="nasty small") for i, n in enumerate(NAMES)),
    *(_sample(f"columns_{n}", (3, n), tags="small" if n < 18 else "") for n in (1, 2, 7, 15, 16, 17, 63, 65, 1000)),
    _sample("large", (2, 50), size=1e30, tags="nasty", given=True),
    _sample("subnormal", (4, 50), size=1e-38, tags="nasty"),
    _sample("zero_rows", (2, 3, 24), layout=_zero_rows, tags="nasty small"),
    _sample("vector", (65,), tags="nasty small"),
    _sample("six_dims", (2, 1, 3, 2, 2, 9), given=True, tags="nasty small"),
    _sample("misaligned", (3, 7, 33), layout=misaligned, tags="strided small"),
    _sample("transposed", (3, 4, 5, 24), given=True, layout=_transposed, tags="strided small"),
    _sample("expanded", (4, 1, 16), layout=lambda t: t.expand(4, 3, t.shape[-1]), tags="strided small"),
    _sample("empty_rows", (0, 8), tags="empty"),
    _sample("empty_columns", (2, 3, 0), tags="empty"),
    _sample("tall", (200_000, 2), tags="huge"),
]


def _unrounded(x, scale, excluded, round):
    scale = row_scale(x, excluded) if scale is None else scale.to(x.dtype)
    return steps(x, scale, excluded), scale


def _magnitudes(args, kwargs, output_grads, eps):
    q, scale = _unrounded(*args, **kwargs)
    return {"q": q.abs(), "out_scale": scale}, {}


def resize(args, kwargs):
    x, scale, excluded = args
    return (*(None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in (x, scale)), excluded), kwargs


def good_call():
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 3, 8, generator=generator), "scale": 0.1 + torch.rand(2, 3, generator=generator),
        "excluded": torch.zeros(8, dtype=torch.int8), "round": 0,
    }  # fmt: skip


def _bad_scale(value):
    def make():
        call = good_call()
        call["scale"][1, 2] = value
        return split_call(call, ("x", "scale", "excluded"))

    return BadInput(
        f"scale_{value}", make, ValueError, r"scale must be positive and finite, got .* at \[1, 2\]", public=False
    )


def memory_calls(dtype):
    x = torch.randn(20_000, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [("20000x1536", (x, None, None), {})]


SPEC = OpSpec(
    name="quantize_int8",
    random_calls=160,
    samples=SAMPLES,
    definition=_unrounded,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("quantize_int8", good_call),
        *(_bad_scale(value) for value in (0.0, -1.0, float("nan"), float("inf"))),
    ],
    good_call=good_call,
    magnitudes=_magnitudes,
    dynamic="...",
    resize=resize,
    public_kwargs=lambda kwargs: {"round": NAMES[kwargs["round"]]} if kwargs else {},
    memory_calls=memory_calls,
)
