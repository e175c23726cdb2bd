"""sparse24_compress's samples and bad inputs."""

import torch

from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._sparse24 import sparse_weight, transposed
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample


def _sample(name, n, k, *, dtype=None, keep=None, layout=None, tags=""):
    """dtype None: a float one, as asked."""

    def make(asked, device, generator):
        w = sparse_weight(n, k, dtype or asked, generator, keep)
        return ((w if layout is None else layout(w)).to(device),), {}

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES if dtype is None else FLOAT_DTYPES[:1])


def random_sample(name, choose):
    return _sample(
        name, choose.randint(1, 40), 4 * choose.randint(1, 20), dtype=choose.choice((None, torch.int8)),
        keep=choose.choice((None, None, 0, 1, 2)), layout=choose.choice((None, transposed)),
    )  # fmt: skip


def good_call():
    return {"w": sparse_weight(6, 12, torch.float32, torch.Generator().manual_seed(0))}


def _dense_group(count, dtype):
    def make():
        w = sparse_weight(6, 12, dtype, torch.Generator().manual_seed(0))
        w[4, 4 : 4 + count] = 3
        w[4, 4 + count : 8] = 0
        w[5, 8:] = 1
        return (w,), {}

    match = f"w must be 2:4 sparse.*got {count} in row 4, columns 4 to 7"
    return BadInput(f"dense_group_{count}_{dtype}", make, ValueError, match)


SPEC = OpSpec(
    name="sparse24_compress",
    samples=[
        _sample("deit_s_fc1", 1536, 384, dtype=torch.int8, tags="vit"),
        _sample("deit_s_fc2", 384, 1536, tags="vit"),
        _sample("small", 7, 20, tags="small framework"),
        _sample("small_int8", 6, 24, dtype=torch.int8, tags="small framework"),
        *(_sample(f"keep_{i}", 9, 32, keep=i, tags="nasty small") for i in range(3)),
        _sample("one_group", 1, 4, tags="nasty small"),
        _sample("transposed", 21, 16, layout=transposed, tags="strided"),
        _sample("empty", 0, 8, tags="empty"),
        _sample("no_depth", 5, 0, tags="nasty empty"),
    ],
    random_sample=random_sample,
    random_calls=40,
    bad_inputs=[
        *declared_bad_inputs("sparse24_compress", good_call),
        *(_dense_group(i, dtype) for i in (3, 4) for dtype in (torch.int8, torch.bfloat16)),
        BadInput("uint8", lambda: ((torch.zeros(4, 4, dtype=torch.uint8),), {}), TypeError, "w must be float32"),
        BadInput("odd", lambda: ((torch.zeros(4, 6),), {}), ValueError, r"w must be \[N, K\] with K a multiple of 4"),
    ],
    good_call=good_call,
    dynamic="N",
    resize=lambda args, kwargs: ((torch.cat((args[0], args[0].flip(0))),), kwargs),
)
