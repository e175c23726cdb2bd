"""sign_bits' samples and bad inputs."""

import torch

from effvit.reference.sign_bits import sign_bits
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, OpSpec, Sample


def _sample(name, shape, *, threshold=False, layout=None, whole=False, tags=""):
    def make(dtype, device, generator):
        x = torch.randn(shape, generator=generator)
        if whole:  # zeros of both signs, and numbers on the threshold
            x = x.round() * torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
        x = x.to(dtype)
        at = torch.randn(shape[:-1], generator=generator) if threshold else None
        at = at.round() if whole and threshold else at
        if layout is not None:
            x = layout(x)
        return tuple(None if t is None else t.to(device) for t in (x, at)), {}

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES)


def random_sample(name, choose):
    shape = [choose.randint(1, 5) for _ in range(choose.randint(0, 3))]
    shape.append(choose.choice((1, 3, 8, 9, 16, 31, 32, 33, 64, 100, 257)))
    return _sample(
        name, shape, threshold=choose.random() < 0.5, whole=choose.random() < 0.4,
        layout=choose.choice((None, misaligned)),
    )  # fmt: skip


SAMPLES = [
    _sample("deit_s_tokens", (2, 197, 384), tags="vit"),
    _sample("attention", (6, 197, 197), threshold=True, tags="vit"),
    _sample("small", (2, 3, 20), tags="small framework"),
    _sample("small_threshold", (2, 5, 33), threshold=True, tags="small framework"),
    _sample("signs_of_zero", (6, 70), whole=True, tags="nasty small"),
    _sample("on_the_threshold", (6, 70), whole=True, threshold=True, tags="nasty small"),
    *(_sample(f"columns_{n}", (3, n), threshold=n % 2 == 0, tags="small" if n < 18 else "")
      for n in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000)),
    _sample("vector", (65,), tags="nasty small"),
    _sample("six_dims", (2, 1, 3, 2, 2, 9), threshold=True, tags="nasty small"),
    _sample("misaligned", (3, 7, 33), layout=misaligned, tags="strided small"),
    _sample("transposed", (3, 4, 5, 24), threshold=True, layout=lambda x: in_order(x, (2, 1, 0, 3)),
            tags="strided small"),
    _sample("empty_rows", (0, 8), tags="empty"),
    _sample("empty_columns", (2, 3, 0), tags="empty"),
    _sample("tall", (200_000, 2), tags="huge"),
]  # fmt: skip


def _definition(x, threshold):
    bits, scale = sign_bits(x, threshold)
    return bits.to(x.dtype), scale


def _magnitudes(args, kwargs, output_grads, eps):
    x, threshold = args
    bits, scale = _definition(x, threshold)
    if threshold is not None:
        on = (x >= threshold[..., None]).to(x.dtype)
        scale = (x.abs() * on).sum(-1) / on.sum(-1).clamp(min=1)
    return {"bits": bits, "scale": scale}, {}


def good_call():
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, 3, 9, generator=generator), "threshold": torch.randn(2, 3, generator=generator)}


SPEC = OpSpec(
    name="sign_bits",
    random_calls=100,
    samples=SAMPLES,
    definition=_definition,
    random_sample=random_sample,
    bad_inputs=declared_bad_inputs("sign_bits", good_call),
    good_call=good_call,
    magnitudes=_magnitudes,
    dynamic="...",
    resize=lambda args, kwargs: (tuple(None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in args), kwargs),
    memory_calls=lambda dtype: [("20000x1536", (torch.randn(20_000, 1536).to(dtype), None), {})],
)
