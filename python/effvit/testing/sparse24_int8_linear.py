"""sparse24_int8_linear's samples and bad inputs."""

import torch

from effvit.ops.sparse24_int8_linear import OP
from effvit.reference.sparse24_compress import sparse24_compress
from effvit.reference.sparse24_int8_linear import dense_weight
from effvit.reference.sparse24_prepack import sparse24_prepack
from effvit.testing import _int8
from effvit.testing._spec import BadInput, OpSpec, split_call


def sparse(n, k, generator):
    """int8 [N, K] with at most two nonzero of each four; some have fewer."""
    w = _int8.integers((n, k // 4, 4), generator, -128)
    order = torch.rand(n, k // 4, 4, generator=generator).argsort(-1)
    return torch.where(order < 2, w, torch.zeros_like(w)).view(n, k)


def _plain(n, k, generator):
    return sparse24_compress(sparse(n, k, generator))


def _packed(n, k, generator):
    return sparse24_prepack(*_plain(n, k, generator)), None


def _dense(x, values, meta, x_scale, w_scale):
    return x, dense_weight(values, meta, w_scale.shape[0], x.shape[1])


def _worst(tensors):
    """The largest sums that there are."""
    x, values, *rest = tensors
    return (torch.full_like(x, -128), torch.full_like(values, 127), *rest)


SAMPLES = [
    *_int8.standard_samples(_plain, 4),
    *(_int8.sample(f"packed_{m}x{n}x{k}", m, n, k, _packed, activation=_int8.GELU, tags=tags) for m, n, k, tags in (
        (197, 384, 384, "vit"), (1, 768, 768, "vit"), (6, 20, 36, "framework"), (5, 16, 64, ""), (40, 100, 12, ""),
        (64, 70, 100, ""))),
    _int8.sample("packed_int8", 50, 40, 96, _packed, out=_int8.INT8, residual=True),
    _int8.sample("worst", 3, 5, 131072, _plain, out=_int8.INT32, bias=False, layout=_worst, tags="nasty"),
    _int8.sample("worst_wide", 60, 40, 4100, _plain, out=_int8.INT32, bias=False, layout=_worst, tags="nasty"),
]  # fmt: skip


def good_call():
    generator = torch.Generator().manual_seed(0)
    x, (values, meta) = _int8.integers((6, 12), generator), _plain(5, 12, generator)
    x_scale, w_scale, bias, residual = _int8.epilogue_tensors(6, 5, 12, torch.float32, generator, residual=True)
    return {
        "x": x, "values": values, "meta": meta, "x_scale": x_scale, "w_scale": w_scale, "bias": bias,
        "residual": residual, "activation": _int8.GELU, "out_dtype": 0, "out_scale": None,
    }  # fmt: skip


def _bad(name, argument, match, **change):
    def make():
        return split_call({**good_call(), **change}, OP.names)

    return BadInput(name, make, ValueError, f"{argument} must be {match}", declared=True)


def _wrong_meta(byte):
    meta = good_call()["meta"].clone()
    meta[1, 0] = byte
    return meta


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 20_000, 768, 96
    scales = _int8.epilogue_tensors(m, n, k, dtype, generator)
    out = _int8.DTYPES.index(dtype)
    weights = _packed(n, k, generator)
    return [
        ("20000x768x96", (_int8.integers((m, k), generator), *weights, *scales), {"activation": 2, "out_dtype": out})
    ]


SPEC = OpSpec(
    name="sparse24_int8_linear",
    samples=SAMPLES,
    definition=_int8.unrounded(_dense),
    random_sample=_int8.random_call(_plain, 4),
    random_calls=160,
    bad_inputs=[
        *_int8.bad_inputs("sparse24_int8_linear", good_call),
        *(_bad(f"meta_{byte:02x}", "meta", r"two positions i0 < i1 in every nibble, as i0 \| i1 << 2, got .* at \[1, 0",
               meta=_wrong_meta(byte)) for byte in (0xE0, 0xE5, 0xEA, 0xEF, 0x1E, 0xFF)),
        _bad("depth_not_of_fours", "x", r"\[M, K\] with K a multiple of 4", x=torch.zeros(6, 14, dtype=torch.int8)),
        _bad("values_wide", "values", r"\[N, K / 2\] = \[5, 6\]", values=torch.zeros(5, 12, dtype=torch.int8)),
        _bad("not_packed", "values", r"packed by sparse24_prepack, \[1, 320\], where meta is not given", meta=None),
        _bad("too_deep", "x", r"\[M, K\] with K at most 131072", x=torch.zeros(6, 131076, dtype=torch.int8),
             values=torch.zeros(5, 65538, dtype=torch.int8)),
    ],
    good_call=good_call,
    magnitudes=_int8.magnitudes(_dense),
    dynamic="M",
    resize=_int8.resize,
    rolled=_int8.rolled,
    public_kwargs=_int8.public_kwargs,
    memory_calls=memory_calls,
)  # fmt: skip
