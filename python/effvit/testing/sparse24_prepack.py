"""sparse24_prepack's samples and bad inputs."""

import torch

from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._sparse24 import bad_meta, compressed, transposed
from effvit.testing._spec import BadInput, OpSpec, Sample


def _sample(name, n, k, *, layout=None, tags=""):
    def make(dtype, device, generator):
        tensors = compressed(n, k, torch.int8, generator)
        return tuple((t if layout is None else layout(t)).to(device) for t in tensors), {}

    return Sample(name, make, frozenset(tags.split()), (torch.float32,))


def random_sample(name, choose):
    return _sample(
        name, choose.randint(1, 70), 4 * choose.randint(0, 20), layout=choose.choice((None, transposed))
    )  # fmt: skip


def good_call():
    return dict(zip(("values", "meta"), compressed(6, 12, torch.int8, torch.Generator().manual_seed(0)), strict=True))


def resize(args, kwargs):
    return tuple(torch.cat((t, t.flip(0), t[:1])) for t in args), kwargs


SPEC = OpSpec(
    name="sparse24_prepack",
    samples=[
        _sample("deit_s_fc1", 1536, 384, tags="vit"),
        _sample("small", 20, 36, tags="small framework"),
        *(_sample(f"small_{n}x{k}", n, k, tags="small") for n in (1, 16, 17) for k in (4, 8, 12)),
        _sample("transposed", 21, 16, layout=transposed, tags="strided"),
        _sample("empty", 0, 8, tags="empty"),
        _sample("no_depth", 5, 0, tags="nasty empty"),
    ],
    random_sample=random_sample,
    random_calls=40,
    bad_inputs=[
        *declared_bad_inputs("sparse24_prepack", good_call),
        *bad_meta(good_call, ("values", "meta")),
        BadInput("values_float", lambda: ((torch.zeros(4, 4), good_call()["meta"][:4, :1]), {}), TypeError,
                 "values must be torch.int8, got torch.float32"),
        BadInput("odd", lambda: ((torch.zeros(4, 3, dtype=torch.int8), good_call()["meta"][:4]), {}), ValueError,
                 r"values must be \[N, K / 2\] with K a multiple of 4"),
    ],
    good_call=good_call,
    dynamic="",  # N and K are part of the layout
    resize=resize,
)  # fmt: skip
