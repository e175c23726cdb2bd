"""Swin's window attention module: timm's constructor and state_dict, one fused operator on the whole feature map."""

import torch
import torch.nn.functional as F
from torch import nn

import effvit.ops

from ._qkv import split_qkv
from ._tokens import is_hooked


def pair(x):
    return tuple(x) if isinstance(x, (tuple, list)) else (x, x)


def relative_position_index(window, device=None):
    """[N, N] row of `relative_position_bias_table` for every pair (query, key) of a window's N tokens."""
    wh, ww = window
    y = torch.arange(wh, device=device).repeat_interleave(ww)
    x = torch.arange(ww, device=device).repeat(wh)
    return (y[:, None] - y[None, :] + wh - 1) * (2 * ww - 1) + (x[:, None] - x[None, :] + ww - 1)


def window_partition(x, window):
    """[B, H, W, C] -> [B*nW, N, C]; window divides H and W."""
    B, H, W, C = x.shape
    wh, ww = window
    x = x.reshape(B, H // wh, wh, W // ww, ww, C).transpose(2, 3)
    return x.reshape(-1, wh * ww, C)


def window_merge(x, window, H, W):
    """[B*nW, N, C] -> [B, H, W, C], the inverse of window_partition."""
    wh, ww = window
    x = x.reshape(-1, H // wh, W // ww, wh, ww, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, H, W, x.shape[-1])


def shift_mask(H, W, window, shift, device=None, dtype=None):
    """[nW, N, N] mask of a rolled map whose sides window divides: -100 between tokens of different shift regions."""
    regions = []
    for size, w, s in zip((H, W), window, shift, strict=True):
        i = torch.arange(size, device=device)
        regions.append((i >= size - w).long() + (i >= size - s).long() if s else torch.zeros_like(i))
    region = (regions[0][:, None] * 3 + regions[1][None, :])[None, :, :, None]
    region = window_partition(region, window)[..., 0]
    return (region[:, :, None] != region[:, None, :]).to(dtype) * -100.0


class WindowAttentionForward:
    """The forward of a module that has timm's Swin v1 attributes: shared by `WindowAttention` and `effvit.patch`.

    Where the operator does not apply, the same function is computed by plain PyTorch (`forward_eager`):
    an explicit mask, active attention dropout (`attn_drop` > 0 in training), float64, and hooks on `softmax` or
    `attn_drop`, which fire there.
    """

    def forward(self, x, mask=None, shift=(0, 0), roll_before_pad=True):
        """x [nW*B, N, C] (windows, as in timm) -> [nW*B, N, dim], or x [B, H, W, C] (a map) -> [B, H, W, dim].

        `mask` [nW, N, N] is added to the logits of window i % nW; it may hold any values, and it selects plain
        PyTorch. A shifted map needs no mask: pass the map and `shift`.
        """
        if x.dim() == 4:
            if mask is not None:
                raise ValueError("effvit::WindowAttention: mask must be None for a map [B, H, W, C], use shift")
            return self.forward_map(x, shift, roll_before_pad)
        if mask is not None or self._needs_eager(x):
            return self.forward_eager(x, mask)
        return self.forward_map(x.unflatten(1, self.window_size)).flatten(1, 2)

    def forward_map(self, x, shift=(0, 0), roll_before_pad=True):
        """x [B, H, W, C] -> [B, H, W, dim]: attention in windows of the map rolled by -shift, padded where needed."""
        if self._needs_eager(x):
            return self._forward_map_eager(x, shift, roll_before_pad)
        H, W = x.shape[1:3]
        wh, ww = self.window_size
        # A compiler gets the padded form at any size: a branch on H would be a guard on every dynamic shape.
        padded = torch.compiler.is_compiling() or H % wh or W % ww
        token = None
        if type(self.qkv) is nn.Linear and not is_hooked(self.qkv):
            qkv = self.qkv(x)
            token = self.qkv.bias
        elif padded:  # an adapter, a quantised projection, one with hooks: called once, on what it sees in timm
            qkv = self.qkv(F.pad(x, (0, 0, 0, -W % ww, 0, -H % wh)))
            token = qkv[:, -1, -1][:1].sum(0)  # not outside of the map where nothing is padded: nobody reads it there
            qkv = qkv[:, :H, :W]
        else:
            qkv = self.qkv(x)
        q, k, v = split_qkv(qkv, self.num_heads)
        pad_k = pad_v = None
        if padded:
            token = qkv.new_zeros(qkv.shape[-1]) if token is None else token.to(qkv.dtype)
            pad_k, pad_v = token.unflatten(0, (3, self.num_heads, -1)).unbind(0)[1:]
        table = self.relative_position_bias_table.view(2 * wh - 1, 2 * ww - 1, self.num_heads).permute(2, 0, 1)
        out, _ = effvit.ops.window_attention(
            q, k, v, table, None, pad_k, pad_v,
            window=self.window_size, shift=tuple(shift), scale=self.scale, roll_before_pad=roll_before_pad,
        )  # fmt: skip
        return self.proj_drop(self.proj(out.flatten(-2)))

    def forward_eager(self, x, mask=None):
        """x [nW*B, N, C], mask [nW, N, N] or None -> [nW*B, N, dim], in plain PyTorch."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        index = relative_position_index(self.window_size, x.device)
        attn = (q * self.scale) @ k.transpose(-2, -1) + self.relative_position_bias_table[index].permute(2, 0, 1)
        if mask is not None:
            attn = (attn.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        x = self.attn_drop(self.softmax(attn)).to(v.dtype) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(-2)))

    def _forward_map_eager(self, x, shift, roll_before_pad):
        H, W = x.shape[1:3]
        (wh, ww), (sh, sw) = self.window_size, shift
        pad = (0, 0, 0, -W % ww, 0, -H % wh)
        x = F.pad(x.roll((-sh, -sw), (1, 2)), pad) if roll_before_pad else F.pad(x, pad).roll((-sh, -sw), (1, 2))
        Hp, Wp = x.shape[1:3]
        mask = shift_mask(Hp, Wp, self.window_size, shift, x.device, x.dtype) if any(shift) else None
        x = window_merge(self.forward_eager(window_partition(x, self.window_size), mask), self.window_size, Hp, Wp)
        if roll_before_pad:
            return x[:, :H, :W].roll((sh, sw), (1, 2))
        return x.roll((sh, sw), (1, 2))[:, :H, :W]

    def _needs_eager(self, x):
        drop = self.attn_drop
        inactive = not drop.training or isinstance(drop, nn.Identity) or (type(drop) is nn.Dropout and drop.p == 0)
        return not inactive or x.dtype == torch.float64 or is_hooked(self.softmax) or is_hooked(drop)


class WindowAttention(WindowAttentionForward, nn.Module):
    """Swin v1 window attention, a drop-in for `timm.models.swin_transformer.WindowAttention`.

    Same constructor, same state_dict, same `forward(x, mask)`. The gain needs the block's roll, padding and partition
    gone too: call it with the map itself, `forward(x[B, H, W, C], shift=...)`, or use `SwinTransformerBlock`.
    See `WindowAttentionForward` for the cases that run as plain PyTorch.

    Compared with timm 1.0.31, models/swin_transformer.py, and with microsoft/Swin-Transformer,
    models/swin_transformer.py at f82860b. The arguments are in timm's order: pass Microsoft's by name, `qk_scale` among
    them. A state_dict of Microsoft's loads strictly: its `relative_position_index` must be that of this window (an
    error of load_state_dict otherwise) and is dropped. None is saved, as in timm.
    """

    def __init__(
        self, dim, num_heads, head_dim=None, window_size=7, qkv_bias=True, attn_drop=0.0, proj_drop=0.0,
        qk_scale=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if isinstance(num_heads, (tuple, list)):
            raise TypeError(
                f"effvit::WindowAttention: num_heads must be an int, got {num_heads}: the arguments are in timm's "
                "order, pass Microsoft's by name"
            )
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = pair(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]
        head_dim = head_dim or dim // num_heads
        self.scale = qk_scale or head_dim**-0.5
        wh, ww = self.window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * wh - 1) * (2 * ww - 1), num_heads, **factory))
        self.qkv = nn.Linear(dim, 3 * head_dim * num_heads, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(head_dim * num_heads, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):  # fmt: skip
        index = state_dict.get(prefix + "relative_position_index")
        if "relative_position_index" not in self._buffers:
            state_dict.pop(prefix + "relative_position_index", None)
        if index is not None and not index.is_meta:
            own = relative_position_index(self.window_size, index.device)
            if not torch.equal(index, own):
                error_msgs.append(
                    f"effvit::WindowAttention: {prefix}relative_position_index must be that of window "
                    f"{list(self.window_size)}, {list(own.shape)}, got another one, {list(index.shape)}"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def set_window_size(self, window_size):
        """Resizes the bias table to another window as timm does (a geometric-grid interpolation; needs timm)."""
        window_size = pair(window_size)
        if window_size == self.window_size:
            return
        from timm.layers import resize_rel_pos_bias_table

        old, table = self.window_size, self.relative_position_bias_table
        rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        with torch.no_grad():
            resized = resize_rel_pos_bias_table(
                table, new_window_size=window_size, new_bias_shape=(rows, self.num_heads), old_window_size=old
            )
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.window_size = window_size
        self.window_area = window_size[0] * window_size[1]

    def extra_repr(self):
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"
