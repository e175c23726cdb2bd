"""What the specs of dwconv, dwconv_glu and, of activations, glu share: their magnitudes, relu's kink, layouts."""

import torch

from effvit.testing._samples import in_order

SIGMOID, GELU, SILU, RELU, TANH, NONE = range(6)


def width_first(t):
    return in_order(t, (2, 0, 1, 3))


def halves(t):
    """A slice of a projection."""
    return torch.cat((t, t), -1)[..., : t.shape[-1]]


def is_away_from_kink(z, m):
    """Whether no rounding of z, a sum of terms m, decides on which side of relu's kink it lies."""
    return bool(((z.abs() > 4 * torch.finfo(torch.float32).eps * m) | (m == 0)).all())


def away_from_kink(draw, terms):
    """`draw`, again where it comes too near to relu's kink: the slope there may be 0 or 1, and the gradients of weight
    and bias, sums over the map, would be anything. terms: (args, kwargs) in float64 -> (z, m).
    """

    def make(dtype, device, generator):
        for _ in range(8):
            args, kwargs = draw(dtype, device, generator)
            if is_away_from_kink(*terms(tuple(None if t is None else t.cpu().double() for t in args), kwargs)):
                return args, kwargs
        raise AssertionError("every draw is too near to relu's kink")

    return make


def activation_magnitudes(name, z, m):
    """Magnitudes of act(z) and of its slope, and what the rounding of z, a sum of terms m, adds. The derivative of gelu
    and of silu has two terms: act(z) / z and the slope times z."""
    s, density = torch.sigmoid(z), torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    if name == "sigmoid":
        act, slope, bend = s, s, s
    elif name == "silu":
        act, slope, bend = z.abs() * s, s + z.abs() * s * (1 - s), torch.full_like(z, 0.5)
    elif name == "gelu":
        half = 0.5 * (1 + torch.erf(z / 2**0.5).abs())
        act, slope, bend = z.abs() * half, half + z.abs() * density, torch.full_like(z, 0.8)
    elif name == "relu":
        assert is_away_from_kink(z, m), "relu's slope is not known where rounding decides on the side of its kink"
        slope = (z > 0).double()
        return z.clamp(min=0) + m * slope, slope
    elif name == "tanh":
        act, slope, bend = torch.tanh(z).abs(), torch.ones_like(z), torch.full_like(z, 0.8)
    else:
        return m, torch.ones_like(z)
    return act + slope * m, slope + bend * m
