"""dwconv's samples, bad inputs and error magnitudes."""

import torch

from effvit.ops.dwconv import NAMES
from effvit.reference.dwconv import dwconv as definition
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._depthwise import (
    GELU,
    NONE,
    RELU,
    SIGMOID,
    SILU,
    TANH,
    activation_magnitudes,
    away_from_kink,
    halves,
    width_first,
)
from effvit.testing._samples import changed, misaligned, sliced
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call


def _terms(args, kwargs):
    """What the activation is of, and the sum of its absolute terms."""
    options = {n: x for n, x in kwargs.items() if n != "act"}
    x, weight, bias, pregate, _, state = args
    given = (x, weight, bias, pregate, None, state)
    return definition(*given, **options), definition(*(None if t is None else t.abs() for t in given), **options)


def _sample(
    name, shape, k, *, before=None, after=None, dilation=(1, 1), window=(0, 0), act=NONE, bias=True, pregate=False,
    postgate=False, state=False, weights=None, size=1.0, layout=None, tags="", dtypes=FLOAT_DTYPES,
):  # fmt: skip
    """shape: [B, H, W, C]; k: (kh, kw). before, after: None is "same". weights: the dtype of weight and bias."""
    reach = [d * (n - 1) for d, n in zip(dilation, k, strict=True)]
    before = [r // 2 for r in reach] if before is None else [*before]
    after = [r - b for r, b in zip(reach, before, strict=True)] if after is None else [*after]

    def draw(dtype, device, generator):
        B, H, W, C = shape
        P, Q = (s + b + a - r for s, b, a, r in zip((H, W), before, after, reach, strict=True))
        randn = lambda *s: torch.randn(*s, generator=generator)
        place = lambda t: layout(t) if layout and t.numel() else t
        maps = {
            "x": randn(*shape) * size,
            "pregate": randn(*shape) if pregate else None,
            "postgate": randn(B, P, Q, C) if postgate else None,
            "state": randn(B, H, before[1], C) if state else None,
        }
        maps = {n: None if t is None else place(t.to(device, dtype)) for n, t in maps.items()}
        w, b = randn(C, *k) / (k[0] * k[1]) ** 0.5, randn(C)
        w, b = (t.to(device, weights or dtype) for t in (w, b))
        tensors = (maps["x"], w, b if bias else None, maps["pregate"], maps["postgate"], maps["state"])
        return tensors, {
            "before": before, "after": after, "dilation": [*dilation], "window": [*window], "act": act,
        }  # fmt: skip

    make = away_from_kink(draw, _terms) if act == RELU else draw
    return Sample(name, make, frozenset(tags.split()), dtypes)


def random_sample(name, choose):
    """Any options and layouts at a small size; `choose` is a random.Random."""
    B, C = choose.randint(1, 3), choose.choice((1, 3, 8, 16, 17, 33, 40))
    kh, kw = choose.choice((1, 1, 1, 2, 3, 4, 5, 7)), choose.choice((1, 2, 3, 4, 5, 7, 9, 11, 17))
    if kh > 1:
        kw = min(kw, 9)
    dilation = (choose.choice((1, 1, 2)), choose.choice((1, 1, 2, 3)))
    H = choose.choice((1, 2, 5, 9)) if kh > 1 else choose.choice((1, 1, 2, 3))
    W = choose.choice((1, 3, 7, 8, 10, 19)) if kh > 1 else choose.choice((1, 5, 8, 21, 40))
    reach = [d * (k - 1) for d, k in zip(dilation, (kh, kw), strict=True)]
    state = kh == 1 and choose.random() < 0.3
    before, after, window = None, None, (0, 0)
    kind = "causal" if state else choose.choice(("same", "same", "window", "valid", "padded", "causal"))
    if kind == "window":
        window = (choose.choice((1, 2, 4)), choose.choice((1, 3, 8)))
        H, W = window[0] * choose.randint(1, 3), window[1] * choose.randint(1, 3)
    elif kind == "valid":
        before, after = (0, 0), (0, 0)
        H, W = H + reach[0], W + reach[1]
    elif kind == "padded":
        before = tuple(choose.randint(0, r + 2) for r in reach)
        least = [r + 1 - s - b for r, s, b in zip(reach, (H, W), before, strict=True)]
        after = tuple(max(n, choose.randint(0, r + 2)) for n, r in zip(least, reach, strict=True))
    elif kind == "causal":
        before, after = (0 if state else reach[0], reach[1]), (0, 0)
    return _sample(
        name, (B, H, W, C), (kh, kw), before=before, after=after, dilation=dilation, window=window,
        act=choose.choice((NONE, NONE, *range(5))), bias=choose.random() < 0.7, pregate=choose.random() < 0.4,
        postgate=choose.random() < 0.4, state=state,
        weights=choose.choice((None, None, torch.float32, torch.bfloat16)),
        layout=choose.choice((None, misaligned, width_first, halves)),
    )  # fmt: skip


# fmt: off
SAMPLES = [
    _sample("convnext_14x14x96", (1, 14, 14, 96), (7, 7), tags="vit"),
    _sample("replknet_20x20x32", (1, 20, 20, 32), (31, 31), bias=False, tags="vit"),
    _sample("kernel_13x13", (2, 15, 17, 20), (13, 13), act=GELU, tags="vit"),
    _sample("inceptionnext_1x11", (1, 14, 15, 24), (1, 11), tags="vit"),
    _sample("inceptionnext_11x1", (1, 14, 15, 24), (11, 1), tags="vit"),
    _sample("cswin_stripes_8x2", (2, 8, 6, 32), (3, 3), window=(8, 2), postgate=True, tags="vit"),
    _sample("hyena_short_3", (2, 1, 100, 48), (1, 3), before=(0, 2), after=(0, 0), pregate=True, postgate=True,
            tags="vit"),
    _sample("mamba_4_silu", (2, 1, 70, 40), (1, 4), before=(0, 3), after=(0, 0), act=SILU, state=True, tags="vit"),
    _sample("small", (2, 5, 7, 20), (3, 3), act=GELU, tags="small framework"),
    _sample("small_causal", (2, 1, 9, 16), (1, 4), before=(0, 3), after=(0, 0), act=SILU, pregate=True, postgate=True,
            tags="small framework"),
    _sample("small_state", (2, 1, 6, 17), (1, 3), before=(0, 2), after=(0, 1), state=True, act=SIGMOID, pregate=True,
            weights=torch.float32, tags="small"),
    _sample("small_state_longer", (1, 2, 3, 5), (1, 4), before=(0, 6), after=(0, 0), dilation=(1, 2), state=True,
            postgate=True, tags="small nasty"),
    _sample("small_window", (1, 4, 6, 9), (3, 5), window=(2, 3), act=TANH, weights=torch.bfloat16, tags="small"),
    _sample("small_even", (2, 4, 5, 8), (2, 4), act=RELU, bias=False, pregate=True, layout=halves, tags="small"),
    _sample("small_dilated", (1, 7, 9, 6), (3, 2), dilation=(2, 3), postgate=True, tags="small"),
    _sample("tiny", (1, 3, 4, 2), (2, 3), act=GELU, pregate=True, postgate=True, tags="tiny nasty"),
    _sample("tiny_state", (1, 1, 3, 2), (1, 3), before=(0, 2), after=(0, 0), state=True, act=SILU, tags="tiny nasty"),
    _sample("tiny_window", (1, 2, 4, 2), (3, 2), window=(2, 2), tags="tiny nasty"),
    _sample("valid", (2, 9, 12, 33), (4, 5), before=(0, 0), after=(0, 0), postgate=True, tags="nasty"),
    _sample("more_padding_than_kernel", (1, 5, 6, 18), (3, 2), before=(4, 3), after=(4, 3), act=GELU, tags="nasty"),
    _sample("cut_off", (1, 9, 8, 16), (3, 3), before=(0, 2), after=(1, 0), postgate=True, tags="nasty"),
    _sample("kernel_1", (2, 5, 6, 20), (1, 1), act=SILU, pregate=True, tags="nasty"),
    _sample("kernel_of_the_map", (1, 6, 7, 19), (13, 15), act=TANH, tags="nasty"),
    _sample("larger_than_the_map", (2, 3, 2, 17), (9, 21), postgate=True, tags="nasty"),
    _sample("dilated_2d", (1, 13, 17, 24), (5, 5), dilation=(2, 3), act=RELU, tags="nasty"),
    _sample("bands", (1, 90, 9, 35), (5, 5), act=RELU, tags="nasty"),
    _sample("long", (1, 1, 2100, 18), (1, 7), act=SILU, pregate=True, tags="nasty"),
    _sample("long_state_dilated", (1, 1, 1500, 16), (1, 5), before=(0, 16), after=(0, 0), dilation=(1, 4), state=True,
            tags="nasty"),
    _sample("long_kernel", (1, 1, 200, 8), (1, 200), before=(0, 199), after=(0, 0), postgate=True, tags="nasty"),
    _sample("wide", (1, 3, 1300, 16), (3, 9), tags="nasty"),
    _sample("channels_150", (1, 9, 10, 150), (3, 3), postgate=True, tags="nasty"),
    _sample("far", (2, 9, 11, 24), (7, 7), act=SILU, size=10.0, bias=False, tags="nasty"),
    _sample("width_first", (2, 6, 8, 24), (3, 3), act=SIGMOID, postgate=True, layout=width_first, tags="strided"),
    _sample("misaligned", (2, 7, 5, 33), (7, 3), pregate=True, layout=misaligned, tags="strided"),
    _sample("sliced_columns", (2, 5, 6, 16), (3, 4), act=SILU, postgate=True, layout=lambda t: sliced(t, 2),
            tags="strided"),
    _sample("windows_width_first", (2, 6, 8, 16), (3, 3), window=(3, 4), layout=width_first, tags="strided"),
    _sample("expanded", (3, 4, 6, 16), (3, 3), act=RELU, layout=lambda t: t[:1].expand_as(t), tags="strided"),
    _sample("no_rows", (2, 2, 5, 4), (3, 3), before=(0, 1), after=(0, 0), act=RELU, postgate=True, tags="empty"),
    _sample("empty_batch", (0, 4, 5, 8), (3, 3), tags="empty"),
    _sample("huge_batch", (70_001, 1, 2, 3), (3, 3), tags="huge", dtypes=(torch.float32,)),
]
# fmt: on


# ---- error magnitudes ----------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of absolute terms: of the convolution, what its rounding makes of the activation, and the products."""
    options = {n: x for n, x in kwargs.items() if n != "act"}
    names = ("x", "weight", "bias", "pregate", "postgate", "state")
    tensors = dict(zip(names, args, strict=True))
    z = definition(**tensors | {"postgate": None}, **options)
    positive = {n: None if t is None else t.abs().requires_grad_() for n, t in tensors.items()} | {"postgate": None}
    with torch.enable_grad():
        m = definition(**positive, **options)
    act, slope = activation_magnitudes(NAMES[kwargs["act"]], z, m.detach())
    gate = torch.ones_like(act) if tensors["postgate"] is None else tensors["postgate"].abs()
    outputs = {"out": act * gate}
    if output_grads is None:
        return outputs, {}
    g = output_grads[0].abs()
    given = {n: t for n, t in positive.items() if t is not None}
    gradients = dict(zip(given, torch.autograd.grad(m, [*given.values()], g * gate * slope), strict=True))
    return outputs, gradients | ({} if tensors["postgate"] is None else {"postgate": g * act})


# ---- the calls of the suite ----------------------------------------------------------------------------------------


def resize(args, kwargs):
    more = lambda t: None if t is None else torch.cat((t, t.flip(0), t[:1]))
    x, w, b, *maps = args
    return (more(x), w, b, *map(more, maps)), kwargs


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 56, 56, 96, generator=generator).to(dtype)
    w, b = torch.randn(96, 7, 7, generator=generator), torch.randn(96, generator=generator)
    kwargs = {"before": [3, 3], "after": [3, 3], "dilation": [1, 1], "window": [0, 0], "act": GELU}
    return [("16x56x56x96 7x7", (x, w, b, None, x, None), kwargs)]


def good_call():
    generator = torch.Generator().manual_seed(0)
    x, pregate, postgate = torch.randn(3, 2, 3, 4, 6, generator=generator)
    w, b = torch.randn(6, 1, 3, generator=generator), torch.randn(6, generator=generator)
    return {
        "x": x, "weight": w, "bias": b, "pregate": pregate, "postgate": postgate,
        "state": torch.randn(2, 3, 2, 6, generator=generator), "before": [0, 2], "after": [0, 0], "dilation": [1, 1],
        "window": [0, 0], "act": GELU,
    }  # fmt: skip


def _bad(name, match, *, public=True, **changes):
    """public: whether the function, which finds the padding itself, can be called so."""
    make = lambda: split_call(changed(good_call(), changes), OPS["dwconv"].names)
    return BadInput(name, make, ValueError, match, declared=True, public=public)


_PLAIN = {"pregate": None, "postgate": None, "state": None}
BAD_INPUTS = [
    _bad("weight_no_columns", r"weight must be \[C, kh, kw\] with at least one row and column, got \[6, 1, 0\]",
         weight=torch.zeros(6, 1, 0), **_PLAIN),
    _bad("weight_no_rows", r"weight must be \[C, kh, kw\] with at least one row and column, got \[6, 0, 3\]",
         weight=torch.zeros(6, 0, 3), **_PLAIN),
    _bad("x_too_narrow", r"x must be \[B, H, W, C\] with H and W of at least 0 and 5, got \[2, 3, 4, 6\]",
         weight=torch.zeros(6, 1, 8), public=False, **_PLAIN),
    _bad("x_too_low", r"x must be \[B, H, W, C\] with H and W of at least 4 and 0, got \[2, 3, 4, 6\]",
         weight=torch.zeros(6, 5, 3), public=False, **_PLAIN),
    _bad("x_dilated", r"x must be \[B, H, W, C\] with H and W of at least 0 and 6, got \[2, 3, 4, 6\]",
         dilation=[1, 4], **_PLAIN),
    _bad("window_half", r"window must be \[0, 0\], or divide the map of \[2, 3, 4, 6\], got \[3, 0\]",
         window=[3, 0], **_PLAIN),
    _bad("window_columns", r"window must be \[0, 0\], or divide the map of \[2, 3, 4, 6\], got \[3, 3\]",
         window=[3, 3], **_PLAIN),
    _bad("window_rows", r"window must be \[0, 0\], or divide the map of \[2, 3, 4, 6\], got \[2, 2\]",
         window=[2, 2], **_PLAIN),
    _bad("window_grows", r"after must be such that windows keep their size: before \+ after = \[0, 2\], got \[0, 1\]",
         window=[3, 2], after=[0, 1], **_PLAIN),
    _bad("state_with_windows", r"state must be None where weight has more than one row", window=[3, 2]),
    _bad("state_with_rows", r"state must be None where weight has more than one row",
         weight=torch.zeros(6, 2, 3), postgate=None, public=False),
    _bad("state_with_padded_rows", r"state must be None where weight has more than one row", after=[1, 0],
         postgate=None),
    _bad("postgate_size", r"postgate must be \[B, P, Q, C\] = \[2, 3, 5, 6\], got \[2, 3, 4, 6\]", after=[0, 1]),
]  # fmt: skip


def public_kwargs(kwargs):
    """None where "same", "valid" and numbers do not say it, or causal."""
    if not kwargs:
        return {}
    before, after = kwargs["before"], kwargs["after"]
    options = {
        "dilation": kwargs["dilation"], "act": NAMES[kwargs["act"]],
        "window": None if kwargs["window"] == [0, 0] else kwargs["window"],
    }  # fmt: skip
    if before == after:
        return options | {"padding": before}
    return options | {"causal": True} if before[0] == after[0] == after[1] == 0 else None


SPEC = OpSpec(
    name="dwconv",
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[*declared_bad_inputs("dwconv", good_call), *BAD_INPUTS],
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B",
    resize=resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)
