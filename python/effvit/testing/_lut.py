"""What the specs of the operators on tables of levels share: thresholds and numbers near them."""

import torch

from effvit.testing._samples import in_order, misaligned
from effvit.testing._spec import BadInput, split_call


def thresholds(count, generator, kind="uniform"):
    """[count] float32, ascending."""
    if kind == "log":  # of softmax outputs
        t = 2.0 ** -torch.linspace(0.25, 12.0, count)
    elif kind == "equal":
        t = torch.full((count,), 0.5)
    elif kind == "infinite":
        t = torch.randn(count, generator=generator)
        t[0], t[-1] = -torch.inf, torch.inf
    elif kind == "subnormal":
        t = torch.rand(count, generator=generator) * 1e-38
    else:
        t = torch.randn(count, generator=generator)
    return t.sort().values


KINDS = ("uniform", "log", "equal", "infinite", "subnormal")


def numbers(shape, generator, table, dtype):
    """Of any size; a third of them a threshold itself, its neighbour below, or one above."""
    x = torch.randn(shape, generator=generator) * 1.5
    near = table[torch.randint(0, len(table), shape, generator=generator)]
    to = torch.where(torch.rand(shape, generator=generator) < 0.5, torch.inf, -torch.inf)
    near = torch.where(torch.rand(shape, generator=generator) < 0.5, near, torch.nextafter(near, to))
    x = torch.where(torch.rand(shape, generator=generator) < 0.33, near, x)
    return x.nan_to_num(nan=0.0, posinf=3e38, neginf=-3e38).clamp(-6e4, 6e4).to(dtype)


def transposed(t):
    return in_order(t, (*range(t.ndim - 2, -1, -1), t.ndim - 1))


def standard_samples(sample):
    """Of `sample(name, shape, count=15, kind="uniform", layout=None, tags="")`."""
    return [
        sample("softmax_deit_s", (1, 3, 197, 197), kind="log", tags="vit"),
        sample("swin_hidden_8_bits", (1, 784, 96), count=255, tags="vit"),
        sample("small", (2, 3, 20), tags="small framework"),
        sample("small_8_bits", (2, 3, 37), count=255, tags="small framework"),
        sample("small_log", (2, 3, 24), kind="log", tags="small"),
        *(sample(f"count_{n}", (3, 70), count=n, tags="small" if n in (1, 2, 8, 31) else "")
          for n in (1, 2, 3, 4, 7, 8, 14, 16, 31, 33, 63, 64, 100, 127, 128, 200, 254)),
        *(sample(f"kind_{k}", (3, 70), count=16, kind=k, tags="nasty small") for k in KINDS[1:]),
        *(sample(f"columns_{n}", (3, n), tags="small" if n < 18 else "")
          for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 1000)),
        sample("vector", (65,), tags="nasty small"),
        sample("six_dims", (2, 1, 3, 2, 2, 9), count=31, tags="nasty small"),
        sample("misaligned", (3, 7, 33), layout=misaligned, tags="strided small"),
        sample("transposed", (3, 4, 5, 24), layout=transposed, tags="strided small"),
        sample("expanded", (4, 1, 16), layout=lambda t: t.expand(4, 3, t.shape[-1]), tags="strided small"),
        sample("empty_rows", (0, 8), tags="empty"),
        sample("empty_columns", (2, 3, 0), tags="empty"),
        sample("tall", (200_000, 2), tags="huge"),
    ]  # fmt: skip


def random_options(choose):
    shape = [choose.randint(1, 5) for _ in range(choose.randint(0, 3))]
    shape.append(choose.choice((1, 3, 8, 16, 17, 31, 32, 64, 100, 257)))
    layout = choose.choice((None, misaligned, *((transposed,) if len(shape) > 2 else ())))
    return shape, {"count": choose.choice((1, 2, 3, 7, 15, 16, 31, 63, 127, 255, choose.randint(1, 255))),
                   "kind": choose.choice(KINDS), "layout": layout}  # fmt: skip


def resize(args, kwargs):
    x, *tables = args
    return (torch.cat((x, x.flip(0), x[:1])), *tables), kwargs


def bad_thresholds(op, good_call, names):
    """Values that are no ascending list."""

    def make(change):
        def call():
            good = good_call()
            good["thresholds"] = change(good["thresholds"].clone())
            return split_call(good, names)

        return call

    def nan(t):
        t[2] = torch.nan
        return t

    def bad(name, change, match):
        return BadInput(name, make(change), ValueError, match, schema_match=None)

    return [
        bad("thresholds_nan", nan, r"thresholds must be in ascending order, got nan at \[2\]"),
        bad("thresholds_descending", lambda t: t.flip(0), r"thresholds must be in ascending order, got .* at \[1\]"),
    ]
