"""sparse24_mask's samples and bad inputs."""

import torch

from effvit.ops._sparse24 import ALGORITHMS
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._sparse24 import transposed
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample

MAGNITUDE, TRANSPOSABLE = range(2)


def weight_sample(name, n, k, options, *, ties=False, layout=None, tags=""):
    """ties: integers from -2 to 2, of which many are equal."""

    def make(dtype, device, generator):
        if ties:
            w = torch.randint(-2, 3, (n, k), generator=generator).to(dtype)
        else:
            w = torch.randn(n, k, generator=generator).to(dtype)
        return ((w if layout is None else layout(w)).to(device),), dict(options)

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES)


def _sample(name, n, k, algorithm=MAGNITUDE, **rest):
    return weight_sample(name, n, k, {"algorithm": algorithm}, **rest)


def random_sample(name, choose):
    return _sample(
        name, 4 * choose.randint(1, 8), 4 * choose.randint(1, 12), choose.randrange(2),
        ties=choose.random() < 0.5, layout=choose.choice((None, transposed)),
    )  # fmt: skip


def good_call():
    return {"w": torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), "algorithm": MAGNITUDE}


def resize(args, kwargs):
    return (torch.cat((args[0], args[0].flip(0), args[0][:4])),), kwargs


def odd_shapes(algorithm_named):
    """K, and with transposable N, that are no multiples of 4; `algorithm_named`: (number) -> keyword arguments."""
    both, of_k = r"w must be \[N, K\] with N and K multiples of 4", r"w must be \[N, K\] with K a multiple of 4"
    for name, shape, algorithm, match in (
        ("odd_k", (4, 6), MAGNITUDE, of_k),
        ("odd_n", (6, 8), TRANSPOSABLE, both),
        ("odd_n_and_k", (6, 6), TRANSPOSABLE, both),
    ):
        call = (torch.zeros(shape),), algorithm_named(algorithm)
        yield BadInput(name, lambda call=call: call, ValueError, match, public=algorithm == MAGNITUDE)


SPEC = OpSpec(
    name="sparse24_mask",
    samples=[
        _sample("deit_s_fc1", 1536, 384, tags="vit"),
        _sample("deit_s_fc1_transposable", 1536, 384, TRANSPOSABLE, tags="vit"),
        _sample("small", 7, 20, tags="small framework"),
        _sample("small_transposable", 8, 20, TRANSPOSABLE, tags="small"),
        *(_sample(f"ties_{a}", 40, 24, i, ties=True, tags="nasty small") for i, a in enumerate(ALGORITHMS)),
        *(_sample(f"one_{a}", 4, 4, i, tags="nasty small") for i, a in enumerate(ALGORITHMS)),
        _sample("odd_rows", 7, 12, tags="nasty"),
        *(_sample(f"transposed_{a}", 16, 8, i, layout=transposed, tags="strided") for i, a in enumerate(ALGORITHMS)),
        _sample("empty", 0, 8, TRANSPOSABLE, tags="empty"),
        _sample("no_depth", 4, 0, TRANSPOSABLE, tags="nasty empty"),
    ],
    random_sample=random_sample,
    random_calls=80,
    bad_inputs=[
        *declared_bad_inputs("sparse24_mask", good_call),
        *odd_shapes(lambda algorithm: {"algorithm": algorithm} if algorithm else {}),
    ],
    good_call=good_call,
    dynamic="N",
    resize=resize,
    public_kwargs=lambda kwargs: {"algorithm": ALGORITHMS[kwargs["algorithm"]]} if kwargs else {},
)
