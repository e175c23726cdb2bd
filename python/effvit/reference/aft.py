"""aft in readable PyTorch: the definition."""

import torch


def aft(q, k, v, bias=None, *, window: int = 0):
    """sigmoid(q_i) times the mean of v weighted by exp(k_j + w_ij): q [B, L, C], k and v [B, M, C], bias [L, M].

    w is the bias where |i - j| < window, or everywhere where window is 0, and 0 elsewhere. Returns out [B, L, C], that
    mean, and the logarithm of the sum of the weights, [B, L, C] both; without a bias they are [B, 1, C].
    """
    L, M = q.shape[1], k.shape[1]
    x = k[:, None]
    if bias is not None:
        w = bias.to(k.dtype)
        if window:
            distance = torch.arange(L, device=q.device)[:, None] - torch.arange(M, device=q.device)
            w = w.masked_fill(distance.abs() >= window, 0)
        x = x + w[..., None]
    else:
        x = x[:, :L]  # no query, no mean
    mean = (x.softmax(2) * v[:, None]).sum(2)
    return torch.sigmoid(q) * mean, mean, x.logsumexp(2)
