"""sparse24_decompress: the shared suite."""

from effvit.testing.sparse24_decompress import SPEC
from op_suite import ForwardSuite


class TestSparse24Decompress(ForwardSuite):
    spec = SPEC
