"""What the tests and benchmarks of every operator share: specs, backends, error measurement, samples.

``effvit.testing.<op>`` holds an operator's :class:`OpSpec`; ``tests/op_suite.py`` runs the tests that follow from it.
"""

import importlib

from effvit._accuracy import (
    ErrorReport,
    assert_bitwise_equal,
    assert_close_to_truth,
    assert_same_layout,
    coarsest_eps,
    measure,
)
from effvit.testing._backends import Backend, backends, small_tiles
from effvit.testing._oracle import Oracle, oracle_of, sample_oracle
from effvit.testing._schemas import torchvision_schemas
from effvit.testing._spec import FLOAT_DTYPES, BadInput, OpSpec, Sample

__all__ = [
    "FLOAT_DTYPES",
    "Backend",
    "BadInput",
    "ErrorReport",
    "OpSpec",
    "Oracle",
    "Sample",
    "assert_bitwise_equal",
    "assert_close_to_truth",
    "assert_same_layout",
    "backends",
    "coarsest_eps",
    "get_spec",
    "measure",
    "oracle_of",
    "sample_oracle",
    "small_tiles",
    "torchvision_schemas",
]


def get_spec(name):
    """The OpSpec of an operator: ``effvit.testing.<name>.SPEC``."""
    return importlib.import_module(f"effvit.testing.{name}").SPEC
