"""int_attention with an int8 result against scaled_dot_product_attention and a composition of effvit's operators."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import functools

import torch
import torch.nn.functional as F

import effvit
from effvit.ops._op import Cost

SCALE, SCORE_SCALE = 1e-4, 0.06
SHAPES = {  # B, L, H, K, windows of the bias, bits of probabilities, tag
    "DeiT-S 8x197x6x64": (8, 197, 6, 64, 0, 8, "default"),
    "DeiT-S 8x197x6x64, 16 bits": (8, 197, 6, 64, 0, 16, "default"),
    "DeiT-T 8x197x3x64": (8, 197, 3, 64, 0, 8, "default"),
    "DeiT-B 1x197x12x64": (1, 197, 12, 64, 0, 8, "default"),
    "Swin-T stage 1 64x49x3x32, bias": (64, 49, 3, 32, 64, 8, "default"),
    "Swin-T stage 3 8x49x12x32, bias": (8, 49, 12, 32, 4, 8, "default"),
    "1024 tokens 1x1024x6x64": (1, 1024, 6, 64, 0, 8, "default"),
    "smoke 2x9x2x8": (2, 9, 2, 8, 1, 8, "smoke"),
}


def _inputs(dtype, device, B, L, H, K, W):
    qkv = torch.randint(-127, 128, (B, L, 3, H, K), dtype=torch.int32).to(device, torch.int8)
    bias = torch.randint(-30, 30, (W, H, L, L), dtype=torch.int32, device=device) if W else None
    floats = qkv.to(dtype).permute(2, 0, 3, 1, 4).contiguous()
    mask = None if bias is None else (bias * SCORE_SCALE).to(dtype).repeat(B // W, 1, 1, 1)
    return {"qkv": qkv, "bias": bias, "floats": floats, "mask": mask}


def _effvit(qkv, bias, floats, mask, bits):
    q, k, v = qkv.unbind(2)
    return functools.partial(
        effvit.int_attention, q, k, v, bias, scale=SCALE, score_scale=SCORE_SCALE, bits=bits, v_scale=1.0,
        out_scale=0.25, out_dtype=torch.int8,
    )  # fmt: skip


def _composed(qkv, bias, floats, mask, bits):
    """Four operators, with all that lies between them in memory."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    repeated = None if bias is None else bias.repeat(qkv.shape[0] // bias.shape[0], 1, 1, 1)
    dtype = torch.int8 if bits == 8 else torch.int16

    def run():
        scores = effvit.int8_matmul(
            q, k, transpose_b=True, scale=SCALE, out_scale=SCORE_SCALE, bits=8, out_dtype=torch.int32
        )
        scores = scores if repeated is None else scores + repeated
        p = effvit.shiftmax(scores, SCORE_SCALE, bits=bits, out_dtype=dtype)
        y = effvit.int8_matmul(p, v, scale=2.0 ** (1 - bits), out_scale=0.25, out_dtype=torch.int8)
        return y.transpose(1, 2).contiguous()

    return run


def _sdpa(qkv, bias, floats, mask):
    q, k, v = floats
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE).transpose(1, 2)


def cases():
    for name, (B, L, H, K, W, bits, tag) in SHAPES.items():
        pairs, tokens = B * H * L * L, B * L * H * K
        yield Case(
            shape=name,
            inputs=lambda dtype, device, s=(B, L, H, K, W): _inputs(dtype, device, *s),
            effvit=functools.partial(_effvit, bits=bits),
            peers={"SDPA": _sdpa, "composed": functools.partial(_composed, bits=bits)},
            reference=_sdpa,
            baseline="SDPA",
            compiled=None,
            products=torch.int8,
            cost=lambda direction, dtype, n=pairs * (4 * K + 28), b=4 * tokens + W * H * L * L * 4: Cost(n, b),
            unchecked=("effvit", "composed"),  # integers, which the suite compares bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("int_attention", cases()))
