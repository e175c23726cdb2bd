"""int_add_layer_norm's samples and bad inputs."""

import torch

from effvit.testing import _integer
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import OpSpec
from effvit.testing.int_layer_norm import constants

SCALES = ("x_multiplier", "x_shift", "residual_multiplier", "residual_shift")


def _make(*, size=3000.0, kind="normal", dtype=torch.int32, residual_dtype=torch.int32, residual_kind="normal", low=31,
          high=33, bias=True, rescales=True, largest_offset=0, exact=False, truncate=False, bits=16,
          out_dtype=_integer.INT8):  # fmt: skip
    def make(shape, generator):
        x = _integer.rows(shape, generator, size, kind, dtype)
        residual = _integer.rows(shape, generator, size, residual_kind, residual_dtype)
        scales = (_integer.multipliers(shape[-1], generator, low, high) for _ in range(2))
        vectors = constants(shape, generator, bias, rescales, largest_offset=largest_offset)
        options = {"exact": exact, "truncate": truncate, "bits": bits, "out_dtype": out_dtype}
        return (x, residual, *(t for pair in scales for t in pair), *vectors), options

    return make


def random_sample(name, choose):
    shape = _integer.random_shape(choose)
    low = choose.choice((1, 25, 30, 33, 50))
    options = {
        "size": choose.choice((3.0, 100.0, 3000.0, 1e8)), "kind": choose.choice(_integer.KINDS),
        "residual_kind": choose.choice(_integer.KINDS), "dtype": choose.choice(_integer.INTEGERS),
        "residual_dtype": choose.choice(_integer.INTEGERS), "low": low, "high": min(low + choose.randint(0, 8), 61),
        "bias": choose.random() < 0.6, "rescales": choose.random() < 0.7, "largest_offset": choose.choice((0, 0, 100)),
        "exact": choose.random() < 0.3, "truncate": choose.random() < 0.3, "bits": choose.randint(2, 16),
        "out_dtype": choose.randint(3, 6),
    }  # fmt: skip
    return _integer.sample(name, shape, _make(**options), layout=_integer.random_layout(shape, choose))


VIT = {"deit_s": (2, 197, 384), "swin": (1, 784, 96)}
SAMPLES = [
    *(s for s in _integer.standard_samples(_make, VIT) if s.name != "expanded"),  # x alone
    _integer.sample("vit_int8", (2, 197, 384), _make(dtype=torch.int8, low=25, high=27), tags="vit"),
    *(_integer.sample(f"{str(a)[6:]}_and_{str(b)[6:]}_to_{out}", (3, 70), _make(
        dtype=a, residual_dtype=b, out_dtype=out, size=100.0, low=27, high=30, largest_offset=50), tags="nasty small")
      for i, a in enumerate(_integer.INTEGERS) for j, b in enumerate(_integer.INTEGERS)
      for out in (3 + (i + j) % 4,)),
    _integer.sample("small_int8", (2, 3, 40), _make(dtype=torch.int8, low=25, high=27), tags="small framework"),
    _integer.sample("small_plain", (2, 3, 40), _make(bias=False, rescales=False, out_dtype=_integer.INT32),
                    tags="small framework"),
    _integer.sample("small_deployed", (2, 3, 40), _make(truncate=True), tags="small"),
    _integer.sample("small_exact", (2, 3, 40), _make(exact=True), tags="small"),
    _integer.sample("4_bits", (4, 40), _make(bits=4), tags="small"),
    _integer.sample("saturates", (4, 40), _make(size=1e8, residual_kind="range"), tags="nasty small"),
    _integer.sample("enlarged", (4, 40), _make(residual_kind="range", low=1, high=8), tags="nasty small"),
]  # fmt: skip


def good_call():
    (x, *rest), options = _make(largest_offset=40)((2, 3, 8), torch.Generator().manual_seed(0))
    names = ("residual", *SCALES, "bias", "multiplier", "shift", "offset")
    return {"x": x, **dict(zip(names, rest, strict=True)), **options}


def _bad_shift(name, value):
    shift = good_call()[name].clone()
    shift[3] = value
    return _integer.bad("int_add_layer_norm", good_call, f"{name}_{value}", name, r"between 1 and 61, got .* at \[3\]",
                        **{name: shift})  # fmt: skip


def public_kwargs(kwargs):
    given = {"exact": False, "truncate": False, "bits": 16, "out_dtype": _integer.INT32} | kwargs
    return {"square_root": ("newton", "exact")[given["exact"]], "deployed": given["truncate"], "bits": given["bits"],
            "out_dtype": _integer.dtype_of(given["out_dtype"])}  # fmt: skip


def memory_calls(dtype):
    args, options = _make()((20_000, 1536), torch.Generator().manual_seed(0))
    return [("20000x1536", args, options)]


SPEC = OpSpec(
    name="int_add_layer_norm",
    random_calls=64,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("int_add_layer_norm", good_call),
        *(_bad_shift(name, value) for name in ("shift", "x_shift", "residual_shift") for value in (0, 62)),
        _integer.bad("int_add_layer_norm", good_call, "no_shift", "shift", "given together", shift=None),
    ],
    good_call=good_call,
    dynamic="...",
    resize=_integer.resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)
