"""effvit.quantizers: codes and values against the papers' formulas in NumPy, and what the papers claim of them."""

import math

import numpy as np
import pytest
import torch

import effvit
from effvit import quantizers
from effvit.testing import assert_bitwise_equal

# ---- the formulas, written from the papers, in long double: nothing here comes from effvit -----------------------


def _zero_level(bits, zero):
    return 2**bits if zero == "extra" and bits < 8 else 2**bits - 1


def _log_codes(u, factor, level):
    """rne(-factor log2 u): what is not positive, and what is beyond the last level, is the level of zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.rint(-factor * np.log2(u))
    return np.where((u <= 0) | (q >= level), level, np.maximum(q, 0)).astype(int)


def log2(x, bits, scale=1.0, offset=0.0, zero="extra"):
    level = _zero_level(bits, zero)
    q = _log_codes((x + offset) / scale, 1, level)
    return q, np.where(q == level, 0, scale * 2.0**-q) - offset


def log_sqrt2(x, bits, scale=1.0, offset=0.0, zero="extra"):
    level = _zero_level(bits, zero)
    q = _log_codes((x + offset) / scale, 2, level)
    return q, np.where(q == level, 0, scale * 2.0 ** -np.ceil(q / 2) * np.where(q % 2 == 1, 2**0.5, 1)) - offset


def adalog(x, bits, scale=1.0, q=37, offset=0.0, zero="extra"):
    level, r, most = _zero_level(bits, zero), 37, 2 ** (bits + 1) - 2
    i = _log_codes((x + offset) / scale, np.longdouble(r) / q, level)
    fraction = np.rint(2.0 ** (-((i * q) % r) / r) * most) / most
    return i, np.where(i == level, 0, scale * 2.0 ** -((i * q) // r) * fraction) - offset


def shift_uniform_log2(x, bits, shift=0.01, low=0.0, high=1.0, round_exponent=True):
    eta, n = np.longdouble(shift), 2**bits - 1
    a, b = np.log2(low + eta), np.log2(high + eta)
    d = (b - a) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log2(x + eta)
    q = np.where(x + eta <= 0, 0, np.clip(np.rint((y - a) / d), 0, n)).astype(int)
    e = q * d + a
    return q, 2.0 ** (np.rint(e) if round_exponent else e) - eta


def tan(x, bits, scale=1.0, alpha=1.2):
    n = 2**bits - 1
    u = np.clip(x / np.longdouble(scale), 0, 1)
    q = np.rint(n * (1 + np.tan(alpha * (2 * u - 1)) / np.tan(np.longdouble(alpha))) / 2)
    q = np.clip(q, 0, n).astype(int)
    return q, scale * (1 + np.arctan((2 * q / np.longdouble(n) - 1) * math.tan(alpha)) / alpha) / 2


def uniform(x, bits, scale=1.0, zero_point=0):
    q = np.clip(np.rint(x / np.longdouble(scale)) + zero_point, 0, 2**bits - 1).astype(int)
    return q, scale * (q - zero_point)


FORMULAS = {f.__name__: f for f in (log2, log_sqrt2, adalog, shift_uniform_log2, tan, uniform)}
CASES = [
    *((scheme, {}) for scheme in FORMULAS),
    *((scheme, {"scale": 0.737, "offset": 0.17, "zero": "last"}) for scheme in ("log2", "log_sqrt2", "adalog")),
    *((scheme, {"scale": 3.1e-3}) for scheme in ("log2", "log_sqrt2", "tan", "uniform")),
    *(("adalog", {"scale": s, "q": q}) for s, q in ((1.0, 1), (0.9, 13), (2.5, 20), (1.0, 74), (0.3, 148))),
    ("shift_uniform_log2", {"shift": 0.3, "low": -0.17, "high": 2.5}),
    ("shift_uniform_log2", {"shift": 1e-3, "round_exponent": False}),
    ("tan", {"alpha": 1.55}),
    ("tan", {"alpha": 0.01, "scale": 2.0}),
    ("uniform", {"scale": 0.0625, "zero_point": 3}),  # with ties
]
IDS = [f"{scheme}-{i}" for i, (scheme, _) in enumerate(CASES)]


def made(scheme, bits, options):
    return getattr(quantizers, scheme)(bits, **options)


def numbers(quantizer):
    """Softmax-like ones and others, and around every threshold: itself, both neighbours."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.softmax(3 * torch.randn(40, 50, generator=generator), -1).flatten()]
    x += [torch.randn(2000, generator=generator), 10.0 ** (-8 * torch.rand(2000, generator=generator))]
    t = quantizer.tables()[0]
    x += [t, torch.nextafter(t, torch.tensor(torch.inf)), torch.nextafter(t, torch.tensor(-torch.inf))]
    x += [torch.tensor([0.0, 1.0, 0.5, 0.25, 0.125, 1e-30, 3e-3, 100.0, 2.0**-100, -1.0])]
    return torch.cat(x)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("scheme, options", CASES, ids=IDS)
def test_codes_and_values_are_the_formulas(scheme, options, bits):
    """Every code, also beside the thresholds: long double decides these, 1e-18 of the number, the float32s lie 1e-8."""
    if options.get("zero_point", 0) >= 2**bits:
        options = options | {"zero_point": 1}
    quantizer = made(scheme, bits, options)
    x = numbers(quantizer)
    codes, values = FORMULAS[scheme](x.numpy().astype(np.longdouble), bits, **options)
    found = quantizer.quantize(x)
    wrong = found.numpy().astype(int) != codes
    if scheme == "tan":  # whose thresholds are found in float64: 1e-15 of the scale
        edge = np.abs(_distance_to_tie(x, bits, **options)) < 1e-9
        wrong &= ~edge
    assert not wrong.any(), (x[wrong][:5], found[wrong][:5], codes[wrong][:5])
    same = found.numpy().astype(int) == codes
    for result in (quantizer.dequantize(found), quantizer(x)):
        assert np.allclose(result.numpy()[same], values[same].astype(float), rtol=2e-7, atol=1e-9)
    assert_bitwise_equal(quantizer.dequantize(found), quantizer(x))
    assert int(found.max()) < quantizer.levels <= 256


def _distance_to_tie(x, bits, scale=1.0, alpha=1.2):
    n = 2**bits - 1
    u = np.clip(x.numpy().astype(np.longdouble) / np.longdouble(scale), 0, 1)
    y = n * (1 + np.tan(alpha * (2 * u - 1)) / np.tan(np.longdouble(alpha))) / 2
    return y - np.floor(y) - 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", sorted(FORMULAS))
def test_half_precision_has_the_codes_of_its_numbers(scheme, dtype):
    quantizer = made(scheme, 4, {})
    x = numbers(quantizer).to(dtype)
    assert_bitwise_equal(quantizer.quantize(x), quantizer.quantize(x.float()))
    assert_bitwise_equal(quantizer(x), quantizer(x.float()).to(dtype))
    assert quantizer.dequantize(quantizer.quantize(x), out_dtype=dtype).dtype == dtype


@pytest.mark.parametrize("scheme, options", CASES, ids=IDS)
def test_fast_tables_of_the_search_are_the_exact_ones(scheme, options):
    from effvit._ptq_search import table

    if not options.get("round_exponent", True):
        pytest.skip("a variant that the search does not offer")
    exact = made(scheme, 4, options)
    given = dict(exact.options)
    if "q" in given:
        given["q"] = int(given["q"])
    thresholds, values = table(scheme, 4, given, options.get("zero", "extra"))
    assert np.allclose(thresholds, exact.thresholds, rtol=1e-6, atol=1e-7)
    assert np.allclose(values, exact.values, rtol=1e-12, atol=1e-12)


def softmax_rows(tokens=197, peak=3.0):
    generator = torch.Generator().manual_seed(1)
    return torch.softmax(peak * torch.randn(200, tokens, generator=generator), -1)


def error(quantizer, x):
    return float((quantizer(x) - x).norm() / x.norm())


def best(scheme, bits, x, **grid):
    return min(error(made(scheme, bits, {k: v}), x) for k, values in grid.items() for v in values)


def test_logarithms_keep_softmax_better_than_steps_do():
    """The papers' case: at 4 bits most probabilities are below half a uniform step."""
    x = softmax_rows(peak=1.5)
    top = float(x.max())
    by_steps = best("uniform", 4, x, scale=[top / 15])
    for scheme in ("log2", "log_sqrt2", "adalog"):
        assert best(scheme, 4, x, scale=[top, 0.9 * top, 0.7 * top]) < by_steps, scheme
    assert best("log_sqrt2", 4, x, scale=[top]) < best("log2", 4, x, scale=[top])


def test_adalog_between_the_bases_is_at_least_as_good_as_both():
    """The base 2^(q / 37) can be 2, and all but sqrt 2: 18 and 19 are beside it."""
    x = softmax_rows()
    top = float(x.max())
    found = min(error(quantizers.adalog(4, top, q), x) for q in range(6, 75))
    assert found <= error(quantizers.log2(4, top), x) and found < 1.02 * error(quantizers.log_sqrt2(4, top), x)


def test_shift_gives_codes_to_what_log2_loses():
    """I&S-ViT: few bits of log2 leave nothing for small numbers, with a shift the domain is covered."""
    x = softmax_rows(peak=4.0)
    small = x < 2.0**-8
    log2_, shifted = quantizers.log2(3), quantizers.shift_uniform_log2(3, 0.005, 0.0, float(x.max()))
    assert len(log2_.quantize(x[small]).unique()) == 1 and len(shifted.quantize(x[small]).unique()) > 1
    assert len(shifted.quantize(x).unique()) == 8


def test_tan_is_fine_at_both_ends():
    values = np.diff(quantizers.tan(6, 1.0, 1.4).values)
    assert values[0] < 0.3 * values[32] and values[-1] < 0.3 * values[32]
    flat = np.diff(quantizers.tan(6, 1.0, 1e-3).values)
    assert np.allclose(flat, 1 / 63, rtol=1e-4)
    x = softmax_rows(peak=6.0)
    large = x > 0.7
    assert error(quantizers.tan(4, 1.0, 1.4), x[large]) < error(quantizers.log_sqrt2(4), x[large])


def test_zero_counts_as_asked():
    assert quantizers.log2(4).levels == 17 and quantizers.log2(4, zero="last").levels == 16
    assert quantizers.log2(8).levels == 256
    zero = torch.zeros(3)
    assert quantizers.log2(4).quantize(zero).tolist() == [16] * 3
    assert quantizers.log2(4, zero="last").quantize(zero).tolist() == [15] * 3
    assert quantizers.log2(4)(zero).eq(0).all()


def test_gradients_go_straight_through():
    quantizer = quantizers.log_sqrt2(4, 0.8)
    x = torch.tensor([0.7, 0.01, 0.9, -0.1, 0.0, 0.8], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert x.grad.tolist() == [1.0, 2.0, 0.0, 0.0, 5.0, 6.0]
    thresholds, values = quantizer.tables()
    values.requires_grad_()
    x = torch.rand(500)
    g = torch.randn(500)
    effvit.fake_quantize_lut(x, thresholds, values).backward(g)
    codes = effvit.quantize_lut(x, thresholds).long()
    torch.testing.assert_close(values.grad, torch.zeros_like(values).index_add(0, codes, g))
    values.grad = None
    effvit.dequantize_lut(codes.to(torch.uint8), values).backward(g)
    torch.testing.assert_close(values.grad, torch.zeros_like(values).index_add(0, codes, g))


def test_codes_without_a_value_are_nan():
    q = torch.tensor([0, 2, 3, 255], dtype=torch.uint8)
    assert effvit.dequantize_lut(q, torch.tensor([1.0, 2.0, 3.0])).isnan().tolist() == [False, False, True, True]


def test_nan_stays_and_counts_as_small():
    x = torch.full((40,), torch.nan)
    thresholds, values = quantizers.log2(4).tables()
    assert effvit.fake_quantize_lut(x, thresholds, values).isnan().all()
    assert effvit.quantize_lut(x, thresholds).eq(0).all()


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: quantizers.log2(1), "bits must be between 2 and 8, got 1"),
        (lambda: quantizers.log2(4, 0.0), "scale must be positive, got 0.0"),
        (lambda: quantizers.log2(4, math.nan), "scale must be finite, got nan"),
        (lambda: quantizers.log_sqrt2(4, zero="none"), "zero must be one of extra, last, got 'none'"),
        (lambda: quantizers.adalog(4, 1.0, 0), "q must be between 1 and 148, got 0"),
        (lambda: quantizers.shift_uniform_log2(4, 0.1, -0.2), "low must be above -shift, got -0.2"),
        (lambda: quantizers.shift_uniform_log2(4, 0.1, 0.5, 0.5), "high must be above low, got 0.5"),
        (lambda: quantizers.tan(4, 1.0, 1.6), "alpha must be at most 1.57, got 1.6"),
        (lambda: quantizers.uniform(4, 1.0, 16), "zero_point must be between 0 and 15, got 16"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
