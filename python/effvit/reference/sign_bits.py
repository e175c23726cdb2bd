"""sign_bits in readable PyTorch: the definition, and the inverse of its packing."""

import torch


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """[..., K] of 0 and 1 (or bool) -> uint8 [..., ceil(K / 8)]: bit k % 8 of byte k // 8; zeros beyond K."""
    k = bits.shape[-1]
    wide = torch.nn.functional.pad(bits.to(torch.int32), (0, -k % 8)).unflatten(-1, (-1 if k else 0, 8))
    return (wide << torch.arange(8, dtype=torch.int32, device=bits.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, depth: int) -> torch.Tensor:
    """uint8 [..., V] -> uint8 [..., depth] of 0 and 1."""
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> place) & 1).flatten(-2)[..., :depth]


def sign_bits(x: torch.Tensor, threshold: torch.Tensor | None = None):
    """x [..., K], threshold [...] -> (bits of x >= threshold, or of x >= 0, packed; scale [...])."""
    k = x.shape[-1]
    if threshold is None:
        return pack_bits(x >= 0), x.abs().sum(-1) / max(k, 1)
    on = x >= threshold[..., None].to(x.dtype)
    count = on.sum(-1).clamp(min=1).to(x.dtype)
    return pack_bits(on), torch.where(on, x, torch.zeros_like(x)).sum(-1) / count
