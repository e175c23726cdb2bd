"""block_sparse_linear's samples, bad inputs and error magnitudes."""

import torch

from effvit.ops.block_sparse_linear import NAMES, OP
from effvit.reference.block_sparse_linear import block_sparse_linear, block_sparse_linear_backward
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import misaligned
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call

NONE, RELU, GELU, SILU = range(4)


def structure(down, across, density, generator):
    """(crow, columns): every block is there with that probability."""
    there = torch.rand(down, across, generator=generator) < density
    crow = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return crow, there.nonzero()[:, 1].to(torch.int32)


def _apart(t):
    """Misaligned, where there is anything to align."""
    return misaligned(t) if t.numel() else t


def _sample(
    name, lead, down, across, *, block=16, density=0.5, activation=NONE, bias=True, residual=False, x_layout=None,
    layout=None, tags="", dtypes=FLOAT_DTYPES,
):  # fmt: skip
    def make(dtype, device, generator):
        x = torch.randn(*lead, across * block, generator=generator).to(dtype)
        crow, columns = structure(down, across, density, generator)
        size = max(density * across * block, 1) ** -0.5
        values = (size * torch.randn(len(columns), block, block, generator=generator)).to(dtype)
        b = torch.randn(down * block, generator=generator).to(dtype) if bias else None
        r = torch.randn(*lead, down * block, generator=generator).to(dtype) if residual else None
        x, r = (t if x_layout is None or t is None else x_layout(t) for t in (x, r))
        crow, columns, values = (t if layout is None else layout(t) for t in (crow, columns, values))
        tensors = (None if t is None else t.to(device) for t in (x, values, crow, columns, b, r))
        return tuple(tensors), {"activation": activation}

    return Sample(name, make, frozenset(tags.split()), dtypes)


def random_sample(name, choose):
    lead = [choose.randint(1, 5) for _ in range(choose.randint(0, 3))]
    return _sample(
        name, lead, choose.randint(1, 4), choose.randint(1, 4), block=choose.choice((16, 32)),
        density=choose.choice((0.0, 0.3, 0.7, 1.0)), activation=choose.randrange(4), bias=choose.random() < 0.7,
        residual=choose.random() < 0.5, x_layout=choose.choice((None, misaligned)),
        layout=choose.choice((None, _apart)),
    )  # fmt: skip


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the terms. gelu and silu change their argument by a factor of up to 1.13, and what
    they change it by changes by up to 0.8 of the argument's error."""
    smooth = kwargs["activation"] in (GELU, SILU)
    args = (*args, *(None,) * (6 - len(args)))
    x, values, crow, columns, bias, residual = (
        t.abs() if t is not None and t.is_floating_point() else t for t in args
    )  # fmt: skip
    y = block_sparse_linear(x, values, crow, columns, bias, residual)
    outputs = {"out": 1.13 * y if smooth else y}
    if output_grads is None:
        return outputs, {}
    g = output_grads[0].abs() * (1.13 + 0.8 * y if smooth else 1.0)
    found = block_sparse_linear_backward(g, x, values, crow, columns, bias, residual)
    names = ("x", "values", "bias", "residual")
    return outputs, {n: t for n, t in zip(names, found, strict=True) if t is not None}


def memory_calls(dtype):
    """Without an activation: backward keeps the gradient before one, [..., N], while it runs."""
    generator = torch.Generator().manual_seed(0)
    crow, columns = structure(24, 6, 0.5, generator)
    x = torch.randn(20_000, 192, generator=generator).to(dtype)
    values = torch.randn(len(columns), 32, 32, generator=generator).to(dtype)
    bias, residual = torch.randn(768, generator=generator).to(dtype), torch.ones(20_000, 768, dtype=dtype)
    return [("20000x768x192", (x, values, crow, columns, bias, residual), {"activation": NONE})]


def good_call():
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 3, 48, generator=generator),
        "values": torch.randn(3, 16, 16, generator=generator) / 4,
        "crow": torch.tensor([0, 2, 3], dtype=torch.int32),
        "columns": torch.tensor([0, 2, 1], dtype=torch.int32),
        "bias": torch.randn(32, generator=generator),
        "residual": torch.randn(2, 3, 32, generator=generator),
        "activation": GELU,
    }  # fmt: skip


def resize(args, kwargs):
    x, *rest, residual = args
    x, residual = (None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in (x, residual))
    return (x, *rest, residual), kwargs


def _bad(name, argument, match, error=ValueError, **change):
    change = {n: torch.tensor(t, dtype=torch.int32) if isinstance(t, list) else t for n, t in change.items()}
    return BadInput(
        name,
        lambda: split_call({**good_call(), **change}, OP.names),
        error,
        f"{argument} must be {match}",
        declared=True,
    )


BAD_INPUTS = [
    *declared_bad_inputs("block_sparse_linear", good_call),
    _bad("x_width", "x", r"\[\.\.\., K\] with K a multiple of 16 like values \[3, 16, 16\]", x=torch.zeros(2, 40)),
    _bad("values_8", "values", r"\[Z, B, B\] with B 16 or 32, got \[3, 8, 8\]", values=torch.zeros(3, 8, 8)),
    _bad("values_flat", "values", r"\[Z, B, B\]", values=torch.zeros(3, 16, 32)),
    _bad("crow_empty", "crow", r"\[N / B \+ 1\], got \[0\]", crow=[]),
    _bad("crow_start", "crow", r"ascending from 0 to 3 .*got \[1, 2, 3\]", crow=[1, 2, 3]),
    _bad("crow_end", "crow", r"ascending from 0 to 3 .*got \[0, 2, 2\]", crow=[0, 2, 2]),
    _bad("crow_beyond", "crow", r"ascending from 0 to 3 .*got \[0, 4, 3\]", crow=[0, 4, 3]),
    _bad("crow_negative", "crow", r"ascending from 0 to 3 .*got \[0, -1, 3\]", crow=[0, -1, 3]),
    _bad("crow_int64", "crow", "torch.int32, got torch.int64", TypeError, crow=torch.tensor([0, 2, 3])),
    _bad("columns_beyond", "columns", r"between 0 and 2, got 3 at \[1\]", columns=[0, 3, 1]),
    _bad("columns_negative", "columns", r"between 0 and 2, got -1 at \[0\]", columns=[-1, 2, 1]),
    _bad("columns_twice", "columns", r"ascending in each row of blocks, got 2, 2 at \[0\]", columns=[2, 2, 1]),
    _bad("columns_back", "columns", r"ascending in each row of blocks, got 2, 0 at \[0\]", columns=[2, 0, 1]),
    _bad("columns_long", "columns", r"\[Z\]", columns=[0, 2, 1, 2]),
    _bad("columns_int64", "columns", "torch.int32, got torch.int64", TypeError, columns=torch.tensor([0, 2, 1])),
    _bad("bias_long", "bias", r"\[N\]", bias=torch.zeros(48)),
    _bad("residual_wide", "residual", r"\[\.\.\., N\] = \[2, 3, 32\]", residual=torch.zeros(2, 3, 48)),
    _bad("residual_short", "residual", r"\[\.\.\., N\] = \[2, 3, 32\]", residual=torch.zeros(3, 32)),
]


SPEC = OpSpec(
    name="block_sparse_linear",
    samples=[
        _sample("deit_s_fc1", (1, 197), 48, 12, block=32, activation=GELU, tags="vit", dtypes=FLOAT_DTYPES[:2]),
        _sample("deit_s_fc2", (1, 197), 24, 96, density=0.3, residual=True, tags="vit", dtypes=FLOAT_DTYPES[:1]),
        *(_sample(f"small_{n}", (2, 3), 3, 4, activation=i, bias=i != SILU, residual=i != RELU,
                  tags="small framework")
          for i, n in enumerate(NAMES)),
        _sample("small_32", (3, 2), 2, 3, block=32, activation=RELU, residual=True, tags="small"),
        _sample("residual_32", (4,), 3, 2, block=32, residual=True, bias=False, tags="small"),
        *(_sample(f"rows_{m}", (m,), 3, 4, block=(16, 32)[m % 2], activation=m % 4, residual=m % 3 == 0)
          for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 24, 25, 33, 100)),
        _sample("splits", (2500,), 2, 3, activation=GELU, residual=True),
        _sample("splits_32", (2100,), 2, 2, block=32, dtypes=FLOAT_DTYPES),
        _sample("tiny", (2,), 1, 2, density=1.0, activation=GELU, tags="tiny small"),
        _sample("tiny_none", (2,), 2, 1, density=1.0, tags="tiny small"),
        _sample("dense", (5,), 3, 2, density=1.0, tags="nasty small"),
        _sample("no_blocks", (2, 3), 2, 3, density=0.0, activation=SILU, tags="nasty empty small"),
        _sample("one_block", (7,), 1, 1, density=1.0, tags="nasty small"),
        _sample("vector", (), 2, 3, activation=GELU, tags="nasty small"),
        _sample("six_dims", (2, 1, 3, 1, 2), 2, 2, tags="nasty small"),
        _sample("misaligned", (3, 5), 2, 3, residual=True, x_layout=misaligned, layout=_apart, tags="strided small"),
        _sample("expanded", (1, 4), 2, 2, residual=True, x_layout=lambda t: t.expand(3, 4, 32), tags="strided"),
        _sample("turned", (4, 3, 2), 2, 3, residual=True, activation=RELU, x_layout=lambda t: t.transpose(0, 2),
                tags="strided"),
        _sample("empty_rows", (0, 3), 2, 3, tags="empty"),
        _sample("empty_columns", (2, 3), 0, 3, tags="empty"),
        _sample("empty_depth", (2, 3), 2, 0, residual=True, activation=GELU, tags="nasty empty"),
    ],
    random_sample=random_sample,
    random_calls=80,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="...",
    resize=resize,
    memory_calls=memory_calls,
    public_kwargs=lambda kwargs: {"activation": NAMES[kwargs["activation"]]} if kwargs else {},
)  # fmt: skip
