"""newton_pinv in readable PyTorch: the definition."""

import torch


def newton_pinv(a: torch.Tensor, *, iterations: int = 20, ridge: float = 0.01, step: float = 1.8) -> torch.Tensor:
    """[B, H, m, m] -> [B, H, m, m]: the inverse of a + ridge I by `iterations` Newton-Schulz steps.

    In float32 where the input has half precision. The derivative is that of the inverse, dV = -V da V, and not that of
    the steps: they are the same where the iteration has converged.
    """
    with torch.no_grad():
        p = a.float() if a.dtype in (torch.bfloat16, torch.float16) else a
        alpha = step / p.sum(-1).amax(-1)[..., None, None].square()
        p = p + ridge * torch.eye(a.shape[-1], dtype=p.dtype, device=p.device)
        v = alpha * p
        for _ in range(iterations):
            v = 2 * v - (v @ p) @ v
    if a.requires_grad:
        zero = (a - a.detach()).to(v.dtype)  # gives the result its derivative; a term of exact zeros
        v = v - v @ zero @ v
    return v.to(a.dtype)
