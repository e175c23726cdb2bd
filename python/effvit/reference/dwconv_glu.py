"""dwconv_glu in readable PyTorch: the definition."""

import torch
import torch.nn.functional as F

from .glu import ACTIVATIONS as _GATES

ACTIVATIONS = {**_GATES, "none": lambda x: x}


def dwconv_glu(
    x: torch.Tensor,
    v: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str = "gelu",
    gate_first: bool = False,
) -> torch.Tensor:
    """act(depthwise convolution of x) * v: x [B, H, W, C], v [B, H, W, G], weight [C, k, k] -> [B, H, W, C].

    The channels from G on have no gate. Without v, x [B, H, W, C + G] holds it, behind the C channels or before them.
    """
    channels, size = weight.shape[0], weight.shape[-1]
    if v is None:
        gates = x.shape[-1] - channels
        v, x = x.split((gates, channels), -1) if gate_first else x.split((channels, gates), -1)[::-1]
    weight, bias = weight.unsqueeze(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=size // 2, groups=channels).permute(0, 2, 3, 1)
    y, gates = ACTIVATIONS[act](y), v.shape[-1]
    return y * v if gates == channels else torch.cat((y[..., :gates] * v, y[..., gates:]), -1)
