"""requantize's samples and bad inputs."""

import torch

from effvit.testing import _integer
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import OpSpec


def _make(
    *,
    size=3000.0,
    kind="normal",
    residual=False,
    bits=8,
    out_dtype=_integer.INT8,
    low=36,
    high=42,
    ties=False,
    halves=False,
    dtype=torch.int32,
    residual_dtype=torch.int32,
):
    def make(shape, generator):
        x = _integer.rows(shape, generator, size, kind, dtype)
        tensors = [x, *_integer.multipliers(shape[-1], generator, low, high), None, None, None]
        if ties:  # 2^-1 to 2^-5, on both sides of where kernels change their arithmetic
            tensors[1] = torch.full(shape[-1:], 2**30, dtype=torch.int32)
            tensors[2] = torch.randint(31, 36, shape[-1:], generator=generator).to(torch.int32)
        if halves:
            tensors[1] = torch.full(shape[-1:], 2**30, dtype=torch.int32)
        if residual:
            tensors[3] = _integer.rows(shape, generator, size, dtype=residual_dtype)
            tensors[4:] = _integer.multipliers(shape[-1], generator, low, high)
        return tuple(tensors), {"bits": bits, "out_dtype": out_dtype}

    return make


def random_sample(name, choose):
    shape = _integer.random_shape(choose)
    low = choose.choice((1, 20, 36, 55))
    options = {
        "size": choose.choice((3.0, 100.0, 3000.0, 1e8)), "kind": choose.choice(_integer.KINDS),
        "residual": choose.random() < 0.5, "bits": choose.randint(2, 32), "out_dtype": choose.randint(3, 6), "low": low,
        "high": min(low + choose.randint(0, 8), 61), "ties": choose.random() < 0.2,
        "dtype": choose.choice(_integer.INTEGERS), "residual_dtype": choose.choice(_integer.INTEGERS),
    }  # fmt: skip
    return _integer.sample(name, shape, _make(**options), layout=_integer.random_layout(shape, choose))


VIT = {"deit_s": (2, 197, 384), "swin": (1, 784, 96)}
SAMPLES = [
    *_integer.standard_samples(_make, VIT),
    *_integer.narrow_samples(_make),
    _integer.sample("vit_int8_residual", (2, 197, 384), _make(
        dtype=torch.int8, residual=True, residual_dtype=torch.int16, bits=16, out_dtype=_integer.INT16, low=22,
        high=28), tags="vit"),
    *(_integer.sample(f"{str(a)[6:]}_and_{str(b)[6:]}_to_{out}", (3, 70), _make(
        dtype=a, residual=True, residual_dtype=b, out_dtype=out, low=30, high=35), tags="nasty small")
      for i, a in enumerate(_integer.INTEGERS) for j, b in enumerate(_integer.INTEGERS) for out in (3 + (i + j) % 4,)),
    _integer.sample("vit_residual", (2, 197, 384), _make(residual=True, bits=16, out_dtype=_integer.INT16), tags="vit"),
    _integer.sample("small_residual", (2, 3, 20), _make(residual=True), tags="small framework"),
    _integer.sample("small_int16", (2, 3, 40), _make(residual=True, bits=16, out_dtype=_integer.INT16, low=31, high=34),
                    tags="small"),
    _integer.sample("small_int32", (2, 3, 40), _make(bits=32, out_dtype=_integer.INT32, low=20, high=30), tags="small"),
    _integer.sample("small_uint8", (2, 3, 40), _make(residual=True, out_dtype=_integer.UINT8), tags="small"),
    _integer.sample("ties", (4, 40), _make(size=60.0, ties=True), tags="nasty small"),
    _integer.sample("enlarged", (4, 40), _make(kind="range", residual=True, bits=32, out_dtype=_integer.INT32, low=1,
                                               high=8), tags="nasty small"),
    _integer.sample("reduced", (4, 40), _make(kind="range", residual=True, low=58, high=61), tags="nasty small"),
    *(_integer.sample(f"ties_by_{c}", (4, 40), _make(size=60.0, low=c, high=c, halves=True), tags="nasty")
      for c in (31, 32, 33, 34)),
    _integer.sample("4_bits", (4, 40), _make(bits=4), tags="small"),
]  # fmt: skip


def good_call():
    generator = torch.Generator().manual_seed(0)
    multiplier, shift = _integer.multipliers(8, generator, 36, 42)
    return {
        "x": _integer.rows((2, 3, 8), generator, 3000.0), "multiplier": multiplier, "shift": shift,
        "residual": _integer.rows((2, 3, 8), generator, 3000.0), "residual_multiplier": multiplier.clone(),
        "residual_shift": shift.clone(), "bits": 8, "out_dtype": _integer.INT8,
    }  # fmt: skip


def _bad_shift(name, value):
    shift = good_call()[name].clone()
    shift[3] = value
    return _integer.bad("requantize", good_call, f"{name}_{value}", name, r"between 1 and 61, got .* at \[3\]",
                        **{name: shift})  # fmt: skip


def public_kwargs(kwargs):
    given = {"bits": 8, "out_dtype": _integer.INT8} | kwargs
    return {"bits": given["bits"], "out_dtype": _integer.dtype_of(given["out_dtype"])}


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    x = _integer.rows((20_000, 1536), generator, 3000.0)
    return [("20000x1536", (x, *_integer.multipliers(1536, generator, 36, 42), None, None, None), {})]


SPEC = OpSpec(
    name="requantize",
    random_calls=64,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("requantize", good_call),
        *(_bad_shift(name, v) for name in ("shift", "residual_shift") for v in (0, 62, -1)),
        *(_integer.bad("requantize", good_call, f"no_{name}", name, "given together", **{name: None})
          for name in ("residual_multiplier", "residual_shift")),
    ],
    good_call=good_call,
    dynamic="...",
    resize=_integer.resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)  # fmt: skip
