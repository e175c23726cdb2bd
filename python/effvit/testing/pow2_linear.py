"""pow2_linear's samples and bad inputs."""

import dataclasses

import torch

from effvit.ops.pow2_linear import OP
from effvit.reference.int8_linear import epilogue
from effvit.reference.pow2_linear import shift_sums
from effvit.testing import _int8
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)


def _sample(
    name, m, n, k, *, x_dtype=torch.int8, size=None, bits=4, right=0, activation=_int8.NONE, out=None, bias=True,
    residual=False, layout=None, tags="",
):  # fmt: skip
    info = torch.iinfo(x_dtype)
    low, high = (info.min, info.max) if size is None else (-size, size)

    def make(dtype, device, generator):
        x = torch.randint(low, high + 1, (m, k), generator=generator).to(x_dtype)
        most = 2 ** (bits - 1) - 1
        weight = torch.randint(-most, most + 1, (n, k), generator=generator, dtype=torch.int8)
        x_scale, w_scale, *rest = _int8.epilogue_tensors(m, n, k, dtype, generator, bias=bias, residual=residual)
        w_scale = w_scale * 5000 / (max(high, 1) * 2.0 ** (most - 1 - right))
        tensors = (x, weight, x_scale, w_scale, *rest)
        if layout is not None:
            tensors = layout(tensors)
        as_asked = _int8.DTYPES.index(dtype) if dtype in _int8.DTYPES else 0
        options = {"bits": bits, "right": right, "activation": activation}
        options["out_dtype"] = as_asked if out is None else out
        if out == _int8.INT8:
            options["out_scale"] = 0.02
        return tuple(None if t is None else t.to(device) for t in tensors), options

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES if out is None else FLOAT_DTYPES[:1])


def _strided(tensors):
    x, weight, *rest, residual = tensors

    def wide(t):
        w = torch.zeros(2 * t.shape[0], t.shape[1] + 3, dtype=t.dtype)
        w[::2, 3:] = t
        return w[::2, 3:]

    return (wide(x), wide(weight), *rest, None if residual is None else wide(residual))


def _of_one(value, code):
    return lambda tensors: (torch.full_like(tensors[0], value), torch.full_like(tensors[1], code), *tensors[2:])


_SUMS = {"out": _int8.INT32, "bias": False}
_SHIFT = {"x_dtype": torch.int32, "size": 1 << 16, "bits": 5, "right": 14}
SAMPLES = [
    _sample("deit_s_fc1", 197, 1536, 384, activation=_int8.GELU, tags="vit"),
    _sample("deit_s_matshift", 50, 384, 384, **_SHIFT, tags="vit"),
    _sample("one_row", 1, 100, 768, tags="vit"),
    *(_sample(f"small_{a}", 7, 20, 36, activation=i, residual=i % 2 == 0, **(_SHIFT if i > 1 else {}),
              tags="small framework") for i, a in enumerate(_int8.NAMES)),
    *(_sample(f"small_{str(t)[6:]}", 6, 21, 30, x_dtype=t, bits=5 if t == torch.uint8 else 4, right=i, **_SUMS,
              tags="small") for i, t in enumerate(INTEGERS)),
    _sample("small_int8_out", 9, 12, 400, out=_int8.INT8, tags="small"),
    *(_sample(f"bits_{bits}_right_{right}", 5, 18, 40, bits=bits, right=right, x_dtype=INTEGERS[(bits + right) % 4],
              size=100, **_SUMS, tags="small" if bits > 3 and right in (0, 3) else "")
      for bits in (2, 3, 4, 5) for right in (0, 1, 3, 14, 31)),
    *(_sample(f"rows_{m}", m, 70, 52, **(_SHIFT if m % 2 else {})) for m in (*range(1, 11), 17, 33, 70)),
    *(_sample(f"columns_{n}", 3, n, 20, residual=True, **(_SHIFT if n % 2 else {}), tags="small" if n < 3 else "")
      for n in (1, 2, 15, 16, 17, 33, 65)),
    *(_sample(f"depth_{k}", 4, 19, k, **(_SHIFT if k % 2 else {}), tags="small" if k < 5 else "")
      for k in (1, 2, 3, 4, 5, 15, 16, 31, 33, 64, 257)),
    _sample("saturates", 4, 19, 40, x_dtype=torch.int32, bits=5, **_SUMS, tags="nasty"),
    _sample("largest", 4, 19, 40, x_dtype=torch.int32, bits=5, **_SUMS, layout=_of_one(-(2**31), -15), tags="nasty"),
    _sample("at_the_bound", 3, 19, 64, x_dtype=torch.int32, bits=2, **_SUMS, layout=_of_one(2**25 - 2, -1),
            tags="nasty"),
    _sample("worst_product", 2, 5, 131072, **_SUMS, layout=_of_one(-128, 7), tags="nasty"),
    _sample("deep", 2, 5, 5000, x_dtype=torch.int16, bits=5, **_SUMS, tags="nasty"),
    _sample("strided", 6, 20, 28, residual=True, layout=_strided, tags="strided small"),
    _sample("strided_shift", 6, 20, 28, residual=True, layout=_strided, **_SHIFT, tags="strided small"),
    _sample("tiny", 2, 3, 4, residual=True, activation=_int8.SILU, tags="tiny small"),
    _sample("empty_rows", 0, 8, 12, residual=True, tags="empty"),
    _sample("empty_columns", 4, 0, 12, tags="empty"),
    _sample("empty_depth", 4, 20, 0, residual=True, activation=_int8.RELU, tags="empty nasty small"),
    _sample("tall", 40_000, 3, 8, tags="huge"),
]  # fmt: skip


def random_sample(name, choose):
    out = choose.choice((None, None, None, _int8.INT8, _int8.INT32))
    plain = out == _int8.INT32
    bits = choose.randint(2, 5)
    return _sample(
        name, choose.choice((1, 2, 5, 13, 40)), choose.choice((1, 3, 16, 33, 50)), choose.randint(1, 200), out=out,
        x_dtype=choose.choice((torch.int8, *INTEGERS)), bits=bits, right=choose.choice((0, 0, choose.randint(0, 31))),
        size=choose.choice((3, 100, None)), activation=_int8.NONE if plain else choose.randrange(4),
        bias=not plain and choose.random() < 0.7, residual=not plain and choose.random() < 0.5,
    )  # fmt: skip


def _sums(args, kwargs):
    return shift_sums(args[0], args[1], kwargs["bits"], kwargs["right"]).clamp(-(2**31), 2**31 - 1).double()


def _definition(*args, **options):
    acc = _sums(args, options)
    if options["out_dtype"] == _int8.INT32:
        return acc
    activation = _int8.NAMES[options["activation"]]
    return epilogue(acc, *args[2:], activation=activation, out_scale=options["out_scale"])


def _magnitudes(args, kwargs, output_grads, eps):
    acc = _sums(args, kwargs).abs()
    if kwargs["out_dtype"] == _int8.INT32:
        return {"out": acc}, {}
    y = acc * (args[2][:, None] * args[3])
    for term in args[4:]:
        y = y if term is None else y + term.abs()
    of_gelu = kwargs["activation"] in (_int8.GELU, _int8.SILU)
    return {"out": y * (1.2 if of_gelu else 1.0) / (kwargs.get("out_scale") or 1.0)}, {}


def good_call():
    generator = torch.Generator().manual_seed(0)
    x = _int8.integers((6, 12), generator)
    weight = torch.randint(-7, 8, (5, 12), generator=generator, dtype=torch.int8)
    x_scale, w_scale, bias, residual = _int8.epilogue_tensors(6, 5, 12, torch.float32, generator, residual=True)
    return {
        "x": x, "weight": weight, "x_scale": x_scale, "w_scale": w_scale, "bias": bias, "residual": residual,
        "bits": 4, "right": 0, "activation": _int8.GELU, "out_dtype": 0, "out_scale": None,
    }  # fmt: skip


def _bad(name, argument, match, error=ValueError, **change):
    return BadInput(
        name, lambda: split_call({**good_call(), **change}, OP.names), error, f"{argument} must {match}", declared=True
    )


def _code(value):
    weight = good_call()["weight"].clone()
    weight[3, 7] = value
    return weight


def _bad_inputs():
    for bad in declared_bad_inputs("pow2_linear", good_call):  # the public function takes x of any rank
        rank = bad.name == "declared_x_rank_above"
        yield dataclasses.replace(bad, public=False) if rank else bad
    yield _bad("code_high", "weight", "be codes between -7 and 7 with bits = 4, got 8", weight=_code(8))
    yield _bad("code_low", "weight", "be codes between -7 and 7 with bits = 4, got -128", weight=_code(-128))
    yield _bad("x_float", "x", "be", TypeError, x=torch.zeros(6, 12))
    yield _bad("weight_int16", "weight", "be torch.int8", TypeError, weight=torch.zeros(5, 12, dtype=torch.int16))
    yield _bad("w_scale_zero", "w_scale", "be positive and finite", w_scale=torch.zeros(5))
    yield _bad("x_scale_negative", "x_scale", "be positive and finite", x_scale=torch.full((6,), -1.0))
    yield _bad("out_scale_missing", "out_scale", "be given where the output is int8", out_dtype=_int8.INT8)
    yield _bad("int32_bias", "bias", "be None where the output is int32", out_dtype=_int8.INT32, residual=None)
    yield _bad("too_deep", "x", r"be \[M, K\] with K at most 131072", x=torch.zeros(6, 131073, dtype=torch.int8),
               weight=torch.zeros(5, 131073, dtype=torch.int8))  # fmt: skip


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 20_000, 768, 96
    weight = torch.randint(-7, 8, (n, k), generator=generator, dtype=torch.int8)
    scales = _int8.epilogue_tensors(m, n, k, dtype, generator)
    return [("20000x768x96", (_int8.integers((m, k), generator), weight, *scales),
             {"out_dtype": _int8.DTYPES.index(dtype)})]  # fmt: skip


def _rolled(t, i):
    """Codes stay codes, and float values are not involved."""
    return t.flatten().roll(i).view(t.shape)


SPEC = OpSpec(
    name="pow2_linear",
    samples=SAMPLES,
    definition=_definition,
    random_sample=random_sample,
    random_calls=160,
    bad_inputs=list(_bad_inputs()),
    good_call=good_call,
    magnitudes=_magnitudes,
    dynamic="M",
    resize=_int8.resize,
    rolled=_rolled,
    public_kwargs=_int8.public_kwargs,
    memory_calls=memory_calls,
)
