"""IntegerBlock, a transformer block by integers alone, against timm's block in float32: DeiT-S and Swin-T.

The integers are checked bit by bit against the block that is trained, and their values against the float block, before
anything is timed. Shapes "beside int8" have a peer more: timm's block after effvit.patch and effvit.quantize_, whose
linear layers are int8 and whose rest is floating point.
"""

import copy

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import timm.models.swin_transformer as timm_swin
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

import effvit
from effvit import integer_models
from effvit.layers import IntegerBits, QuantAct, Quantised

MOST_ERROR = 0.05  # of a block's result, relative to the float block's: 8 bits
SOFTMAX_BITS = 8


def converted(x, block):
    """(the trained form, calibrated on x; x as it takes it)"""
    bits = IntegerBits(softmax=16 if x.dim() == 3 else SOFTMAX_BITS)
    make = integer_models._vit_block if x.dim() == 3 else integer_models._swin_block
    trained = make("block", block, bits).eval()
    act = QuantAct(16).train()
    with torch.no_grad(), integer_models.calibrating(trained):
        trained(Quantised(x))
    with torch.no_grad():
        return trained, act(x)


def integer(x, block):
    trained, q = converted(x, block)
    deployed, scale = trained.deployed(q.scale)
    with torch.no_grad():
        out, expected = deployed(q.integers), trained(q)
        exact = copy.deepcopy(block).double()(x.double())
    if not torch.equal(out, expected.integers):
        raise AssertionError("the deployed block does not compute the integers of the trained one")
    error = float((out * scale - exact).norm() / exact.norm())
    if error > MOST_ERROR:
        raise AssertionError(f"relative error {error:.3g} of the integers, at most {MOST_ERROR}")
    return lambda: deployed(q.integers)


def eager(x, block):
    block = copy.deepcopy(block).to(x.dtype)
    return lambda: block(x)


def int8(x, block):
    model = nn.Sequential(copy.deepcopy(block))
    effvit.patch(model, verify=False, verbose=False)
    effvit.quantize_(model, verbose=False)
    return lambda: model(x)


def case(label, shape, make, tags, beside=False):
    def inputs(dtype, device):
        block = make().eval().requires_grad_(False)
        for m in block.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
        return {"x": torch.randn(shape, device=device), "block": block.to(device)}

    return Case(
        shape=label,
        inputs=inputs,
        effvit=integer,
        peers={"eager": eager, **({"int8": int8} if beside else {})},
        reference=eager,
        unchecked=("effvit",),
        approximate={"int8": MOST_ERROR},
        directions=("forward",),
        dtypes=("float32",),
        tags=tags,
    )


def deit(dim, heads):
    return lambda: timm_vit.Block(dim, heads, qkv_bias=True)


def swin(dim, heads, side, shift):
    return lambda: timm_swin.SwinTransformerBlock(dim, (side, side), heads, window_size=7, shift_size=shift)


def cases():
    for batch in (1, 8):
        shape = (batch, 197, 384)
        yield case(f"DeiT-S block {batch}x197x384 h6", shape, deit(384, 6), ("default",))
        yield case(f"DeiT-S block {batch}x197x384 h6 beside int8", shape, deit(384, 6), ("default",), beside=True)
    yield case("DeiT-B block 1x197x768 h12", (1, 197, 768), deit(768, 12), ("extended",))
    yield case("Swin-T block 1x56x56x96 h3 shift 3", (1, 56, 56, 96), swin(96, 3, 56, 3), ("default",))
    yield case("Swin-T block 1x14x14x384 h12 shift 3", (1, 14, 14, 384), swin(384, 12, 14, 3), ("default",))
    yield case("smoke 2x17x24 h3", (2, 17, 24), deit(24, 3), ("smoke",))


if __name__ == "__main__":
    raise SystemExit(main("integer_block", cases(), kernel_op="int_attention"))
