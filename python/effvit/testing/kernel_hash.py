"""kernel_hash's samples and bad inputs."""

import torch

from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import OpSpec, Sample


def _sample(name, b, n, h, k, p, f, *, layout=None, tags=""):
    def make(dtype, device, generator):
        x = torch.randn(b, n, h, k, generator=generator) / k**0.5
        anchors = torch.randn(h, p, k, generator=generator) / k**0.5
        mean, projection = torch.rand(h, p, generator=generator), torch.randn(h, f, p, generator=generator)
        tensors = [x.to(dtype), anchors, mean, projection]
        if dtype == torch.float64:
            tensors = [t.double() for t in tensors]
        if layout is not None:
            tensors[0] = layout(tensors[0])
        return tuple(t.to(device) for t in tensors), {}

    return Sample(name, make, frozenset(tags.split()))


def random_sample(name, choose):
    sizes = [choose.randint(1, most) for most in (3, 40, 4, 40, 30, 20)]
    return _sample(name, *sizes, layout=choose.choice((None, misaligned)))


SAMPLES = [
    _sample("pvt_stage1", 2, 784, 1, 64, 25, 16, tags="vit"),
    _sample("twins_stage3", 2, 196, 8, 32, 25, 16, tags="vit"),
    _sample("small", 2, 7, 3, 8, 5, 4, tags="small framework"),
    _sample("one_token", 1, 1, 2, 4, 3, 2, tags="nasty"),
    _sample("one_anchor", 2, 5, 1, 4, 1, 1, tags="nasty"),
    _sample("tiny", 1, 3, 2, 2, 2, 2, tags="tiny"),
    _sample("misaligned", 2, 9, 2, 5, 7, 3, layout=misaligned, tags="strided"),
    _sample("heads_first", 2, 9, 3, 8, 5, 4, layout=lambda x: in_order(x, (0, 2, 1, 3)), tags="strided"),
    _sample("empty_batch", 0, 5, 2, 4, 3, 2, tags="empty"),
    _sample("empty_codes", 2, 5, 2, 4, 3, 0, tags="empty"),
    _sample("tall", 1, 50_000, 1, 4, 3, 2, tags="huge"),
]


def magnitudes(args, kwargs, output_grads, eps):
    """The terms of the last sum."""
    x, anchors, mean, projection = args
    terms = torch.einsum("hp,hfp->hf", 1 + mean.abs(), projection.abs())
    return {"out": terms.expand(*x.shape[:3], -1).contiguous()}, {}


def good_call():
    args, _ = SAMPLES[2].build()
    return dict(zip(("x", "anchors", "mean", "projection"), args, strict=True))


SPEC = OpSpec(
    name="kernel_hash",
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=100,
    bad_inputs=list(declared_bad_inputs("kernel_hash", good_call)),
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B",
    resize=lambda args, kwargs: ((torch.cat((args[0], args[0].flip(0), args[0][:1])), *args[1:]), kwargs),
)
