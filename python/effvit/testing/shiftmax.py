"""shiftmax's samples and bad inputs."""

import torch

from effvit.ops._integer import DTYPES
from effvit.ops.shiftmax import MOST_BITS
from effvit.testing import _integer
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import OpSpec

_MOST = {DTYPES[getattr(torch, name)]: bits for name, bits in MOST_BITS.items()}


def _make(*, size=60.0, kind="normal", x0=-20, n=15, bits=8, half_bit=True, out_dtype=_integer.INT8,
          dtype=torch.int32):  # fmt: skip
    def make(shape, generator):
        options = {"x0": x0, "n": n, "bits": bits, "half_bit": half_bit, "out_dtype": out_dtype}
        return (_integer.rows(shape, generator, size, kind, dtype),), options

    return make


def random_sample(name, choose):
    shape = _integer.random_shape(choose)
    out_dtype = choose.choice(sorted(_MOST))
    options = {
        **_integer.random_shift_exp(choose), "bits": choose.randint(2, _MOST[out_dtype]), "out_dtype": out_dtype,
        "size": choose.choice((3.0, 100.0, 1e5)), "kind": choose.choice(_integer.KINDS),
        "dtype": choose.choice(_integer.INTEGERS),
    }  # fmt: skip
    return _integer.sample(name, shape, _make(**options), layout=_integer.random_layout(shape, choose))


VIT = {"deit_s_scores": (2, 6, 197, 197), "swin_scores": (16, 3, 49, 49)}
SAMPLES = [
    *_integer.standard_samples(_make, VIT),
    *_integer.narrow_samples(_make),
    _integer.sample("vit_int8", (2, 6, 197, 197), _make(dtype=torch.int8, size=20.0), tags="vit"),
    *(_integer.sample(f"int8_x0_{-x0}_n_{n}{'' if half_bit else '_deployed'}", (3, 70),
                      _make(dtype=torch.int8, kind="range", x0=x0, n=n, bits=bits, half_bit=half_bit, out_dtype=out),
                      tags="nasty small" if bits == 16 and n > 14 else "nasty")
      for x0, n, half_bit in ((-1, 15, True), (-3, 15, True), (-17, 15, False), (-24, 15, True), (-24, 16, True),
                              (-511, 15, True), (-65535, 15, True), (-2, 29, True), (-20, 10, True), (-5, 4, False),
                              (-127, 15, False), (-200, 15, True), (-32767, 16, True), (-7, 8, True))
      for bits, out in ((8, _integer.INT8), (16, _integer.INT16))),
    _integer.sample("small_deployed", (2, 3, 20), _make(n=16, half_bit=False), tags="small framework"),
    _integer.sample("small_int16", (2, 3, 40), _make(bits=16, out_dtype=_integer.INT16, x0=-3000, size=9000.0),
                    tags="small"),
    _integer.sample("small_int32", (3, 40), _make(bits=16, out_dtype=_integer.INT32), tags="small"),
    _integer.sample("small_uint8", (3, 40), _make(bits=9, out_dtype=_integer.UINT8), tags="small"),
    *(_integer.sample(f"bound_{n}", (4, 100), _make(n=n, x0=-((2**31 - 1) >> n), size=float((2**31 - 1) >> n),
                                                    bits=16, out_dtype=_integer.INT16), tags="nasty small")
      for n in (4, 5, 10, 15, 16, 23, 30)),
    *(_integer.sample(f"least_{n}", (4, 100), _make(n=n, x0=-1, size=4.0), tags="nasty small") for n in (4, 15, 30)),
]  # fmt: skip


def good_call():
    x = _integer.rows((2, 3, 8), torch.Generator().manual_seed(0), 60.0)
    return {"x": x, "x0": -20, "n": 15, "bits": 8, "half_bit": True, "out_dtype": _integer.INT8}


def public_kwargs(kwargs):
    given = good_call() | kwargs
    return {"scale": 1 / (-given["x0"] - 0.5), "n": given["n"], "bits": given["bits"],
            "deployed": not given["half_bit"], "out_dtype": _integer.dtype_of(given["out_dtype"])}  # fmt: skip


def memory_calls(dtype):
    x = _integer.rows((20_000, 1536), torch.Generator().manual_seed(0), 60.0)
    return [("20000x1536", (x,), {"x0": -20})]


SPEC = OpSpec(
    name="shiftmax",
    random_calls=64,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *_integer.without_half_bit(declared_bad_inputs("shiftmax", good_call)),
        *_integer.bad_shift_exp("shiftmax", good_call),
        *(_integer.bad("shiftmax", good_call, f"bits_{bits}_of_{out}", "bits", f"at most {bits - 1} with out_dtype",
                       bits=bits, out_dtype=out) for out, bits in ((_integer.INT8, 9), (_integer.UINT8, 10))),
    ],
    good_call=good_call,
    dynamic="...",
    resize=_integer.resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)  # fmt: skip
