"""int_attention: the shared suite, the same bits as int64 NumPy and as a composition of four operators."""

import int_oracle
import pytest
import torch
from integer_suite import IntegerSuite, numpy_dtype

import effvit
from effvit.integer import multipliers
from effvit.testing.int_attention import SPEC


class TestIntAttention(IntegerSuite):
    spec = SPEC
    FUZZ_ROWS = 6_000

    def oracle(self, args, kwargs):
        options = self.spec.declared.complete(kwargs)
        dtype = numpy_dtype(options.pop("out_dtype"))
        return int_oracle.int_attention(*(None if a is None else a.numpy() for a in args), **options, dtype=dtype)


def _call(B=4, L=40, H=2, K=32):
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randint(-128, 128, (B, L, 3, H, K), generator=generator, dtype=torch.int32).to(torch.int8)
    return qkv.unbind(2)


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.int8), (16, torch.int16)])
def test_is_a_composition(bits, dtype):
    """int8_matmul, requantize, the bias, shiftmax, int8_matmul."""
    q, k, v = _call()
    scale, score_scale, out_scale = 2e-4, 0.06, 0.05
    bias = torch.randint(-40, 40, (2, 2, 40, 40), dtype=torch.int32)
    y = effvit.int_attention(
        q, k, v, bias, scale=scale, score_scale=score_scale, bits=bits, v_scale=0.03, out_scale=out_scale,
        out_dtype=torch.int8,
    )  # fmt: skip
    scores = effvit.int8_matmul(q.transpose(1, 2), k.transpose(1, 2), transpose_b=True)
    scores = effvit.requantize(scores, *multipliers(scale, score_scale, scores), bits=8, out_dtype=torch.int32)
    p = effvit.shiftmax(scores + bias.repeat(2, 1, 1, 1), score_scale, bits=bits, out_dtype=dtype)
    expected = effvit.int8_matmul(p, v.transpose(1, 2), scale=0.03 * 2.0 ** (1 - bits), out_scale=out_scale,
                                  out_dtype=torch.int8)  # fmt: skip
    assert torch.equal(y, expected.transpose(1, 2))


def test_is_attention_of_what_the_integers_stand_for():
    q, k, v = _call()
    scale, score_scale = 5e-5, 0.04
    floats = (t.double().transpose(1, 2) for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*floats, scale=scale).transpose(1, 2)
    y = effvit.int_attention(q, k, v, scale=scale, score_scale=score_scale, n=10, bits=16, score_bits=12)
    assert (y.double() / 2**15 - expected).abs().max() < 0.04 * 127


def test_integers_in_place_of_scales():
    q, k, v = _call()
    by_scales = effvit.int_attention(q, k, v, scale=0.25, score_scale=128.0 / 3, v_scale=2.0, out_scale=3.0)
    m, c = multipliers(0.25, 128.0 / 3, torch.zeros(1))
    m_out, c_out = multipliers(2.0**-6, 3.0, torch.zeros(1))
    options = {"score_multiplier": int(m), "score_shift": int(c), "multiplier": int(m_out), "shift": int(c_out)}
    assert torch.equal(effvit.int_attention(q, k, v, x0=-1, **options), by_scales)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("scale must be given, or score_multiplier in its place", {"score_scale": 0.1}),
        ("scale must be given, or score_multiplier in its place",
         {"scale": 0.1, "score_scale": 0.1, "score_multiplier": 3}),
        ("score_shift must be given together", {"score_multiplier": 3, "score_scale": 0.1}),
        ("score_scale must be given together with scale", {"scale": 0.1, "x0": -3}),
        ("score_scale must be given, or x0 in its place", {"score_multiplier": 3, "score_shift": 3}),
        ("score_scale must be such that", {"scale": 1e12, "score_scale": 0.1}),
        ("out_scale must be given together with v_scale", {"scale": 0.1, "score_scale": 0.1, "v_scale": 0.1}),
        ("multiplier must be 0 where v_scale is given",
         {"scale": 0.1, "score_scale": 0.1, "v_scale": 0.1, "out_scale": 1.0, "multiplier": 5}),
    ],
)  # fmt: skip
def test_scales(match, options):
    q, k, v = _call()
    with pytest.raises(ValueError, match=f"effvit::int_attention: {match}"):
        effvit.int_attention(q, k, v, **options)


def test_compiled_with_a_bias():
    """One program a batch size: W divides B."""
    q, k, v = _call()
    bias = torch.randint(-40, 40, (2, 2, 40, 40), dtype=torch.int32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(q, k, v, bias):
        return effvit.int_attention(q, k, v, bias, scale=2e-4, score_scale=0.06)

    for b in (4, 2):
        expected = effvit.int_attention(q[:b], k[:b], v[:b], bias, scale=2e-4, score_scale=0.06)
        assert torch.equal(compiled(q[:b], k[:b], v[:b], bias), expected)


@pytest.mark.parametrize("options, match", [
    ({"scale": 0.1, "score_scale": 0.1, "score_shift": 5}, "score_shift must be None where scale is given, got 5"),
    ({"score_multiplier": 2**30, "score_shift": 40, "x0": -3, "score_scale": 0.1},
     "score_scale must be None where score_multiplier and x0 are given, got 0.1"),
])  # fmt: skip
def test_nothing_given_is_ignored(options, match):
    with pytest.raises(ValueError, match=f"effvit::int_attention: {match}"):
        effvit.int_attention(*_call(), **options)
