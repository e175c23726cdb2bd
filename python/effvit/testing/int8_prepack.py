"""int8_prepack's samples and bad inputs."""

import torch

from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._int8 import integers
from effvit.testing._spec import BadInput, OpSpec, Sample


def _sample(name, n, k, *, layout=None, tags=""):
    def make(dtype, device, generator):
        weight = integers((n, k), generator, -128)
        return ((weight if layout is None else layout(weight)).to(device),), {}

    return Sample(name, make, frozenset(tags.split()), (torch.float32,))


def random_sample(name, choose):
    return _sample(
        name, choose.randint(1, 70), choose.randint(0, 70), layout=choose.choice((None, lambda t: t.mT.contiguous().mT))
    )


def good_call():
    return {"weight": integers((6, 12), torch.Generator().manual_seed(0))}


SPEC = OpSpec(
    name="int8_prepack",
    samples=[
        _sample("deit_s_fc1", 1536, 384, tags="vit"),
        _sample("small", 20, 33, tags="small framework"),
        *(_sample(f"small_{n}x{k}", n, k, tags="small") for n in (1, 16, 17) for k in (1, 3, 4, 5)),
        _sample("transposed", 21, 18, layout=lambda t: t.mT.contiguous().mT, tags="strided"),
        _sample("empty", 0, 8, tags="empty"),
        _sample("no_depth", 5, 0, tags="nasty empty"),
    ],
    random_sample=random_sample,
    random_calls=40,
    bad_inputs=[
        *declared_bad_inputs("int8_prepack", good_call),
        BadInput(
            "uint8",
            lambda: ((torch.zeros(4, 4, dtype=torch.uint8),), {}),
            TypeError,
            "weight must be torch.int8, got torch.uint8",
        ),
    ],
    good_call=good_call,
    dynamic="",  # N and K are part of the layout
    resize=lambda args, kwargs: ((torch.cat((args[0], args[0].flip(0))),), kwargs),
)
