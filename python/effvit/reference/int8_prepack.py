"""int8_prepack in readable PyTorch: the definition of the CPU's layout of int8 weights, and the way back."""

import torch
import torch.nn.functional as F

COLUMNS = 16  # output channels of a block


def packed_width(k: int) -> int:
    """Bytes of a block: ceil(K / 4) rows of 64, and one that is reserved."""
    return 64 * ((k + 3) // 4 + 1)


def int8_prepack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [ceil(N / 16), packed_width(K)]: of every block of 16 channels [K / 4][16][4], as weight + 128."""
    n, k = weight.shape
    groups = (k + 3) // 4
    padded = F.pad(weight, (0, 4 * groups - k, 0, -n % COLUMNS))
    count = padded.shape[0] // COLUMNS
    blocks = padded.view(count, COLUMNS, groups, 4).transpose(1, 2).reshape(count, 64 * groups) ^ -128
    return F.pad(blocks, (0, 64))


def int8_unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """What int8_prepack was given."""
    groups = (k + 3) // 4
    blocks = (packed[:, : 64 * groups] ^ -128).view(packed.shape[0], groups, COLUMNS, 4)
    return blocks.transpose(1, 2).reshape(COLUMNS * packed.shape[0], 4 * groups)[:n, :k]
