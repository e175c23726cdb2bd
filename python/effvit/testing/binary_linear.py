"""binary_linear's samples and bad inputs."""

import torch

from effvit.ops.binary_linear import OP
from effvit.reference.binary_linear import binary_product
from effvit.reference.int8_linear import epilogue
from effvit.testing import _int8
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call


def _bytes(m, k, generator):
    """Any bytes: bits beyond K are set as well, and must not count."""
    return torch.randint(0, 256, (m, (k + 7) // 8), generator=generator, dtype=torch.uint8)


def _sample(
    name, m, n, k, *, unipolar=False, activation=_int8.NONE, out=None, bias=True, residual=False, layout=None, tags=""
):
    def make(dtype, device, generator):
        x, weight = _bytes(m, k, generator), _bytes(n, k, generator)
        scales = _int8.epilogue_tensors(m, n, k, dtype, generator, bias=bias, residual=residual)
        scales = (scales[0], scales[1] * 5000, *scales[2:])
        tensors = (x, weight, *scales)
        if layout is not None:
            tensors = layout(tensors)
        as_asked = _int8.DTYPES.index(dtype) if dtype in _int8.DTYPES else 0
        options = {"depth": k, "unipolar": unipolar, "activation": activation}
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


def _of_one(value_x, value_w):
    return lambda tensors: (torch.full_like(tensors[0], value_x), torch.full_like(tensors[1], value_w), *tensors[2:])


SAMPLES = [
    _sample("deit_s_fc1", 197, 1536, 384, activation=_int8.GELU, tags="vit"),
    _sample("deit_s_fc2", 197, 384, 1536, residual=True, tags="vit"),
    _sample("attention_values", 197, 64, 197, unipolar=True, bias=False, tags="vit"),
    _sample("one_row", 1, 100, 768, tags="vit"),
    *(_sample(f"small_{a}", 7, 20, 36, activation=i, residual=i % 2 == 0, unipolar=i > 1, tags="small framework")
      for i, a in enumerate(_int8.NAMES)),
    _sample("small_int8", 9, 33, 400, out=_int8.INT8, tags="small"),
    _sample("small_int32", 5, 18, 68, out=_int8.INT32, bias=False, tags="small"),
    _sample("small_int32_unipolar", 5, 18, 68, out=_int8.INT32, bias=False, unipolar=True, tags="small"),
    *(_sample(f"rows_{m}", m, 70, 52, unipolar=m % 2 == 0, tags="small" if m in (1, 3) else "")
      for m in (*range(1, 14), 31, 100)),
    *(_sample(f"columns_{n}", 3, n, 20, residual=True, tags="small" if n < 4 else "")
      for n in (1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 200)),
    *(_sample(f"depth_{k}", 4, 19, k, unipolar=k % 2 == 0, tags="small" if k < 10 else "")
      for k in (1, 2, 7, 8, 9, 31, 63, 64, 65, 247, 248, 249, 255, 256, 257, 500)),
    _sample("deep", 2, 17, 70_000, tags="nasty"),
    _sample("all_differ", 5, 70, 3000, out=_int8.INT32, bias=False, layout=_of_one(255, 0), tags="nasty"),
    _sample("all_equal", 5, 70, 3000, out=_int8.INT32, bias=False, layout=_of_one(255, 255), tags="nasty"),
    _sample("all_set", 5, 70, 3000, out=_int8.INT32, bias=False, unipolar=True, layout=_of_one(255, 255),
            tags="nasty"),
    _sample("strided", 6, 20, 28, residual=True, layout=_strided, tags="strided small"),
    _sample("tiny", 2, 3, 4, residual=True, activation=_int8.SILU, tags="tiny small"),
    _sample("empty_rows", 0, 8, 12, residual=True, tags="empty"),
    _sample("empty_columns", 4, 0, 12, tags="empty"),
    _sample("empty_depth", 4, 20, 0, residual=True, activation=_int8.RELU, tags="empty nasty small"),
    _sample("tall", 40_000, 3, 8, tags="huge"),
]  # fmt: skip


def random_sample(name, choose):
    m, n = choose.choice((1, 2, 5, 13, 16, 40)), choose.choice((1, 3, 16, 33, 50, 130))
    out = choose.choice((None, None, None, _int8.INT8, _int8.INT32))
    plain = out == _int8.INT32
    return _sample(
        name, m, n, choose.choice((choose.randint(1, 200), choose.randint(200, 700))), out=out,
        unipolar=choose.random() < 0.4, activation=_int8.NONE if plain else choose.randrange(4),
        bias=not plain and choose.random() < 0.7, residual=not plain and choose.random() < 0.5,
    )  # fmt: skip


def _definition(*args, depth, unipolar, activation, out_dtype, out_scale):
    x, weight, x_scale, w_scale, bias, residual = args
    acc = binary_product(x, weight, depth, unipolar)
    if out_dtype == _int8.INT32:
        return acc
    return epilogue(acc, x_scale, w_scale, bias, residual, activation=_int8.NAMES[activation], out_scale=out_scale)


def _magnitudes(args, kwargs, output_grads, eps):
    x, weight, x_scale, w_scale, bias, residual = args
    acc = binary_product(x, weight, kwargs["depth"], kwargs["unipolar"]).abs()
    if kwargs["out_dtype"] == _int8.INT32:
        return {"out": acc}, {}
    y = acc * (x_scale[:, None] * w_scale)
    for term in (bias, residual):
        y = y if term is None else y + term.abs()
    of_gelu = kwargs["activation"] in (_int8.GELU, _int8.SILU)
    return {"out": y * (1.2 if of_gelu else 1.0) / (kwargs.get("out_scale") or 1.0)}, {}


def good_call():
    generator = torch.Generator().manual_seed(0)
    x, weight = _bytes(6, 12, generator), _bytes(5, 12, generator)
    x_scale, w_scale, bias, residual = _int8.epilogue_tensors(6, 5, 12, torch.float32, generator, residual=True)
    return {
        "x": x, "weight": weight, "x_scale": x_scale, "w_scale": w_scale, "bias": bias, "residual": residual,
        "depth": 12, "unipolar": False, "activation": _int8.GELU, "out_dtype": 0, "out_scale": None,
    }  # fmt: skip


def _bad(name, argument, match, error=ValueError, **change):
    return BadInput(
        name, lambda: split_call({**good_call(), **change}, OP.names), error, f"{argument} must {match}", declared=True
    )


def _bad_inputs():
    import dataclasses

    for bad in declared_bad_inputs("binary_linear", good_call):  # the public function takes x of any rank
        rank = bad.name == "declared_x_rank_above"
        yield dataclasses.replace(bad, public=False) if rank else bad
    yield _bad("depth_small", "x", r"be \[M, V\] with V = ceil\(depth / 8\) = 1", depth=8)
    yield _bad("depth_large", "x", r"be \[M, V\] with V = ceil\(depth / 8\) = 3", depth=17)
    yield _bad("x_int8", "x", "be torch.uint8, got torch.int8", TypeError, x=torch.zeros(6, 2, dtype=torch.int8))
    zeros = torch.zeros(5, 3, dtype=torch.uint8)
    yield _bad("weight_wide", "weight", r"be \[N, V\] like x \[6, 2\]", weight=zeros)
    yield _bad("w_scale_zero", "w_scale", "be positive and finite", w_scale=torch.zeros(5))
    yield _bad("x_scale_negative", "x_scale", "be positive and finite", x_scale=torch.full((6,), -1.0))
    yield _bad("out_scale_missing", "out_scale", "be given where the output is int8", out_dtype=_int8.INT8)
    yield _bad("out_scale_float", "out_scale", "be None where the output is not int8", out_scale=0.1)
    yield _bad("int32_bias", "bias", "be None where the output is int32", out_dtype=_int8.INT32, residual=None)


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 20_000, 768, 96
    tensors = (_bytes(m, k, generator), _bytes(n, k, generator), *_int8.epilogue_tensors(m, n, k, dtype, generator))
    return [("20000x768x96", tensors, {"depth": k, "out_dtype": _int8.DTYPES.index(dtype)})]


SPEC = OpSpec(
    name="binary_linear",
    samples=SAMPLES,
    definition=_definition,
    random_sample=random_sample,
    random_calls=160,
    bad_inputs=list(_bad_inputs()),
    good_call=good_call,
    magnitudes=_magnitudes,
    dynamic="M",
    resize=_int8.resize,
    public_kwargs=_int8.public_kwargs,
    memory_calls=memory_calls,
)
