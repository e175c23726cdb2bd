"""The non-uniform quantisers of vision transformers, as tables: exact thresholds of their codes, and what these mean.

Each is a :class:`Quantizer`. Its thresholds are the smallest float32 numbers of every code, found from the formulas in
exact or 50-digit arithmetic (the tangent's in float64): :func:`effvit.ops.quantize_lut` then gives the code of the
formula in real numbers, ties to even, for every float32, bfloat16 or float16 input and on every device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import torch

from . import ops
from .ops import _checks

ADALOG_R = 37  # of AdaLog: bases are 2^(q / r)
_DIGITS = 50
_NAME = "quantizers"


# ---- thresholds ------------------------------------------------------------------------------------------------------


def _float32_at_least(bound: Fraction | Decimal, strictly: bool) -> float:
    """The smallest float32 that is at least a number, or above it."""
    with np.errstate(over="ignore"):
        x = np.float32(float(bound))  # close to it: two roundings
    exact = Fraction if isinstance(bound, Fraction) else Decimal
    below, up = np.float32(-math.inf), np.float32(math.inf)

    def reaches(t):
        if not np.isfinite(t):
            return t > 0
        t = exact(float(t))
        return t > bound if strictly else t >= bound

    while reaches(x) and x > below:
        x = np.nextafter(x, below)
    while not reaches(x):
        x = np.nextafter(x, up)
    return float(x)


def _powers_of_two(exponents: list[Fraction], step: Fraction) -> list[Fraction | Decimal]:
    """2^e of exponents that fall by step each: exact where e is a whole number, else to 50 digits less the last two."""
    found = []
    with localcontext() as context:
        context.prec = _DIGITS
        ratio = Decimal(2) ** (-Decimal(step.numerator) / Decimal(step.denominator))
        power = Decimal(2) ** (Decimal(exponents[0].numerator) / Decimal(exponents[0].denominator))
        for e in exponents:
            found.append(Fraction(2) ** e.numerator if e.denominator == 1 else power)
            power *= ratio
    return found


def _times(a: Fraction | Decimal, b: Fraction) -> Fraction | Decimal:
    if isinstance(a, Fraction):
        return a * b
    with localcontext() as context:
        context.prec = _DIGITS
        return a * (Decimal(b.numerator) / Decimal(b.denominator))


def _minus(a: Fraction | Decimal, b: Fraction) -> Fraction | Decimal:
    if isinstance(a, Fraction):
        return a - b
    with localcontext() as context:
        context.prec = _DIGITS
        return a - Decimal(b.numerator) / Decimal(b.denominator)


# ---- a quantiser -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A quantiser as a table: what :func:`log2` and its kin return.

    thresholds, values: the smallest float32 of every code but the lowest, and what all are worth, in ascending order
    of x. descending: codes fall where x rises, so that code 0 is the largest value. levels: how many codes there are.
    """

    scheme: str
    bits: int
    options: tuple[tuple[str, float], ...]
    thresholds: tuple[float, ...]
    values: tuple[float, ...]
    descending: bool = False

    @property
    def levels(self) -> int:
        return len(self.values)

    def tables(self, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(thresholds [T], values [T + 1] in ascending order): float32."""
        return tuple(torch.tensor(t, dtype=torch.float32, device=device) for t in (self.thresholds, self.values))

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Codes: x [..., C] float -> uint8."""
        return ops.quantize_lut(x, self.tables(x.device)[0], descending=self.descending)

    def dequantize(self, q: torch.Tensor, *, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What codes are worth: q [..., C] uint8 -> out_dtype."""
        values = self.tables(q.device)[1]
        return ops.dequantize_lut(q, values.flip(0) if self.descending else values, out_dtype=out_dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """dequantize(quantize(x)) in one pass and in the dtype of x, with a straight-through gradient."""
        return ops.fake_quantize_lut(x, *self.tables(x.device))

    def __str__(self):
        return f"{self.scheme} {self.bits} bits" + "".join(f", {n} {x:.4g}" for n, x in self.options)


def _bits(bits: object, least: int = 2) -> int:
    return _checks.as_int(_NAME, "bits", bits, (least, 8))


def _positive(name: str, x: object) -> Fraction:
    return Fraction(_checks.as_positive(_NAME, name, x))


def _number(name: str, x: object) -> Fraction:
    return Fraction(_checks.as_finite(_NAME, name, x))


def _made(scheme, bits, options, bounds, values, descending=False):
    """Of bounds from low to high: (number, whether it belongs to the code below)."""
    thresholds = tuple(_float32_at_least(bound, below) for bound, below in bounds)
    given = tuple((name, float(x)) for name, x in options.items())
    return Quantizer(scheme, bits, given, thresholds, tuple(float(v) for v in values), descending)


def _logarithmic(scheme, bits, scale, step: Fraction, offset, options, levels, value):
    """q = rne(-log2((x + offset) / scale) / step): codes 0 to levels - 1 are logarithms, code `levels` is zero.

    The bound between the codes k and k + 1 is scale 2^(-(k + 1/2) step) - offset. It goes to the even one of the two;
    x above it have the smaller code.
    """
    powers = _powers_of_two([-step * (2 * k + 1) / 2 for k in range(levels)], step)
    bounds = [(_minus(_times(powers[k], scale), offset), k % 2 == 1) for k in range(levels - 1, -1, -1)]
    values = [float(-offset), *(float(scale) * value(k) - float(offset) for k in range(levels - 1, -1, -1))]
    return _made(scheme, bits, options, bounds, values, descending=True)


def _log_levels(bits: int, zero: str) -> int:
    """How many codes are logarithms. zero "extra": the 2^bits + 1st code is zero, as in the papers' code, which keep it
    as a mask beside the codes; of 8 bits it is the 256th. "last": the last of 2^bits."""
    _checks.index_of(_NAME, "zero", zero, ("extra", "last"))
    return 2**bits if zero == "extra" and bits < 8 else 2**bits - 1


@functools.lru_cache(maxsize=512)
def log2(bits: int = 4, scale: float = 1.0, *, offset: float = 0.0, zero: str = "extra") -> Quantizer:
    """``q = rne(-log2(x / scale))``, 0 for q >= 2^bits: FQ-ViT's log-int-softmax (arXiv:2111.13824), PTQ4ViT.

    Args:
        bits: 2 to 8. scale: what code 0 is worth.
        offset: added to x first and taken off what codes are worth: for activations with a negative tail, such as
            GELU's (AdaLog's bias re-parameterisation).
        zero: "extra": 2^bits logarithms and a code of its own, 2^bits, for zero, as the papers count (8 bits: code
            255); "last": code 2^bits - 1 is zero.
    """
    bits, s, o = _bits(bits), _positive("scale", scale), _number("offset", offset)
    levels = _log_levels(bits, zero)
    return _logarithmic("log2", bits, s, Fraction(1), o, {"scale": s} | ({"offset": o} if o else {}), levels,
                        lambda k: 2.0**-k)  # fmt: skip


@functools.lru_cache(maxsize=512)
def log_sqrt2(bits: int = 4, scale: float = 1.0, *, offset: float = 0.0, zero: str = "extra") -> Quantizer:
    """``q = rne(-2 log2(x / scale))``, worth ``scale 2^-ceil(q / 2)``, times sqrt 2 where q is odd: RepQ-ViT's
    quantiser after softmax (arXiv:2212.08254), whose scale takes the sqrt 2 in. Arguments as of :func:`log2`.
    """
    bits, s, o = _bits(bits), _positive("scale", scale), _number("offset", offset)
    levels = _log_levels(bits, zero)
    return _logarithmic("log_sqrt2", bits, s, Fraction(1, 2), o, {"scale": s} | ({"offset": o} if o else {}), levels,
                        lambda k: 2.0 ** -((k + 1) // 2) * (math.sqrt(2.0) if k % 2 else 1.0))  # fmt: skip


def adalog_table(bits: int, q: int) -> list[float]:
    """AdaLog's fractions, T[i] = round(2^(-(i q mod r) / r) L) / L with L = 2^(bits + 1) - 2, for i < 2^bits."""
    most = 2 ** (bits + 1) - 2
    return [round(2.0 ** (-(i * q % ADALOG_R) / ADALOG_R) * most) / most for i in range(2**bits)]


@functools.lru_cache(maxsize=512)
def adalog(bits: int = 4, scale: float = 1.0, q: int = 37, *, offset: float = 0.0, zero: str = "extra") -> Quantizer:
    """A logarithm to the base 2^(q / 37): ``i = rne(-log2(x / scale) 37 / q)``, worth ``scale 2^-floor(i q / 37) T[i]``
    with the fractions of :func:`adalog_table`, integers over 2^(bits + 1) - 2: AdaLog (arXiv:2407.12951).

    Args:
        q: 1 to 148; 37 is log2 itself, and less is finer. Else as of :func:`log2`.
    """
    bits, s, o = _bits(bits), _positive("scale", scale), _number("offset", offset)
    q = _checks.as_int(_NAME, "q", q, (1, 4 * ADALOG_R))
    table, levels = adalog_table(bits, q), _log_levels(bits, zero)
    options = {"scale": s, "q": q} | ({"offset": o} if o else {})
    return _logarithmic("adalog", bits, s, Fraction(q, ADALOG_R), o, options, levels,
                        lambda k: 2.0 ** -(k * q // ADALOG_R) * table[k])  # fmt: skip


@functools.lru_cache(maxsize=512)
def shift_uniform_log2(
    bits: int = 4, shift: float = 0.01, low: float = 0.0, high: float = 1.0, *, round_exponent: bool = True
) -> Quantizer:
    """A uniform quantiser of ``log2(x + shift)`` between its values at low and high: I&S-ViT (arXiv:2311.10126).

    ``q = clamp(rne((log2(x + shift) - a) / d), 0, 2^bits - 1)``, a = log2(low + shift), d = (log2(high + shift) - a) /
    (2^bits - 1), worth ``2^rne(q d + a) - shift``: a bit shift. Codes rise with x.

    Args:
        shift: the paper's eta, positive; it decides how much of the codes goes to numbers near low.
        low, high: the range of x, with low + shift positive.
        round_exponent: False: codes are worth ``2^(q d + a) - shift``, which is finer and no bit shift.
    """
    bits, eta = _bits(bits), _positive("shift", shift)
    lo, hi = _number("low", low), _number("high", high)
    _checks.as_bool(_NAME, "round_exponent", round_exponent)
    if lo + eta <= 0:
        raise _checks.value_error(_NAME, "low", "above -shift", low)
    if hi <= lo:
        raise _checks.value_error(_NAME, "high", "above low", high)
    n = 2**bits - 1
    with localcontext() as context:
        context.prec = _DIGITS

        def decimal(x):
            return Decimal(x.numerator) / Decimal(x.denominator)

        ln2 = Decimal(2).ln()
        a = decimal(lo + eta).ln() / ln2
        d = (decimal(hi + eta).ln() / ln2 - a) / n
        bounds = [(Decimal(2) ** (a + (k + Decimal("0.5")) * d) - decimal(eta), k % 2 == 0) for k in range(n)]
        exponents = [a + k * d for k in range(n + 1)]
        if round_exponent:
            exponents = [e.to_integral_value(rounding="ROUND_HALF_EVEN") for e in exponents]
        values = [Decimal(2) ** e - decimal(eta) for e in exponents]
    options = {"shift": eta, "low": lo, "high": hi, "round_exponent": round_exponent}
    return _made("shift_uniform_log2", bits, options, bounds, values)


@functools.lru_cache(maxsize=512)
def tan(bits: int = 4, scale: float = 1.0, alpha: float = 1.2) -> Quantizer:
    """A uniform quantiser of a tangent, after DopQ-ViT's TanQ (arXiv:2408.03291): fine near 0 and near scale.

    ``q = clamp(rne(n (1 + tan(alpha (2 x / scale - 1)) / tan(alpha)) / 2), 0, n)`` with n = 2^bits - 1, worth ``scale
    (1 + atan((2 q / n - 1) tan(alpha)) / alpha) / 2``. A tangent is steep at both ends: what most of softmax's outputs
    are, and what the largest few are, gets more codes than what lies between. The paper's idea; this parameterisation,
    in which alpha towards 0 is the uniform quantiser, is this project's.

    Args:
        scale: the largest x, from 0.
        alpha: above 0, at most 1.57.
    """
    bits, s = _bits(bits), _positive("scale", scale)
    alpha = float(_positive("alpha", alpha))
    if alpha > 1.57:
        raise _checks.value_error(_NAME, "alpha", "at most 1.57", alpha)
    n, steep = 2**bits - 1, math.tan(alpha)

    def inverse(y: Fraction) -> Fraction:
        """Of y in [0, 1]; in float64 but for the middle, which is exact and a tie."""
        return s * (1 + Fraction(math.atan(float(2 * y - 1) * steep) / alpha)) / 2

    bounds = [(inverse(Fraction(2 * k + 1, 2 * n)), k % 2 == 0) for k in range(n)]
    values = [float(inverse(Fraction(k, n))) for k in range(n + 1)]
    return _made("tan", bits, {"scale": s, "alpha": alpha}, bounds, values)


@functools.lru_cache(maxsize=512)
def uniform(bits: int = 8, scale: float = 1.0, zero_point: int = 0) -> Quantizer:
    """``q = clamp(rne(x / scale) + zero_point, 0, 2^bits - 1)``, worth ``scale (q - zero_point)``."""
    bits, s = _bits(bits), _positive("scale", scale)
    z = _checks.as_int(_NAME, "zero_point", zero_point, (0, 2**bits - 1))
    n = 2**bits - 1
    bounds = [(s * Fraction(2 * (k - z) + 1, 2), (k - z) % 2 == 0) for k in range(n)]
    return _made("uniform", bits, {"scale": s, "zero_point": z}, bounds, [float(s) * (k - z) for k in range(n + 1)])


SCHEMES = {f.__name__: f for f in (uniform, log2, log_sqrt2, adalog, shift_uniform_log2, tan)}
