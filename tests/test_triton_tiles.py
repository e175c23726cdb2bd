"""Triton's kernels with the smallest tiles, in the interpreter: small samples take every path of large ones."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from effvit.testing import backends, get_spec, sample_oracle
from effvit.testing._spec import as_tuple

CASES = {
    "window_attention": ["small_shift", "small_dilated", "small_halo", "small_tail", "small_pads"],
    "linear_attention": ["small_splits_causal", "small_splits_segments", "small_segments_everything", "small_wide",
                         "small_causal_wide", "small_quadratic_chunks", "small_tails", "small_splits"],
    "rbf_gram": ["small"],
    "newton_pinv": ["small_gram_17"],
}  # fmt: skip


def samples():
    for op, prefixes in CASES.items():
        for sample in get_spec(op).tagged("small"):
            if sample.name in prefixes or (prefixes == ["small"] and sample.name.startswith("small")):
                yield pytest.param(op, sample, id=f"{op}-{sample.name}")


@pytest.mark.parametrize("op, sample", list(samples()))
def test_small_tiles(op, sample):
    triton = [b for b in backends(op) if b.name == "triton"]
    if not triton:
        pytest.skip("the Triton kernels run on a GPU or in the interpreter only")
    from effvit.triton_kernels._common import small_tiles

    spec, backend = get_spec(op), triton[0]
    oracle = sample_oracle(op, sample.name, sample.dtypes[0])

    def on_device(tensors):
        return tuple(t.to(backend.device) if isinstance(t, torch.Tensor) else t for t in tensors)

    args, grads = on_device(oracle.args), on_device(oracle.output_grads)
    with small_tiles():
        outputs = as_tuple(backend.forward(*args, **oracle.kwargs))
        bargs, bkwargs = spec.backward_call(args, oracle.kwargs, outputs, grads)
        gradients = spec.split_gradients(backend.backward(*bargs, **bkwargs), args, oracle.kwargs)
    oracle.check_outputs(outputs)
    oracle.check_gradients(gradients)
