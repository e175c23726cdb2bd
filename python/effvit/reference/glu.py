"""glu in readable PyTorch: the definition."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": lambda x: x * torch.sigmoid(x),  # the derivative of F.silu has no forward mode
    "relu": F.relu,
    "tanh": torch.tanh,
}


def glu(a: torch.Tensor, b: torch.Tensor | None = None, *, act: str = "sigmoid") -> torch.Tensor:
    """a * act(b): both [..., C], or a [..., 2*C] that holds a and then b."""
    if b is None:
        a, b = a.chunk(2, -1)
    return a * ACTIVATIONS[act](b)
