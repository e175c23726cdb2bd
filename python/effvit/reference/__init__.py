"""Every operator in readable, differentiable PyTorch: the definition, the oracle of the tests, the last resort."""

from .window_attention import window_attention

__all__ = ["window_attention"]
