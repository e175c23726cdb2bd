"""sparse24_decompress's samples and bad inputs."""

import torch

from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._sparse24 import bad_meta, compressed, transposed
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample


def _sample(name, n, k, *, dtype=None, layout=None, tags=""):
    """dtype None: a float one, as asked."""

    def make(asked, device, generator):
        tensors = compressed(n, k, dtype or asked, generator)
        return tuple((t if layout is None else layout(t)).to(device) for t in tensors), {}

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES if dtype is None else FLOAT_DTYPES[:1])


def random_sample(name, choose):
    return _sample(
        name, choose.randint(1, 40), 4 * choose.randint(1, 20), dtype=choose.choice((None, torch.int8)),
        layout=choose.choice((None, transposed)),
    )  # fmt: skip


def good_call():
    return dict(
        zip(("values", "meta"), compressed(6, 12, torch.float32, torch.Generator().manual_seed(0)), strict=True)
    )


def resize(args, kwargs):
    return tuple(torch.cat((t, t.flip(0), t[:1])) for t in args), kwargs


SPEC = OpSpec(
    name="sparse24_decompress",
    samples=[
        _sample("deit_s_fc1", 1536, 384, dtype=torch.int8, tags="vit"),
        _sample("deit_s_fc2", 384, 1536, tags="vit"),
        _sample("small", 7, 20, tags="small framework"),
        _sample("small_int8", 6, 24, dtype=torch.int8, tags="small framework"),
        _sample("one_group", 1, 4, tags="nasty small"),
        _sample("transposed", 21, 16, layout=transposed, tags="strided"),
        _sample("empty", 0, 8, tags="empty"),
        _sample("no_depth", 5, 0, tags="nasty empty"),
    ],
    random_sample=random_sample,
    random_calls=40,
    bad_inputs=[
        *declared_bad_inputs("sparse24_decompress", good_call),
        *bad_meta(good_call, ("values", "meta")),
        BadInput("odd", lambda: ((torch.zeros(4, 3), torch.full((4, 1), 0xEE, dtype=torch.uint8)), {}), ValueError,
                 r"values must be \[N, K / 2\] with K a multiple of 4"),
    ],
    good_call=good_call,
    dynamic="N",
    resize=resize,
)  # fmt: skip
