"""int_layer_norm's samples and bad inputs."""

import torch

from effvit.testing import _integer
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import OpSpec


def constants(shape, generator, bias, rescales, largest_bias=2**29, largest_offset=0, low=45, high=55):
    """bias, multiplier, shift, offset."""
    vectors = [_integer.integers(shape[-1:], generator, largest_bias) if bias else None, None, None, None]
    if rescales:
        vectors[1:3] = _integer.multipliers(shape[-1], generator, low, high)
        vectors[1][1:2] = 0  # as of a channel without a weight
    if largest_offset:
        vectors[3] = _integer.integers(shape[-1:], generator, largest_offset)
    return vectors


def _make(*, size=3000.0, kind="normal", bias=False, rescales=False, exact=False, truncate=False,
          out_dtype=_integer.INT32, largest_bias=2**29, largest_offset=0, dtype=torch.int32,
          low=45, high=55):  # fmt: skip
    def make(shape, generator):
        x = _integer.rows(shape, generator, size, kind, dtype)
        options = {"exact": exact, "truncate": truncate, "out_dtype": out_dtype}
        return (x, *constants(shape, generator, bias, rescales, largest_bias, largest_offset, low, high)), options

    return make


def random_sample(name, choose):
    shape = _integer.random_shape(choose)
    options = {
        "size": choose.choice((0.6, 3.0, 100.0, 3000.0, 1e4, 1e8)), "kind": choose.choice(_integer.KINDS),
        "bias": choose.random() < 0.6, "rescales": choose.random() < 0.5, "exact": choose.random() < 0.5,
        "truncate": choose.random() < 0.3, "out_dtype": choose.randint(3, 6), "largest_bias": 2**31 - 1,
        "largest_offset": choose.choice((0, 0, 100, 2**31 - 1)), "dtype": choose.choice(_integer.INTEGERS),
        "low": choose.choice((1, 31, 45)),
    }  # fmt: skip
    return _integer.sample(name, shape, _make(**options), layout=_integer.random_layout(shape, choose))


FUSED = {"bias": True, "rescales": True, "out_dtype": _integer.INT8}
VIT = {"deit_s": (2, 197, 384), "swin": (1, 784, 96)}
SAMPLES = [
    *_integer.standard_samples(_make, VIT),
    *_integer.narrow_samples(_make),
    _integer.sample("vit_int16_to_int8", (2, 197, 384), _make(**FUSED, dtype=torch.int16), tags="vit"),
    *(_integer.sample(f"{str(dtype)[6:]}_to_{out}", (2, 3, 40), _make(
        bias=True, rescales=True, out_dtype=out, dtype=dtype, largest_offset=90), tags="nasty small")
      for i, dtype in enumerate(_integer.INTEGERS) for out in (3 + i, 3 + (i + 1) % 4)),
    _integer.sample("small_offset", (2, 3, 40), _make(**FUSED, largest_offset=60), tags="small framework"),
    _integer.sample("largest_offset", (10, 40), _make(rescales=True, largest_offset=2**31 - 1, low=1),
                    tags="nasty small"),
    _integer.sample("offset_alone", (10, 40), _make(largest_offset=2**31 - 1), tags="nasty small"),
    *(_integer.sample(f"shift_{low}_to_{high}", (10, 40), _make(**FUSED, low=low, high=high), tags="nasty")
      for low, high in ((1, 30), (31, 34), (33, 61), (50, 52), (56, 61))),
    _integer.sample("vit_int8", (2, 197, 384), _make(**FUSED), tags="vit"),
    _integer.sample("small_bias", (2, 3, 20), _make(bias=True), tags="small framework"),
    _integer.sample("small_int8", (2, 3, 40), _make(**FUSED), tags="small framework"),
    _integer.sample("small_exact", (2, 3, 40), _make(exact=True, bias=True), tags="small framework"),
    _integer.sample("small_deployed", (2, 3, 40), _make(truncate=True, bias=True), tags="small"),
    _integer.sample("small_int16", (2, 3, 40), _make(bias=True, rescales=True, out_dtype=_integer.INT16), tags="small"),
    _integer.sample("small_uint8", (2, 3, 40), _make(bias=True, rescales=True, out_dtype=_integer.UINT8), tags="small"),
    *(_integer.sample(f"exact_{kind}", (2, 3, 37), _make(kind=kind, exact=True), tags="nasty small")
      for kind in _integer.KINDS),
    *(_integer.sample(f"deployed_{kind}", (2, 3, 37), _make(kind=kind, truncate=True), tags="nasty small")
      for kind in _integer.KINDS),
    _integer.sample("few_steps", (40, 10), _make(size=1.0), tags="nasty small"),
    _integer.sample("few_steps_exact", (40, 10), _make(size=1.0, exact=True), tags="nasty small"),
    _integer.sample("largest_bias", (40, 10), _make(bias=True, largest_bias=2**31 - 1), tags="nasty small"),
    _integer.sample("long_exact", (2, 16_384), _make(exact=True, size=2e4)),
]  # fmt: skip


def good_call():
    generator = torch.Generator().manual_seed(0)
    multiplier, shift = _integer.multipliers(8, generator, 45, 55)
    return {
        "x": _integer.rows((2, 3, 8), generator, 3000.0), "bias": _integer.integers((8,), generator, 2**29),
        "multiplier": multiplier, "shift": shift, "offset": _integer.integers((8,), generator, 50),
        "exact": False, "truncate": False, "out_dtype": _integer.INT8,
    }  # fmt: skip


def _bad_shift(value):
    shift = good_call()["shift"].clone()
    shift[3] = value
    return _integer.bad("int_layer_norm", good_call, f"shift_{value}", "shift", r"between 1 and 61, got .* at \[3\]",
                        shift=shift)  # fmt: skip


def public_kwargs(kwargs):
    given = {"exact": False, "truncate": False, "out_dtype": _integer.INT32} | kwargs
    return {"square_root": ("newton", "exact")[given["exact"]], "deployed": given["truncate"],
            "out_dtype": _integer.dtype_of(given["out_dtype"])}  # fmt: skip


def memory_calls(dtype):
    x = _integer.rows((20_000, 1536), torch.Generator().manual_seed(0), 3000.0)
    return [("20000x1536", (x, None, None, None, None), {})]


SPEC = OpSpec(
    name="int_layer_norm",
    random_calls=64,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("int_layer_norm", good_call),
        *(_bad_shift(value) for value in (0, 62, -1)),
        _integer.bad("int_layer_norm", good_call, "no_shift", "shift", "given together", shift=None),
    ],
    good_call=good_call,
    dynamic="...",
    resize=_integer.resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)
