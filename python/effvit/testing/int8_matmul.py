"""int8_matmul's samples and bad inputs."""

import torch

from effvit.testing import _integer
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._samples import misaligned, sliced
from effvit.testing._spec import OpSpec, Sample

DTYPES = (torch.int8, torch.uint8, torch.int16)
I8, U8, I16 = DTYPES


def operand(shape, dtype, generator, kind="uniform"):
    """The whole range of a dtype, or its ends alone: the largest sums."""
    info = torch.iinfo(dtype)
    if kind == "least":
        return torch.full(shape, info.min or info.max, dtype=dtype)
    if kind == "ends":
        ends = torch.tensor([info.min, info.max, info.min or info.max, info.max], dtype=dtype)
        return ends[torch.randint(0, 4, shape, generator=generator)]
    return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int32).to(dtype)


def _heads_last(t):
    """[..., H, L, K] with rows as [..., L, H, K] has them: heads of a projection."""
    return t.transpose(-3, -2).contiguous().transpose(-3, -2)


def _sample(
    name, lead, m, n, k, a=I8, b=I8, *, transpose=False, kind="uniform", layout=None, tags="", m_c=None, bits=32,
    out=_integer.INT32,
):  # fmt: skip
    def make(dtype, device, generator):
        x = operand((*lead, m, k), a, generator, kind)
        y = operand((*lead, n, k) if transpose else (*lead, k, n), b, generator, kind)
        multiplier, shift = m_c or (0, 0)
        options = {"transpose_b": transpose, "multiplier": multiplier, "shift": shift, "bits": bits, "out_dtype": out}
        return tuple((layout(t) if layout and k else t).to(device) for t in (x, y)), options

    return Sample(name, make, frozenset(tags.split()), _integer.ANY)


TO_INT8 = {"m_c": (1518500250, 42), "bits": 8, "out": _integer.INT8}


def random_sample(name, choose):
    lead = [choose.randint(1, 3) for _ in range(choose.randint(0, 3))]
    a, b = choose.choice(DTYPES), choose.choice(DTYPES)
    layouts = (None, misaligned, lambda t: sliced(t, t.dim() - 2), *((_heads_last,) if lead else ()))
    size = 1 + (choose.choice((6, 20, 60)) if len(lead) < 2 else 12)
    rescale = {}
    if choose.random() < 0.7:
        shift = choose.choice((1, 20, 31, 33, 36, 40, 42, 46, 55, 61))
        out = choose.choice((_integer.INT32, _integer.INT8, _integer.UINT8, _integer.INT16))
        rescale = {"m_c": (choose.choice((1, 2**30, choose.randint(2**30, 2**31 - 1), 2**31 - 1)), shift),
                   "bits": choose.randint(2, 32), "out": out}  # fmt: skip
    return _sample(
        name, lead, *(choose.randint(1, size) for _ in range(2)), choose.choice((1, 3, 4, 31, 64, 65, 197, 300)),
        a, b, transpose=choose.random() < 0.5, kind=choose.choice(("uniform", "ends", "least")),
        layout=choose.choice(layouts), **rescale,
    )  # fmt: skip


def _pairs(tags, *shape, **options):
    """Every pair of dtypes, b both ways."""
    for a in DTYPES:
        for b in DTYPES:
            for transpose in (False, True):
                name = f"{str(a)[6:]}_{str(b)[6:]}{'_t' * transpose}_{'x'.join(map(str, shape[1:]))}"
                yield _sample(name, *shape, a, b, transpose=transpose, tags=tags, **options)


SAMPLES = [
    _sample("deit_s_scores", (2, 6), 197, 197, 64, transpose=True, layout=_heads_last, tags="vit", **TO_INT8),
    _sample("deit_s_context", (2, 6), 197, 64, 197, I8, I8, layout=_heads_last, tags="vit", **TO_INT8),
    _sample("deit_s_context_16", (1, 6), 197, 64, 197, I16, I8, tags="vit", m_c=(2**30, 45), bits=8, out=_integer.INT8),
    _sample("swin_scores", (64, 3), 49, 49, 32, transpose=True, tags="vit", **TO_INT8),
    _sample("small", (2, 3), 5, 7, 9, tags="small framework", **TO_INT8),
    _sample("small_transposed", (2, 2), 4, 6, 20, transpose=True, tags="small framework", **TO_INT8),
    _sample("small_unsigned", (2,), 5, 17, 33, U8, I8, tags="small framework", m_c=(2**30 + 1, 42), out=_integer.UINT8),
    *_pairs("small", (2,), 3, 9, 21, kind="ends"),
    *_pairs("nasty", (), 7, 33, 600, kind="least"),
    *(_sample(f"shape_{m}x{n}x{k}", (2,), m, n, k, transpose=bool(k % 2)) for m, n, k in (
        (1, 1, 1), (1, 64, 64), (64, 1, 64), (15, 17, 16), (16, 16, 63), (33, 31, 65), (48, 96, 128), (13, 130, 100))),
    _sample("deep", (), 3, 5, 140_000, kind="least", tags="nasty"),
    _sample("deep_unsigned", (), 3, 5, 70_001, U8, U8, kind="least", tags="nasty"),
    _sample("deep_int16", (), 3, 5, 9_001, I16, I16, kind="ends", tags="nasty", m_c=(2**30, 40), out=_integer.INT16),
    _sample("ties", (2,), 6, 20, 3, kind="ends", tags="nasty small", m_c=(2**30, 31), bits=16, out=_integer.INT16),
    _sample("enlarged", (2,), 6, 20, 3, tags="nasty small", m_c=(2**31 - 1, 1), bits=16, out=_integer.INT16),
    _sample("reduced", (2,), 6, 20, 3, tags="nasty small", m_c=(3, 61), bits=16, out=_integer.INT16),
    _sample("4_bits", (2,), 6, 20, 30, tags="small", m_c=(2**30, 45), bits=4, out=_integer.INT8),
    _sample("matrices", (), 6, 20, 30, tags="small", **TO_INT8),
    _sample("six_dims", (2, 1, 3, 2), 4, 9, 8, tags="nasty small"),
    _sample("misaligned", (2, 3), 5, 19, 33, layout=misaligned, tags="strided small", **TO_INT8),
    _sample("heads_last", (2, 3), 5, 19, 16, layout=_heads_last, tags="strided small", **TO_INT8),
    _sample("expanded", (2, 1), 5, 9, 16, layout=lambda t: t.expand(2, 3, *t.shape[2:]), tags="strided small"),
    _sample("no_depth", (2,), 3, 4, 0, tags="nasty", **TO_INT8),
    _sample("empty_batch", (0, 3), 4, 5, 6, tags="empty"),
    _sample("empty_rows", (2,), 0, 5, 6, tags="empty"),
    _sample("empty_columns", (2,), 4, 0, 6, tags="empty", transpose=True),
    _sample("many", (20_000,), 2, 2, 3, tags="huge"),
]  # fmt: skip


def good_call():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": operand((2, 3, 8), I8, generator), "b": operand((2, 5, 8), I8, generator), "transpose_b": True,
        "multiplier": 2**30, "shift": 40, "bits": 8, "out_dtype": _integer.INT8,
    }  # fmt: skip


def public_kwargs(kwargs):
    given = dict(kwargs)
    if "out_dtype" in given:
        given["out_dtype"] = _integer.dtype_of(given["out_dtype"])
    return given


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (64, 500, 64), (64, 500, 64)
    return [("64x500x500", tuple(operand(s, I8, generator) for s in shapes), {"transpose_b": True, **_RESCALED})]


_RESCALED = {"multiplier": 2**30, "shift": 40, "bits": 8, "out_dtype": _integer.INT8}


def _bad(name, argument, match, error=ValueError, **change):
    return _integer.bad("int8_matmul", good_call, name, argument, match, error, **change)


SPEC = OpSpec(
    name="int8_matmul",
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=64,
    bad_inputs=[
        *declared_bad_inputs("int8_matmul", good_call),
        *(_bad(f"{name}_int32", name, "int16, int8 or uint8", TypeError,
               **{name: torch.zeros(2, 3 if name == "a" else 5, 8, dtype=torch.int32)}) for name in "ab"),
        _bad("b_depth", "b", r"\[..., N, K\] with K = 8 like a \[2, 3, 8\], got \[2, 5, 9\]",
             b=torch.zeros(2, 5, 9, dtype=torch.int8)),
        _bad("b_depth_plain", "b", r"\[..., K, N\] with K = 8 like a \[2, 3, 8\], got \[2, 5, 8\]", transpose_b=False),
        _bad("b_lead", "b", r"\[..., R, C\] like a", b=torch.zeros(3, 5, 8, dtype=torch.int8)),
        _bad("b_rank", "b", r"\[..., R, C\] like a", b=torch.zeros(5, 8, dtype=torch.int8)),
        _bad("no_shift", "shift", "between 1 and 61 with a multiplier, got 0", shift=0),
        _bad("too_deep", "a", r"\[..., M, K\] with K at most 1048576",
             a=torch.zeros(1, 1, 1, dtype=torch.int8).expand(2, 1, 2**20 + 1).contiguous(),
             b=torch.zeros(2, 1, 2**20 + 1, dtype=torch.int8)),
    ],
    good_call=good_call,
    dynamic="...",
    resize=lambda args, kwargs: (tuple(torch.cat((t, t.flip(0), t[:1])) for t in args), kwargs),
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)  # fmt: skip
