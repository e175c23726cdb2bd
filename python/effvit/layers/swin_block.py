"""Swin v1 transformer block on whole feature maps: timm's constructor and state_dict, no partition, roll or padding."""

import torch
from torch import nn

from .window_attention import WindowAttention, pair, shift_mask


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of a sample with probability drop_prob, in training."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        sample = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (sample / keep if keep > 0.0 else sample)

    def extra_repr(self):
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Two linear layers with an activation; timm's parameter names."""

    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, hidden_features, **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, in_features, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class SwinTransformerBlock(nn.Module):
    """Swin v1 block, a drop-in for `timm.models.swin_transformer.SwinTransformerBlock`.

    x [B, H, W, C] -> [B, H, W, C], or x [B, H*W, C] of `input_resolution` as Microsoft's block takes it. The attention
    reads the map in place: what timm rolls, pads, partitions, masks and merges is index arithmetic inside the operator,
    so the block takes maps of any size, whatever input_resolution was. As in timm, input_resolution decides the window
    (no larger than the map, unless always_partition) and whether there is a shift. `dynamic_mask` is accepted and does
    nothing: no mask exists.

    Dropout after the projection draws one value per map position (timm draws them per window position, padding
    included), so random streams differ from timm's; the distribution is the same.

    Compared with timm 1.0.31, models/swin_transformer.py, and with microsoft/Swin-Transformer,
    models/swin_transformer.py at f82860b. The arguments are in timm's order; pass Microsoft's by name: `qk_scale`,
    `drop` (timm's `proj_drop`) and `fused_window_process`, which does nothing. A map no larger than the window on
    one axis alone limits window and shift there, as in timm; Microsoft's block makes the window square and drops the
    shift of both axes. A state_dict of Microsoft's loads strictly: `attn_mask` must be that of this window and shift
    (an error of load_state_dict otherwise; masks of other resolutions pass) and is dropped.
    """

    def __init__(
        self, dim, input_resolution, num_heads=4, head_dim=None, window_size=7, shift_size=0, always_partition=False,
        dynamic_mask=False, mlp_ratio=4.0, qkv_bias=True, proj_drop=0.0, attn_drop=0.0, drop_path=0.0,
        act_layer=nn.GELU, norm_layer=nn.LayerNorm, qk_scale=None, drop=None, fused_window_process=False, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        if drop is not None:
            if proj_drop:
                raise ValueError(
                    f"effvit::SwinTransformerBlock: proj_drop must be 0 where drop is given, got {proj_drop}"
                )
            proj_drop = drop
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.input_resolution = pair(input_resolution)
        self.target_shift_size = pair(shift_size)
        self.always_partition = always_partition
        self.dynamic_mask = dynamic_mask
        self.window_size, self.shift_size = self._calc_window_shift(window_size, shift_size)
        self.window_area = self.window_size[0] * self.window_size[1]
        self.mlp_ratio = mlp_ratio

        self.norm1 = norm_layer(dim, **factory)
        self.attn = WindowAttention(
            dim, num_heads, head_dim, self.window_size, qkv_bias, attn_drop, proj_drop, qk_scale, **factory
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def _calc_window_shift(self, window_size, shift_size=None):
        window_size = pair(window_size)
        if shift_size is None:  # a new window of a shifted block is shifted by half of it
            shifted = any(self.target_shift_size)
            shift_size = (window_size[0] // 2, window_size[1] // 2) if shifted else self.target_shift_size
        shift_size = pair(shift_size)
        if self.always_partition:
            return window_size, shift_size
        sides = list(zip(self.input_resolution, window_size, shift_size, strict=True))
        return tuple(min(r, w) for r, w, _ in sides), tuple(0 if r <= w else s for r, w, s in sides)

    def set_input_size(self, feat_size, window_size, always_partition=None):
        """Adapts window, shift and bias table to another resolution and window, as timm does."""
        self.input_resolution = pair(feat_size)
        if always_partition is not None:
            self.always_partition = always_partition
        self.window_size, self.shift_size = self._calc_window_shift(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]
        self.attn.set_window_size(self.window_size)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):  # fmt: skip
        mask = state_dict.pop(prefix + "attn_mask", None)
        if mask is not None and not self._masks_as(mask):
            error_msgs.append(
                f"effvit::SwinTransformerBlock: {prefix}attn_mask must be that of window {list(self.window_size)} and "
                f"shift {list(self.shift_size)}, got another one, {list(mask.shape)}"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def _masks_as(self, mask):
        """Whether mask [nW, N, N] is what this block masks, as far as a mask of another resolution can tell."""
        if not any(self.shift_size) or mask.dim() != 3 or tuple(mask.shape[1:]) != (self.window_area,) * 2:
            return False
        (H, W), (wh, ww) = self.input_resolution, self.window_size
        if mask.is_meta or H % wh or W % ww or mask.shape[0] != (H // wh) * (W // ww):
            return True
        return torch.equal(mask, shift_mask(H, W, self.window_size, self.shift_size, mask.device, mask.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 3:
            H, W = self.input_resolution
            if x.shape[1] != H * W:
                raise ValueError(
                    f"effvit::SwinTransformerBlock: x must be [B, H, W, C], or [B, {H * W}, C] for input_resolution "
                    f"{[H, W]}, got {list(x.shape)}"
                )
            return self.forward_map(x.unflatten(1, (H, W))).flatten(1, 2)
        return self.forward_map(x)

    def forward_map(self, x):
        x = x + self.drop_path1(self.attn(self.norm1(x), shift=self.shift_size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
