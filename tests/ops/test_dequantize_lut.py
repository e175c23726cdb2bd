"""dequantize_lut: the shared suite."""

from effvit.testing.dequantize_lut import SPEC
from op_suite import ForwardSuite


class TestDequantizeLut(ForwardSuite):
    spec = SPEC
