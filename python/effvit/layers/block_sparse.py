"""Linear layers of which only some blocks of the weight are there: BlockSparseLinear and BlockSparseInt8Linear."""

import torch
from torch import nn

from ..ops import _checks
from ..ops.block_sparse_linear import BLOCKS
from ..reference.block_sparse_linear import dense_weight, kept_blocks
from ..reference.int8_linear import ACTIVATIONS
from . import _ops
from .int8 import QuantisedLinear, check_smooth, quantised_weight, scaled


def reason_not(in_features, out_features, block):
    """Why a layer of this size has no such blocks."""
    if in_features % block or out_features % block:
        return f"{out_features} x {in_features} is not made of blocks of {block} x {block}"
    return None


def check_blocks(layer, in_features, out_features, block, blocks):
    """The number of blocks; None: all."""
    if not _checks.is_int(block) or block not in BLOCKS:
        raise _checks.value_error(layer, "block", "16 or 32", block)
    for name, n in (("in_features", in_features), ("out_features", out_features)):
        if n % block:
            raise _checks.value_error(layer, name, f"a multiple of the block, {block}", n)
    most = in_features // block * (out_features // block)
    blocks = most if blocks is None else blocks
    if not _checks.is_int(blocks) or not 0 <= blocks <= most:
        raise _checks.value_error(layer, "blocks", f"between 0 and {most}", blocks)
    return blocks


def empty_parts(in_features, out_features, block, blocks, dtype, device):
    """(values, crow, columns) of a weight of zeros: equally many blocks in every row of blocks, spread evenly."""
    down, across = out_features // block, in_features // block
    counts = [blocks // down + (r < blocks % down) for r in range(down)]
    columns = [i * across // n for n in counts for i in range(n)]
    crow = torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    values = torch.zeros(blocks, block, block, dtype=dtype, device=device)
    return values, crow.to(device), torch.tensor(columns, dtype=torch.int32).to(device)


def chosen(owner, linear, block, density, mask):
    """(weight with zeros outside of the blocks to keep, mask of these, size of a block).

    Those of `mask`; else of density; else of `effvit.sparsify_`; else those that are not zero.
    """
    from .. import block_sparse
    from ..sparsify import BlockMask, mask_of

    weight, own = linear.weight.detach(), mask_of(linear)
    if isinstance(own, BlockMask) and block is None:
        block = own.block
    block = 16 if block is None else block
    check_blocks(owner, linear.in_features, linear.out_features, block, None)
    if mask is not None and density is not None:
        raise _checks.value_error(owner, "density", "None where a mask is given", density)
    if mask is None:
        if density is not None:
            mask = block_sparse.mask(weight, density=density, block=block)
        elif isinstance(own, BlockMask) and own.block == block:
            mask = own.entries()
        else:
            mask = weight != 0
    _, crow, columns = block_sparse.compress(weight, block=block, mask=mask)
    there = dense_weight(weight.new_ones(len(columns), block, block), crow, columns, linear.in_features)
    return weight * there, (crow, columns), block


class BlockSparseInt8Linear(QuantisedLinear):
    """`Int8Linear` of whose weight only some blocks are there: :func:`effvit.ops.block_sparse_int8_linear`.

    The state_dict holds values int8 [Z, B, B], crow int32 [N / B + 1] and columns int32 [Z]: see
    :func:`effvit.ops.block_sparse_linear`. Everything else is as in `Int8Linear`; in_features and out_features are
    multiples of `block`, 16 or 32; `blocks` is Z, None all of them.
    """

    integers = ("values", "crow", "columns")

    def __init__(
        self, in_features, out_features, bias=True, activation="none", static=False, smooth=False, int8_output=False,
        block=16, blocks=None, device=None, dtype=None,
    ):  # fmt: skip
        blocks = check_blocks("BlockSparseInt8Linear", in_features, out_features, block, blocks)
        super().__init__(in_features, out_features, bias, activation, static, smooth, int8_output, device, dtype)
        parts = empty_parts(in_features, out_features, block, blocks, torch.int8, device)
        for name, t in zip(self.integers, parts, strict=True):
            self.register_buffer(name, t)
        self.prepare()

    def pack(self):
        return None  # blocks are packed in every call

    def weights(self):
        """(values, crow, columns)."""
        if not torch.compiler.is_compiling() and not self.seen.is_current(self._sources()):
            self.prepare()
        return self.values, self.crow, self.columns

    def plain_weight(self):
        return dense_weight(self.values, self.crow, self.columns, self.in_features)

    @classmethod
    def from_linear(
        cls, linear, *, block=None, density=None, mask=None, activation="none", input_scale=None, output_scale=None,
        smooth=None, folded=False,
    ):  # fmt: skip
        """The layer of an nn.Linear; the blocks as in `BlockSparseLinear.from_linear`, the rest as in
        `Int8Linear.from_linear`. Blocks are chosen before smooth."""
        weight, (crow, columns), block = chosen(cls.__name__, linear, block, density, mask)
        check_smooth(cls.__name__, smooth, weight)
        q, scale = quantised_weight(cls.__name__, scaled(weight, smooth))
        inside = None if folded else smooth
        options = {"block": block, "blocks": len(columns)}
        layer = cls.empty_like(linear, activation, input_scale, output_scale, inside, **options)
        tensors = {"values": kept_blocks(q, crow, columns, block), "crow": crow, "columns": columns}
        return layer.fill(linear.weight, tensors, scale, linear.bias, input_scale, output_scale, inside)

    def options(self):
        return super().options() | {"block": self.values.shape[-1], "blocks": self.values.shape[0]}

    def extra_repr(self):
        return f"{super().extra_repr()}, {_blocks(self)}"


def _blocks(layer):
    block, n = layer.values.shape[-1], layer.values.shape[0]
    return f"block={block}, blocks={n} of {layer.in_features // block * (layer.out_features // block)}"


class BlockSparseLinear(nn.Module):
    """act(x Wᵀ + bias) with a W of which only some blocks are there, by :func:`effvit.ops.block_sparse_linear`.

    `values` [Z, B, B] are parameters, which training changes in their places; `crow` int32 [N / B + 1] and `columns`
    int32 [Z] say which places these are. in_features and out_features are multiples of `block`, 16 or 32; `blocks` is
    Z, None all of them. To train with dense weights, use `effvit.sparsify_`; `to_linear` is the way back.
    """

    def __init__(
        self, in_features, out_features, bias=True, block=16, blocks=None, activation="none", device=None, dtype=None
    ):
        blocks = check_blocks("BlockSparseLinear", in_features, out_features, block, blocks)
        _checks.index_of("BlockSparseLinear", "activation", activation, tuple(ACTIVATIONS))
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        dtype = torch.get_default_dtype() if dtype is None else dtype
        values, crow, columns = empty_parts(in_features, out_features, block, blocks, dtype, device)
        self.values = nn.Parameter(values)
        self.register_buffer("crow", crow)
        self.register_buffer("columns", columns)
        bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self):
        """As nn.Linear does, for the share of the weights that is there."""
        inputs = self.values.numel() / max(self.out_features, 1)
        bound = inputs**-0.5 if inputs else 0.0
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def plain_weight(self):
        """[out_features, in_features] with zeros, differentiable."""
        return dense_weight(self.values, self.crow, self.columns, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return _ops.block_sparse_linear(input, self.values, self.crow, self.columns, self.bias, self.activation)

    @classmethod
    def from_linear(cls, linear, *, block=None, density=None, mask=None, activation="none"):
        """The layer of an nn.Linear; it shares the bias.

        Args:
            block: 16 or 32; None: that of `effvit.sparsify_`, else 16.
            density: keep that share of the blocks, the largest: see `effvit.block_sparse.mask`.
            mask: bool [out_features, in_features]: keep the blocks of which it has any entry. With neither: those that
                `effvit.sparsify_` has chosen, else those that are not zero, which changes nothing.
            activation: "none", "relu", "gelu" or "silu", applied to the result.
        """
        weight, (crow, columns), block = chosen(cls.__name__, linear, block, density, mask)
        layer = cls(
            linear.in_features, linear.out_features, False, block, len(columns), activation, device="meta",
            dtype=weight.dtype,
        )  # fmt: skip
        values = kept_blocks(weight, crow, columns, block)
        layer.values = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        layer.crow, layer.columns = crow, columns
        layer.bias = linear.bias
        return layer

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An nn.Linear of the same values, with zeros where no block is; it shares the bias and has no activation."""
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=self.values.dtype)
        linear.weight = nn.Parameter(self.plain_weight(), requires_grad=self.values.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def options(self) -> dict:
        """The constructor's arguments for a layer that takes this one's state_dict."""
        return {
            "in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None,
            "block": self.values.shape[-1], "blocks": self.values.shape[0], "activation": self.activation,
        }  # fmt: skip

    def extra_repr(self):
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts += [f"activation={self.activation}"] if self.activation != "none" else []
        return ", ".join([*parts, _blocks(self)])
