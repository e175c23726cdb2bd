"""scipy.fft by the names of torch.fft, a peer: float32 on the CPU, forward, where scipy is installed."""

import torch

from harness import THREADS, parse

try:
    import scipy.fft
except ImportError:
    scipy = None


def serves(direction, dtype):
    """Whether scipy can run here: gradients, half precision and GPUs it has not."""
    options = parse(None)
    device = options.memory_worker["device"] if options.memory_worker else options.device
    return scipy is not None and device == "cpu" and (direction, dtype) == ("forward", "float32")


def rfftn(x, s=None, dim=None, norm=None):
    return torch.from_numpy(scipy.fft.rfftn(x.numpy(), s=s, axes=dim, norm=norm, workers=THREADS))


def irfftn(x, s=None, dim=None, norm=None):
    return torch.from_numpy(scipy.fft.irfftn(x.numpy(), s=s, axes=dim, norm=norm, workers=THREADS))
