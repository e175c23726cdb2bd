"""Non-linear functions of int8 by index tables, on blocks that have powers of two as scales (BCT, arXiv:2304.01483).

A block is `block` neighbours of a row: int8 values and one exponent e, int8, that stands for a scale of 2^e. The paper
leaves the format of its tables open. Here a function has a table for every exponent that a block may have, with an
exponent of its own for the results, so that nothing is computed but one lookup a byte.
"""

import torch
import torch.nn.functional as F
from torch import nn

import effvit.ops

from ..ops import _checks
from ._ops import asks_for_derivatives


def table_of(function, scale: float, out_scale: float, dtype=torch.int8) -> torch.Tensor:
    """[256] of round(f(x * scale) / out_scale), x = -128 to 127, saturating: ties to even, 0 for NaN; from float64."""
    x = torch.arange(-128, 128, dtype=torch.float64) * scale
    info = torch.iinfo(dtype)
    return (function(x) / out_scale).nan_to_num(nan=0.0).round().clamp(info.min, info.max).to(dtype)


def _exponent_for(largest: torch.Tensor) -> torch.Tensor:
    """The least e with largest <= 127 * 2^e; 0 where it is 0."""
    mantissa, e = torch.frexp(largest.double())  # largest = mantissa * 2^e, 1/2 <= mantissa < 1; 127 = 0.9921875 * 2^7
    e = torch.where(mantissa > 127 / 128, e - 6, e - 7)
    return torch.where(largest > 0, e, torch.zeros_like(e))


def quantize_blocks(x: torch.Tensor, block: int, least: int = -128, most: int = 127):
    """x [..., C] -> (int8 [..., C], exponents int8 [..., C / block]): to the nearest, with the least exponent that
    holds a block's largest value, between `least` and `most`; saturating."""
    blocks = x.detach().double().unflatten(-1, (-1, block))
    e = _exponent_for(blocks.abs().amax(-1)).clamp(least, most)
    q = torch.round(blocks * torch.exp2(-e.double())[..., None]).clamp(-128, 127)
    return q.flatten(-2).to(torch.int8), e.to(torch.int8)


def dequantize_blocks(q: torch.Tensor, e: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    blocks = q.unflatten(-1, (e.shape[-1], -1)).to(dtype)
    return (blocks * torch.exp2(e.to(dtype))[..., None]).flatten(-2)


class TableFunction(nn.Module):
    """Any function of one number, on blocks of int8: a table for each exponent from `least` to `most`.

    ``forward_int(q, e)``: int8 [..., C] and exponents int8 [..., C / block] -> the same of the results; exponents
    outside are an error. ``forward(x)``: x in floating point is rounded to blocks, looked up, and multiplied out; its
    gradient is that of the function, straight through both roundings.
    """

    def __init__(self, function, block=64, least=-12, most=3):
        super().__init__()
        name = type(self).__name__
        self.least = _checks.as_int(name, "least", least, (-120, 120))
        self.most = _checks.as_int(name, "most", most, (self.least, 120))
        self.block, self.function = _checks.as_int(name, "block", block, (1, 1 << 20)), function
        x = torch.arange(-128, 128, dtype=torch.float64)
        tables, exponents = [], []
        for e in range(self.least, self.most + 1):
            e_out = int(_exponent_for(function(x * 2.0**e).abs().max()))
            tables.append(table_of(function, 2.0**e, 2.0**e_out))
            exponents.append(e_out)
        self.register_buffer("tables", torch.stack(tables))
        self.register_buffer("exponents", torch.tensor(exponents, dtype=torch.int8))

    def forward_int(self, q: torch.Tensor, e: torch.Tensor):
        name = type(self).__name__
        if q.shape[:-1] != e.shape[:-1] or q.shape[-1] != e.shape[-1] * self.block:
            expected = f"[..., C / {self.block}] like q {_checks.shape(q)}"
            raise _checks.value_error(name, "e", expected, _checks.shape(e))
        if e.numel() and _checks.has_readable_values(e):
            low, high = (int(t) for t in e.aminmax())
            if low < self.least or high > self.most:
                wrong = low if low < self.least else high
                raise _checks.value_error(name, "e", f"between {self.least} and {self.most}", wrong)
        which = (e.to(torch.int16) - self.least).to(torch.uint8)
        blocks = q.unflatten(-1, (e.shape[-1], self.block))
        out = effvit.ops.table_lookup(blocks, self.tables, which).flatten(-2)
        return out, self.exponents[which.long()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % self.block:
            raise _checks.value_error(type(self).__name__, "x", f"[..., multiple of {self.block}]", _checks.shape(x))
        result = dequantize_blocks(*self.forward_int(*quantize_blocks(x, self.block, self.least, self.most)))
        result = result.to(x.dtype)
        if not asks_for_derivatives(x):
            return result
        smooth = self.function(x)
        return smooth + (result - smooth).detach()

    def extra_repr(self):
        return f"block={self.block}, exponents {self.least} to {self.most}"


class TableGELU(TableFunction):
    """GELU (the exact one) by tables."""

    def __init__(self, block=64, least=-12, most=3):
        super().__init__(F.gelu, block, least, most)


class TableSoftmax(nn.Module):
    """Softmax of int8 by a table of exponentials and one integer division a row: no floating point.

    ``forward_int(q, e)``: int8 [..., C], an exponent of the scale for each row, int8 [...] -> uint8 [..., C], in steps
    of 1/256: with d = max - q, t = round(255 exp(-d 2^e)) from the table and s = sum t, it is ``min(255, (256 t + s //
    2) // s)``. The largest t is 255, so s is at least that. ``forward(x)``: x in floating point, with the exponent of
    each row that holds its largest |x|; the gradient is softmax's, straight through.
    """

    def __init__(self, least=-12, most=3):
        super().__init__()
        self.least = _checks.as_int("TableSoftmax", "least", least, (-120, 120))
        self.most = _checks.as_int("TableSoftmax", "most", most, (self.least, 120))
        d = torch.arange(256, dtype=torch.float64)
        tables = [torch.round(255 * torch.exp(-d * 2.0**e)) for e in range(self.least, self.most + 1)]
        self.register_buffer("tables", torch.stack(tables).to(torch.uint8))

    def forward_int(self, q: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        if e.shape != q.shape[:-1]:
            expected = f"[...] like q {_checks.shape(q)} without its last dim"
            raise _checks.value_error("TableSoftmax", "e", expected, _checks.shape(e))
        if e.numel() and _checks.has_readable_values(e):
            low, high = (int(t) for t in e.aminmax())
            if low < self.least or high > self.most:
                wrong = low if low < self.least else high
                raise _checks.value_error("TableSoftmax", "e", f"between {self.least} and {self.most}", wrong)
        which = (e.to(torch.int16) - self.least).to(torch.uint8)
        below = (q.amax(-1, keepdim=True).to(torch.int16) - q).to(torch.uint8)
        t = effvit.ops.table_lookup(below, self.tables, which).to(torch.int32)
        s = t.sum(-1, keepdim=True, dtype=torch.int64)
        return ((t * 256 + s // 2) // s).clamp(max=255).to(torch.uint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, e = quantize_blocks(x, x.shape[-1], self.least, self.most)
        result = self.forward_int(q, e[..., 0]).to(x.dtype) / 256
        if not asks_for_derivatives(x):
            return result
        smooth = x.softmax(-1)
        return smooth + (result - smooth).detach()

    def extra_repr(self):
        return f"exponents {self.least} to {self.most}"
