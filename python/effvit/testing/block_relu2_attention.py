"""block_relu2_attention's samples, bad inputs and error magnitudes."""

import torch

from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned, sliced
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "block_relu2_attention"
BFLOAT16_FIRST = (torch.bfloat16, torch.float32, torch.float16)

# ---- samples -------------------------------------------------------------------------------------------------------


def _sample(name, B, L, K, V, *, group=256, causal=False, size=1.0, layout=None, tags="", dtypes=FLOAT_DTYPES):
    """Scores of about `size` after the division by the group."""

    def make(dtype, device, generator):
        q, k = (torch.randn(B, L, K, generator=generator) * (size * group / K**0.5) ** 0.5 for _ in range(2))
        v = torch.randn(B, L, V, generator=generator)
        tensors = tuple(t.to(device, dtype) for t in (q, k, v))
        return layout(*tensors) if layout else tensors, {"group": group, "causal": causal}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _each(change):
    return lambda *tensors: tuple(change(t) for t in tensors)


def _tokens_first(t):
    return in_order(t, (1, 0, 2))


def _shared(q, k, v):
    """One key and one value for the whole batch."""
    return q, k[:1].expand_as(k), v[:1].expand_as(v)


# fmt: off
SAMPLES = [
    _sample("gau_196", 1, 196, 64, 192, tags="vit"),
    _sample("mossformer_tail", 1, 300, 128, 72, group=256, tags="vit", dtypes=BFLOAT16_FIRST),
    _sample("small", 2, 11, 5, 7, group=4, tags="small framework"),
    _sample("small_causal", 2, 9, 8, 16, group=6, causal=True, tags="small framework"),
    _sample("small_blocks", 1, 70, 16, 40, group=64, tags="small", dtypes=BFLOAT16_FIRST),
    _sample("small_blocks_causal", 1, 67, 20, 33, group=40, causal=True, tags="small"),
    _sample("tiny", 1, 5, 2, 2, group=3, tags="tiny small"),
    _sample("tiny_causal", 1, 4, 2, 3, group=4, causal=True, tags="tiny"),
    _sample("group_of_one", 2, 3, 4, 5, group=1, tags="nasty"),
    _sample("many_keys_causal", 1, 520, 9, 17, group=512, causal=True, tags="nasty"),
    _sample("widest", 1, 20, 256, 1100, group=16, tags="nasty"),
    _sample("large_scores", 1, 40, 16, 16, group=32, size=30.0, tags="nasty", dtypes=FLOAT_DTYPES[:2]),
    _sample("misaligned", 2, 21, 17, 19, group=8, layout=_each(misaligned), tags="strided small"),
    _sample("tokens_first", 3, 21, 8, 16, group=8, layout=_each(_tokens_first), tags="strided"),
    _sample("sliced", 2, 21, 8, 16, group=16, layout=_each(lambda t: sliced(t, 2)), tags="strided"),
    _sample("shared", 3, 10, 8, 8, group=4, layout=_shared, tags="strided"),
    _sample("empty_batch", 0, 5, 4, 8, tags="empty"),
    _sample("empty_tokens", 2, 0, 4, 8, tags="empty"),
    _sample("huge_batch", 70001, 2, 1, 2, group=1, tags="huge", dtypes=FLOAT_DTYPES[:1]),
]
# fmt: on


def random_sample(name, choose):
    """Any sizes, groups and layouts, small; `choose` is a random.Random."""
    return _sample(
        name, choose.randint(1, 3), choose.choice((1, 2, 7, 16, 31, 49, 65, 100)), choose.choice((1, 3, 8, 16, 17, 40)),
        choose.choice((1, 3, 8, 16, 17, 33, 64)), group=choose.choice((1, 2, 5, 16, 33, 64, 256)),
        causal=choose.random() < 0.5, layout=choose.choice((None, _each(misaligned), _each(_tokens_first))),
    )  # fmt: skip


# ---- error magnitudes ----------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """A weight r² carries the error of its score, whose terms add up to a: 2 r a, and a² eps where rounding lifts a
    score above 0. The gradient of a score, 2 r dp / group, carries those of r and of dp likewise."""
    group, causal = kwargs["group"], kwargs["causal"]
    L = args[0].shape[1]
    same = torch.arange(L)[:, None] // group == torch.arange(L) // group
    there = (same.tril() if causal else same).double()
    q, k, v = args
    r = torch.relu(q @ k.mT / group) * there
    a = q.abs() @ k.abs().mT / group * there
    p = r * r + 2 * r * a + eps * a * a
    out = p @ v.abs()
    if output_grads is None:
        return {"out": out}, {}
    g = output_grads[0]
    ds = 2 / group * (a * (g @ v.mT).abs() + r * (g.abs() @ v.abs().mT))
    return {"out": out}, {"q": ds @ k.abs(), "k": ds.mT @ q.abs(), "v": p.mT @ g.abs()}


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def good_call():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 6, 4, generator=generator)
    return {"q": q, "k": k, "v": torch.randn(2, 6, 5, generator=generator), "group": 4, "causal": False}


def _bad(name, match, **changes):
    def make():
        call = good_call()
        return split_call(call | {n: change(call[n]) for n, change in changes.items()}, OPS[NAME].names)

    return BadInput(name, make, ValueError, match)


BAD_INPUTS = [
    *declared_bad_inputs(NAME, good_call),
    _bad("q_no_columns", "q must have between 1 and 256 columns", q=lambda t: t[..., :0], k=lambda t: t[..., :0]),
    _bad("q_wide", "q must have between 1 and 256 columns", **dict.fromkeys("qk", lambda t: t.repeat(1, 1, 65))),
    _bad("v_no_columns", "v must have between 1 and 2048 columns", v=lambda t: t[..., :0]),
    _bad("v_wide", "v must have between 1 and 2048 columns", v=lambda t: t.repeat(1, 1, 410)),
]


def resize(args, kwargs):
    return tuple(torch.cat((t, t.flip(0)))[:, 1:].contiguous() for t in args), kwargs


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)

    def call(B, L, K, V, **options):
        shapes = ((B, L, K), (B, L, K), (B, L, V))
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), options

    return [
        ("2x4096x128x1024", *call(2, 4096, 128, 1024)),
        ("8x3136x64x192", *call(8, 3136, 64, 192, group=256, causal=True)),
    ]


SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B L",
    resize=resize,
    memory_calls=memory_calls,
)
