"""quantize_lut: the shared suite."""

from effvit.testing.quantize_lut import SPEC
from op_suite import ForwardSuite


class TestQuantizeLut(ForwardSuite):
    spec = SPEC
