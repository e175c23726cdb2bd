"""TableGELU, TableFunction and TableSoftmax against plain formulas in NumPy, bit by bit, and gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from effvit.layers import TableFunction, TableGELU, TableSoftmax
from effvit.layers.table import dequantize_blocks, quantize_blocks, table_of


def exponent(largest):
    """By search: the least power of two of which 127 steps reach it."""
    e = -200
    while largest > 127 * 2.0**e:
        e += 1
    return e if largest else 0


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def test_blocks():
    x = torch.randn(3, 5, 128) * torch.exp2(torch.randint(-8, 4, (3, 5, 2)).float()).repeat_interleave(64, -1)
    x[0, 0] = 0
    x[1, 1, :64] = torch.linspace(-127, 127, 64)
    q, e = quantize_blocks(x, 64)
    for xs, qs, exponents in zip(x.view(-1, 2, 64), q.view(-1, 2, 64), e.view(-1, 2), strict=True):
        for b in range(2):
            expected = exponent(float(xs[b].abs().max()))
            assert int(exponents[b]) == expected
            assert np.array_equal(qs[b].numpy(), np.rint(xs[b].double().numpy() / 2.0**expected))
    assert (dequantize_blocks(q, e) - x).abs().max() <= 2.0 ** (int(e.max()) - 1)


def test_gelu_is_the_formula():
    """Each byte: the block's scale, GELU in float64, rounded to the scale that its table holds."""
    layer, q = TableGELU(block=8, least=-9, most=2), torch.randint(-128, 128, (4, 3, 24), dtype=torch.int8)
    e = torch.randint(-9, 3, (4, 3, 3), dtype=torch.int8)
    out, e_out = layer.forward_int(q, e)
    for place in np.ndindex(4, 3, 24):
        scale = 2.0 ** int(e[place[0], place[1], place[2] // 8])
        most = max(abs(gelu(v * scale)) for v in range(-128, 128))
        ours = exponent(most)
        assert int(e_out[place[0], place[1], place[2] // 8]) == ours
        expected = min(127, max(-128, round(gelu(int(q[place]) * scale) / 2.0**ours)))
        assert int(out[place]) == expected


def test_float_form_and_gradient():
    layer, x, g = TableGELU(block=16), torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 32)
    y = layer(x)
    step = 2.0 ** -(6 - 2)  # |x| < 4: steps of 2^-5, and those of the result
    assert (y - F.gelu(x)).abs().max() < step
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    (found,) = torch.autograd.grad(y, x, g)
    (expected,) = torch.autograd.grad(F.gelu(x), x, g)
    torch.testing.assert_close(found, expected)


def test_any_function_and_errors():
    layer = TableFunction(torch.tanh, block=4, least=-7, most=0)
    q, e = torch.randint(-128, 128, (2, 8), dtype=torch.int8), torch.zeros(2, 2, dtype=torch.int8)
    out, e_out = layer.forward_int(q, e)
    assert (e_out == -6).all()  # tanh reaches 1: 127 steps of 2^-7 would not
    assert np.array_equal(out.numpy(), np.rint(np.tanh(q.double().numpy()) * 64))
    with pytest.raises(ValueError, match="TableFunction: e must be between -7 and 0, got 1"):
        layer.forward_int(q, e + 1)
    with pytest.raises(ValueError, match=r"e must be \[..., C / 4\] like q \[2, 8\], got \[2, 3\]"):
        layer.forward_int(q, torch.zeros(2, 3, dtype=torch.int8))
    assert table_of(lambda x: 1 / x, 1.0, 1.0)[128] == 127  # infinity saturates


@pytest.mark.parametrize("columns", [1, 7, 197, 1000])
def test_softmax_is_the_formula(columns):
    layer, q = TableSoftmax(), torch.randint(-128, 128, (3, 4, columns), dtype=torch.int8)
    e = torch.randint(-12, 4, (3, 4), dtype=torch.int8)
    out = layer.forward_int(q, e).numpy()
    for i, j in np.ndindex(3, 4):
        d = int(q[i, j].max()) - q[i, j].numpy().astype(np.int64)
        t = np.rint(255 * np.exp(-d * 2.0 ** int(e[i, j]))).astype(np.int64)
        s = int(t.sum())
        assert np.array_equal(out[i, j], np.minimum(255, (256 * t + s // 2) // s))


def test_softmax_float_form_and_gradient():
    layer, x, g = TableSoftmax(), torch.randn(2, 3, 50, requires_grad=True), torch.randn(2, 3, 50)
    y = layer(x)
    assert (y - x.softmax(-1)).abs().max() < 0.02
    (found,), (expected,) = (torch.autograd.grad(z, x, g) for z in (y, x.softmax(-1)))
    torch.testing.assert_close(found, expected)


def test_integers_only():
    """Between its integer arguments and results nothing is in floating point."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoFloats(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                assert not (isinstance(t, torch.Tensor) and t.is_floating_point()), func
            return out

    q, e = torch.randint(-128, 128, (2, 3, 64), dtype=torch.int8), torch.zeros(2, 3, 1, dtype=torch.int8)
    gelu_layer, softmax_layer = TableGELU(), TableSoftmax()
    with NoFloats():
        gelu_layer.forward_int(q, e)
        softmax_layer.forward_int(q, e[..., 0])
