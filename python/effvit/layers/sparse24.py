"""Linear layers whose weights are 2:4 sparse: Sparse24Linear in floating point, Sparse24Int8Linear in int8."""

import torch
from torch import nn

import effvit.ops

from ..ops import _checks
from . import _ops
from .int8 import QuantisedLinear, check_smooth, quantised_weight, scaled

FIRST_TWO = 0x44  # of the metadata: both groups of a byte keep their entries 0 and 1
EMPTY_GROUP = 0xE  # what pads the last byte: entries 2 and 3, of a group that is not there


def check_width(layer, in_features):
    if in_features % 4:
        raise _checks.value_error(layer, "in_features", "a multiple of 4", in_features)


def empty_parts(out_features, in_features, dtype, device):
    """(values, meta) of a weight of zeros."""
    values = torch.zeros(out_features, in_features // 2, dtype=dtype, device=device)
    meta = torch.full((out_features, (in_features + 7) // 8), FIRST_TWO, dtype=torch.uint8, device=device)
    if in_features % 8 and in_features:
        meta[:, -1] = EMPTY_GROUP << 4 | FIRST_TWO & 0xF
    return values, meta


def pruned(owner, weight, algorithm):
    """The weight with the two entries of every four that `algorithm` keeps."""
    check_width(owner, weight.shape[1])
    weight = weight.detach()
    return weight * _ops.sparse24_mask(weight, algorithm=algorithm).to(weight.dtype)


class Sparse24Int8Linear(QuantisedLinear):
    """`Int8Linear` with two of every four weights along in_features zero: :func:`effvit.ops.sparse24_int8_linear`.

    The state_dict holds values int8 [N, K/2] and metadata uint8 [N, K/8] in the canonical form of
    :func:`effvit.ops.sparse24_compress`; on a CPU a copy in the kernels' order is derived from them. Everything else is
    as in `Int8Linear`; in_features is a multiple of 4.
    """

    integers = ("values", "metadata")

    def __init__(
        self, in_features, out_features, bias=True, activation="none", static=False, smooth=False, int8_output=False,
        device=None, dtype=None,
    ):  # fmt: skip
        check_width("Sparse24Int8Linear", in_features)
        super().__init__(in_features, out_features, bias, activation, static, smooth, int8_output, device, dtype)
        values, meta = empty_parts(out_features, in_features, torch.int8, device)
        self.register_buffer("values", values)
        self.register_buffer("metadata", meta)
        self.prepare()

    def pack(self):
        return effvit.ops.sparse24_prepack(self.values, self.metadata)

    def plain_weight(self):
        return effvit.ops.sparse24_decompress(self.values, self.metadata)

    @classmethod
    def from_linear(
        cls, linear, *, algorithm="magnitude", activation="none", input_scale=None, output_scale=None, smooth=None,
        folded=False,
    ):  # fmt: skip
        """The layer of an nn.Linear, pruned by `algorithm` ("magnitude" or "transposable", nothing changes where its
        weight is 2:4 already) and quantised. The rest is as in `Int8Linear.from_linear`; pruning comes before smooth.
        """
        check_smooth(cls.__name__, smooth, linear.weight)
        weight = scaled(pruned(cls.__name__, linear.weight, algorithm), smooth)
        q, scale = quantised_weight(cls.__name__, weight)
        values, meta = effvit.ops.sparse24_compress(q)
        inside = None if folded else smooth
        layer = cls.empty_like(linear, activation, input_scale, output_scale, inside)
        tensors = {"values": values, "metadata": meta}
        return layer.fill(linear.weight, tensors, scale, linear.bias, input_scale, output_scale, inside)


class Sparse24Linear(nn.Module):
    """nn.Linear with a 2:4 sparse weight in floating point, by :func:`effvit.ops.sparse24_linear`.

    `values` [N, K/2] are parameters, which training changes in their places; `metadata` uint8 [N, K/8] says which
    places these are, in the canonical form of :func:`effvit.ops.sparse24_compress`. in_features is a multiple of 4. To
    train the choice of places as well, use `effvit.sparsify_`.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        check_width("Sparse24Linear", in_features)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        dtype = torch.get_default_dtype() if dtype is None else dtype
        values, meta = empty_parts(out_features, in_features, dtype, device)
        self.values = nn.Parameter(values)
        self.register_buffer("metadata", meta)
        bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self):
        """As nn.Linear does, for the half of the weights that is there."""
        bound = (self.in_features // 2) ** -0.5 if self.in_features else 0.0
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def plain_weight(self):
        """[out_features, in_features] with zeros, differentiable."""
        return effvit.ops.sparse24_decompress(self.values, self.metadata)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return _ops.sparse24_linear(input, self.values, self.metadata, self.bias)

    @classmethod
    def from_linear(cls, linear, *, algorithm="magnitude"):
        """The layer of an nn.Linear, pruned by `algorithm` ("magnitude" or "transposable"); it shares the bias."""
        weight = pruned(cls.__name__, linear.weight, algorithm)
        layer = cls(linear.in_features, linear.out_features, False, device="meta", dtype=weight.dtype)
        values, layer.metadata = effvit.ops.sparse24_compress(weight)
        layer.values = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        layer.bias = linear.bias
        return layer

    def options(self) -> dict:
        """The constructor's arguments for a layer that takes this one's state_dict."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
