"""table_lookup's samples and bad inputs."""

import torch

from effvit.ops.table_lookup import OP
from effvit.reference.table_lookup import table_lookup
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call


def _bytes(shape, generator, most=256):
    return torch.randint(0, most, shape, generator=generator, dtype=torch.uint8)


def _sample(name, shape, *, tables=0, layout=None, every=False, signed=False, tags=""):
    """tables: how many, with `which`; 0: one, without. every: every byte."""

    def make(dtype, device, generator):
        x = _bytes(shape, generator)
        if every:
            x = torch.arange(x.numel()).to(torch.uint8).view(shape)
        table = _bytes((max(tables, 1), 256), generator)
        which = _bytes(shape[:-1], generator, tables) if tables else None
        x = layout(x) if layout else x
        return tuple(None if t is None else t.to(device) for t in (x, table, which)), {"signed": signed}

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES[:1])


def random_sample(name, choose):
    shape = [choose.randint(1, 5) for _ in range(choose.randint(0, 3))]
    shape.append(choose.choice((1, 3, 16, 31, 32, 33, 100, 127, 128, 129, 257)))
    return _sample(
        name,
        shape,
        tables=choose.choice((0, 1, 2, 5, 256)),
        signed=choose.random() < 0.5,
        layout=choose.choice((None, misaligned)),
    )


SAMPLES = [
    _sample("deit_s_hidden", (2, 197, 1536), tags="vit"),
    _sample("blocks_of_64", (2, 197, 24, 64), tables=16, tags="vit"),
    _sample("small", (2, 3, 20), tags="small framework"),
    _sample("small_which", (2, 5, 33), tables=3, tags="small framework"),
    _sample("every_byte", (3, 256), tables=3, every=True, tags="nasty small"),
    _sample("every_signed_byte", (3, 256), tables=3, every=True, signed=True, tags="nasty small framework"),
    _sample("every_byte_of_one", (512,), every=True, tags="nasty small"),
    _sample("most_tables", (300, 5), tables=256, tags="nasty"),
    *(_sample(f"columns_{n}", (3, n), tables=n % 2 * 2, tags="small" if n < 18 else "")
      for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)),
    _sample("vector", (65,), tags="nasty small"),
    _sample("six_dims", (2, 1, 3, 2, 2, 9), tables=2, tags="nasty small"),
    _sample("misaligned", (3, 7, 33), layout=misaligned, tags="strided small"),
    _sample("transposed", (3, 4, 5, 24), tables=2, layout=lambda x: in_order(x, (2, 1, 0, 3)), tags="strided small"),
    _sample("expanded", (4, 1, 16), layout=lambda t: t.expand(4, 3, 16), tags="strided small"),
    _sample("empty_rows", (0, 8), tags="empty"),
    _sample("empty_columns", (2, 3, 0), tables=2, tags="empty"),
    _sample("tall", (200_000, 2), tags="huge"),
]  # fmt: skip


def good_call():
    generator = torch.Generator().manual_seed(0)
    return {"x": _bytes((2, 3, 8), generator), "table": _bytes((4, 256), generator),
            "which": _bytes((2, 3), generator, 4), "signed": False}  # fmt: skip


def _bad(name, argument, match, error=ValueError, public=True, **change):
    def make():
        return split_call({**good_call(), **change}, OP.names)

    return BadInput(name, make, error, f"{argument} must {match}", public=public, declared=True)


SPEC = OpSpec(
    name="table_lookup",
    random_calls=100,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("table_lookup", good_call),
        _bad("narrow", "table", "be", table=torch.zeros(4, 255, dtype=torch.uint8)),
        _bad("several", "table", r"be \[T, 256\] with T = 1 where which is None", which=None),
        _bad("none", "table", r"be \[T, 256\] with T at least 1", table=torch.zeros(0, 256, dtype=torch.uint8)),
        _bad("beyond", "which", "be below T = 4, got 4", which=torch.full((2, 3), 4, dtype=torch.uint8)),
        _bad("x_int32", "x", "be torch", TypeError, x=torch.zeros(2, 3, 8, dtype=torch.int32)),
        _bad("table_float", "table", "be torch", TypeError, table=torch.zeros(4, 256)),
    ],
    good_call=good_call,
    magnitudes=lambda args, kwargs, output_grads, eps: ({"out": table_lookup(*args, **kwargs).double()}, {}),
    dynamic="...",
    public_kwargs=lambda kwargs: None if kwargs.get("signed") else {},
    resize=lambda args, kwargs: (
        (*(None if t is None else torch.cat((t, t.flip(0), t[:1])) for t in args[:1]), args[1],
         None if args[2] is None else torch.cat((args[2], args[2].flip(0), args[2][:1]))), kwargs),
    memory_calls=lambda dtype: [("20000x1536", (torch.zeros(20_000, 1536, dtype=torch.uint8),
                                                torch.zeros(1, 256, dtype=torch.uint8), None), {})],
)  # fmt: skip
