"""timm's attention with its products on quantised operands: what `effvit.calibrate_ptq` puts in its place."""

from __future__ import annotations

import torch
from timm.models import swin_transformer as timm_swin
from timm.models import vision_transformer as timm_vit
from torch import nn

from .layers.ptq import FakeQuantizer

OPERANDS = ("q_act", "k_act", "softmax_act", "v_act")


class PTQAttention(timm_vit.Attention):
    """timm's Attention: q kᵀ and softmax(..) v of quantised operands. `attn_mask` is added, or, of bools, excludes."""

    def forward(self, x, attn_mask=None, is_causal=False):
        B, N, _ = x.shape
        gate = getattr(self, "gate", None)
        gate = None if gate is None else gate(x).sigmoid()
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_act(self.q_norm(q)), self.k_act(self.k_norm(k))
        scores = (q @ k.transpose(-2, -1)) * self.scale
        if is_causal:
            attn_mask = torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        attn = self.attn_drop(self.softmax_act(scores.softmax(-1), v))
        y = (attn @ self.v_act(v)).transpose(1, 2).reshape(B, N, -1)
        y = self.norm(y) if hasattr(self, "norm") else y
        y = y if gate is None else y * gate
        return self.proj_drop(self.proj(y))


class PTQWindowAttention(timm_swin.WindowAttention):
    """timm's WindowAttention of Swin: likewise, with its position bias and mask."""

    def forward(self, x, mask=None):
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (self.q_act(q) @ self.k_act(k).transpose(-2, -1)) * self.scale + self._get_rel_pos_bias()
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(-1, windows, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.num_heads, N, N)
        attn = self.attn_drop(self.softmax_act(self.softmax(scores), v))
        y = (attn @ self.v_act(v)).transpose(1, 2).reshape(B, N, -1)
        return self.proj_drop(self.proj(y))


CLASSES = {timm_vit.Attention: PTQAttention, timm_swin.WindowAttention: PTQWindowAttention}


def swap(attention: nn.Module) -> None:
    """The attention becomes one with quantisers, nothing quantised yet."""
    attention.__class__ = CLASSES[type(attention)]
    device = next(attention.parameters()).device
    for name in OPERANDS:
        attention.add_module(name, FakeQuantizer().to(device))
