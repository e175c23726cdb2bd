"""quantize_lut's samples and bad inputs."""

import torch

from effvit.testing import _lut
from effvit.testing._bad_inputs import declared_bad_inputs
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample, split_call


def _sample(name, shape, *, count=15, kind="uniform", descending=False, layout=None, tags=""):
    def make(dtype, device, generator):
        table = _lut.thresholds(count, generator, kind)
        x = _lut.numbers(shape, generator, table, dtype)
        x = x if layout is None else layout(x)
        return (x.to(device), table.to(device)), {"descending": descending}

    return Sample(name, make, frozenset(tags.split()), FLOAT_DTYPES)


def random_sample(name, choose):
    shape, options = _lut.random_options(choose)
    return _sample(name, shape, descending=choose.random() < 0.5, **options)


SAMPLES = [
    *_lut.standard_samples(_sample),
    _sample("small_descending", (2, 3, 20), descending=True, tags="small framework"),
    _sample("descending_8_bits", (3, 70), count=255, descending=True),
]


def _definition(x, thresholds, descending):
    """In the dtype of x, so that it counts as a truth that is rounded."""
    table = thresholds.to(x.dtype)
    found = (x[..., None] >= table).sum(-1)
    return (len(table) - found if descending else found).to(x.dtype)


def good_call():
    generator = torch.Generator().manual_seed(0)
    table = _lut.thresholds(7, generator)
    return {"x": _lut.numbers((2, 3, 8), generator, table, torch.float32), "thresholds": table, "descending": True}


def _too_many():
    call = good_call()
    call["thresholds"] = torch.arange(256.0)
    return split_call(call, ("x", "thresholds"))


def memory_calls(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20_000, 1536, generator=generator).to(dtype)
    return [("20000x1536", (x, _lut.thresholds(15, generator, "log")), {"descending": True})]


SPEC = OpSpec(
    name="quantize_lut",
    random_calls=100,
    samples=SAMPLES,
    definition=_definition,
    random_sample=random_sample,
    bad_inputs=[
        *declared_bad_inputs("quantize_lut", good_call),
        *_lut.bad_thresholds("quantize_lut", good_call, ("x", "thresholds")),
        BadInput("256_thresholds", _too_many, ValueError, r"thresholds must have 1 to 255 elements, got \[256\]"),
    ],
    good_call=good_call,
    dynamic="...",
    resize=_lut.resize,
    ordered=("thresholds",),
    memory_calls=memory_calls,
)
