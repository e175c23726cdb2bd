"""aft's samples, bad inputs and error magnitudes."""

import torch

from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import every_other, in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "aft"
FLOAT32 = FLOAT_DTYPES[:1]

# ---- samples -------------------------------------------------------------------------------------------------------


def _sample(
    name, B, L, M, C, *, bias=True, window=0, size=1.0, values=None, layout=None, bias_dtype=None, tags="",
    dtypes=FLOAT_DTYPES,
):  # fmt: skip
    """`size` multiplies keys and bias."""

    def make(dtype, device, generator):
        q, k, v = (torch.randn(B, n, C, generator=generator) for n in (L, M, M))
        w = torch.randn(L, M, generator=generator) * size if bias else None
        k = k * size
        if values is not None:
            k, w = values(k, w)
        q, k, v = (t.to(device, dtype) for t in (q, k, v))
        w = None if w is None else w.to(device, bias_dtype or dtype)
        return layout(q, k, v, w) if layout else (q, k, v, w), {"window": window}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _opposed(k, w):
    """The largest key meets the least bias, in half of the channels and rows: the product of the largest says nothing
    about the sum."""
    k, w = k.clone(), w.clone()
    k[:, 0, ::2] += 80
    w[::2, 0] -= 130
    k[:, -1, 1::2] -= 100
    return k, w


def _transposed_bias(q, k, v, w):
    return q, k, v, in_order(w, (1, 0))


def _strided(q, k, v, w):
    return misaligned(q), in_order(k, (1, 0, 2)), misaligned(v), every_other(w)


def _one_bias(q, k, v, w):
    return q, k[:1].expand_as(k), v, w[:1].expand_as(w)


# fmt: off
SAMPLES = [
    _sample("full_196", 1, 196, 196, 20, tags="vit"),
    _sample("local_49", 2, 49, 49, 48, window=7, tags="vit"),
    _sample("simple_196", 2, 196, 196, 40, bias=False, tags="vit"),
    _sample("small", 2, 5, 7, 6, tags="small framework"),
    _sample("small_local", 1, 9, 9, 4, window=3, bias_dtype=torch.float32, tags="small framework"),
    _sample("small_simple", 2, 5, 4, 9, bias=False, tags="small framework"),
    _sample("small_blocks", 1, 37, 35, 33, size=2.0, tags="small"),
    _sample("small_opposed", 2, 19, 21, 17, values=_opposed, tags="nasty small", dtypes=FLOAT32),
    _sample("far_apart", 1, 70, 50, 40, size=40.0, tags="nasty", dtypes=FLOAT32),
    _sample("simple_far_apart", 2, 20, 50, 40, bias=False, size=60.0, tags="nasty", dtypes=FLOAT32),
    _sample("tiny", 1, 3, 2, 2, tags="tiny small"),
    _sample("tiny_local", 2, 3, 3, 1, window=2, tags="tiny"),
    _sample("tiny_simple", 1, 2, 3, 2, bias=False, tags="tiny"),
    _sample("one_key", 2, 6, 1, 18, tags="nasty"),
    _sample("one_query", 3, 1, 40, 130, tags="nasty"),
    _sample("window_beyond", 1, 20, 31, 8, window=1000, tags="nasty"),
    _sample("transposed_bias", 2, 21, 19, 16, layout=_transposed_bias, tags="strided"),
    _sample("strided", 3, 21, 19, 11, window=5, layout=_strided, bias_dtype=torch.bfloat16, tags="strided small"),
    _sample("expanded", 2, 9, 19, 8, layout=_one_bias, tags="strided"),
    _sample("empty_batch", 0, 5, 4, 8, tags="empty"),
    _sample("empty_queries", 2, 0, 4, 8, bias=False, tags="empty"),
    _sample("empty_channels", 2, 3, 4, 0, tags="empty"),
    _sample("huge_batch", 70001, 1, 2, 2, tags="huge", dtypes=FLOAT32),
]
# fmt: on


def random_sample(name, choose):
    """Any sizes, windows and layouts, small; `choose` is a random.Random."""
    L, M = (choose.choice((1, 2, 7, 16, 31, 49, 65)) for _ in range(2))
    bias = choose.random() < 0.8
    return _sample(
        name, choose.randint(1, 3), L, M, choose.choice((1, 3, 8, 16, 17, 33)), bias=bias,
        window=choose.choice((0, 0, 1, 4, 20)), size=choose.choice((0.3, 1.0, 3.0)),
        bias_dtype=choose.choice((None, torch.float32)), layout=_strided if bias and choose.random() < 0.3 else None,
    )  # fmt: skip


# ---- error magnitudes ----------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """A weight exp(k + w - lse) carries the float32 rounding of lse, where there is a bias: backward reads it."""
    q, k, v, bias = args
    L, M, window = q.shape[1], k.shape[1], kwargs["window"]
    there = torch.ones(L if bias is not None else min(L, 1), M, dtype=torch.bool)
    x = k[:, None].expand(-1, len(there), -1, -1)
    if bias is not None:
        if window:
            there = (torch.arange(L)[:, None] - torch.arange(M)).abs() < window
        x = x + bias.masked_fill(~there, 0)[..., None]
    weights, lse = x.softmax(2), x.logsumexp(2)
    mean = (weights * v.abs()[:, None]).sum(2)
    s = torch.sigmoid(q)
    outputs = {"out": s * mean, "mean": mean, "lse": lse.abs() + weights.sum(2)}
    if output_grads is None:
        return outputs, {}
    g, grad_mean, grad_lse = (
        torch.zeros_like(like) if t is None else t.abs() for t, like in zip(output_grads, (q, mean, mean), strict=True)
    )
    gy = g * s if bias is not None else (g * s).sum(1, keepdim=True)[:, :L]
    gy = gy + grad_mean
    if bias is not None:
        weights = weights * (1 + torch.finfo(torch.float32).eps / eps * lse.abs()[:, :, None])
    moved = gy[:, :, None] * (v.abs()[:, None] + mean[:, :, None]) + grad_lse[:, :, None]
    terms = weights * moved
    gradients = {"q": g * s * (1 - s) * mean, "k": terms.sum(1), "v": (weights * gy[:, :, None]).sum(1)}
    if bias is not None:
        gradients["bias"] = terms.sum((0, 3)) * there
    return outputs, gradients


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def good_call():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 6, generator=generator)
    k, v = torch.randn(2, 2, 4, 6, generator=generator)
    return {"q": q, "k": k, "v": v, "bias": torch.randn(5, 4, generator=generator), "window": 3}


def _bad(name, error, match, schema_match=None, **changes):
    def make():
        call = good_call()
        return split_call(call | {n: change(call[n]) for n, change in changes.items()}, OPS[NAME].names)

    return BadInput(name, make, error, match, schema_match)


BAD_INPUTS = [
    *declared_bad_inputs(NAME, good_call),
    _bad("no_keys", ValueError, "k must have at least one token, got", k=lambda t: t[:, :0], v=lambda t: t[:, :0]),
]


def resize(args, kwargs):
    q, k, v, bias = args
    return (*(torch.cat((t, t.flip(0), t[:1])) for t in (q, k, v)), bias), kwargs


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)

    def call(B, L, C, bias):
        tensors = [torch.randn(B, L, C, generator=generator).to(dtype) for _ in range(3)]
        return (*tensors, torch.randn(L, L, generator=generator).to(dtype) if bias else None), {}

    return [("4x1024x384", *call(4, 1024, 384, True)), ("16x3136x96 simple", *call(16, 3136, 96, False))]


SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B",
    resize=resize,
    memory_calls=memory_calls,
)
