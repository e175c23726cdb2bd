"""int8_prepack in readable PyTorch: the definition of the CPU's layout of int8 weights, and the way back."""

import torch
import torch.nn.functional as F

COLUMNS = 16  # output channels of a block


DENSE, SPARSE24 = 0x38746E69, 0x34327073  # what labels begin with: "int8", "sp24"


def packed_width(k: int) -> int:
    """Bytes of a block: ceil(K / 4) rows of 64, and a label."""
    return 64 * ((k + 3) // 4 + 1)


def label(kind: int, n: int, k: int, like: torch.Tensor) -> torch.Tensor:
    """[64] int8, which ends every block: kind, N and K as int32 and zeros."""
    parts = [torch.full((1,), x, dtype=torch.int32, device=like.device) for x in (kind, n, k)]
    return torch.cat((*parts, parts[0].new_zeros(13))).view(torch.int8)


def labelled(packed: torch.Tensor) -> tuple[int, int, int]:
    """(kind, N, K) of packed weights; of what was not packed anything."""
    raw = bytes(x & 255 for x in packed[0, -64:-52].tolist())
    return tuple(int.from_bytes(raw[i : i + 4], "little", signed=True) for i in (0, 4, 8))


def int8_prepack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [ceil(N / 16), packed_width(K)]: of every block of 16 channels [K / 4][16][4], as weight + 128."""
    n, k = weight.shape
    groups = (k + 3) // 4
    padded = F.pad(weight, (0, 4 * groups - k, 0, -n % COLUMNS))
    count = padded.shape[0] // COLUMNS
    blocks = padded.view(count, COLUMNS, groups, 4).transpose(1, 2).reshape(count, 64 * groups) ^ -128
    return torch.cat((blocks, label(DENSE, n, k, weight).expand(count, 64)), 1)


def int8_unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """What int8_prepack was given."""
    groups = (k + 3) // 4
    blocks = (packed[:, : 64 * groups] ^ -128).view(packed.shape[0], groups, COLUMNS, 4)
    return blocks.transpose(1, 2).reshape(COLUMNS * packed.shape[0], 4 * groups)[:n, :k]
