"""sparse24_prepack in readable PyTorch: the definition of the CPU's layout of 2:4-sparse weights, and the way back."""

import torch
import torch.nn.functional as F

from .int8_prepack import COLUMNS, SPARSE24, label


def interleaved(fours: torch.Tensor) -> torch.Tensor:
    """[..., 4] of two groups' values: the first of each, then the second of each; its own inverse."""
    return fours.unflatten(-1, (2, 2)).mT.flatten(-2)


def packed_width(k: int) -> int:
    """Bytes of a block: 64 of values of 8 neighbours along K, 64 of positions of every 32, 64 of sums, a label."""
    return 64 * ((k + 7) // 8 + (k + 31) // 32 + 2)


def sparse24_prepack(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """int8 [N, K / 2], uint8 [N, K8 = ceil(K / 8)] -> int8 [ceil(N / 16), packed_width(K)]: per block of 16 channels
    values [K8][16][4], positions [ceil(K / 32)][16][4], the sums of the channels, and a label.

    The four bytes of positions belong to the four values; each has those of four times eight neighbours, in two bits.
    """
    n, k8 = meta.shape
    rows, blocks = -n % COLUMNS, (n + COLUMNS - 1) // COLUMNS
    padded = interleaved(F.pad(values, (0, 4 * k8 - values.shape[1], 0, rows)).view(blocks, COLUMNS, k8, 4))
    bits = interleaved(torch.stack([meta.int() >> 2 * i & 3 for i in range(4)], -1))  # of a nibble: i0, i1
    bits = F.pad(bits, (0, 0, 0, -k8 % 4, 0, rows)).view(blocks, COLUMNS, (k8 + 3) // 4, 4, 4)
    positions = sum(bits[..., i, :] << 2 * i for i in range(4)).to(torch.uint8).view(torch.int8)
    sums = padded.flatten(2).sum(-1, dtype=torch.int32).contiguous().view(torch.int8)
    parts = (padded.transpose(1, 2).flatten(1), positions.transpose(1, 2).flatten(1), sums)
    return torch.cat((*parts, label(SPARSE24, n, 2 * values.shape[1], values).expand(blocks, 64)), 1)


def sparse24_unpack(packed: torch.Tensor, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What sparse24_prepack was given; the nibble that K % 8 == 4 leaves over is 1110."""
    k8, k32, blocks = (k + 7) // 8, (k + 31) // 32, packed.shape[0]
    values = interleaved(packed[:, : 64 * k8].reshape(blocks, k8, COLUMNS, 4)).transpose(1, 2)
    values = values.reshape(COLUMNS * blocks, 4 * k8)
    words = packed[:, 64 * k8 : 64 * (k8 + k32)].contiguous().view(torch.uint8).view(blocks, k32, COLUMNS, 4)
    bits = interleaved(torch.stack([words.int() >> 2 * i & 3 for i in range(4)], 3))  # [blocks, K32, 16, 4, 4]
    meta = sum(bits[..., i] << 2 * i for i in range(4)).to(torch.uint8)
    meta = meta.transpose(1, 2).reshape(COLUMNS * blocks, 4 * k32)[:n, :k8].contiguous()
    return values[:n, : k // 2].contiguous(), meta
