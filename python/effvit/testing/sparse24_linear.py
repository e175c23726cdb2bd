"""sparse24_linear's samples, bad inputs and error magnitudes."""

import torch

from effvit.reference.sparse24_linear import sparse24_linear
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import misaligned
from effvit.testing._sparse24 import bad_meta, compressed, transposed
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call


def _sample(name, lead, n, k, *, bias=True, x_layout=None, layout=None, tags="", dtypes=FLOAT_DTYPES):
    def make(dtype, device, generator):
        x = torch.randn(*lead, k, generator=generator).to(dtype)
        values, meta = compressed(n, k, dtype, generator)
        b = torch.randn(n, generator=generator).to(dtype) if bias else None
        x = x if x_layout is None else x_layout(x)
        values, meta = (t if layout is None else layout(t) for t in (values, meta))
        return tuple(None if t is None else t.to(device) for t in (x, values, meta, b)), {}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def random_sample(name, choose):
    lead = [choose.randint(1, 5) for _ in range(choose.randint(0, 3))]
    return _sample(
        name, lead, choose.randint(1, 40), 4 * choose.randint(1, 20), bias=choose.random() < 0.7,
        x_layout=choose.choice((None, misaligned)), layout=choose.choice((None, transposed)),
    )  # fmt: skip


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the terms: the same formula of absolute values."""
    x, values, meta, bias = (t.abs() if t is not None and t.is_floating_point() else t for t in args)
    leaves = [t.detach().requires_grad_() for t in (x, values, bias) if t is not None]
    out = sparse24_linear(*leaves[:2], meta, *leaves[2:])
    if output_grads is None:
        return {"out": out.detach()}, {}
    found = torch.autograd.grad(out, leaves, output_grads[0].abs())
    return {"out": out.detach()}, dict(zip(("x", "values", "bias"), found, strict=False))


def good_call():
    generator = torch.Generator().manual_seed(0)
    values, meta = compressed(6, 12, torch.float32, generator)
    return {
        "x": torch.randn(2, 3, 12, generator=generator), "values": values, "meta": meta,
        "bias": torch.randn(6, generator=generator),
    }  # fmt: skip


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    values, meta = compressed(384, 96, dtype, generator)
    x, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((20_000, 96), (384,)))
    return [("20000x384x96", (x, values, meta, bias), {})]


def resize(args, kwargs):
    x, *rest = args
    return (torch.cat((x, x.flip(0), x[:1])), *rest), kwargs


def _bad(name, argument, match, **change):
    make = lambda: split_call({**good_call(), **change}, ("x", "values", "meta", "bias"))
    return BadInput(name, make, ValueError, f"{argument} must be {match}")


SPEC = OpSpec(
    name="sparse24_linear",
    samples=[
        _sample("deit_s_fc1", (1, 197), 1536, 384, tags="vit", dtypes=FLOAT_DTYPES[:2]),
        _sample("deit_s_fc2", (1, 197), 384, 1536, tags="vit", dtypes=FLOAT_DTYPES[:1]),
        _sample("small", (2, 3), 7, 20, tags="small framework"),
        _sample("small_no_bias", (3, 2), 6, 24, bias=False, tags="small framework"),
        _sample("tiny", (2,), 3, 4, tags="tiny small"),
        _sample("one_row", (1,), 17, 32, tags="nasty small"),
        _sample("vector", (), 9, 12, tags="nasty small"),
        _sample("six_dims", (2, 1, 3, 1, 2), 5, 8, tags="nasty small"),
        _sample("misaligned", (3, 5), 9, 12, x_layout=misaligned, tags="strided small"),
        _sample("transposed", (3, 5), 9, 16, layout=transposed, tags="strided small"),
        _sample("expanded", (1, 4), 6, 8, x_layout=lambda t: t.expand(3, 4, 8), tags="strided"),
        _sample("last_byte", (6,), 16, 496, tags="nasty"),  # a vector of positions reaches two bytes beyond the row
        _sample("deep", (20,), 40, 1100, tags="nasty"),  # K in parts
        _sample("empty_rows", (0, 3), 5, 8, tags="empty"),
        _sample("empty_columns", (2, 3), 0, 8, tags="empty"),
        _sample("empty_depth", (2, 3), 5, 0, tags="nasty empty"),
    ],
    random_sample=random_sample,
    random_calls=80,
    bad_inputs=[
        *declared_bad_inputs("sparse24_linear", good_call),
        *bad_meta(good_call, ("x", "values", "meta", "bias")),
        _bad("x_wide", "x", r"\[\.\.\., K\] with K = 12 like values \[6, 6\], got \[2, 16\]", x=torch.zeros(2, 16)),
        _bad("values_odd", "values", r"\[N, K / 2\] with K a multiple of 4", values=torch.zeros(6, 5)),
        _bad("bias_long", "bias", r"\[N\]", bias=torch.zeros(7)),
    ],
    good_call=good_call,
    magnitudes=magnitudes,
    memory_calls=memory_calls,
    dynamic="...",
    resize=resize,
)
