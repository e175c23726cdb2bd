"""HyperZZW: kernels that a slow network makes of coordinates, multiplied with the data and with it again."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import dwconv
from ._tokens import convolve
from .hyena import require, without_autocast


class SineFilter(nn.Module):
    """sin(linear(coordinates)), frequencies drawn from a gamma distribution of shape `alpha`."""

    def __init__(self, hidden, omega_0, alpha, factory):
        super().__init__()
        gamma = torch.distributions.Gamma(alpha, 1.0).sample((hidden, 2)).view(hidden, 2, 1, 1)
        self.linear = nn.Conv2d(2, hidden, 1, **factory)
        with torch.no_grad():
            self.linear.weight.mul_((2 * math.pi * omega_0 * gamma).to(self.linear.weight))
            self.linear.bias.zero_()

    def forward(self, coordinates):
        return torch.sin(self.linear(coordinates))


class SlowNetwork(nn.Module):
    """A multiplicative network of sines (MAGNet) over a grid of size x size: [1, out_channels, size, size].

    h_0 = f_0(grid), h_(i+1) = f_(i+1)(grid) * linear_i(h_i) + bias, out = output_linear(h). With `context`, each h is
    also renormalised, h + 0.1 h / ||h|| where h itself gets no gradient, and multiplied by what a pooled x becomes.
    """

    def __init__(self, size, hidden, out_channels, num_layers, omega_0, context, factory):
        super().__init__()
        self.size = size
        self.context = context
        self.linears = nn.ModuleList(nn.Conv2d(hidden, hidden, 1, **factory) for _ in range(num_layers))
        self.output_linear = nn.Conv2d(hidden, out_channels, 1, **factory)
        self.filters = nn.ModuleList(SineFilter(hidden, omega_0, 6.0 / (i + 1), factory) for i in range(num_layers + 1))
        bias = nn.Parameter(torch.zeros(1, 1, size, size, **factory))
        if context:
            self.bias_pk = bias
            self.fast_reduce = nn.Conv2d(out_channels, hidden, 1, **factory)
            self.fast_fc1 = nn.Conv2d(hidden, hidden, 1, **factory)
            self.fast_linears_x = nn.ModuleList(nn.Conv2d(hidden, hidden, 1, **factory) for _ in range(num_layers))
        else:
            self.bias_p = bias
        for layer in (*self.linears, *(self.fast_linears_x if context else ())):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.ones_(layer.bias)
        nn.init.kaiming_uniform_(self.output_linear.weight, nonlinearity="linear")
        nn.init.zeros_(self.output_linear.bias)
        with torch.no_grad():
            self.output_linear.weight.div_(size)

    def forward(self, x=None):
        bias = self.bias_pk if self.context else self.bias_p
        side = torch.linspace(-1, 1, self.size, device=bias.device, dtype=bias.dtype)
        with without_autocast(bias):
            grid = torch.stack((side[:, None].expand(-1, self.size), side.expand(self.size, -1)))[None]
            if self.context:
                pooled = self.fast_reduce(F.adaptive_avg_pool2d(x.to(bias.dtype), self.size))
                pooled = F.gelu(self.fast_fc1(pooled.mean(0, keepdim=True)))
            h = self.filters[0](grid)
            for i, linear in enumerate(self.linears):
                h = self.filters[i + 1](grid) * linear(h) + bias
                if self.context:
                    h = h.detach() + 0.1 * F.normalize(h.flatten(2), dim=-1).view_as(h)
                    h = h * self.fast_linears_x[i](pooled)
            return self.output_linear(h)


class HyperKernel(nn.Module):
    """The slow network under the names that the authors' code has for it."""

    def __init__(self, *args):
        super().__init__()
        self.Kernel = SlowNetwork(*args)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}train_length", None)  # the size, which the original keeps as well
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x=None):
        return self.Kernel(x)


class HyperZZWGlobal(nn.Module):
    """The global HyperZZW operator (arXiv:2401.17948): every pixel sees all, by products of maps as matrices.

    x [B, in_channels, size, size], other of the same shape or None for x -> the same shape: channel by channel the
    matrix product (x * K) other, with a kernel K [in_channels, size, size] from a slow network of coordinates.

    Compared with its formula in plain PyTorch. Names are those of hyperevolnet/Terminator, models/modules/hyperzzw.py,
    slow_net.py and magnet.py at 458c8c5, of whose blocks only the operators are here; the last layer is scaled down at
    once, not in the first call.

    Raises: ValueError for a size or num_layers < 1, and for x of another size.
    """

    def __init__(self, in_channels, size, hidden_channels=32, num_layers=3, omega_0=10.0, device=None, dtype=None):
        super().__init__()
        require(self, ("size", size >= 1, ">= 1", size), ("num_layers", num_layers >= 1, ">= 1", num_layers))
        self.in_channels = in_channels
        self.size = size
        factory = {"device": device, "dtype": dtype}
        self.slow_net = HyperKernel(size, hidden_channels, in_channels, num_layers, omega_0, False, factory)

    def forward(self, x, other=None):
        shape = (self.in_channels, self.size, self.size)
        if x.dim() != 4 or x.shape[1:] != shape:
            raise ValueError(f"effvit::HyperZZWGlobal: x must be [B, {', '.join(map(str, shape))}], got {[*x.shape]}")
        return (x * self.slow_net().to(x.dtype)) @ (x if other is None else other)

    def extra_repr(self):
        return f"in_channels={self.in_channels}, size={self.size}"


class MixedConvolution(nn.Module):
    """gelu(standardised(channel_mixer(depthwise convolution of x))): statistics are those of the batch, always."""

    def __init__(self, channels, factory):
        super().__init__()
        self.channel_mixer = nn.Conv2d(channels, channels, 1, **factory)
        nn.init.kaiming_normal_(self.channel_mixer.weight)
        nn.init.zeros_(self.channel_mixer.bias)

    def forward(self, kernel, x):
        y = dwconv(x.permute(0, 2, 3, 1), kernel).permute(0, 3, 1, 2)
        y = convolve(self.channel_mixer, y)
        return F.gelu(F.batch_norm(y, None, None, training=True) if y.shape[0] else y)


class HyperZZWLocal(nn.Module):
    """The local HyperZZW operator (arXiv:2401.17948): a depthwise convolution whose kernel depends on the data.

    x [B, in_channels, H, W], other or None for x -> the shape of other; any H and W. The kernel [in_channels, k, k]
    comes from a slow network of coordinates, in which x, pooled to k x k and averaged over the batch, is multiplied;
    other is convolved with it::

        gelu(standardised(channel_mixer(dwconv(other, K(x))))) + fast_bias

    Samples of a batch depend on each other, through the kernel and the statistics.

    Compared with its formula in plain PyTorch. Names are those of hyperevolnet/Terminator, models/modules/hyperzzw.py,
    slow_net.py, magnet.py and local_conv.py at 458c8c5. The renormalisation's two factors, 1 and 0.1, are no
    parameters there either.

    Raises: ValueError for an even kernel_size, and num_layers < 1.
    """

    def __init__(
        self, in_channels, kernel_size, hidden_channels=32, num_layers=3, omega_0=10.0, device=None, dtype=None
    ):
        super().__init__()
        odd = kernel_size >= 1 and kernel_size % 2 == 1
        require(self, ("kernel_size", odd, "odd", kernel_size), ("num_layers", num_layers >= 1, ">= 1", num_layers))
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        factory = {"device": device, "dtype": dtype}
        self.slow_net = HyperKernel(kernel_size, hidden_channels, in_channels, num_layers, omega_0, True, factory)
        self.local_conv = MixedConvolution(in_channels, factory)
        self.fast_bias = nn.Parameter(torch.zeros(1, **factory))

    def forward(self, x, other=None):
        kernel = self.slow_net(x).squeeze(0)
        return self.local_conv(kernel, x if other is None else other) + self.fast_bias

    def extra_repr(self):
        return f"in_channels={self.in_channels}, kernel_size={self.kernel_size}"
