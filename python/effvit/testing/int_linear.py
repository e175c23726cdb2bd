"""int_linear's samples and bad inputs."""

import dataclasses
import math

import torch

from effvit.reference.int8_prepack import int8_prepack
from effvit.testing import _int8, _integer
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import FLOAT_DTYPES, OpSpec, Sample

INT32, INT8, UINT8, INT16 = _integer.INT32, _integer.INT8, _integer.UINT8, _integer.INT16


def _residual(shape, generator, dtype):
    """Within the dtype; int32 of 16 bits, and now and then any, or about 2^23, beyond which kernels go another way."""
    if dtype != INT32:
        info = torch.iinfo(_integer.dtype_of(dtype))
        return torch.randint(info.min, info.max + 1, shape, generator=generator).to(_integer.dtype_of(dtype))
    t, kind = _integer.rows(shape, generator, 3000.0), torch.rand(shape, generator=generator)
    edge = 2**23 - torch.randint(-1, 3, shape, generator=generator).to(torch.int32)
    edge = torch.where(torch.rand(shape, generator=generator) < 0.5, -edge, edge)
    t = torch.where(kind < 0.01, edge, t)
    return torch.where(kind > 0.99, _integer.rows(shape, generator, 0, "range"), t)


def _rescaling(n, generator, low, high, halves):
    """halves: every other multiplier is 2^30, the rest end in any number of zeros."""
    m, shift = _integer.multipliers(n, generator, low, high)
    if halves:
        zeros = torch.randint(0, 31, (n,), generator=generator)
        m = torch.where(torch.arange(n) % 2 == 0, 2**30, (m.abs() >> zeros << zeros) * m.sign()).to(torch.int32)
    return m, shift


def sample(
    name, m, n, k, *, packed=False, raw=False, bias=True, residual=None, bits=8, out=INT8, low=None, high=None,
    halves=False, small=False, bias_size=3000, of_residual=None, layout=None, tags="",
):  # fmt: skip
    """A call. low, high: the shifts; None: such that results are of size 40. halves: multipliers that end in
    zeros, so that there are ties. small: x and weight from -2 to 2. residual: its dtype.
    of_residual: its shifts. raw: no multiplier."""
    usual = 38 + round(0.5 * math.log2(max(k, 1)))
    low, high = (usual - 2, usual + 2) if low is None else (low, high)

    def make(dtype, device, generator):
        x, weight = (_int8.integers((rows, k), generator, -128) for rows in (m, n))
        if small:
            x, weight = x // 50, weight // 50
        tensors = [x, int8_prepack(weight) if packed else weight, *(None,) * 6]
        if not raw:
            tensors[2:4] = _rescaling(n, generator, low, high, halves)
        if bias:
            tensors[4] = _integer.integers((n,), generator, bias_size)
        if residual is not None:
            least = {INT32: 37, INT16: 40, INT8: 31, UINT8: 31}[residual]
            tensors[5] = _residual((m, n), generator, residual)
            tensors[6:] = _rescaling(n, generator, *(of_residual or (least, least + 4)), halves)
        if layout is not None:
            tensors = layout(tensors)
        options = {"bits": 8 if raw else bits, "out_dtype": out}
        return tuple(None if t is None else t.to(device) for t in tensors), options

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES[:1])


def _padded(t, left):
    wide = t.new_zeros(2 * t.shape[0], t.shape[1] + left)
    wide[::2, left:] = t
    return wide[::2, left:]


def _strided(tensors):
    x, weight, multiplier, shift, bias, residual, *rest = tensors
    return (_padded(x, 3), _padded(weight, 7), multiplier, shift.flip(0).flip(0), bias, _padded(residual, 5), *rest)


def _expanded(tensors):
    return tuple(t if t is None or t.dim() != 1 else t[:1].expand(t.shape) for t in tensors)


def _worst(tensors):
    """The largest sums that there are, beyond int32 with the bias of every other channel; a step less in the rest."""
    x, weight, multiplier, shift, bias, *rest = tensors
    edge = 2**31 - 128 * 128 * x.shape[1]  # from the largest sum to 2^31
    bias = torch.where(torch.arange(len(bias)) % 2 == 0, edge, edge - 1).to(torch.int32)
    return (torch.full_like(x, -128), torch.full_like(weight, -128), multiplier, shift, bias, *rest)


def _lowest(tensors):
    """Likewise the smallest."""
    x, weight, multiplier, shift, bias, *rest = tensors
    edge = -(2**31) + 127 * 128 * x.shape[1]
    bias = torch.where(torch.arange(len(bias)) % 2 == 0, edge - 1, edge).to(torch.int32)
    return (torch.full_like(x, 127), torch.full_like(weight, -128), multiplier, shift, bias, *rest)


def _rare_ties(tensors):
    """All halves, by factors of which the one that varies ends in as many zeros as it can: of the residual; without
    one, of the sum, which is the bias."""
    x, weight, multiplier, shift, bias, residual, *of_residual = tensors
    n = weight.shape[0]
    odd = 1 + 2 * (torch.arange(n, dtype=torch.int32) % 15)
    by = torch.full((n,), 34, dtype=torch.int32)
    if residual is None:
        return (x, weight, odd << 23, by, torch.full_like(bias, 2**10), residual, *of_residual)
    zeros = {torch.int32: 23, torch.int16: 15, torch.int8: 7, torch.uint8: 7}[residual.dtype]
    largest = 2**zeros if residual.dtype == torch.uint8 else -(2**zeros)
    return (x, weight, multiplier | 1, shift, bias, torch.full_like(residual, largest), odd << (33 - zeros), by)


SAMPLES = [
    sample("deit_s_fc1", 197, 1536, 384, tags="vit"),
    sample("deit_s_fc2", 197, 384, 1536, residual=INT16, bits=16, out=INT16, tags="vit"),
    sample("deit_s_proj_packed", 197, 384, 384, packed=True, residual=INT32, bits=16, out=INT16, tags="vit"),
    sample("swin_stage1", 784, 96, 96, packed=True, out=UINT8, tags="vit"),
    sample("head", 4, 1000, 384, raw=True, out=INT32, tags="vit"),
    sample("one_row", 1, 100, 768, tags="vit"),
    sample("small", 7, 20, 36, tags="small framework"),
    sample("small_residual", 5, 19, 40, residual=INT32, tags="small framework"),
    sample("small_int16", 9, 33, 40, residual=INT16, bits=16, out=INT16, low=31, high=38, tags="small"),
    sample("small_int8", 6, 24, 32, residual=INT8, tags="small"),
    sample("small_uint8", 6, 24, 32, residual=UINT8, out=UINT8, tags="small"),
    sample("small_int32", 6, 24, 32, bits=32, out=INT32, low=20, high=30, tags="small"),
    sample("small_raw", 5, 18, 68, raw=True, out=INT32, tags="small framework"),
    sample("small_raw_int16", 5, 18, 68, raw=True, out=INT16, bias_size=40_000, tags="small"),
    sample("small_raw_int8", 5, 18, 68, raw=True, out=INT8, bias=False, small=True, tags="small"),
    sample("raw_saturates", 5, 18, 68, raw=True, out=INT32, bias_size=2**31 - 1, tags="nasty small"),
    sample("bias_saturates", 5, 18, 68, bias_size=2**31 - 1, low=50, high=56, tags="nasty small"),
    sample("ties", 8, 40, 20, small=True, bias_size=40, halves=True, low=31, high=36, tags="nasty small"),
    sample("ties_residual", 8, 40, 20, small=True, bias_size=40, halves=True, low=31, high=36, residual=INT8,
           tags="nasty small"),
    *(sample(f"ties_by_{c}", 8, 40, 20, small=True, bias_size=40, halves=True, low=c, high=c, tags="nasty")
      for c in (31, 32, 33, 34, 35, 36)),
    sample("rare_ties", 7, 40, 0, layout=_rare_ties, tags="nasty small"),
    *(sample(f"rare_ties_{name}", 7, 40, 0, residual=dtype, layout=_rare_ties, tags="nasty small")
      for name, dtype in (("int32", INT32), ("int16", INT16), ("int8", INT8), ("uint8", UINT8))),
    sample("wide_residual", 14, 40, 12, bits=32, out=INT32, residual=INT32, of_residual=(26, 32), tags="nasty small"),
    sample("enlarged", 4, 40, 12, bits=32, out=INT32, low=1, high=8, residual=INT32, tags="nasty small"),
    sample("reduced", 4, 40, 60, low=44, high=61, residual=INT32, tags="nasty small"),
    sample("mixed_shifts", 4, 70, 60, bits=16, out=INT16, low=1, high=61, residual=INT16, tags="nasty small"),
    sample("4_bits", 4, 40, 33, bits=4, tags="small"),
    *(sample(f"rows_{m}", m, 70, 52, tags="small" if m in (1, 3, 13, 17) else "") for m in (*range(1, 18), 31, 33)),
    *(sample(f"columns_{n}", 3, n, 20, residual=INT32, bits=16, out=INT16, tags="small" if n < 4 else "")
      for n in (1, 2, 3, 15, 16, 17, 47, 65)),
    *(sample(f"depth_{k}", 4, 19, k, residual=UINT8, tags="small" if k < 10 else "")
      for k in (1, 2, 3, 4, 5, 7, 8, 9, 12, 31, 63, 64, 65, 127, 257)),
    *(sample(f"packed_{m}x{n}x{k}", m, n, k, packed=True, residual=residual, tags=tags) for m, n, k, residual, tags in (
        (6, 20, 33, INT8, "framework"), (5, 16, 64, None, ""), (40, 100, 7, UINT8, ""), (17, 50, 31, INT32, ""))),
    sample("packed_raw", 6, 20, 33, packed=True, raw=True, out=INT32),
    sample("deep", 2, 17, 4100, tags="nasty"),
    sample("worst", 3, 5, 131071, raw=True, out=INT32, layout=_worst, tags="nasty"),
    sample("worst_wide", 14, 40, 131071, low=54, high=58, layout=_worst, tags="nasty"),
    sample("lowest", 3, 19, 131071, bits=32, out=INT32, low=30, high=33, layout=_lowest, tags="nasty"),
    sample("no_bias", 6, 24, 32, bias=False, tags="small"),
    sample("strided", 6, 20, 28, residual=INT16, layout=_strided, tags="strided small"),
    sample("one_rescaling", 6, 20, 28, residual=INT32, layout=_expanded, tags="strided small"),
    sample("tiny", 2, 3, 4, residual=INT32, tags="small"),
    sample("empty_rows", 0, 8, 12, residual=INT8, tags="empty"),
    sample("empty_columns", 4, 0, 12, tags="empty"),
    sample("empty_depth", 4, 20, 0, residual=INT32, low=36, high=40, tags="empty nasty small"),
    sample("tall", 40_000, 3, 8, tags="huge"),
]  # fmt: skip


def random_sample(name, choose):
    m, n = choose.choice((1, 2, 5, 13, 16, 40, 97)), choose.choice((1, 3, 16, 33, 50, 130))
    k = choose.choice((0, 1, 4, choose.randint(1, 200), choose.randint(1, 200)))
    low = choose.choice((None, None, 1, 20, 32, 55))
    raw, bias = choose.random() < 0.15, choose.random() < 0.8
    packed = (bias or not raw) and m * n * k > 5000 and choose.random() < 0.7  # of the small ones GPUs take some
    return sample(
        name, m, n, k, packed=packed, raw=raw, bias=bias,
        residual=None if raw or choose.random() < 0.5 else choose.choice((INT32, INT8, UINT8, INT16)),
        bits=choose.randint(2, 32), out=choose.choice((INT32, INT8, UINT8, INT16)), low=low,
        high=None if low is None else min(low + choose.choice((0, 4, 8, 40)), 61), halves=choose.random() < 0.3,
        small=choose.random() < 0.3, bias_size=choose.choice((3, 3000, 2**31 - 1)),
        of_residual=choose.choice((None, None, (26, 32), (18, 40), (1, 61))),
    )  # fmt: skip


def good_call():
    generator = torch.Generator().manual_seed(0)
    x, weight = _int8.integers((6, 12), generator), _int8.integers((5, 12), generator)
    multiplier, shift = _integer.multipliers(5, generator, 38, 42)
    return {
        "x": x, "weight": weight, "multiplier": multiplier, "shift": shift,
        "bias": _integer.integers((5,), generator, 3000), "residual": _residual((6, 5), generator, INT16),
        "residual_multiplier": multiplier.clone(), "residual_shift": shift.clone(), "bits": 8, "out_dtype": INT8,
    }  # fmt: skip


def _bad(name, argument, match, error=ValueError, **change):
    return _integer.bad("int_linear", good_call, name, argument, match, error, **change)


def _with(name, at, value):
    t = good_call()[name].clone()
    t[at] = value
    return {name: t}


def _bad_inputs():
    for declared in declared_bad_inputs("int_linear", good_call):
        # The public function takes x of any rank. Any number of rows of a plain weight is an N.
        yield dataclasses.replace(declared, public=declared.name != "declared_x_rank_above")
    for name in ("shift", "residual_shift"):
        for value in (0, 62, -1):
            yield _bad(f"{name}_{value}", name, r"between 1 and 61, got .* at \[3\]", **_with(name, 3, value))
    for name in ("multiplier", "residual_multiplier"):
        lowest = _with(name, 2, -(2**31))
        yield _bad(f"{name}_lowest", name, r"between -2147483647 and 2147483647, got .* at \[2\]", **lowest)
    for name in ("multiplier", "shift", "residual_multiplier", "residual_shift"):
        yield _bad(f"no_{name}", name, "given together", **{name: None})
    alone = {"multiplier": None, "shift": None}
    none = {"residual": None, "residual_multiplier": None, "residual_shift": None}
    yield _bad("no_residual", "residual", "given together with residual_multiplier", residual=None)
    yield _bad("residual_alone", "multiplier", "given together with residual, got None", **alone)
    yield _bad("bits_of_sums", "bits", "left at 8 without multiplier, got 16", bits=16, **alone, **none)
    yield _bad("bias_float", "bias", "torch.int32, got torch.float32", TypeError, bias=torch.zeros(5))
    yield _bad("residual_float", "residual", "int32, int16, int8 or uint8", TypeError, residual=torch.zeros(6, 5))
    yield _bad("x_uint8", "x", "torch.int8, got torch.uint8", TypeError, x=torch.zeros(6, 12, dtype=torch.uint8))
    wide = torch.zeros(5, 13, dtype=torch.int8)
    yield _bad("weight_wide", "weight", r"\[N, K\] = \[N, 12\] or packed by int8_prepack, \[ceil", weight=wide)
    yield _bad("weight_rows", "multiplier", r"\[N\] = \[4\], got \[5\]", weight=wide[:4, 1:])
    packed = int8_prepack(good_call()["weight"])
    yield _bad("packed_size", "bias", r"\[N\] with ceil\(N / 16\) = 2 like the packed", weight=packed.repeat(2, 1))
    yield _bad(
        "packed_of_another",
        "weight",
        r"packed by int8_prepack from \[N, K\] = \[5, 12\], got one of \[5, 11\]",
        weight=int8_prepack(good_call()["weight"][:, 1:]),
    )
    yield _bad("packed_kind", "weight", "packed by int8_prepack, got something else", weight=torch.zeros_like(packed))
    yield _bad(
        "packed_alone",
        "bias",
        "given, or multiplier, where weight is packed",
        weight=packed,
        bias=None,
        **alone,
        **none,
    )
    deep = {name: torch.zeros(rows, 131072, dtype=torch.int8) for name, rows in (("x", 6), ("weight", 5))}
    yield _bad("too_deep", "x", r"\[M, K\] with K at most 131071", **deep)


def resize(args, kwargs):
    """Twice the rows and one more."""
    return tuple(torch.cat((t, t.flip(0), t[:1])) if i in (0, 5) and t is not None else t
                 for i, t in enumerate(args)), kwargs  # fmt: skip


def public_kwargs(kwargs):
    named = {"bits": 8} | kwargs
    return {k: _integer.dtype_of(v) if k == "out_dtype" else v for k, v in named.items()}


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 20_000, 768, 96
    weight = int8_prepack(_int8.integers((n, k), generator))
    rescaling = _integer.multipliers(n, generator, 39, 43)
    return [("20000x768x96", (_int8.integers((m, k), generator), weight, *rescaling), {"out_dtype": INT8})]


SPEC = OpSpec(
    name="int_linear",
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=64,
    bad_inputs=[*_bad_inputs()],
    good_call=good_call,
    dynamic="M",
    resize=resize,
    rolled=_int8.rolled,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)
