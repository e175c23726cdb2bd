"""local_pool_attention's samples, bad inputs and error magnitudes."""

import torch

from effvit.ops._op import OPS
from effvit.reference.local_pool_attention import _around
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import changed, in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call

NAME = "local_pool_attention"
TENSORS = OPS[NAME].names
EXTRAS = ("local_bias", "pool_bias", "q_scale", "q_embed", "tokens", "token_bias")


def _sample(
    name, B, H, W, h, d, P, window=3, *, extras="", size=1.0, layout=None, tags="", dtypes=FLOAT_DTYPES
):  # fmt: skip
    """extras: names of the optional tensors, or "all"."""
    chosen = EXTRAS if extras == "all" else extras.split()

    def make(dtype, device, generator):
        randn = lambda *shape: torch.randn(shape, generator=generator)
        T = window * window
        maps = [randn(B, H, W, h, d) for _ in range(3)] + [randn(B, P, h, d) for _ in range(2)]
        maps = [t * size * d**-0.25 if i in (0, 1, 3) else t for i, t in enumerate(maps)]
        shapes = {"local_bias": (h, T), "pool_bias": (h, H * W, P), "q_embed": (h, d), "token_bias": (h, T)}
        optional = {n: randn(*shape) * 0.5 for n, shape in shapes.items()}
        optional["q_scale"] = torch.rand(h, H * W, generator=generator) + 0.5
        optional["tokens"] = randn(h, d, T) * d**-0.5 * 0.5
        place = lambda t: layout(t) if layout and t.numel() else t
        maps = [place(t.to(device, dtype)) for t in maps]
        wide = torch.promote_types(dtype, torch.float32)
        return (*maps, *(optional[n].to(device, wide) if n in chosen else None for n in EXTRAS)), {"window": window}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def _heads_first(t):
    return in_order(t, (t.ndim - 2, *range(t.ndim - 2), t.ndim - 1))


def _one_projection(t):
    """Heads of a slice of something wider."""
    return torch.cat((t, t), -2)[..., : t.shape[-2], :]


def random_sample(name, choose):
    """Any options and layouts at a small size; `choose` is a random.Random."""
    extras = " ".join(n for n in EXTRAS if choose.random() < 0.5)
    return _sample(
        name, choose.randint(1, 2), choose.choice((1, 2, 5, 9)), choose.choice((1, 3, 7, 10)), choose.randint(1, 2),
        choose.choice((1, 3, 8, 16, 20)), choose.choice((0, 1, 4, 9, 17)), choose.choice((3, 3, 5, 7)), extras=extras,
        layout=choose.choice((None, misaligned, _heads_first, _one_projection)),
    )  # fmt: skip


# fmt: off
SAMPLES = [
    _sample("transnext_28x28", 1, 28, 28, 2, 24, 49, extras="all", tags="vit"),
    _sample("small", 2, 4, 5, 2, 8, 4, extras="all", size=0.5, tags="small framework"),
    _sample("small_plain", 2, 3, 6, 1, 5, 3, tags="small framework"),
    _sample("small_5", 1, 5, 4, 2, 6, 5, 5, extras="q_scale tokens pool_bias", tags="small"),
    _sample("small_7", 1, 3, 2, 1, 4, 2, 7, extras="local_bias q_embed token_bias", tags="small"),
    _sample("tiny", 1, 2, 3, 1, 2, 2, extras="all", tags="tiny nasty"),
    _sample("bands", 1, 45, 18, 1, 9, 7, 5, extras="all", tags="nasty"),
    _sample("no_pooled_tokens", 2, 9, 3, 2, 20, 0, extras="local_bias", tags="nasty"),
    _sample("large_scores", 1, 8, 9, 2, 16, 10, extras="local_bias pool_bias", size=5.0, tags="nasty"),
    _sample("d70_p70", 1, 5, 6, 1, 70, 70, extras="tokens", tags="nasty"),
    _sample("heads_first", 2, 5, 6, 3, 16, 5, extras="q_scale q_embed", layout=_heads_first, tags="strided"),
    _sample("misaligned", 2, 6, 5, 2, 9, 6, extras="all", layout=misaligned, tags="strided"),
    _sample("empty_batch", 0, 4, 5, 2, 8, 3, extras="all", tags="empty"),
    _sample("huge_batch", 70_001, 1, 1, 1, 2, 1, tags="huge", dtypes=(torch.float32,)),
]
# fmt: on


# ---- error magnitudes ----------------------------------------------------------------------------------------------


def _scores(t, window):
    """Scores [B, H, W, h, T + P], those of keys outside of the map too; t: tensors by name."""
    q, h, H, W = t["q"], t["q"].shape[3], *t["q"].shape[1:3]
    if "q_embed" in t:
        q = q + t["q_embed"]
    if "q_scale" in t:
        q = q * t["q_scale"].view(h, H, W).permute(1, 2, 0).unsqueeze(-1)
    local = (_around(t["k"], window) @ q.unsqueeze(-1)).squeeze(-1)
    pooled = torch.einsum("byxhd,bphd->byxhp", q, t["k_pool"])
    if "local_bias" in t:
        local = local + t["local_bias"]
    if "pool_bias" in t:
        pooled = pooled + t["pool_bias"].view(h, H, W, -1).permute(1, 2, 0, 3)
    return torch.cat((local, pooled), -1)


def _extra(t, like):
    """What is added to the weights of the window."""
    extra = torch.zeros_like(like)
    if "tokens" in t:
        extra = extra + torch.einsum("byxhd,hdt->byxht", t["q"], t["tokens"])
    return extra + t["token_bias"] if "token_bias" in t else extra


def _sum(t, weights, window):
    """Sum of the values: weights [B, H, W, h, T + P] -> [B, H, W, h, d]."""
    T = window * window
    out = (weights[..., :T].unsqueeze(-2) @ _around(t["v"], window)).squeeze(-2)
    return out + torch.einsum("byxhp,bphd->byxhd", weights[..., T:], t["v_pool"])


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the terms behind every component, in float64.

    A score is a sum in float32, whose rounding changes the weights of its row by the factor 1 + eps(float32) * the sum
    of its absolute terms. All else is linear in each tensor: gradients of the sums, of absolute values.
    """
    window, T = kwargs["window"], kwargs["window"] ** 2
    given = {n: t for n, t in zip(TENSORS, args, strict=True) if t is not None}
    t = {n: x.abs().requires_grad_() for n, x in given.items()}
    inside = _around(torch.ones(1, *args[0].shape[1:3], 1, 1, dtype=torch.float64), window).squeeze(-1) > 0
    scores = _scores(given, window)
    scores[..., :T].masked_fill_(~inside, -torch.inf)
    weights = scores.softmax(-1)
    with torch.enable_grad():
        terms = _scores(t, window)
        extra = _extra(t, terms[..., :T])
    rounding = torch.finfo(torch.float32).eps / eps
    a = weights * (1 + 2 * rounding * (terms.detach() * (weights > 0)).amax(-1, keepdim=True))
    w = torch.cat((a[..., :T] + extra.detach(), a[..., T:]), -1)
    with torch.enable_grad():
        out = _sum(t, w, window)
    if output_grads is None:
        return {"out": out.detach()}, {}
    g = output_grads[0].abs()
    with torch.enable_grad():
        ones = w.detach().requires_grad_()
        da = torch.autograd.grad(_sum(given | {n: t[n].detach() for n in ("v", "v_pool")}, ones, window), ones, g)[0]
    ds = a * (da + (a * da).sum(-1, keepdim=True))
    total = (ds * terms).sum() + (da[..., :T] * extra).sum() + (g * out).sum()
    found = torch.autograd.grad(total, list(t.values()))
    return {"out": out.detach()}, dict(zip(t, found, strict=True))


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def resize(args, kwargs):
    """The same call at another batch: biases of all positions are for a map of one size."""
    twice = tuple(torch.cat((t, t.flip(0), t[:1])) for t in args[:5])
    return (*twice, *args[5:]), kwargs


def memory_calls(dtype):
    args, kwargs = _sample("56x56", 4, 56, 56, 3, 24, 49, extras="all").build(dtype)
    return [("4x56x56x3x24", args, kwargs)]


def good_call():
    args, kwargs = _sample("good", 2, 3, 4, 2, 6, 5, extras="all").build()
    return dict(zip(TENSORS, args, strict=True)) | kwargs


def _bad(name, match, **changes):
    return BadInput(name, lambda: split_call(changed(good_call(), changes), TENSORS), ValueError, match)


BAD_INPUTS = [
    _bad("window_4", "window must be odd, got 4", window=4),
    _bad("window_5", r"local_bias must be \[h, T\] = \[2, 25\], got \[2, 9\]", window=5),
    _bad("head_dim_257", r"q must be a tensor with a head dim between 1 and 256, got \[2, 3, 4, 2, 257\]",
         q=torch.zeros(2, 3, 4, 2, 257), k=torch.zeros(2, 3, 4, 2, 257), v=torch.zeros(2, 3, 4, 2, 257),
         k_pool=torch.zeros(2, 5, 2, 257), v_pool=torch.zeros(2, 5, 2, 257)),
    _bad("v_pool_tokens", r"v_pool must be \[B, P, h, d\] like .*, got \[2, 4, 2, 6\]", v_pool=lambda t: t[:, :4]),
    _bad("pool_bias_map", r"pool_bias must be \[h, H\*W, P\] = \[2, 12, 5\], got \[2, 11, 5\]",
         pool_bias=lambda t: t[:, 1:]),
]  # fmt: skip

SPEC = OpSpec(
    name=NAME,
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=160,
    bad_inputs=[*declared_bad_inputs(NAME, good_call), *BAD_INPUTS],
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B",
    resize=resize,
    memory_calls=memory_calls,
)
