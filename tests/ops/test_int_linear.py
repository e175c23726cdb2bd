"""int_linear: the shared suite, the same bits as int64 NumPy on every backend, and what the public function adds."""

import int_oracle
import pytest
import torch
import torch.nn.functional as F
from integer_suite import IntegerSuite, numpy_dtype

import effvit
from effvit.integer import linear_constants, multipliers
from effvit.testing import backends
from effvit.testing.int_linear import SPEC


class TestIntLinear(IntegerSuite):
    spec = SPEC

    def oracle(self, args, kwargs):
        options = self.spec.declared.complete(kwargs)
        dtype = numpy_dtype(options.pop("out_dtype"))
        given = self.spec.declared.given(args).values()
        return int_oracle.int_linear(*(None if a is None else a.numpy() for a in given), **options, dtype=dtype)


def _layer(m=7, n=20, k=36):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    return x, torch.randn(n, k, generator=generator) / k**0.5, torch.randn(n, generator=generator)


def test_is_a_linear_layer_of_what_the_integers_stand_for():
    x, weight, bias = _layer()
    constants = linear_constants(weight, bias, 0.02, 0.03)
    w_int, b_int, multiplier, shift = constants
    y = effvit.int_linear(x, w_int, multiplier, shift, b_int)
    assert y.dtype == torch.int8
    exact = F.linear(x.double() * 0.02, weight.double(), bias.double()) / 0.03
    # half a step of the result, and half a step of every weight and of the bias
    steps = weight.abs().amax(1).double() / 254 * 0.02 * (x.abs().double().sum(1, keepdim=True) + 1) / 0.03
    assert ((y - exact.clamp(-128, 127)).abs() <= 0.5 + 1e-6 + steps).all()
    assert y.double().std() > 10


def test_leading_dims_and_defaults():
    x, weight, bias = _layer()
    w, b, m, c = linear_constants(weight, bias, 0.02, 0.03)
    flat = effvit.int_linear(x, w, m, c, b)
    assert torch.equal(effvit.int_linear(x[:6].view(2, 3, 36), w, m, c, b), flat[:6].view(2, 3, 20))
    assert torch.equal(effvit.int_linear(x[0], w, m, c, b), flat[0])
    sums = effvit.int_linear(x, w, bias=b)
    assert sums.dtype == torch.int32 and torch.equal(sums.long(), x.long() @ w.long().mT + b.long())
    residual = torch.randint(-128, 128, (2, 3, 20), dtype=torch.int8)
    rescaling = multipliers(0.01, 0.03, residual)
    y = effvit.int_linear(x[:6].view(2, 3, 36), w, m, c, b, residual, *rescaling)
    expected = effvit.requantize(sums[:6], m, c, residual.view(6, 20).int(), *rescaling)
    assert torch.equal(y, expected.view(2, 3, 20))
    with pytest.raises(ValueError, match=r"effvit::int_linear: x must be \[..., K\], got \[\]"):
        effvit.int_linear(torch.zeros((), dtype=torch.int8), w)


def test_is_int8_linear_and_requantize():
    """Bit for bit the two operators in turn, on every backend that has all three."""
    x, weight, bias = _layer(13, 33, 50)
    w, _, m, c = linear_constants(weight, None, 0.02, 0.03)
    sums = effvit.int8_linear(x, w, torch.ones(1), torch.ones(1), out_dtype=torch.int32)
    expected = effvit.requantize(sums, m, c, bits=8)
    for backend in backends("int_linear"):
        given = (t.to(backend.device) for t in (x, w, m, c))
        assert torch.equal(backend.forward(*given, out_dtype=4).cpu(), expected), backend.name


def test_packed_weights_give_the_same():
    x, weight, bias = _layer(17, 50, 31)
    w, b, m, c = linear_constants(weight, bias, 0.02, 0.03)
    packed = effvit.int8_prepack(w)
    assert torch.equal(effvit.int_linear(x, packed, m, c, b), effvit.int_linear(x, w, m, c, b))
    assert torch.equal(effvit.int_linear(x, packed, m, c), effvit.int_linear(x, w, m, c))
    assert torch.equal(effvit.int_linear(x, packed, bias=b), effvit.int_linear(x, w, bias=b))


def test_linear_constants_are_i_vits():
    """S_w = max|w| / 127; round(w / S_w), round(b / (S_w S_x)), S_w S_x / S_out."""
    _, weight, bias = _layer()
    w, b, m, c = linear_constants(weight, bias, torch.tensor([0.02], dtype=torch.float64), 0.03)
    assert [t.dtype for t in (w, b, m, c)] == [torch.int8, torch.int32, torch.int32, torch.int32]
    scale = weight.double().abs().amax(1) / 127
    assert torch.equal(w.double(), (weight.double() / scale[:, None]).round())
    assert (w.abs().amax(1) == 127).all()
    assert torch.equal(b.double(), (bias.double() / (scale * 0.02)).round())
    torch.testing.assert_close(m.double() / 2.0 ** c.double(), scale * 0.02 / 0.03, rtol=2**-30, atol=0)
    per_channel = torch.linspace(0.01, 0.05, 20)
    _, _, m, c = linear_constants(weight.half(), None, 0.02, per_channel)
    scale = weight.half().double().abs().amax(1) / 127
    torch.testing.assert_close(m.double() / 2.0 ** c.double(), scale * 0.02 / per_channel.double(), rtol=2**-30, atol=0)


def test_linear_constants_of_channels_without_weights():
    """They still have their bias; one of nothing at all is 0. A bias beyond int32 takes a larger step."""
    x, weight, bias = _layer(4, 5, 36)
    weight[1] = 0.0
    weight[2], bias[2] = 0.0, 0.0
    weight[3] *= 1e-12
    weight[4] *= 1e-30
    bias[4] = 0.0
    w, b, m, c = linear_constants(weight, bias, 0.02, 0.01)
    assert (m >= 2**30).all() and (c >= 1).all() and (c <= 61).all()
    y = effvit.int_linear(x, w, m, c, b, bits=16, out_dtype=torch.int16)
    expected = (F.linear(x.double() * 0.02, weight.double(), bias.double()) / 0.01).round()
    assert torch.equal(y[:, 1:].double(), expected[:, 1:])
    assert (b[[1, 3]].abs() == 2**31 - 1).all()


def test_linear_constants_refuse():
    _, weight, bias = _layer()

    def refused(match, *args, error=ValueError):
        with pytest.raises(error, match="effvit::int_linear: " + match):
            linear_constants(*args)

    refused(r"weight must be \[N, K\], got \[36\]", weight[0], bias, 0.1, 0.1)
    refused(r"bias must be \[N\] = \[20\], got \[19\]", weight, bias[1:], 0.1, 0.1)
    refused("weight must be a float tensor, got torch.int8", weight.char(), bias, 0.1, 0.1, error=TypeError)
    refused("weight must be finite, got inf", weight / 0, bias, 0.1, 0.1)
    refused("x_scale must be positive, got 0.0", weight, bias, 0.0, 0.1)
    refused("out_scale must be positive and finite, got", weight, bias, 0.1, torch.zeros(20))
    refused(r"out_scale must be a number, \[1\] or \[N\] = \[20\], got \[2\]", weight, bias, 0.1, torch.ones(2))
    refused("out_scale must be above 2\\^-30 of a step of the sum", weight, bias, 1e9, 1e-9)
