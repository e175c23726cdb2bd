"""Depthwise convolutions of modules on maps, channels last, and how branches with norms become one of them."""

import torch
from torch import nn

from ..reference.dwconv_glu import ACTIVATIONS
from ._ops import dwconv
from ._tokens import convolve, is_hooked


def fits(conv):
    """Whether the geometry is one of the operator: depthwise, stride 1, as many zeros on either side of the map."""
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return depthwise and conv.padding_mode == "zeros" and conv.stride == (1, 1) and not isinstance(conv.padding, str)


def is_operators(conv):
    """Whether the operator computes all that calling the module does."""
    return type(conv) is nn.Conv2d and not is_hooked(conv) and fits(conv)


def depthwise(conv, x, act="none"):
    """act(conv(x)) for a map x [B, H, W, C] -> [B, H', W', C]: by the operator, or by calling a conv that does more."""
    if is_operators(conv):
        return dwconv(x, conv.weight, conv.bias, padding=conv.padding, dilation=conv.dilation, act=act)
    return ACTIVATIONS[act](convolve(conv, x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


def depthwise_map(conv, x, act="none"):
    """act(conv(x)) for x [B, C, H, W]; the result is channels last."""
    return depthwise(conv, x.permute(0, 2, 3, 1), act).permute(0, 3, 1, 2)


def fold_norm(name, norm, weight, bias=None):
    """(weight, bias) in float64 of a convolution or linear layer that a BatchNorm with running statistics follows."""
    if norm.running_var is None:
        raise ValueError(f"effvit::{name}: every BatchNorm must have running statistics, got one without")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    return weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1)), shift


def is_trained(*sources):
    """Whether any parameter among modules, parameters and None wants gradients."""
    parameters = [p for s in sources for p in (s.parameters() if isinstance(s, nn.Module) else [s])]
    return any(p is not None and p.requires_grad for p in parameters)


def like_conv(conv, weight, bias, *sources):
    """A Conv2d with the geometry, device, dtype and mode of `conv` and these weights, trained if any source is."""
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    made = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        **like,
    )  # fmt: skip
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made.train(conv.training).requires_grad_(is_trained(*sources))


def batch_norm(channels, sync, factory):
    return (nn.SyncBatchNorm if sync else nn.BatchNorm2d)(channels, **factory)


def merge_on_load(state_dict, prefix, like, make, error_msgs):
    """Replaces the state of a layer as it is trained, below `prefix`, by that of the merged one.

    make() constructs the layer to merge, `like` names a weight whose device and dtype the result gets. For
    `_load_from_state_dict`: what is missing or has another shape becomes one of `error_msgs`.
    """
    own = {name: t for name, t in state_dict.items() if name.startswith(prefix)}
    if any(t.is_meta for t in own.values()):
        return
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        trained = make().double()
        try:
            trained.load_state_dict({name.removeprefix(prefix): t for name, t in own.items()})
            trained.reparameterize()
        except (RuntimeError, ValueError) as e:
            error_msgs.append(str(e))
            return
    for name in own:
        del state_dict[name]
    weight = own[prefix + like]
    for name, t in trained.state_dict().items():
        state_dict[prefix + name] = t.to(weight) if t.is_floating_point() else t
