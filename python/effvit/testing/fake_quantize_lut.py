"""fake_quantize_lut's samples, bad inputs and error magnitudes."""

import torch

from effvit.testing import _lut
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import FLOAT_DTYPES, OpSpec, Sample

NAMES = ("x", "thresholds", "values")


def _values(table, generator):
    """One between each two thresholds and one beyond each end, in any order of size."""
    return torch.randn(len(table) + 1, generator=generator)


def _sample(name, shape, *, count=15, kind="uniform", layout=None, tags=""):
    def make(dtype, device, generator):
        table = _lut.thresholds(count, generator, kind).to(dtype).float()  # a yardstick in half precision has the same
        x = _lut.numbers(shape, generator, table, dtype)
        x = x if layout is None else layout(x)
        return tuple(t.to(device) for t in (x, table, _values(table, generator))), {}

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES)


def random_sample(name, choose):
    shape, options = _lut.random_options(choose)
    return _sample(name, shape, **options)


SAMPLES = _lut.standard_samples(_sample)


def magnitudes(args, kwargs, output_grads, eps):
    """A result is a value of the table. The gradient of one is a sum over what became it."""
    x, table, values = args
    found = (x[..., None] >= table).sum(-1)
    outputs = {"out": values[found].abs()}
    if output_grads is None:
        return outputs, {}
    g = output_grads[0].abs()
    of_values = torch.zeros_like(values).index_add(0, found.flatten(), g.flatten())
    return outputs, {"x": g, "thresholds": torch.zeros_like(table), "values": of_values}


def good_call():
    generator = torch.Generator().manual_seed(0)
    table = _lut.thresholds(7, generator)
    x = _lut.numbers((2, 3, 8), generator, table, torch.float32)
    return {"x": x, "thresholds": table, "values": _values(table, generator)}


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    x, table = torch.rand(20_000, 1536, generator=generator).to(dtype), _lut.thresholds(15, generator, "log")
    return [("20000x1536", (x, table, _values(table, generator)), {})]


SPEC = OpSpec(
    name="fake_quantize_lut",
    random_calls=100,
    samples=SAMPLES,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("fake_quantize_lut", good_call),
        *_lut.bad_thresholds("fake_quantize_lut", good_call, NAMES),
    ],
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="...",
    resize=_lut.resize,
    ordered=("thresholds",),
    memory_calls=memory_calls,
)
