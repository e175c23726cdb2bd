"""sparse24_compress and sparse24_decompress in readable PyTorch: the definition of the canonical form of 2:4 weights.

Of each four neighbours along K (a group) two are kept, at i0 < i1: the values of all groups in order, and a nibble
i0 | i1 << 2 for each group; the low nibble of a byte is the first of two groups. 0b1110 stands where no group is.
"""

import torch
import torch.nn.functional as F

NO_GROUP = 0b1110


def kept_positions(nonzero: torch.Tensor) -> torch.Tensor:
    """[..., 4] of at most two True -> [..., 2]: where they are, in ascending order, filled up with zeros.

    One at p: (p, 3), at 3: (2, 3); none: (2, 3). The form is so a function of the weight.
    """
    n0, n1, n2, n3 = nonzero.unbind(-1)
    first = torch.where(n0, 0, torch.where(n1, 1, 2))
    second = torch.where(n3, 3, torch.where(n2 & (n0 | n1), 2, torch.where(n0 & n1, 1, 3)))
    return torch.stack((first, second), -1)


def pack_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    """[N, groups] -> uint8 [N, ceil(groups / 2)]"""
    padded = F.pad(nibbles, (0, nibbles.shape[1] % 2), value=NO_GROUP)
    low, high = padded.unflatten(1, (padded.shape[1] // 2, 2)).unbind(-1)
    return (low | high << 4).to(torch.uint8)


def unpack_nibbles(meta: torch.Tensor, groups: int) -> torch.Tensor:
    """What pack_nibbles was given, as int64."""
    meta = meta.to(torch.int64)
    return torch.stack((meta & 15, meta >> 4), -1).flatten(1)[:, :groups]


def sparse24_compress(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K] -> (values [N, K / 2], meta uint8 [N, ceil(K / 8)]); a third nonzero of a group is lost."""
    groups = w.unflatten(1, (w.shape[1] // 4, 4))
    positions = kept_positions(groups != 0)
    nibbles = positions[..., 0] | positions[..., 1] << 2
    return groups.gather(-1, positions).flatten(1), pack_nibbles(nibbles)


def sparse24_decompress(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """What sparse24_compress was given: [N, K]."""
    pairs = values.unflatten(1, (values.shape[1] // 2, 2))
    nibbles = unpack_nibbles(meta, pairs.shape[1])[..., None]
    place = torch.arange(4, device=values.device)
    second = torch.where(place == nibbles >> 2, pairs[..., 1:], torch.zeros_like(pairs[..., 1:]))
    return torch.where(place == nibbles & 3, pairs[..., :1], second).flatten(1)
