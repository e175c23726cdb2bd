"""pow2_linear: the shared suite, exactness against shifts one by one in int64, and the codes of weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from int_oracle import shift_linear

import effvit
from effvit.reference.pow2_linear import pow2_codes, pow2_values
from effvit.testing import assert_bitwise_equal, backends
from effvit.testing.pow2_linear import SPEC
from op_suite import OpSuite


class TestPow2Linear(OpSuite):
    spec = SPEC

    @pytest.mark.parametrize("name", [b.name for b in backends("pow2_linear")])
    def test_sums_are_exact(self, name):
        """Bit for bit those of int64: every bits and shift, saturating, at the bound where int32 sums begin to pass."""
        backend = next(b for b in backends("pow2_linear") if b.name == name)
        rng = np.random.default_rng(1)
        shape = (5, 7, 21) if backend.slow else (19, 35, 130)
        m, n, k = shape
        for dtype in (np.int8, np.uint8, np.int16, np.int32):
            info = np.iinfo(dtype)
            for bits, right in ((2, 0), (4, 0), (4, 2), (5, 0), (5, 14), (5, 31)):
                most = 2 ** (bits - 1) - 1
                left = max(0, most - 1 - right)
                bound = min(info.max, ((2**31 - 1) // k >> left) + 1)
                for size in (bound,) if backend.slow else (info.max, bound, max(bound - 2, 1)):
                    x = rng.integers(-size if info.min else 0, size, (m, k), dtype=np.int64, endpoint=True)
                    x[0] = size if bits == 2 else x[0]
                    x = x.astype(dtype)
                    codes = rng.integers(-most, most, (n, k), dtype=np.int8, endpoint=True)
                    codes[0], codes[1] = most, -most
                    tensors = [torch.from_numpy(t).to(backend.device) for t in (x, codes)]
                    ones = [torch.ones(rows, device=backend.device) for rows in (m, n)]
                    result = backend.forward(*tensors, *ones, None, None, out_dtype=3, bits=bits, right=right)
                    expected = torch.from_numpy(shift_linear(x, codes, right))
                    assert_bitwise_equal(result.cpu(), expected, name=f"{dtype}, {bits}, {right}, {size}")


def test_codes_are_the_nearest_powers():
    w = torch.tensor([[0.0, 1.0, -1.0, 1.4, 1.5, 3.0, -5.9, 64.0, 1e9, 0.4, 0.5, 0.3, -0.36]])
    codes = pow2_codes(w, 0, 4)
    # log2: 0 is code 1; 1.4 -> 0.49, 1.5 -> 0.58, 3 -> 1.58, 5.9 -> 2.56; below 2^-1.5 of the least power it is 0
    assert codes.tolist() == [[0, 1, -1, 1, 2, 3, -4, 7, 7, 1, 1, 0, -1]]
    assert pow2_values(codes).tolist() == [[0, 1, -1, 1, 2, 4, -8, 64, 64, 1, 1, 0, -1]]


def test_is_a_linear_layer_with_powers_of_two():
    w = torch.randn(20, 36)
    codes = pow2_codes(w, -14, 5)
    x = torch.randint(-127, 128, (2, 3, 36), dtype=torch.int8)
    scale, bias = torch.full((20,), 2.0**-14), torch.randn(20)
    y = effvit.pow2_linear(x, codes, torch.ones(1), scale, bias, bits=5)
    expected = F.linear(x.double(), pow2_values(codes, torch.float64) * 2.0**-14, bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_fixed_point_rounds_every_term_down():
    x = torch.tensor([[5, -5, 7, -1]], dtype=torch.int32)
    codes = torch.tensor([[14, 14, -13, 1]], dtype=torch.int8)  # 2^-1, 2^-1, -2^-2, 2^-14
    one = torch.ones(1)
    y = effvit.pow2_linear(x, codes, one, one, bits=5, right=14, out_dtype=torch.int32)
    assert y.item() == 2 - 3 - 1 - 1
