"""selective_scan2d in readable PyTorch: the definition, with its four scans in memory."""

import torch


def cross_scan(t: torch.Tensor) -> torch.Tensor:
    """[B, H, W, 4, ...] -> [B, H*W, 4, ...]: tokens of direction s in the order in which it meets them.

    0 row after row, 1 column after column, 2 and 3 these two from the last token to the first.
    """
    rows, columns, rows_back, columns_back = t.unbind(3)
    sequences = (
        rows.flatten(1, 2),
        columns.transpose(1, 2).flatten(1, 2),
        rows_back.flatten(1, 2).flip(1),
        columns_back.transpose(1, 2).flatten(1, 2).flip(1),
    )
    return torch.stack(sequences, dim=2)


def cross_merge(y: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """[B, H*W, 4, D] -> [B, H, W, D]: the sequences of :func:`cross_scan` back on the map, and their sum."""
    rows, columns, rows_back, columns_back = y.unbind(2)
    along_rows = (rows + rows_back.flip(1)).unflatten(1, (H, W))
    return along_rows + (columns + columns_back.flip(1)).unflatten(1, (W, H)).transpose(1, 2)


def selective_scan2d(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    d: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    softplus: bool = True,
) -> torch.Tensor:
    """x [B, H, W, D], dt [B, H, W, 4, D], b and c [B, H, W, 4, N], a [4, D, N], d and dt_bias [4, D] -> [B, H, W, D].

    Per direction and channel, along its sequence, with delta = softplus(dt + dt_bias)::

        h_i = exp(delta_i a) h_(i-1) + delta_i b_i x_i        [N]
        y_i = c_i . h_i + d x_i

    The result is the sum of the four directions, float32 where the inputs have half precision.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, b, c, a = (t.to(wide) for t in (x, dt, b, c, a))
    H, W = x.shape[1:3]
    u = cross_scan(x.unsqueeze(3).expand(*x.shape[:3], 4, x.shape[3]))
    delta = cross_scan(dt)
    if dt_bias is not None:
        delta = delta + dt_bias.to(wide)
    if softplus:
        delta = torch.nn.functional.softplus(delta)
    decay = (delta.unsqueeze(-1) * a).exp()  # [B, L, 4, D, N]
    added = (delta * u).unsqueeze(-1) * cross_scan(b).unsqueeze(3)
    states: list[torch.Tensor] = []
    for e, new in zip(decay.unbind(1), added.unbind(1), strict=True):
        states.append(e * states[-1] + new if states else new)
    h = torch.stack(states, dim=1) if states else added  # a map without tokens
    y = (h * cross_scan(c).unsqueeze(3)).sum(-1)
    if d is not None:
        y = y + d.to(wide) * u
    return cross_merge(y, H, W)
