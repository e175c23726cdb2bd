"""shift_gelu's samples and bad inputs."""

import torch

from effvit.testing import _integer
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import OpSpec

HALF = {"multiplier": 2**30, "shift": 37}  # of steps of 2^-7: a step is as large as two of x


def _make(*, size=60.0, kind="normal", x0=-12, n=23, bits=8, half_bit=True, safe_max=True, out_dtype=_integer.INT32,
          multiplier=0, shift=31, dtype=torch.int32):  # fmt: skip
    def make(shape, generator):
        options = {"x0": x0, "n": n, "bits": bits, "half_bit": half_bit, "safe_max": safe_max}
        options |= {"multiplier": multiplier, "shift": shift, "out_dtype": out_dtype}
        return (_integer.rows(shape, generator, size, kind, dtype),), options

    return make


def random_sample(name, choose):
    shape = _integer.random_shape(choose)
    rescales = choose.random() < 0.5
    options = {
        **_integer.random_shift_exp(choose), "bits": choose.randint(2, 16), "safe_max": choose.random() < 0.7,
        "out_dtype": choose.randint(3, 6), "size": choose.choice((3.0, 60.0, 60.0, 3000.0, 1e8)),
        "kind": choose.choice(_integer.KINDS), "dtype": choose.choice(_integer.INTEGERS),
        "multiplier": choose.randint(1, 2**31 - 1) if rescales else 0, "shift": choose.choice((1, 20, 31, 37, 45, 61)),
    }  # fmt: skip
    return _integer.sample(name, shape, _make(**options), layout=_integer.random_layout(shape, choose))


def _int8(**options):
    return _make(**HALF, out_dtype=_integer.INT8, **options)


VIT = {"deit_s_hidden": (1, 197, 1536), "swin_hidden": (1, 784, 384)}
SAMPLES = [
    *_integer.standard_samples(_make, VIT),
    *_integer.narrow_samples(_make),
    _integer.sample("vit_int8_to_int8", (1, 197, 1536), _int8(dtype=torch.int8, size=30.0), tags="vit"),
    _integer.sample("vit_int16_to_int8", (1, 197, 1536), _int8(dtype=torch.int16, size=300.0, x0=-120), tags="vit"),
    *(_integer.sample(f"{str(dtype)[6:]}_to_{out}_{kind}", (3, 70), _make(
        **HALF, dtype=dtype, out_dtype=out, kind=kind, safe_max=kind != "negative"),
        tags="nasty small" if (i + out) % 3 == 0 else "nasty")
      for i, dtype in enumerate(_integer.INTEGERS[1:]) for out in (3, 4, 5, 6)
      for kind in ("normal", "range", "negative")),
    _integer.sample("int8_many_tops", (300, 40), _int8(dtype=torch.int8, kind="range"), tags="nasty"),
    _integer.sample("vit_int8", (1, 197, 1536), _int8(), tags="vit"),
    _integer.sample("small_int8", (2, 3, 40), _int8(), tags="small framework"),
    _integer.sample("small_wide_int8", (2, 3, 40), _int8(size=5000.0, x0=-250), tags="small framework"),
    _integer.sample("small_deployed", (2, 3, 20), _make(half_bit=False), tags="small framework"),
    _integer.sample("small_authors", (2, 3, 20), _make(safe_max=False), tags="small"),
    _integer.sample("authors_below_0", (2, 3, 20), _make(safe_max=False, kind="negative"), tags="nasty small"),
    _integer.sample("authors_far_below_0", (2, 300), _make(safe_max=False, kind="minimum"), tags="nasty small"),
    _integer.sample("authors_below_0_deployed", (2, 300), _make(safe_max=False, kind="negative", half_bit=False),
                    tags="nasty"),
    _integer.sample("small_int16", (2, 3, 40), _make(bits=16, out_dtype=_integer.INT16, size=3.0), tags="small"),
    _integer.sample("small_uint8", (2, 3, 40), _make(**HALF, out_dtype=_integer.UINT8), tags="small"),
    _integer.sample("saturates_before", (2, 40), _make(bits=16, size=1e8, **HALF), tags="nasty small"),
    *(_integer.sample(f"bound_{n}", (4, 100), _make(n=n, x0=-((2**31 - 1) >> n), size=float((2**31 - 1) >> n)),
                      tags="nasty small") for n in (4, 5, 10, 15, 16, 23, 30)),
    *(_integer.sample(f"least_{n}", (4, 100), _make(n=n, x0=-1, size=4.0), tags="nasty small") for n in (4, 15, 30)),
]  # fmt: skip


def good_call():
    x = _integer.rows((2, 3, 8), torch.Generator().manual_seed(0), 60.0)
    return {"x": x, "x0": -12, "n": 23, "bits": 8, "half_bit": True, "safe_max": True, "multiplier": 0, "shift": 31,
            "out_dtype": _integer.INT32}  # fmt: skip


def public_kwargs(kwargs):
    given = good_call() | kwargs
    scale, bits = 1 / (1.702 * (-given["x0"] - 0.5)), given["bits"]
    call = {"scale": scale, "n": given["n"], "bits": bits, "safe_max": given["safe_max"]}
    call |= {"deployed": not given["half_bit"], "out_dtype": _integer.dtype_of(given["out_dtype"])}
    if not given["multiplier"] and given["out_dtype"] == _integer.INT32:
        call["out_dtype"] = None
    if given["multiplier"]:
        call["out_scale"] = scale * 2.0 ** (1 - bits) * 2.0 ** given["shift"] / given["multiplier"]
    return call


def memory_calls(dtype):
    x = _integer.rows((20_000, 1536), torch.Generator().manual_seed(0), 60.0)
    return [("20000x1536", (x,), {"x0": -12})]


SPEC = OpSpec(
    name="shift_gelu",
    random_calls=64,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *_integer.without_half_bit(declared_bad_inputs("shift_gelu", good_call)),
        *_integer.bad_shift_exp("shift_gelu", good_call),
    ],
    good_call=good_call,
    dynamic="...",
    resize=_integer.resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)
