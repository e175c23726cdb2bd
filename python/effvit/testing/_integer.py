"""What the specs of the integer-only operators share: rows of any kind, layouts, bad inputs."""

import torch

from effvit.ops._declaration import OUT_DTYPES
from effvit.ops._op import OPS
from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import FLOAT_DTYPES, BadInput, Sample, split_call

INT32, INT8, UINT8, INT16 = 3, 4, 5, 6
ANY = FLOAT_DTYPES[:1]  # these calls have no floats


INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)


def rows(shape, generator, size, kind="normal", dtype=torch.int32):
    """Rows: normal of standard deviation `size`, all equal, all minimum, one spike, the whole range, uniform below 0.

    Of fewer bits than 32: up to the ends of these. Of uint8: 100 more.
    """
    if dtype == torch.int32:
        return _rows(shape, generator, size, kind)
    info = torch.iinfo(dtype)
    if kind == "minimum":
        return torch.full(shape, info.min, dtype=dtype)
    if kind == "range":
        return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(dtype)
    x = _rows(shape, generator, min(size, float(2 * info.max)), kind).long()
    return (x + 100 * (info.min == 0)).clamp(info.min, info.max).to(dtype)


def _rows(shape, generator, size, kind):
    if kind == "equal":
        return torch.full(shape, 17, dtype=torch.int32)
    if kind == "minimum":
        return torch.full(shape, -(2**31), dtype=torch.int32)
    if kind == "spike":
        x = torch.full(shape, -int(size), dtype=torch.int32)
        x[..., shape[-1] // 2] = 20 * int(size)
        return x
    if kind == "range":
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    if kind == "negative":
        return -1 - torch.randint(0, max(int(size), 1), shape, generator=generator).to(torch.int32)
    return (torch.randn(shape, generator=generator) * size).round().to(torch.int32)


KINDS = ("normal", "equal", "minimum", "spike", "range", "negative")


def transposed(t):
    return in_order(t, (*range(t.ndim - 2, -1, -1), t.ndim - 1))


def sample(name, shape, make, *, layout=None, tags=""):
    """`make(shape, generator)` -> (tensors, options); `layout` is that of the first tensor."""

    def build(dtype, device, generator):
        (x, *rest), options = make(shape, generator)
        x = layout(x) if layout else x
        return tuple(None if t is None else t.to(device) for t in (x, *rest)), options

    return Sample(name, build, frozenset(tags.split()), ANY)


def standard_samples(make, vit):
    """Of `make(**options)` -> a function as `sample` takes it: layouts, widths, kinds of rows; `vit`: real shapes."""
    return [
        *(sample(name, shape, make(), tags="vit") for name, shape in vit.items()),
        sample("small", (2, 3, 20), make(), tags="small framework"),
        *(sample(f"kind_{kind}", (2, 3, 37), make(kind=kind), tags="nasty small") for kind in KINDS),
        *(sample(f"wide_{kind}", (2, 300), make(kind=kind), tags="nasty") for kind in KINDS),
        *(
            sample(f"columns_{n}", (3, n), make(), tags="small" if n < 34 else "")
            for n in (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 257, 1000)
        ),
        sample("long_row", (2, 16_384), make()),
        sample("longer_row", (1, 70_001), make(kind="range"), tags="nasty"),
        sample("vector", (65,), make(), tags="nasty small"),
        sample("six_dims", (2, 1, 3, 2, 2, 9), make(), tags="nasty small"),
        sample("misaligned", (3, 7, 33), make(), layout=misaligned, tags="strided small"),
        sample("transposed", (3, 4, 5, 24), make(), layout=transposed, tags="strided small"),
        sample("expanded", (4, 1, 16), make(), layout=lambda t: t.expand(4, 3, t.shape[-1]), tags="strided small"),
        sample("empty_rows", (0, 8), make(), tags="empty"),
        sample("empty_columns", (2, 3, 0), make(), tags="empty"),
        sample("tall", (200_000, 2), make(), tags="huge"),
    ]


def narrow_samples(make):
    """Of x in fewer bits than 32: every dtype, kinds of rows, widths, layouts."""
    return [
        *(sample(f"{_name(dtype)}_{kind}", (2, 3, 37), make(kind=kind, dtype=dtype),
                 tags="nasty small" if kind in ("normal", "range") else "nasty")
          for dtype in INTEGERS[1:] for kind in KINDS),
        *(sample(f"int8_wide_{kind}", (5, 300), make(kind=kind, dtype=torch.int8), tags="nasty") for kind in KINDS),
        *(sample(f"int8_columns_{n}", (5, n), make(dtype=torch.int8), tags="small" if n < 34 else "")
          for n in (1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 197, 1000)),
        *(sample(f"{_name(dtype)}_columns_{n}", (5, n), make(dtype=dtype)) for n in (5, 49, 384)
          for dtype in (torch.uint8, torch.int16)),
        sample("int8_framework", (2, 3, 20), make(dtype=torch.int8), tags="small framework"),
        sample("int8_misaligned", (3, 7, 33), make(dtype=torch.int8), layout=misaligned, tags="strided small"),
        sample("int16_transposed", (3, 4, 5, 24), make(dtype=torch.int16), layout=transposed, tags="strided small"),
        sample("uint8_expanded", (4, 1, 16), make(dtype=torch.uint8), layout=lambda t: t.expand(4, 3, t.shape[-1]),
               tags="strided small"),
        sample("int8_empty_columns", (2, 3, 0), make(dtype=torch.int8), tags="empty"),
        sample("int16_long_row", (1, 70_001), make(kind="range", dtype=torch.int16), tags="nasty"),
    ]  # fmt: skip


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def random_shape(choose):
    shape = [choose.randint(1, 5) for _ in range(choose.randint(0, 3))]
    return [*shape, choose.choice((1, 3, 8, 16, 17, 31, 32, 64, 100, 257, 400))]


def random_layout(shape, choose):
    return choose.choice((None, misaligned, *((transposed,) if len(shape) > 2 else ())))


def random_shift_exp(choose, most=2**31 - 1):
    """x0, n and half_bit within the bounds; often at them."""
    n = choose.choice((4, 8, 10, 15, 15, 16, 23, 23, 30))
    largest = min((2**31 - 1) >> n, most)
    x = choose.choice((1, largest, choose.randint(1, largest), min(choose.randint(1, 400), largest)))
    return {"x0": -x, "n": n, "half_bit": choose.random() < 0.7}


def bad(op, good_call, name, argument, match, error=ValueError, **change):
    return BadInput(
        name,
        lambda: split_call({**good_call(), **change}, OPS[op].names),
        error,
        f"{argument} must be {match}",
        declared=True,
    )


def bad_shift_exp(op, good_call):
    """Every n has its own bound of x0: one beyond it."""
    return [
        bad(op, good_call, f"x0_beyond_n_{n}", "x0", f"between -{(2**31 - 1) >> n} and -1 with n = {n}, got",
            n=n, x0=-((2**31 - 1) >> n) - 1)
        for n in (4, 15, 16, 23, 30)
    ]  # fmt: skip


def resize(args, kwargs):
    """Along the first dim, of tensors that have leading dims."""
    lead = args[0].ndim
    return tuple(t if t is None or t.ndim != lead else torch.cat((t, t.flip(0), t[:1])) for t in args), kwargs


def integers(shape, generator, largest):
    """From -largest to largest."""
    return torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def multipliers(columns, generator, low, high):
    """(multiplier, shift) of every column: normalised, some negative; shifts from low to high."""
    m = torch.randint(2**30, 2**31, (columns,), generator=generator, dtype=torch.int64)
    m = torch.where(torch.rand(columns, generator=generator) < 0.2, -m, m)
    return m.to(torch.int32), torch.randint(low, high + 1, (columns,), generator=generator).to(torch.int32)


def dtype_of(out_dtype):
    return getattr(torch, OUT_DTYPES[out_dtype])


def without_half_bit(bad_inputs):
    """The public functions have `deployed` in its place, and torch takes an int for a bool."""
    return [b for b in bad_inputs if b.name != "declared_half_bit_int"]
