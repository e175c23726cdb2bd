"""dequantize_lut's samples, bad inputs and error magnitudes."""

import torch

from effvit.ops.dequantize_lut import DTYPES
from effvit.testing import _integer, _lut
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import BadInput, OpSpec, Sample, split_call

NAMES = ("q", "values")


def _sample(name, shape, *, count=15, kind="uniform", out_dtype=0, layout=None, tags=""):
    def make(dtype, device, generator):
        q = torch.randint(0, count + 1, shape, generator=generator).to(torch.uint8)
        values = torch.randn(count + 1, generator=generator)
        q = q if layout is None else layout(q)
        return (q.to(device), values.to(device)), {"out_dtype": out_dtype}

    return Sample(name, make, frozenset(tags.split()), _integer.ANY)


def random_sample(name, choose):
    shape, options = _lut.random_options(choose)
    return _sample(name, shape, out_dtype=choose.randrange(3), **options)


SAMPLES = [
    *_lut.standard_samples(_sample),
    *(_sample(f"to_{t}", (2, 3, 37), count=n, out_dtype=i, tags="small framework")
      for i, t, n in ((1, "bfloat16", 15), (2, "float16", 255))),
]  # fmt: skip


def magnitudes(args, kwargs, output_grads, eps):
    """A result is a value of the table. The gradient of one is a sum over its codes."""
    q, values = args
    outputs = {"out": values[q.long()].abs()}
    if output_grads is None:
        return outputs, {}
    g = output_grads[0].abs().to(values.dtype)
    return outputs, {"values": torch.zeros_like(values).index_add(0, q.long().flatten(), g.flatten())}


def good_call():
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 8, (2, 3, 8), generator=generator).to(torch.uint8)
    return {"q": q, "values": torch.randn(8, generator=generator), "out_dtype": 0}


def _too_many():
    call = good_call()
    call["values"] = torch.arange(257.0)
    return split_call(call, NAMES)


def public_kwargs(kwargs):
    kinds = {i: dtype for dtype, i in DTYPES.items()}
    return {"out_dtype": kinds[kwargs.get("out_dtype", 0)]}


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (20_000, 1536), generator=generator, dtype=torch.uint8)
    return [("20000x1536", (q, torch.randn(16, generator=generator)), {})]


SPEC = OpSpec(
    name="dequantize_lut",
    random_calls=100,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("dequantize_lut", good_call),
        BadInput("257_values", _too_many, ValueError, r"values must have 1 to 256 elements, got \[257\]",
                 public=False),
    ],
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="...",
    resize=_lut.resize,
    public_kwargs=public_kwargs,
    memory_calls=memory_calls,
)  # fmt: skip
