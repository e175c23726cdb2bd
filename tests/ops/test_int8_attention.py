"""int8_attention: the shared suite, how close it is to attention in float64, and what is special about it."""

from effvit.testing.int8_attention import SPEC
from op_suite import ForwardSuite


class TestInt8Attention(ForwardSuite):
    spec = SPEC
