"""int8_linear's samples and bad inputs."""

import torch

from effvit.ops.int8_linear import OP
from effvit.reference.int8_prepack import int8_prepack, int8_unpack
from effvit.testing import _int8
from effvit.testing._spec import BadInput, OpSpec, split_call


def _plain(n, k, generator):
    return (_int8.integers((n, k), generator, -128),)


def _packed(n, k, generator):
    return (int8_prepack(*_plain(n, k, generator)),)


def _dense(x, weight, x_scale, w_scale):
    return x, int8_unpack(weight, w_scale.shape[0], x.shape[1]) if weight.shape[1] > x.shape[1] else weight


def _worst(tensors):
    """The largest sums that there are."""
    x, weight, *rest = tensors
    return (torch.full_like(x, -128), torch.full_like(weight, 127), *rest)


def _transposed(tensors):
    x, weight, *rest = tensors
    wide = torch.zeros(2 * weight.shape[0], weight.shape[1] + 7, dtype=torch.int8)
    wide[::2, 7:] = weight
    return (x, wide[::2, 7:], *rest)


SAMPLES = [
    *_int8.standard_samples(_plain),
    *(_int8.sample(f"packed_{m}x{n}x{k}", m, n, k, _packed, activation=_int8.GELU, tags=tags) for m, n, k, tags in (
        (197, 384, 384, "vit"), (1, 768, 768, "vit"), (6, 20, 33, "framework"), (5, 16, 64, ""), (40, 100, 7, ""))),
    _int8.sample("packed_int8", 50, 40, 96, _packed, out=_int8.INT8, residual=True),
    _int8.sample("worst", 3, 5, 131072, _plain, out=_int8.INT32, bias=False, layout=_worst, tags="nasty"),
    _int8.sample("worst_wide", 14, 40, 4099, _plain, out=_int8.INT32, bias=False, layout=_worst, tags="nasty"),
    _int8.sample("strided_weight", 6, 20, 28, _plain, layout=_transposed, tags="strided small"),
]  # fmt: skip


def good_call():
    generator = torch.Generator().manual_seed(0)
    x, weight = _int8.integers((6, 12), generator), _int8.integers((5, 12), generator)
    x_scale, w_scale, bias, residual = _int8.epilogue_tensors(6, 5, 12, torch.float32, generator, residual=True)
    return {
        "x": x, "weight": weight, "x_scale": x_scale, "w_scale": w_scale, "bias": bias, "residual": residual,
        "activation": _int8.GELU, "out_dtype": 0, "out_scale": None,
    }  # fmt: skip


def _bad(name, argument, match, **change):
    return BadInput(
        name,
        lambda: split_call({**good_call(), **change}, OP.names),
        ValueError,
        f"{argument} must be {match}",
        declared=True,
    )


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 20_000, 768, 96
    scales = _int8.epilogue_tensors(m, n, k, dtype, generator)
    weight = int8_prepack(_int8.integers((n, k), generator))
    out = _int8.DTYPES.index(dtype)
    return [("20000x768x96", (_int8.integers((m, k), generator), weight, *scales), {"activation": 2, "out_dtype": out})]


SPEC = OpSpec(
    name="int8_linear",
    samples=SAMPLES,
    definition=_int8.unrounded(_dense),
    random_sample=_int8.random_call(_plain),
    random_calls=160,
    bad_inputs=[
        *_int8.bad_inputs("int8_linear", good_call),
        _bad("weight_wide", "weight", r"\[N, K\] = \[5, 12\] or packed", weight=torch.zeros(5, 13, dtype=torch.int8)),
        _bad("weight_of_another_format", "weight", r"\[N, K\] = \[5, 12\] or packed by int8_prepack, \[1, 256\]",
             weight=torch.zeros(1, 128, dtype=torch.int8)),
        _bad("too_deep", "x", r"\[M, K\] with K at most 131072", x=torch.zeros(6, 131073, dtype=torch.int8),
             weight=torch.zeros(5, 131073, dtype=torch.int8)),
    ],
    good_call=good_call,
    magnitudes=_int8.magnitudes(_dense),
    dynamic="M",
    resize=_int8.resize,
    rolled=_int8.rolled,
    public_kwargs=_int8.public_kwargs,
    memory_calls=memory_calls,
)  # fmt: skip
