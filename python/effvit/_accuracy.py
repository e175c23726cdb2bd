"""The one rule that says whether a floating-point result is right, and the assertion that applies it.

With t the float64 truth, x the result and y the yardstick (the same formula in plain PyTorch at the result's dtype)::

    max_i |x_i - t_i| / m_i  <=  2 * max_i |y_i - t_i| / m_i  +  2 * eps
        ||x - t||            <=  2 * ||y - t||               +  2 * eps * ||m||

Both must hold. m is the magnitude: per component, the sum of the absolute values of the terms that the formula adds up
(Higham's forward error bound), so a small component beside a large one is still checked at its own scale. eps belongs
to the coarsest floating dtype among result and inputs: intermediate products may be rounded to it once. A component
smaller than eps times the largest one is measured as if it were that large, and so is one whose last digits float32
can only hold as subnormal numbers, which kernels may take for zeros. Subnormal numbers of the result's dtype are
measured like its smallest normal one: they lie as far apart, so that the truth itself, rounded, is no closer.

A yardstick is one sample of a rounding error. Where PyTorch has several ways to compute the formula (eager and SDPA,
say), a list of them may be given: the largest error counts. A yardstick that is not finite earns no allowance. NaN
never passes. Where the truth overflows the result's dtype, the result must be the infinity of the same sign.
"""

from dataclasses import dataclass

import torch

YARDSTICK_FACTOR = 2.0
EPS_FACTOR = 2.0
UNDERFLOW = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps  # kernels accumulate in float32


@dataclass(frozen=True)
class ErrorReport:
    """Measured errors of one result and what the rule allows."""

    max_error: float  # relative to the magnitude
    max_allowed: float
    norm_error: float
    norm_allowed: float
    position: tuple
    expected: float
    actual: float
    problem: str = ""

    @property
    def ok(self):
        return not self.problem and self.max_error <= self.max_allowed and self.norm_error <= self.norm_allowed

    def __str__(self):
        where = f"at {list(self.position)}: expected {self.expected:.9g}, actual {self.actual:.9g}"
        if self.problem:
            return f"{self.problem}; {where}"
        return (
            f"max error {self.max_error:.3g} (allowed {self.max_allowed:.3g}), "
            f"norm of the error {self.norm_error:.3g} (allowed {self.norm_allowed:.3g}); worst {where}"
        )


def coarsest_eps(*tensors):
    """eps of the coarsest floating dtype among the tensors; non-tensors are ignored."""
    dtypes = [t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)


def default_magnitude(truth):
    """Row-wise largest absolute value: what to measure against when the formula's own magnitude is not known."""
    if truth.ndim == 0 or truth.numel() == 0:
        return truth.abs()
    return truth.abs().amax(dim=-1, keepdim=True).expand_as(truth)


def _position(flat_index, shape):
    position = []
    for size in reversed(shape):
        position.append(int(flat_index % size))
        flat_index //= size
    return tuple(reversed(position))


def measure(result, truth64, yardstick=None, *, magnitude=None, eps=None, allowance=1.0):
    """Applies the rule of this module and returns an ErrorReport; ValueError when the question makes no sense.

    ``allowance`` multiplies what the rule allows: see :mod:`random_calls` in tests, its only user.
    """
    if truth64.dtype != torch.float64:
        raise ValueError(f"truth64 must be float64, got {truth64.dtype}")
    if not torch.isfinite(truth64).all():
        raise ValueError("truth64 must be finite, got NaN or infinity: the case proves nothing")
    if tuple(result.shape) != tuple(truth64.shape):
        raise AssertionError(f"shape must be {list(truth64.shape)}, got {list(result.shape)}")
    yardsticks = [] if yardstick is None else [yardstick] if isinstance(yardstick, torch.Tensor) else list(yardstick)
    for y in yardsticks:
        if tuple(y.shape) != tuple(truth64.shape):
            raise ValueError(f"yardstick must be {list(truth64.shape)}, got {list(y.shape)}")
    if not result.is_floating_point():
        raise AssertionError(f"dtype must be floating point, got {result.dtype}")
    eps = torch.finfo(result.dtype).eps if eps is None else eps
    truth = truth64.detach().cpu()
    m = default_magnitude(truth) if magnitude is None else magnitude.detach().cpu().double()
    if tuple(m.shape) != tuple(truth.shape) or not torch.isfinite(m).all() or (m < 0).any():
        raise ValueError("magnitude must be finite, non-negative and of the truth's shape")
    if truth.numel() == 0:
        return ErrorReport(0.0, 0.0, 0.0, 0.0, (), 0.0, 0.0)
    m = torch.maximum(m, truth.abs())
    if float(m.max()) > 0:
        m = m.clamp(min=max(eps * float(m.max()), UNDERFLOW, torch.finfo(result.dtype).tiny))
    x = result.detach().cpu()

    def report(flags, problem):
        i = int(flags.flatten().to(torch.uint8).argmax())
        actual = float(x.flatten()[i])
        return ErrorReport(0.0, 0.0, 0.0, 0.0, _position(i, truth.shape), float(truth.flatten()[i]), actual, problem)

    overflow = truth.abs() > torch.finfo(x.dtype).max
    wrong = overflow & (x.double() != torch.sign(truth) * torch.inf)
    if wrong.any():
        return report(wrong, f"{int(wrong.sum())} values must be infinite: the truth overflows {x.dtype}")
    wrong = ~torch.isfinite(x) & ~overflow
    if wrong.any():
        return report(wrong, f"{int(wrong.sum())} of {x.numel()} values are not finite")

    def error_of(z):
        return torch.where(overflow, 0.0, (z.double() - truth).abs())

    def ratio_of(e):  # m is zero only if every magnitude is: then nothing but an exact zero is right
        return torch.where(m > 0, e / m.clamp(min=torch.finfo(torch.float64).tiny), e * torch.inf).nan_to_num(nan=0.0)

    error = error_of(x)
    ratio = ratio_of(error)
    max_allowed = EPS_FACTOR * eps
    norm_allowed = EPS_FACTOR * eps * float(torch.where(overflow, 0.0, m).norm())
    errors = [error_of(y.detach().cpu()) for y in yardsticks if torch.isfinite(y).all()]
    if errors:
        max_allowed += YARDSTICK_FACTOR * max(float(ratio_of(e).max()) for e in errors)
        norm_allowed += YARDSTICK_FACTOR * max(float(e.norm()) for e in errors)
    i = int(ratio.flatten().argmax())
    return ErrorReport(
        float(ratio.flatten()[i]), allowance * max_allowed, float(error.norm()), allowance * norm_allowed,
        _position(i, truth.shape), float(truth.flatten()[i]), float(x.flatten()[i]),
    )  # fmt: skip


def assert_close_to_truth(
    result, truth64, yardstick=None, *, magnitude=None, eps=None, name="result", allowance=1.0
):  # fmt: skip
    """Fails unless `result` is as close to `truth64` as the rule of this module demands. It has no tolerance.

    yardstick: a tensor, several, or a function that returns them: asked only where the rule without one refuses.
    """
    if not isinstance(result, torch.Tensor):
        raise AssertionError(f"{name} must be a tensor, got {type(result).__name__}")
    try:
        given = None if callable(yardstick) else yardstick
        report = measure(result, truth64, given, magnitude=magnitude, eps=eps, allowance=allowance)
        if not report.ok and callable(yardstick):
            report = measure(result, truth64, yardstick(), magnitude=magnitude, eps=eps, allowance=allowance)
    except AssertionError as e:
        raise AssertionError(f"{name}: {e}") from None
    if not report.ok:
        raise AssertionError(f"{name} ({result.dtype}, {list(result.shape)}): {report}")
    return report


def assert_rounded_truth(result, truth64, magnitude=None, *, name="result"):
    """Fails unless every integer of `result` is `truth64` rounded to the nearest, within its dtype.

    magnitude: sum of the absolute values of the terms, in steps of the result, where these are computed in float32: a
    truth as close to a tie as 8 of their roundings may go either way. None: the truth is exact, and the result too.
    """
    if not isinstance(result, torch.Tensor) or result.is_floating_point():
        raise AssertionError(f"{name} must be a tensor of integers, got {getattr(result, 'dtype', type(result))}")
    if tuple(result.shape) != tuple(truth64.shape):
        raise AssertionError(f"{name}: shape must be {list(truth64.shape)}, got {list(result.shape)}")
    info = torch.iinfo(result.dtype)
    truth = truth64.double().clamp(info.min, info.max)
    slack = 0.0 if magnitude is None else 8 * torch.finfo(torch.float32).eps * magnitude.double()
    wrong = (result.double() - truth).abs() > 0.5 + slack
    if wrong.any():
        i = int(wrong.flatten().to(torch.uint8).argmax())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {result.numel()} integers are wrong; first at "
            f"{list(_position(i, result.shape))}: expected {truth64.flatten()[i].item()!r} rounded, "
            f"actual {result.flatten()[i].item()!r}"
        )


def assert_bitwise_equal(result, expected, *, name="result"):
    """Fails unless dtype, shape and every value are the same. A NaN on either side fails."""
    if not isinstance(result, torch.Tensor) or not isinstance(expected, torch.Tensor):
        raise AssertionError(f"{name}: both must be tensors, got {type(result).__name__}, {type(expected).__name__}")
    if result.dtype != expected.dtype or result.shape != expected.shape:
        raise AssertionError(
            f"{name} must be {expected.dtype} {list(expected.shape)}, got {result.dtype} {list(result.shape)}"
        )
    different = result.detach() != expected.detach()  # NaN differs from everything, itself included
    if different.any():
        i = int(different.flatten().to(torch.uint8).argmax())
        raise AssertionError(
            f"{name}: {int(different.sum())} of {different.numel()} values differ; first at "
            f"{list(_position(i, result.shape))}: expected {expected.flatten()[i].item()!r}, "
            f"actual {result.flatten()[i].item()!r}"
        )


def assert_same_layout(result, expected, *, name="result"):
    """Fails unless shape, dtype and strides agree (strides of dims of size 1 or of empty tensors do not count)."""
    for what in ("dtype", "shape"):
        if getattr(result, what) != getattr(expected, what):
            raise AssertionError(f"{name} must have {what} {getattr(expected, what)}, got {getattr(result, what)}")
    if 0 in expected.shape:
        return
    for i, (size, a, b) in enumerate(zip(expected.shape, result.stride(), expected.stride(), strict=True)):
        if size > 1 and a != b:
            raise AssertionError(f"{name} must have strides {expected.stride()}, got {result.stride()} (dim {i})")
