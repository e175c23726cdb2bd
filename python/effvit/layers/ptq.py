"""Modules of post-training quantisation: FakeQuantizer, a table, and PTQLinear, an nn.Linear that has one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..ops import _checks
from ..quantizers import Quantizer
from ._ops import as_parameter
from .int8 import Int8Linear


class FakeQuantizer(nn.Module):
    """What a quantiser keeps of its input, straight through: none yet, a table (:class:`effvit.quantizers.Quantizer`),
    or "int8", the symmetric one of :func:`effvit.ops.quantize_int8` with one scale.

    The state_dict holds the tables, the scale, and what they are; a module takes those of any other. They stay in
    float32 whatever the model is cast to.
    """

    tables = ("thresholds", "values", "scale")

    def __init__(self):
        super().__init__()
        self.scheme, self.bits, self.text = "none", 0, "float"
        self.descending = False
        self.enabled = True
        self.observer = None  # a function of the inputs, during calibration
        for name in self.tables:
            self.register_buffer(name, torch.zeros(0))

    def use(self, quantizer: Quantizer | None, device: torch.device | None = None) -> FakeQuantizer:
        """Take over a table; None: pass everything on."""
        device = self.thresholds.device if device is None else device
        if quantizer is None:
            self.scheme, self.bits, self.text = "none", 0, "float"
            thresholds = values = torch.zeros(0, device=device)
        else:
            self.scheme, self.bits, self.text = quantizer.scheme, quantizer.bits, str(quantizer)
            self.descending = quantizer.descending
            thresholds, values = quantizer.tables(device)
        self.thresholds, self.values, self.scale = thresholds, values, torch.zeros(0, device=device)
        return self

    def use_int8(self, scale: float, device: torch.device | None = None) -> FakeQuantizer:
        """Steps of `scale` from -127 to 127."""
        self.use(None, device)
        scale = _checks.as_positive("FakeQuantizer", "scale", scale)
        self.scheme, self.bits, self.text = "int8", 8, f"int8 8 bits, scale {scale:.4g}"
        self.scale = torch.tensor([scale], dtype=torch.float32, device=self.thresholds.device)
        return self

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """What a deployed model would store: uint8 codes, or int8."""
        if self.scheme == "none":
            raise _checks.value_error("FakeQuantizer", "the quantiser", "calibrated", "none")
        if self.scheme == "int8":
            return ops.quantize_int8(x, self.scale)[0]
        return ops.quantize_lut(x, self.thresholds, descending=self.descending)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., C] -> the same, quantised. other: what calibration looks at as well."""
        if self.observer is not None:
            self.observer(x.detach(), None if other is None else other.detach())
        if self.scheme == "none" or not self.enabled:
            return x
        x = x if x.stride(-1) == 1 else x.contiguous()
        if self.scheme == "int8":
            return ops.fake_quantize_int8(x, self.scale)
        return ops.fake_quantize_lut(x, self.thresholds, self.values)

    def get_extra_state(self):
        return {"scheme": self.scheme, "bits": self.bits, "text": self.text, "descending": self.descending}

    def set_extra_state(self, state):
        for name, value in state.items():
            setattr(self, name, value)

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in self.tables}
        super()._apply(fn, recurse)
        for name, t in kept.items():
            if getattr(self, name).dtype != torch.float32:
                setattr(self, name, t.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self.tables:  # tables have as many entries as their quantiser has codes
            given = state_dict.get(prefix + name)
            if given is not None and given.shape != getattr(self, name).shape:
                setattr(self, name, torch.zeros_like(given, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        return self.text


class PTQLinear(nn.Linear):
    """nn.Linear whose input goes through a `FakeQuantizer`, `act`, and whose weight is rounded, symmetrically and with
    a scale for each output channel, to `weight_bits` bits; 0: not at all. The parameters are those of the float layer;
    gradients go straight through both roundings.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_bits = 0
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.act = FakeQuantizer()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PTQLinear:
        """A layer with the parameters of `linear` (of a parametrised one, with what they are now), nothing quantised
        yet."""
        layer = cls(linear.in_features, linear.out_features, False, device="meta")
        layer.weight, layer.bias = as_parameter(linear.weight), as_parameter(linear.bias)
        layer.weight_scale = torch.ones(linear.out_features, dtype=torch.float32, device=linear.weight.device)
        layer.act = FakeQuantizer().to(linear.weight.device)
        layer.training = linear.training
        return layer

    def use_weight(self, bits: int, scale: torch.Tensor | None = None) -> PTQLinear:
        """Round the weight to steps of scale [out_features]; 0 bits: not at all."""
        self.weight_bits = bits
        self.weight_scale = torch.ones_like(self.weight_scale) if scale is None else scale.detach().float()
        return self

    @property
    def largest(self) -> int:
        return 2 ** (self.weight_bits - 1) - 1

    def weight_codes(self) -> torch.Tensor:
        """[out_features, in_features] int8."""
        y = self.weight.detach().float() / self.weight_scale[:, None]
        return y.round().clamp(-self.largest, self.largest).to(torch.int8)

    def effective_weight(self) -> torch.Tensor:
        """What multiplies x."""
        if not self.weight_bits:
            return self.weight
        scale = self.weight_scale[:, None]  # in float32, as weight_codes has it
        y = (self.weight.float() / scale).clamp(-self.largest, self.largest)
        return ((y + (y.round() - y).detach()) * scale).to(self.weight.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(self.act(input), self.effective_weight(), self.bias)

    @torch.no_grad()
    def deployed(self) -> Int8Linear:
        """The int8 layer that computes the same on integers, of a layer with an int8 input and a rounded weight."""
        if self.act.scheme != "int8" or not self.weight_bits:
            raise _checks.value_error("PTQLinear", "the layer", "int8 with a rounded weight to be deployed", self)
        scale = float(self.act.scale)
        layer = Int8Linear.empty_like(self, "none", scale, None, None)
        return layer.fill(
            self.weight, {"weight": self.weight_codes()}, self.weight_scale.clone(), self.bias, scale, None, None
        )

    def get_extra_state(self):
        return {"weight_bits": self.weight_bits}

    def set_extra_state(self, state):
        self.weight_bits = state["weight_bits"]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.bias is None and f"{prefix}bias" in state_dict:  # a re-parameterised layer's
            self.bias = nn.Parameter(torch.zeros_like(self.weight[:, 0]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self):
        return f"{super().extra_repr()}, weight {f'{self.weight_bits} bits' if self.weight_bits else 'float'}"
