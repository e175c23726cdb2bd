"""quantize_int8: the shared suite, the same bits on every backend, and what the public function adds."""

import pytest
import torch

import effvit
from effvit.testing import assert_bitwise_equal, backends
from effvit.testing.quantize_int8 import SPEC
from op_suite import ForwardSuite


class TestQuantizeInt8(ForwardSuite):
    spec = SPEC

    @pytest.mark.parametrize("name", ["reference", *(b.name for b in backends("quantize_int8")[1:])])
    def test_every_backend_gives_the_same_bits(self, name):
        backend = next(b for b in backends("quantize_int8") if b.name == name)
        for sample in self.spec.samples:
            if backend.slow and "small" not in sample.tags:
                continue
            args, kwargs = sample.build(sample.dtypes[0])
            expected = self.spec.declared.reference(*args, **kwargs)
            given = (None if a is None else a.to(backend.device) for a in args)
            for result, e in zip(backend.forward(*given, **kwargs), expected, strict=True):
                assert_bitwise_equal(result.cpu(), e, name=sample.name)


def test_is_the_formula_of_the_papers():
    x = torch.randn(5, 33)
    q, scale = effvit.quantize_int8(x)
    assert torch.equal(scale, x.abs().amax(1) / 127)
    assert torch.equal(q, (x / scale[:, None]).round().to(torch.int8))


def test_ties():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0.49999997, -0.49999997, 200.0]])
    one = torch.ones(1)
    even, away = (effvit.quantize_int8(x, one, round=r)[0][0].tolist() for r in ("even", "away"))
    assert even == [0, 2, 2, 0, -2, -2, 126, 0, 0, 127]
    assert away == [1, 2, 3, -1, -2, -3, 127, 0, 0, 127]


def test_what_is_not_finite_stays_visible():
    x = torch.ones(3, 8)
    x[0, 3], x[1, 2] = float("nan"), float("-inf")
    q, scale = effvit.quantize_int8(x)
    assert torch.isnan(scale[0]) and torch.isinf(scale[1]) and scale[2] == torch.tensor(1.0) / 127
    assert not torch.isfinite((q * scale[:, None])[0]).any() and not torch.isfinite((q * scale[:, None])[1]).any()


def test_granularity():
    x = torch.randn(2, 3, 24)
    q, scale = effvit.quantize_int8(x, granularity="block", block=8)
    blocks = effvit.quantize_int8(x.reshape(2, 3, 3, 8))
    assert scale.shape == (2, 3, 3) and torch.equal(q.view(2, 3, 3, 8), blocks[0]) and torch.equal(scale, blocks[1])
    q, scale = effvit.quantize_int8(x, granularity="tensor")
    assert scale.shape == (1,) and scale == x.abs().max() / 127
    assert torch.equal(q, (x / scale).round().to(torch.int8))
    with pytest.raises(ValueError, match="effvit::quantize_int8: block must be a positive divisor of K = 24, got 7"):
        effvit.quantize_int8(x, granularity="block", block=7)
    with pytest.raises(ValueError, match="granularity must be one of token, tensor, block, got 'row'"):
        effvit.quantize_int8(x, granularity="row")


def test_outliers():
    """Columns with an outlier are left out of scales and values: LLM.int8()."""
    x = torch.randn(6, 16).clamp(-3, 3)
    x[2, 5], x[4, 11] = 8.0, -7.0
    q, scale, idx = effvit.quantize_int8(x, outlier_threshold=6.0)
    assert idx.tolist() == [5, 11]
    kept = x.clone()
    kept[:, idx] = 0
    assert torch.equal(scale, kept.abs().amax(1) / 127)
    assert torch.equal(q, (kept / scale[:, None]).round().to(torch.int8))
    with pytest.raises(ValueError, match="outlier_threshold must be at least 0, got -1.0"):
        effvit.quantize_int8(x, outlier_threshold=-1.0)


@pytest.mark.parametrize("given", [False, True])
def test_nan_and_infinity_give_the_same_bits_everywhere(given):
    x = torch.randn(3, 40)
    x[0, 3], x[1, 2], x[1, 39] = float("nan"), float("-inf"), float("inf")
    scale = torch.full((3,), 0.5) if given else None
    expected = SPEC.declared.reference(x, scale, None, round=0)
    assert expected[0][0, 3] == 0
    for b in backends("quantize_int8")[1:]:
        given_scale = None if scale is None else scale.to(b.device)
        for result, e in zip(b.forward(x.to(b.device), given_scale, None, round=0), expected, strict=True):
            assert torch.equal(result.cpu().nan_to_num(nan=7.0), e.nan_to_num(nan=7.0)), b.name
