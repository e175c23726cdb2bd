"""UniRepLKNet: a large depthwise convolution trained beside dilated ones, which are merged into it for inference."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ._depthwise import batch_norm, depthwise_map, fold_norm, is_trained, like_conv, merge_on_load
from ._tokens import convolve
from .swin_block import DropPath

# Size of the large kernel: sizes and dilations of those beside it.
BRANCHES = {
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
    15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
    11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)),
    7: ((5, 3, 3), (1, 2, 3)),
    5: ((3, 3), (1, 2)),
}


def _conv(channels, size, dilation=1, bias=False, factory=None):
    padding = dilation * (size - 1) // 2
    return nn.Conv2d(
        channels, channels, size, padding=padding, dilation=dilation, groups=channels, bias=bias, **factory
    )


class DilatedReparamBlock(nn.Module):
    """UniRepLKNet's dilated re-parameterisation (arXiv:2311.15599), a drop-in for its class.

    x [B, channels, H, W] -> the same shape, channels last: the sum of BatchNorms of a depthwise convolution of
    `kernel_size` (5, 7, .., 17; ValueError otherwise) and of smaller, dilated ones, see BRANCHES. A dilated kernel is
    a large one with zeros between its taps: `reparameterize()`, `merge_dilated_branches()` in the original, makes one
    convolution with a bias of all, for evaluation; deploy=True constructs that, and takes state_dicts of merged layers
    or of trained ones, which it merges (in float64) when it loads them.

    Compared with AILab-CVC/UniRepLKNet, unireplknet.py at b5677d8. `attempt_use_lk_impl` is accepted and unused.
    """

    def __init__(
        self, channels, kernel_size, deploy=False, use_sync_bn=False, attempt_use_lk_impl=True, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        if kernel_size not in BRANCHES:
            sizes = sorted(BRANCHES)
            raise ValueError(f"effvit::DilatedReparamBlock: kernel_size must be one of {sizes}, got {kernel_size}")
        factory = {"device": device, "dtype": dtype}
        self.lk_origin = _conv(channels, kernel_size, bias=deploy, factory=factory)
        self.kernel_sizes, self.dilates = BRANCHES[kernel_size]
        if not deploy:
            self.origin_bn = batch_norm(channels, use_sync_bn, factory)
            for conv, bn, size, dilation in self._names():
                setattr(self, conv, _conv(channels, size, dilation, factory=factory))
                setattr(self, bn, batch_norm(channels, use_sync_bn, factory))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):  # fmt: skip
        if not hasattr(self, "origin_bn") and prefix + "origin_bn.weight" in state_dict:
            conv = self.lk_origin
            make = functools.partial(DilatedReparamBlock, conv.in_channels, conv.kernel_size[0])
            merge_on_load(state_dict, prefix, "lk_origin.weight", make, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def _names(self):
        """(name of the convolution, of its norm, size, dilation) of every branch."""
        branches = zip(self.kernel_sizes, self.dilates, strict=True)
        return [(f"dil_conv_k{k}_{r}", f"dil_bn_k{k}_{r}", k, r) for k, r in branches]

    def forward(self, x):
        y = depthwise_map(self.lk_origin, x)
        if not hasattr(self, "origin_bn"):
            return y
        y = self.origin_bn(y)
        for conv, bn, _, _ in self._names():
            y = y + getattr(self, bn)(depthwise_map(getattr(self, conv), x))
        return y

    @torch.no_grad()
    def reparameterize(self):
        """Merges all branches, in float64; nothing where that has been done. ValueError: no running statistics."""
        if hasattr(self, "origin_bn"):
            self._deploy(*self._merged())

    def _merged(self):
        """(weight, bias) in float64 of the one convolution."""
        name, large = type(self).__name__, self.lk_origin.kernel_size[0]
        if not hasattr(self, "origin_bn"):
            return self.lk_origin.weight.double(), self.lk_origin.bias.double()
        weight, bias = fold_norm(name, self.origin_bn, self.lk_origin.weight, self.lk_origin.bias)
        for conv, bn, k, r in self._names():
            branch, shift = fold_norm(name, getattr(self, bn), getattr(self, conv).weight)
            margin = large // 2 - r * (k // 2)
            weight[..., margin : large - margin : r, margin : large - margin : r] += branch
            bias = bias + shift
        return weight, bias

    def _deploy(self, weight, bias, *sources):
        self.lk_origin = like_conv(self.lk_origin, weight, bias, self, *sources)
        if hasattr(self, "origin_bn"):
            del self.origin_bn
            for conv, bn, _, _ in self._names():
                delattr(self, conv)
                delattr(self, bn)

    merge_dilated_branches = reparameterize


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv:2301.00808) of x [B, H, W, dim].

    (1 + gamma n) x + beta with n a channel's L2 norm over the map, divided by the mean of all channels' norms.
    """

    def __init__(self, dim, use_bias=True, device=None, dtype=None):
        super().__init__()
        self.use_bias = use_bias
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))
        if use_bias:
            self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
        y = x * (1 + self.gamma * (norm / (norm.mean(-1, keepdim=True) + 1e-6))).to(x.dtype)
        return y + self.beta if self.use_bias else y


class SEBlock(nn.Module):
    """Squeeze and excitation (arXiv:1709.01507) of a map [B, C, H, W]: x * sigmoid(up(relu(down(mean(x)))))."""

    def __init__(self, input_channels, internal_neurons, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Conv2d(input_channels, internal_neurons, 1, **factory)
        self.up = nn.Conv2d(internal_neurons, input_channels, 1, **factory)
        self.nonlinear = nn.ReLU()

    def forward(self, x):
        y = self.nonlinear(convolve(self.down, x.mean((2, 3), keepdim=True)))
        return x * convolve(self.up, y).sigmoid()


class ChannelsLast(nn.Module):
    """[B, C, H, W] -> [B, H, W, C], a view."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """[B, H, W, C] -> [B, C, H, W], a view."""

    def forward(self, x):
        return x.permute(0, 3, 1, 2)


class UniRepLKNetBlock(nn.Module):
    """UniRepLKNet's block (arXiv:2311.15599), a drop-in for its class: same arguments, state_dict and calls.

    x [B, dim, H, W] -> the same shape, channels last::

        y = se(norm(dwconv(x)));    out = x + gamma * bn(linear(grn(gelu(linear(y)))))

    kernel_size 0 has no convolution and no norm, 3 and 5 a plain one, 7 to 17 a `DilatedReparamBlock`; ValueError for
    others. `reparameterize()` folds branches, norms, gamma and GRN's beta into the convolution and the last linear
    layer, for evaluation; deploy=True constructs the result, and takes state_dicts of merged blocks or of trained ones,
    which it merges (in float64) when it loads them.

    Compared with AILab-CVC/UniRepLKNet, unireplknet.py at b5677d8. Differences: nothing is printed, and
    `attempt_use_lk_impl` is accepted and unused.
    """

    def __init__(
        self, dim, kernel_size, drop_path=0.0, layer_scale_init_value=1e-6, deploy=False, attempt_use_lk_impl=True,
        with_cp=False, use_sync_bn=False, ffn_factor=4, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if kernel_size not in (0, 3, 5, *BRANCHES):
            sizes = sorted({0, 3, *BRANCHES})
            raise ValueError(f"effvit::UniRepLKNetBlock: kernel_size must be one of {sizes}, got {kernel_size}")
        factory = {"device": device, "dtype": dtype}
        self.with_cp = with_cp
        self._sizes, self._ffn_factor = (dim, kernel_size), ffn_factor
        if kernel_size == 0:
            self.dwconv = nn.Identity()
        elif kernel_size >= 7:
            self.dwconv = DilatedReparamBlock(dim, kernel_size, deploy, use_sync_bn, **factory)
        else:
            self.dwconv = _conv(dim, kernel_size, bias=deploy, factory=factory)
        plain = deploy or kernel_size == 0
        self.norm = nn.Identity() if plain else batch_norm(dim, use_sync_bn, factory)
        self.se = SEBlock(dim, dim // 4, **factory)
        hidden = int(ffn_factor * dim)
        self.pwconv1 = nn.Sequential(ChannelsLast(), nn.Linear(dim, hidden, **factory))
        self.act = nn.Sequential(nn.GELU(), GRN(hidden, use_bias=not deploy, **factory))
        last = [nn.Linear(hidden, dim, bias=deploy, **factory), ChannelsFirst()]
        self.pwconv2 = nn.Sequential(*last, *([] if deploy else [batch_norm(dim, use_sync_bn, factory)]))
        scaled = not deploy and layer_scale_init_value is not None and layer_scale_init_value > 0
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value, **factory)) if scaled else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):  # fmt: skip
        like = "pwconv2.0.weight"
        if len(self.pwconv2) == 2 and prefix + "pwconv2.2.weight" in state_dict:
            scale = 1.0 if prefix + "gamma" in state_dict else None
            make = functools.partial(UniRepLKNetBlock, *self._sizes, layer_scale_init_value=scale)
            merge_on_load(state_dict, prefix, like, lambda: make(ffn_factor=self._ffn_factor), error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def compute_residual(self, x):
        y = depthwise_map(self.dwconv, x) if isinstance(self.dwconv, nn.Conv2d) else self.dwconv(x)
        y = self.pwconv2(self.act(self.pwconv1(self.se(self.norm(y)))))
        y = y if self.gamma is None else self.gamma.view(-1, 1, 1) * y
        return self.drop_path(y)

    def _forward(self, x):
        return x + self.compute_residual(x)

    def forward(self, x):
        if self.with_cp and x.requires_grad:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    @torch.no_grad()
    def reparameterize(self):
        """Folds, in float64, what evaluation does not need apart; nothing where that has been done.

        ValueError where a norm has no running statistics.
        """
        name, conv = type(self).__name__, self.dwconv
        if not isinstance(self.norm, nn.Identity):
            branches = isinstance(conv, DilatedReparamBlock)
            merged = conv._merged() if branches else (conv.weight, conv.bias)
            merged = fold_norm(name, self.norm, *merged)
            if branches:
                conv._deploy(*merged, self.norm)
            else:
                self.dwconv = like_conv(conv, *merged, conv, self.norm)
            self.norm = nn.Identity()
        if len(self.pwconv2) == 3:
            linear, back, norm = self.pwconv2
            grn = self.act[1]
            before = None if linear.bias is None else linear.bias.double()
            if grn.use_bias:
                added = linear.weight.double() @ grn.beta.double().flatten()
                before = added if before is None else before + added
            weight, bias = fold_norm(name, norm, linear.weight, before)
            if self.gamma is not None:
                weight, bias = weight * self.gamma.double()[:, None], bias * self.gamma.double()
            made = nn.Linear(
                linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype
            )
            made.weight.copy_(weight)
            made.bias.copy_(bias)
            made.requires_grad_(is_trained(linear, norm, self.gamma, grn.beta if grn.use_bias else None))
            self.pwconv2 = nn.Sequential(made, back).train(self.training)
            self.gamma = None
            if grn.use_bias:
                grn.use_bias = False
                del grn.beta
