"""sparse24_prune in readable PyTorch: the definition, with the straight-through gradient and that of SR-STE."""

import torch

from .sparse24_mask import sparse24_mask


def sparse24_prune(w: torch.Tensor, *, algorithm: str = "magnitude", decay: float = 0.0) -> torch.Tensor:
    """w [N, K] where sparse24_mask keeps it, decay * w elsewhere; its derivative is taken to be 1."""
    masked = decay * w.detach() + (w - w.detach())
    return torch.where(sparse24_mask(w, algorithm=algorithm), w, masked)


def sparse24_prune_backward(grad_out, w, *, algorithm="magnitude", strength=2e-4):
    """The gradient itself, and where w is masked strength * w on top."""
    masked = ~sparse24_mask(w, algorithm=algorithm)
    return grad_out.to(w.dtype) + torch.where(masked, strength * w, torch.zeros_like(w))
