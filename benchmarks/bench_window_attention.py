"""window_attention against timm's eager path, SDPA and torch.compile: from qkv [B, H, W, 3C] to out [B, H, W, C].

Roll, partition, merge, the gather of the bias and the addition of the mask are timed with every peer, as in the models.
"""

import dataclasses
import math

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.layers._qkv import split_qkv
from effvit.reference.window_attention import window_attention as definition
from effvit.testing.window_attention import SPEC

F = torch.nn.functional


@dataclasses.dataclass(frozen=True)
class Shape:
    """Geometry of one case; C = heads * d."""

    name: str
    B: int
    H: int
    heads: int
    window: int
    shift: int = 0
    d: int = 32
    halo: int = 0
    cosine: bool = False
    bias: bool = True
    tags: tuple = ("default",)
    memory: bool = False

    @property
    def kernel_args(self):
        pairs = {"window": self.window, "shift": self.shift, "halo": self.halo}
        return {name: (value, value) for name, value in pairs.items()}

    @property
    def table_side(self):
        return 2 * self.window - 1 + 2 * self.halo

    def cost(self, direction, dtype):
        """Matrix products only; each tensor moved once. Training is a forward and a backward call."""
        q = torch.empty(self.B, self.H, self.H, self.heads, self.d, dtype=dtype, device="meta")
        table = torch.empty(self.heads, self.table_side, self.table_side, dtype=dtype, device="meta")
        table = table if self.bias else None
        calls = [SPEC.cost((q, q, q, table), self.kernel_args, backward) for backward in (False, True)]
        calls = calls[: 1 if direction == "forward" else 2]
        return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))


def swin(name, size, heads, **kwargs):
    return [Shape(f"{name} {size}x{size} h{heads} shift {s}", 8, size, heads, 7, s, **kwargs) for s in (0, 3)]


# timm does not shift where one window covers the map (stage 4); shift 3 there is timed as the operator defines it.
SHAPES = [
    *swin("Swin-T", 56, 3, memory=True),
    *swin("Swin-T", 28, 6),
    *swin("Swin-T", 14, 12),
    *swin("Swin-T", 7, 24),
    Shape("Swin-B/384 96x96 h4 window 12 shift 6", 2, 96, 4, 12, 6, tags=("extended",)),
    Shape("window 16 64x64 h6 shift 8", 2, 64, 6, 16, 8, tags=("extended",)),
    Shape("Swin v2 64x64 h3 window 8 shift 4", 8, 64, 3, 8, 4, cosine=True, tags=("extended",)),
    Shape("Swin v2 64x64 h3 window 16 shift 8", 2, 64, 3, 16, 8, cosine=True, tags=("extended",)),
    Shape("HAT overlap 64x64 h6 window 16 halo 4", 1, 64, 6, 16, 0, d=30, halo=4, tags=("extended",)),
    Shape("MaxViT 56x56 h2 window 7", 8, 56, 2, 7, tags=("extended",)),
    # Large windows and wide heads. Without a bias the peers have the least to do beside the products.
    Shape("window 16 32x32 h2 d128", 1, 32, 2, 16, d=128, bias=False, tags=("extended",)),
    Shape("window 32 32x32 h2 d64", 1, 32, 2, 32, d=64, bias=False, tags=("extended",)),
    Shape("window 32 32x32 h2 d64 bias", 1, 32, 2, 32, d=64, tags=("extended",)),
    Shape("global 64x64 h1 d64", 1, 64, 1, 64, d=64, bias=False, tags=("extended",)),
    Shape("window 7 14x14 h1 d512", 2, 14, 1, 7, d=512, bias=False, tags=("extended",)),
    Shape("smoke 8x8 h2 window 4 shift 0", 1, 8, 2, 4, 0, d=16, tags=("smoke",)),
    Shape("smoke 8x8 h2 window 4 shift 2", 1, 8, 2, 4, 2, d=16, tags=("smoke",), memory=True),
    Shape("smoke 8x8 h2 window 4 cosine", 1, 8, 2, 4, 2, d=16, cosine=True, tags=("smoke",)),
    Shape("smoke 8x8 h2 window 4 no bias", 1, 8, 2, 4, 0, d=16, bias=False, tags=("smoke",)),
    Shape("smoke 8x8 h2 window 4 halo 2", 1, 8, 2, 4, 0, d=15, halo=2, tags=("smoke",)),
]


def inputs_of(shape):
    def draw(dtype, device):
        C = shape.heads * shape.d
        qkv = torch.randn(shape.B, shape.H, shape.H, 3 * C)
        drawn = {"qkv": qkv}
        if shape.bias:
            drawn["table"] = 0.5 * torch.randn(shape.table_side**2, shape.heads)  # as timm stores it
        if shape.cosine:
            drawn["logit_scale"] = math.log(10) + 0.2 * torch.randn(shape.heads)
        return {name: t.to(device, dtype) for name, t in drawn.items()}

    return draw


def table_of(shape, table):
    """timm's [(2w-1)^2, h] parameter as the [h, 2w-1, 2w-1] view that the op takes."""
    return None if table is None else table.view(shape.table_side, shape.table_side, shape.heads).permute(2, 0, 1)


def effvit_path(shape, op=effvit.ops.window_attention):
    def make(qkv, table=None, logit_scale=None):
        def fn():
            q, k, v = split_qkv(qkv, shape.heads)
            pad = {}
            if shape.halo:  # tokens outside the map are zeros that join the softmax
                zero = qkv.new_zeros(shape.heads, shape.d)
                pad = {"pad_k": zero, "pad_v": zero}
            out, _ = op(q, k, v, table_of(shape, table), logit_scale, **pad, **shape.kernel_args)
            return out.flatten(-2)

        return fn

    return make


def reference_path(shape):
    """The definition, in the dtype of its inputs (the harness passes float64)."""
    return effvit_path(shape, definition)


# ---- peers --------------------------------------------------------------------------------------------------------


def timm_path(shape, fused):
    """timm's own block code between the qkv and proj layers; `fused` is its SDPA with the mask added to the bias."""

    def make(qkv, table):
        from timm.models import swin_transformer as timm_swin

        C, window, side = shape.heads * shape.d, shape.window, (shape.window, shape.window)
        block = timm_swin.SwinTransformerBlock(
            C, (shape.H, shape.H), shape.heads, window_size=window, shift_size=shape.shift, always_partition=True
        ).to(qkv.device, qkv.dtype)
        attn, mask = block.attn, block.attn_mask  # the mask and the bias index are precomputed; the bias is gathered
        attn.qkv = attn.proj = torch.nn.Identity()
        attn.fused_attn = fused
        del attn.relative_position_bias_table
        attn.relative_position_bias_table = table  # the input itself, so that its gradient is taken

        def fn():
            x = qkv
            if shape.shift:
                x = torch.roll(x, shifts=(-shape.shift, -shape.shift), dims=(1, 2))
            x = timm_swin.window_partition(x, side).view(-1, window * window, 3 * C)
            x = attn(x, mask=mask).view(-1, window, window, C)
            x = timm_swin.window_reverse(x, side, shape.H, shape.H)
            if shape.shift:
                x = torch.roll(x, shifts=(shape.shift, shape.shift), dims=(1, 2))
            return x

        return fn

    return make


def partition(x, window):  # [B, H, W, C] -> [B * windows, window * window, C]
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C).transpose(2, 3)
    return x.reshape(-1, window * window, C)


def merge(x, window, B, H):  # the inverse
    n = H // window
    return x.view(B, n, n, window, window, -1).transpose(2, 3).reshape(B, H, H, -1)


def plain_path(shape, fused):
    """What timm has no module for: cosine attention on a given table (Swin v2), overlapping keys (HAT), no bias."""

    def make(qkv, table=None, logit_scale=None):
        w, h, d, halo, shift = shape.window, shape.heads, shape.d, shape.halo, shape.shift
        wide, n = w + 2 * halo, shape.H // w
        query, key = torch.arange(w), torch.arange(-halo, w + halo)
        offset = query[:, None] - key[None, :] + w - 1 + halo
        index = (offset[:, None, :, None] * shape.table_side + offset[None, :, None, :]).reshape(-1).to(qkv.device)
        mask = None
        if shift:
            at = torch.arange(shape.H)
            axis = (at >= shape.H - w).long() + (at >= shape.H - shift).long()
            labels = partition((3 * axis[:, None] + axis[None, :])[None, :, :, None], w).squeeze(-1)
            mask = ((labels[:, :, None] != labels[:, None, :]) * -100.0).to(qkv.device, qkv.dtype)

        def fn():
            x = torch.roll(qkv, shifts=(-shift, -shift), dims=(1, 2)) if shift else qkv
            if halo:
                q, kv = x.split((h * d, 2 * h * d), dim=-1)
                q = partition(q, w).view(-1, w * w, h, d).transpose(1, 2)
                kv = F.pad(kv, (0, 0, halo, halo, halo, halo)).unfold(1, wide, w).unfold(2, wide, w)
                kv = kv.reshape(-1, 2, h, d, wide * wide).permute(1, 0, 2, 4, 3)
                k, v = kv.unbind(0)
            else:
                q, k, v = partition(x, w).view(-1, w * w, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
            bias = None
            if table is not None:
                bias = table[index].view(w * w, wide * wide, h).permute(2, 0, 1).contiguous().unsqueeze(0)
            scale = d**-0.5
            if logit_scale is not None:
                q = F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100)).exp()[:, None, None]
                k, scale = F.normalize(k, dim=-1), 1.0
            if fused:
                if mask is not None:
                    bias = (bias + mask[None, :, None].expand(shape.B, -1, h, -1, -1).flatten(0, 1)).contiguous()
                x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
            else:
                s = (q * scale) @ k.transpose(-2, -1)
                s = s if bias is None else s + bias
                if mask is not None:
                    s = (s.view(-1, n * n, h, w * w, w * w) + mask[None, :, None]).flatten(0, 1)
                x = s.softmax(dim=-1) @ v
            x = merge(x.transpose(1, 2).reshape(-1, w * w, h * d), w, shape.B, shape.H)
            return torch.roll(x, shifts=(shift, shift), dims=(1, 2)) if shift else x

        return fn

    return make


def cases():
    for shape in SHAPES:
        peer = timm_path if shape.bias and not (shape.cosine or shape.halo) else plain_path
        yield Case(
            shape=shape.name,
            inputs=inputs_of(shape),
            effvit=effvit_path(shape),
            peers={"eager": peer(shape, fused=False), "sdpa": peer(shape, fused=True)},
            reference=reference_path(shape),
            cost=shape.cost,
            wrt=("qkv", *["table"] * shape.bias, *["logit_scale"] * shape.cosine),
            memory=shape.memory,
            tags=shape.tags,
        )


if __name__ == "__main__":
    raise SystemExit(main("window_attention", cases()))
