"""Quantisation-aware training of integer-only layers (I-ViT): each computes the integers of the deployed operators.

What flows between them is a :class:`Quantised`: integers, what a step of them is worth, and their value in floating
point, through which gradients pass straight. Without integers (before the first :class:`QuantAct` quantises) every
layer computes what its float original does: so ranges are calibrated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import effvit.ops  # noqa: F401  defines torch.ops.effvit

from ..integer import layer_norm_constants
from ..ops import _checks
from ..ops._integer import DTYPES, LARGEST, LEAST_N, MOST_N, fixed_point, fixed_point_of
from ..ops.shift_gelu import FACTOR

IDENTITY = (2**30, 30)  # the multiplier and shift of 1
BINS = 2048  # of a calibration's histogram


class _Exact(torch.autograd.Function):
    """`exact`, with the gradient of `smooth`, whose rounding it is."""

    @staticmethod
    def forward(ctx, smooth, exact):
        return exact

    @staticmethod
    def backward(ctx, g):
        return g, None


def straight_through(smooth: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return _Exact.apply(smooth, exact.to(smooth.dtype))


class Quantised:
    """A quantised activation.

    integers: [..., C] int8, int16 or int32; None: not quantised, `value` is all there is.
    scale: what a step is worth, float64: [], or [C], one for each channel.
    value: [..., C] in floating point, integers * scale as near as its dtype comes; what is differentiated.
    """

    __slots__ = ("_value", "dtype", "integers", "scale")

    def __init__(self, value, integers=None, scale=None, dtype=torch.float32):
        self._value, self.integers, self.scale = value, integers, scale
        self.dtype = dtype if value is None else value.dtype

    @property
    def value(self) -> torch.Tensor:
        if self._value is None:
            self._value = steps(self.integers, self.scale, self.dtype)
        return self._value

    @property
    def shape(self):
        return (self._value if self.integers is None else self.integers).shape

    def map(self, function) -> Quantised:
        """Of data that is only moved: function of the integers and of the value. With a scale per channel the last dim
        must stay what it is."""
        integers = None if self.integers is None else function(self.integers)
        value = function(self.value) if integers is None or self._value is not None else None
        return Quantised(value, integers, self.scale, self.dtype)

    def scaled(self, factor: torch.Tensor | float) -> Quantised:
        """Times a number or a [C] tensor, which the scale takes up."""
        if self.integers is None:
            return Quantised(self.value * factor)
        by = factor.detach().double() if isinstance(factor, torch.Tensor) else factor
        needed = self._value is not None and torch.is_grad_enabled()
        return Quantised(self.value * factor if needed else None, self.integers, self.scale * by, self.dtype)


def check_quantised(owner: str, name: str, x: object) -> None:
    if not isinstance(x, Quantised):
        raise _checks.type_error(owner, name, "a Quantised (QuantAct makes them)", type(x).__name__)


def steps(integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = torch.promote_types(dtype, torch.float32)  # sums are beyond what float16 holds
    return (integers.to(wide) * scale.to(wide)).to(dtype)


def computed(smooth, integers: torch.Tensor, scale: torch.Tensor, like: Quantised) -> Quantised:
    """The result of a layer: smooth() is the function that it stands for, called where a gradient may be asked for."""
    if not torch.is_grad_enabled():
        return Quantised(None, integers, scale, like.dtype)
    y = smooth()
    return Quantised(straight_through(y, steps(integers, scale, y.dtype)), integers, scale)


def dtype_of(bits: int) -> torch.dtype:
    """The narrowest signed dtype."""
    return torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32


def probabilities_dtype(bits: int) -> torch.dtype:
    """Of what is between 0 and 2^(bits - 1)."""
    return torch.uint8 if bits == 9 else dtype_of(bits)


def ends(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def constants_of(owner: str, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(multiplier, shift) in int32 of ratios of scales in float64: 0 where one is below 2^-31."""
    if not (ratio.abs() < 2.0**30).all():
        raise _checks.value_error(owner, "scale", "below 2^30 of the result's", f"{float(ratio.abs().max())} of it")
    small = ratio.abs() < 2.0**-31
    m, c = fixed_point_of(torch.where(small, 1.0, ratio))
    return torch.where(small, 0, m).to(torch.int32), torch.where(small, 31, c).to(torch.int32)


def grouped(t: torch.Tensor, groups: int) -> torch.Tensor:
    """[..., C] -> [*, groups, C / groups]"""
    return t.reshape(-1, groups, t.shape[-1] // groups)


class _Bits:
    """Of a module with `bits`: its state_dict holds them, and one without leaves them as they are."""

    def get_extra_state(self):
        return torch.tensor(self.bits)

    def set_extra_state(self, state):
        self.bits = int(state)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}_extra_state"]


class QuantAct(_Bits, nn.Module):
    """Activations in steps of one scale, `max(|low|, |high|) / (2^(bits - 1) - 1)` of the range that was seen.

    `low` and `high` [groups] are buffers, in float32 whatever the model is cast to: in training, moving averages of
    what each batch holds; the first batch, or a calibration, sets them. `groups`: that many runs of channels have a
    scale of their own (queries, keys, values).
    Called with a float tensor it quantises, with a :class:`Quantised` it requantises by
    :func:`torch.ops.effvit.requantize`, with a residual, whose scale may be another, in the same pass.
    The gradient is that of a clamp to what does not saturate.

    Raises:
        ValueError: NaN or infinity in training, which leaves the range as it was, or in a calibration.
        TypeError: a float tensor with a residual or a norm, which are for a Quantised.
        RuntimeError: it has seen no data.
    """

    def __init__(self, bits: int = 8, groups: int = 1, momentum: float = 0.95):
        super().__init__()
        self.bits = _checks.as_int("QuantAct", "bits", bits, (2, 32))
        self.groups, self.momentum = groups, momentum
        self.observing = True  # in training: False freezes the range
        self.quantising = True  # False: a float tensor stays one, as while a model is calibrated
        self.calibrating = False  # all that is seen widens the range
        self.histogram = None  # of |x|, while it is calibrated by other than the maximum
        self.register_buffer("low", torch.full((groups,), math.inf))
        self.register_buffer("high", torch.full((groups,), -math.inf))

    # ---- the range

    def observe(self, *values: torch.Tensor) -> None:
        """A moving average of what is seen; while it is calibrated, all of it."""
        values = [grouped(v.detach(), self.groups) for v in values if v.numel()]
        if not values:
            return
        low = torch.stack([v.amin((0, 2)) for v in values]).amin(0).float()
        high = torch.stack([v.amax((0, 2)) for v in values]).amax(0).float()
        finite = bool((low.isfinite() & high.isfinite()).all())
        if not (finite or self.calibrating):  # of a calibration the end does, which names the layer
            raise _checks.value_error("QuantAct", "x", "finite", "NaN or infinity")
        if self.histogram is not None and finite:
            for v in values:
                self.histogram.add(v.transpose(0, 1).flatten(1).abs().float())
        if self.calibrating:
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)
        elif self.low[0] > self.high[0]:  # the first batch
            self.low.copy_(low)
            self.high.copy_(high)
        else:
            self.low.lerp_(low, 1 - self.momentum)
            self.high.lerp_(high, 1 - self.momentum)

    def calibrate(self, method: str = "max") -> None:
        """Begin to see ranges anew. Beyond 8 bits there is room for all that is seen: the method is "max"."""
        self.low.fill_(math.inf)
        self.high.fill_(-math.inf)
        self.calibrating = True
        self.histogram = Histogram(self.groups, self.low.device) if method != "max" and self.bits <= 8 else None

    def calibrated(self, method: str = "max", percentile: float = 99.99) -> None:
        """End it."""
        histogram, self.histogram, self.calibrating = self.histogram, None, False
        self.seen()  # or an error, before a histogram, in which NaN and infinity are not, cuts the range
        if histogram is None or histogram.counts is None:
            return
        most = histogram.percentile(percentile) if method == "percentile" else histogram.least_error(self.bits)
        self.low.copy_(torch.maximum(self.low, -most))
        self.high.copy_(torch.minimum(self.high, most))

    def seen(self) -> list[tuple[float, float]]:
        """(low, high) of every group that has seen anything. ValueError: a calibration has seen NaN or infinity."""
        found = [x for x in zip(self.low.tolist(), self.high.tolist(), strict=True) if x != (math.inf, -math.inf)]
        if not all(math.isfinite(a) and math.isfinite(b) for a, b in found):
            raise _checks.value_error("QuantAct", "what it has seen", "finite: calibrate again", found)
        return found

    @property
    def scale(self) -> torch.Tensor:
        """[groups] in float64."""
        most = [max(abs(a), abs(b)) for a, b in self.seen()]
        if len(most) < self.groups:
            raise RuntimeError("effvit::QuantAct: has seen no data: train it, or calibrate the model first")
        steps = [(m if m > 0 else 1.0) / ends(self.bits)[1] for m in most]
        return torch.tensor(steps, dtype=torch.float64, device=self.low.device)

    def channels(self, count: int) -> torch.Tensor:
        """The scale as a Quantised of so many channels has it: [], or [count] where there are groups."""
        scale = self.scale
        return scale[0] if self.groups == 1 else scale.repeat_interleave(count // self.groups)

    # ---- integers

    def constants(self, scale: torch.Tensor, count: int, own: torch.Tensor | None = None):
        """(multiplier, shift) [count] int32 from steps of `scale` to this one's, which may be given as `own`."""
        ratio = scale / (self.channels(count) if own is None else own)
        if not ratio.dim() and 2.0**-31 <= float(ratio) < 2.0**30:
            return tuple(
                torch.full((count,), x, dtype=torch.int32, device=ratio.device) for x in fixed_point(float(ratio))
            )
        m, c = constants_of("QuantAct", ratio)
        return m.expand(count).contiguous(), c.expand(count).contiguous()

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """A float tensor in steps of the scale."""
        q = torch.round(x.detach().double() / self.channels(x.shape[-1]))
        return q.clamp(*ends(self.bits)).to(dtype_of(self.bits))

    def of_parameter(self, x: torch.Tensor) -> Quantised:
        """A parameter, in steps of the scale."""
        scale, q = self.channels(x.shape[-1]), self.rounded(x)
        return Quantised(straight_through(x, steps(q, scale, x.dtype)), q, scale)

    def forward(self, x, residual=None, also: tuple = (), norm: IntLayerNorm | None = None) -> Quantised:
        """x: a float tensor or Quantised. residual: Quantised, or a float parameter that takes on this scale. also:
        float tensors that will be quantised with this scale, for its range. norm: of x, normalised in the same pass,
        where a bias of any size has its place."""
        given = isinstance(x, torch.Tensor)
        if not given or norm is not None:
            check_quantised("QuantAct", "x", x)
        if given and residual is not None:
            raise _checks.type_error("QuantAct", "x", "a Quantised where there is a residual", "a float tensor")
        if norm is not None and x.integers is not None:
            return self._normalised(norm, x)
        x = x if norm is None else norm(x)
        x = Quantised(x) if given else x
        observing = self.calibrating or (self.training and self.observing)
        added = None if residual is None else residual if isinstance(residual, torch.Tensor) else residual.value
        total = None
        if observing or torch.is_grad_enabled() or x.integers is None:
            total = x.value if added is None else x.value + added
        if observing:
            self.observe(total, *also)
        if x.integers is None and not (given and self.quantising):
            return Quantised(total)
        count = x.shape[-1]
        scale = self.channels(count)
        if x.integers is None:
            q = self.rounded(total)
        else:
            other = ()
            if residual is not None:
                if isinstance(residual, torch.Tensor):
                    residual = self.of_parameter(residual)
                other = (residual.integers.expand(x.shape), *self.constants(residual.scale, count, scale))
            q = requantize(x.integers, *self.constants(x.scale, count, scale), *other, bits=self.bits)
        return computed(lambda: torch.clamp(total, *self._bounds(scale, x.dtype)), q, scale, x)

    def _normalised(self, norm: IntLayerNorm, x: Quantised) -> Quantised:
        """As `self(norm(x))`, but for biases too large for their weights, which `IntLayerNorm` alone cuts."""
        observing = self.calibrating or (self.training and self.observing)
        total = norm.smooth(x.value) if observing or torch.is_grad_enabled() else None
        if observing:
            self.observe(total)
        scale = self.channels(x.shape[-1])
        q = saturated(int_layer_norm(x.integers, *norm.constants_for(scale), bits=self.bits), self.bits)
        return computed(lambda: torch.clamp(total, *self._bounds(scale, x.dtype)), q, scale, x)

    def _bounds(self, scale: torch.Tensor, dtype: torch.dtype) -> list:
        """What rounds to the ends of the range begins and ends there."""
        low, high = ends(self.bits)
        bounds = [end * scale for end in (low - 0.5, high + 0.5)]
        return [b.to(dtype) if b.dim() else float(b) for b in bounds]

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in ("low", "high")}
        super()._apply(fn, recurse)
        for name, t in kept.items():
            if getattr(self, name).dtype != torch.float32:
                setattr(self, name, t.to(getattr(self, name).device))
        return self

    def extra_repr(self):
        return f"bits={self.bits}, groups={self.groups}"


class Histogram:
    """Of |x| in BINS bins for each group; the bins double in width when something does not fit."""

    def __init__(self, groups: int, device):
        self.counts = None
        self.groups, self.device = groups, device
        self.width = None  # of a bin, [groups]

    def add(self, x: torch.Tensor) -> None:
        """x: [groups, *], not negative"""
        most = x.amax(1).clamp(min=1e-30)
        if self.counts is None:
            self.counts = torch.zeros(self.groups, BINS, dtype=torch.float64, device=self.device)
            self.width = most * 1.0001 / BINS
        for g in range(self.groups):
            while float(most[g]) >= float(self.width[g]) * BINS:
                pairs = self.counts[g].view(-1, 2).sum(1)
                self.counts[g] = torch.cat((pairs, torch.zeros_like(pairs)))
                self.width[g] *= 2
            at = (x[g] / self.width[g]).long().clamp(max=BINS - 1)
            self.counts[g] += torch.bincount(at, minlength=BINS)

    def percentile(self, percent: float) -> torch.Tensor:
        """[groups]: what so many percent are not beyond."""
        total = self.counts.cumsum(1)
        at = (total < total[:, -1:] * (percent / 100)).sum(1)
        return (at + 1) * self.width

    def least_error(self, bits: int) -> torch.Tensor:
        """[groups]: the end of the range whose rounding and saturation make the least mean squared error."""
        centres = torch.arange(BINS, dtype=torch.float64, device=self.device) + 0.5
        best = torch.zeros(self.groups, dtype=torch.float64, device=self.device)
        least = torch.full_like(best, math.inf)
        last = (self.counts > 0).double().mul(torch.arange(1, BINS + 1, device=self.device)).amax(1)
        for share in torch.linspace(0.1, 1.0, 91).tolist():
            step = (share * last / ends(bits)[1])[:, None]
            rounded = (torch.round(centres / step)).clamp(max=ends(bits)[1]) * step
            error = (self.counts * (rounded - centres) ** 2).sum(1)
            best = torch.where(error < least, share * last, best)
            least = torch.minimum(error, least)
        return (best * self.width).float()


# ---- the operators, called without the checks of their public functions: constants were checked when they were made


def requantize(x, m, c, residual=None, rm=None, rc=None, *, bits):
    return torch.ops.effvit.requantize(
        x.contiguous(), m, c, None if residual is None else residual.contiguous(), rm, rc, bits=bits,
        out_dtype=DTYPES[dtype_of(bits)],
    )  # fmt: skip


INT32 = DTYPES[torch.int32]


def int_linear(x, weight, m, c, bias, residual=None, rm=None, rc=None, *, bits=None):
    """bits None: the sums in int32."""
    options = {"out_dtype": INT32} if bits is None else {"bits": bits, "out_dtype": DTYPES[dtype_of(bits)]}
    residual = None if residual is None else residual.flatten(0, -2)
    out = torch.ops.effvit.int_linear(x.flatten(0, -2), weight, m, c, bias, residual, rm, rc, **options)
    return out.view(*x.shape[:-1], out.shape[-1])


class _Weights(_Bits):
    """What QuantLinear and QuantConv2d share: a scale for every output channel."""

    def copied(self, layer: nn.Module):
        """With the weight and bias that the layer has now, be they parameters or what a parametrisation makes."""
        with torch.no_grad():
            self.weight.copy_(layer.weight)
            if self.bias is not None:
                self.bias.copy_(layer.bias)
        return self.train(layer.training)

    def weight_scale(self, x_scale: torch.Tensor) -> torch.Tensor:
        """[N] in float64: max |w| / (2^(bits - 1) - 1); more where a bias would not fit into int32."""
        most = self.weight.detach().flatten(1).double().abs().amax(1)
        scale = most / ends(self.bits)[1]
        if self.bias is not None:
            scale = torch.maximum(scale, self.bias.detach().double().abs() / (x_scale * 2.0**30))
        return torch.where(scale > 0, scale, 1.0)

    def integers(self, x_scale: torch.Tensor):
        """(weight [N, K] int8, bias [N] int32 or None, the result's scale [N] in float64), x_scale [] or [K] equal."""
        w_scale = self.weight_scale(x_scale)
        top = ends(self.bits)[1]
        q = torch.round(self.weight.detach().flatten(1).double() / w_scale[:, None]).clamp(-top, top).to(torch.int8)
        scale = w_scale * x_scale
        bias = None
        if self.bias is not None:
            bias = torch.round(self.bias.detach().double() / scale).clamp(-(2.0**31), LARGEST).to(torch.int32)
        return q, bias, scale

    def product(self, x: Quantised) -> Quantised:
        """x [..., K] -> [..., N] int32"""
        name = type(self).__name__
        check_quantised(name, "x", x)
        if x.integers is None:
            return Quantised(F.linear(x.value, self.weight.flatten(1), self.bias))
        if x.integers.dtype != torch.int8 or x.scale.dim():
            raise _checks.value_error(name, "x", "int8 with one scale", f"{x.integers.dtype}, {x.scale.numel()} scales")
        q, bias, scale = self.integers(x.scale)
        sums = int_linear(x.integers.contiguous(), q, None, None, bias)

        def smooth():
            grid = steps(q, (scale / x.scale)[:, None], self.weight.dtype)
            w = straight_through(self.weight.flatten(1), grid)
            return F.linear(x.value, w.to(x.dtype), self.bias)

        return computed(smooth, sums, scale, x)


class QuantLinear(_Weights, nn.Linear):
    """nn.Linear of int8 weights and int8 activations: exact int32 sums, the bias rounded to their scale."""

    def __init__(self, in_features, out_features, bias=True, bits=8, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.bits = _checks.as_int("QuantLinear", "bits", bits, (2, 8))

    forward = _Weights.product

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int = 8) -> QuantLinear:
        """With copies of its parameters."""
        w = linear.weight
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, bits, w.device, w.dtype)
        return layer.copied(linear)


def patches(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[B, C, H, W] -> [B, H / h, W / w, C * h * w]"""
    B, C, H, W = x.shape
    h, w = size
    return x.reshape(B, C, H // h, h, W // w, w).permute(0, 2, 4, 1, 3, 5).reshape(B, H // h, W // w, C * h * w)


class QuantConv2d(_Weights, nn.Conv2d):
    """nn.Conv2d of patches that do not overlap, as a linear layer: [B, C, H, W] -> [B, H / h, W / w, N]."""

    def __init__(self, in_channels, out_channels, kernel_size, bias=True, bits=8, device=None, dtype=None):
        super().__init__(in_channels, out_channels, kernel_size, kernel_size, bias=bias, device=device, dtype=dtype)
        self.bits = _checks.as_int("QuantConv2d", "bits", bits, (2, 8))

    def forward(self, x: Quantised) -> Quantised:
        check_quantised("QuantConv2d", "x", x)
        if x.shape[-2] % self.kernel_size[0] or x.shape[-1] % self.kernel_size[1]:
            raise _checks.value_error("QuantConv2d", "x", f"whole patches of {self.kernel_size}", list(x.shape))
        return self.product(x.map(lambda t: patches(t, self.kernel_size)))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, bits: int = 8) -> QuantConv2d:
        """With copies of its parameters. ValueError: its patches overlap, are padded, dilated or grouped."""
        if conv.stride != conv.kernel_size or conv.dilation != (1, 1) or conv.groups != 1 or conv.padding != (0, 0):
            raise _checks.value_error("QuantConv2d", "conv", "one of patches: stride = kernel, no padding", conv)
        w = conv.weight
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.bias is not None, bits, w.device, w.dtype
        )
        return layer.copied(conv)


class QuantMatMul(nn.Module):
    """The product of two quantised tensors: exact int32 sums, worth the product of their scales."""

    def __init__(self, transpose_b: bool = False):
        super().__init__()
        self.transpose_b = transpose_b  # b is [..., N, K]

    def forward(self, a: Quantised, b: Quantised) -> Quantised:
        for name, t in (("a", a), ("b", b)):
            check_quantised("QuantMatMul", name, t)

        def smooth():
            return a.value @ (b.value.mT if self.transpose_b else b.value)

        if a.integers is None:
            return Quantised(smooth())
        if a.scale.dim() or b.scale.dim():
            raise _checks.value_error("QuantMatMul", "a and b", "of one scale each", "a scale for each channel")
        sums = torch.ops.effvit.int8_matmul(
            dense(a.integers), dense(b.integers), transpose_b=self.transpose_b, out_dtype=INT32
        )
        return computed(smooth, sums, a.scale * b.scale, a)


def dense(t: torch.Tensor) -> torch.Tensor:
    """What the operators take: a last stride of 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def largest_n(x0: int) -> int:
    """The most bits after the point of the shift exponential: -x0 << n must fit into int32."""
    return min(MOST_N, (LARGEST // -x0).bit_length() - 1)


class _Exponential(_Bits, nn.Module):
    """What Shiftmax and ShiftGELU share: x0 from the scale, and n, which is chosen by the first batch in training that
    has integers, or by a calibration; `usual_n` until then. One that is given changes by a calibration alone."""

    factor, usual_n = 1.0, LEAST_N

    def __init__(self, n: int | None, bits: int):
        super().__init__()
        self.bits = _checks.as_int(type(self).__name__, "bits", bits, (2, 16))
        n = 0 if n is None else _checks.as_int(type(self).__name__, "n", n, (LEAST_N, MOST_N))
        self.register_buffer("n", torch.tensor(n, dtype=torch.int64))  # 0: not chosen yet
        self.samples = None  # rows, while it is calibrated

    def options(self, scale: torch.Tensor) -> dict[str, int]:
        """x0, n and bits for a scale [], as the operator takes them; n at most what x0 leaves room for."""
        x0 = math.floor(-1.0 / (self.factor * float(scale)))
        if -x0 > LARGEST >> LEAST_N:
            raise _checks.value_error(type(self).__name__, "scale", "such that x0 fits into int32", float(scale))
        return {"x0": x0, "n": min(int(self.n) or self.usual_n, largest_n(x0)), "bits": self.bits}

    def sample(self, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        self.samples.append(rows[:: max(len(rows) // 32, 1)][:32].clone())
        if len(self.samples) > 16:
            self.samples = self.samples[::2]

    @torch.no_grad()
    def choose_n(self, scale: torch.Tensor) -> None:
        """The n whose results on the samples are nearest to those of the smooth function; the larger of equals."""
        if self.samples:
            rows = torch.cat(self.samples).double()
            q = torch.round(rows / scale).clamp(-LARGEST, LARGEST).to(torch.int32)
            value = q.double() * scale
            options, best = self.options(scale), None
            for n in range(LEAST_N, largest_n(options["x0"]) + 1):
                y, step = self.integers(q, scale, options | {"n": n})
                error = float((y.double() * step - self.smooth(value)).square().sum())
                if best is None or error <= best[0]:
                    best = error, n
            self.n.fill_(best[1])
        self.samples = None

    def forward(self, x: Quantised) -> Quantised:
        check_quantised(type(self).__name__, "x", x)
        if x.integers is None:
            if self.samples is not None:
                self.sample(x.value)
            return Quantised(self.float_function(x.value))
        if x.scale.dim():
            raise _checks.value_error(type(self).__name__, "x", "of one scale", "a scale for each channel")
        if self.training and x.integers.numel() and not int(self.n):
            self.samples = []
            self.sample(x.value)
            self.choose_n(x.scale)
        q, scale = self.integers(x.integers.contiguous(), x.scale, self.options(x.scale))
        return computed(lambda: self.smooth(x.value), q, scale, x)

    def extra_repr(self):
        return f"n={int(self.n) or None}, bits={self.bits}"


class IntSoftmax(_Exponential):
    """Shiftmax over the last dim, in steps of 2^(1 - bits). The gradient is softmax's.

    n: bits after the point of its exponential. None: the best for the first batch in training, or for a calibration;
    I-ViT's 15 until then.
    """

    usual_n = 15

    def __init__(self, bits: int = 16, n: int | None = None):
        super().__init__(n, bits)

    def integers(self, q, scale, options):
        """(integers, what a step is worth)"""
        y = torch.ops.effvit.shiftmax(q, **options, out_dtype=DTYPES[probabilities_dtype(self.bits)])
        return y, torch.as_tensor(2.0 ** (1 - self.bits), dtype=torch.float64, device=q.device)

    @staticmethod
    def smooth(x):
        return torch.softmax(x, -1)

    float_function = smooth


class IntGELU(_Exponential):
    """ShiftGELU over rows, x * sigmoid(1.702 x): int32, in steps of the scale times 2^(1 - bits).

    The gradient is that of x * sigmoid(1.702 x). Not quantised it is GELU, or `approximate` as nn.GELU has it. n: as of
    :class:`IntSoftmax`; 23 until it is chosen.
    """

    factor, usual_n = FACTOR, 23

    def __init__(self, bits: int = 8, n: int | None = None, approximate: str = "none"):
        super().__init__(n, bits)
        self.approximate = approximate

    def integers(self, q, scale, options):
        return torch.ops.effvit.shift_gelu(q, **options, out_dtype=INT32), scale * 2.0 ** (1 - self.bits)

    @staticmethod
    def smooth(x):
        return x * torch.sigmoid(FACTOR * x)

    def float_function(self, x):
        return self.smooth(x) if self.approximate == "quick" else F.gelu(x, approximate=self.approximate)


class IntLayerNorm(nn.LayerNorm):
    """LayerNorm over the last dim by integers: int32, in steps of weight * sqrt(C) / 2^30, one for each channel.

    A bias beyond 2 sqrt(C) |weight| saturates there, unless a QuantAct takes the norm with it. The gradient is
    LayerNorm's.
    """

    def constants(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(bias [C] int32, the result's scale [C] in float64)"""
        weight = self.weight.detach().double()
        weight = torch.where(weight == 0, 1e-30, weight)
        scale = weight * len(weight) ** 0.5 / 2.0**30
        bias = torch.floor(self.bias.detach().double() / scale).clamp(-(2.0**31), LARGEST)
        return torch.where(self.bias.detach() == 0, 0.0, bias).to(torch.int32), scale

    def constants_for(self, out_scale: torch.Tensor):
        """(bias, multiplier, shift, offset) [C] int32 of a result in steps of out_scale []."""
        return layer_norm_constants(self.weight, self.bias, float(out_scale))

    def smooth(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    def forward(self, x: Quantised) -> Quantised:
        check_quantised("IntLayerNorm", "x", x)
        if x.integers is None:
            return Quantised(self.smooth(x.value))
        if x.scale.dim():
            raise _checks.value_error("IntLayerNorm", "x", "of one scale", "a scale for each channel")
        bias, scale = self.constants()
        return computed(lambda: self.smooth(x.value), int_layer_norm(x.integers, bias), scale, x)

    @classmethod
    def from_norm(cls, norm: nn.LayerNorm) -> IntLayerNorm:
        """With copies of its parameters; without some, ones and zeros that are not trained."""
        (size,), w = norm.normalized_shape, norm.weight
        like = {} if w is None else {"device": w.device, "dtype": w.dtype}
        layer = cls(size, eps=norm.eps, **like)
        for name in ("weight", "bias"):
            given = getattr(norm, name)
            if given is None:
                getattr(layer, name).requires_grad_(False)
            else:
                getattr(layer, name).data.copy_(given.detach())
        return layer.train(norm.training)


def int_layer_norm(x, bias, m=None, c=None, offset=None, *, bits=32):
    return torch.ops.effvit.int_layer_norm(dense(x), bias, m, c, offset, out_dtype=DTYPES[dtype_of(bits)])


def saturated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """An operator's result, saturated at its dtype, at fewer bits."""
    return x if bits == torch.iinfo(x.dtype).bits else x.clamp(*ends(bits))
