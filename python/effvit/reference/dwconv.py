"""dwconv in readable PyTorch: the definition."""

import torch
import torch.nn.functional as F

from .dwconv_glu import ACTIVATIONS


def dwconv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pregate: torch.Tensor | None = None,
    postgate: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    before: tuple[int, int] = (0, 0),
    after: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    window: tuple[int, int] = (0, 0),
    act: str = "none",
) -> torch.Tensor:
    """postgate * act(depthwise convolution of (x * pregate) + bias): x [B, H, W, C], weight [C, kh, kw].

    before, after: zeros (rows, columns) around the map, or around each of its windows of `window`. state
    [B, H, before[1], C] stands in the place of the zeros left of the map.
    """
    B, H, W, C = x.shape
    P, Q = (
        s + b + a - d * (k - 1) for s, b, a, d, k in zip((H, W), before, after, dilation, weight.shape[1:], strict=True)
    )
    if P * Q == 0:  # F.conv2d refuses it; made of the tensors, so that gradients are zeros
        given = (t for t in (x, weight, bias, pregate, postgate, state) if t is not None)
        return torch.cat([t.reshape(-1)[:0].to(x.dtype) for t in given]).view(B, P, Q, C)
    x = x if pregate is None else x * pregate
    left = before[1]
    if state is not None:
        x, left = torch.cat((state, x), 2), 0
    if window[0]:
        (wh, ww), (rows, columns) = window, (H // window[0], W // window[1])
        x = x.view(B, rows, wh, columns, ww, C).transpose(2, 3).reshape(B * rows * columns, wh, ww, C)
    weight, bias = weight.unsqueeze(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
    x = F.pad(x.permute(0, 3, 1, 2), (left, after[1], before[0], after[0]))
    y = F.conv2d(x, weight, bias, dilation=dilation, groups=C).permute(0, 2, 3, 1)
    if window[0]:
        y = y.reshape(B, rows, columns, wh, ww, C).transpose(2, 3).reshape(B, H, W, C)
    y = ACTIVATIONS[act](y)
    return y if postgate is None else y * postgate
