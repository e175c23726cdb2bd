"""The shared suite of the integer-only operators: bitwise equal to tests/int_oracle.py, sample by sample and fuzzed."""

import random

import numpy as np
import random_calls
import torch

from effvit.ops._declaration import OUT_DTYPES
from effvit.testing import assert_bitwise_equal, backends
from effvit.testing._spec import as_tuple
from op_suite import ForwardSuite


def numpy_dtype(out_dtype):
    return np.dtype(OUT_DTYPES[out_dtype])


class IntegerSuite(ForwardSuite):
    """Subclasses have `oracle(args, kwargs)`."""

    FUZZ_ROWS = 12_000

    def expected(self, args, kwargs):
        """One result or several."""
        return [torch.from_numpy(np.ascontiguousarray(y)) for y in as_tuple(self.oracle(args, kwargs))]

    def test_every_sample_is_the_oracles(self):
        """The definition and the best kernels; test_results compares every backend with the definition."""
        reference, *compiled = (b for b in backends(self.spec.name) if not b.slow and "emulated" not in b.name)
        for sample in self.spec.samples:
            if "empty" in sample.tags:
                continue
            args, kwargs = sample.build()
            expected = self.expected(args, kwargs)
            for backend in (reference, *compiled[-1:]):
                given = (None if a is None else a.to(backend.device) for a in args)
                results = as_tuple(backend.forward(*given, **kwargs))
                for result, right in zip(results, expected, strict=True):
                    assert_bitwise_equal(result.cpu(), right, name=f"{sample.name} on {backend.name}")

    def test_fuzz(self):
        """Random rows and options, at least FUZZ_ROWS of them, on every compiled instruction set."""
        fast = [b for b in backends(self.spec.name) if not b.slow]
        rows, i = 0, 0
        while rows < self.FUZZ_ROWS:
            sample = self.spec.random_sample(f"fuzz_{i}", random.Random(f"{self.spec.name} {random_calls.seed()} {i}"))
            args, kwargs = sample.build()
            expected = self.expected(args, kwargs)
            for backend in fast if i % 8 == 0 else fast[-1:]:
                results = as_tuple(backend.forward(*args, **kwargs))
                given = [None if a is None else (a.dtype, list(a.shape)) for a in args]
                for result, right in zip(results, expected, strict=True):
                    assert_bitwise_equal(result, right, name=f"{backend.name}, {given}, {kwargs}, call {i}")
            rows += args[0].shape[:-1].numel()
            i += 1
