"""fake_quantize_lut: the shared suite."""

from effvit.testing.fake_quantize_lut import SPEC
from op_suite import ForwardSuite


class TestFakeQuantizeLut(ForwardSuite):
    spec = SPEC
