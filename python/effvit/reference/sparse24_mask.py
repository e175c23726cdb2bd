"""sparse24_mask in readable PyTorch: the definition."""

import torch

ROW_CODES = 0xCA9653  # the six ways to keep two of four, four bits each, as bits of the positions kept


def magnitude_mask(w: torch.Tensor) -> torch.Tensor:
    """The two largest |w| of each four neighbours in a row, the earlier of equals; NaN counts as infinite."""
    size = _size(w, torch.inf).unflatten(1, (w.shape[1] // 4, 4)).unbind(-1)
    s01, s02, s03, s12, s13, s23 = (size[i] >= size[j] for i in range(4) for j in range(i + 1, 4))
    kept = (
        _two_of(s01, s02, s03), _two_of(~s01, s12, s13), _two_of(~s02, ~s12, s23), _two_of(~s03, ~s13, ~s23)
    )  # fmt: skip
    return torch.stack(kept, -1).flatten(1)


def transposable_mask(w: torch.Tensor) -> torch.Tensor:
    """Of each 4 x 4 block two in every row and two in every column: of the 90 ways the one that keeps most of |w|.

    Sums are float64, in an order of their own: the same mask on every device. Of equals the first. What is not finite
    counts as 1e300.
    """
    n, k = w.shape
    blocks = _size(w.double(), 1e300).view(n // 4, 4, k // 4, 4).transpose(1, 2).flatten(0, 1)  # [blocks, row, column]
    pairs = torch.stack([blocks[..., i] + blocks[..., j] for i, j in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))])
    first, second, third, fourth = pairs.unbind(-1)  # [6, blocks]: of a row, what each code keeps
    lower = (third[:, None] + fourth).flatten(0, 1)
    digits = _ways(w.device)
    best, choice = None, None
    for code in range(6):  # of the first row: 15 ways go with each
        of_second, of_third, of_fourth = digits[code, :, 1:].unbind(-1)
        sums = (first[code] + second).index_select(0, of_second) + lower.index_select(0, 6 * of_third + of_fourth)
        most, which = sums.max(0)
        which = which + 15 * code
        if best is None:
            best, choice = most, which
        else:
            choice = torch.where(most > best, which, choice)
            best = torch.maximum(best, most)
    kept = _bits(digits.flatten(0, 1)).index_select(0, choice)
    return kept.view(n // 4, k // 4, 4, 4).transpose(1, 2).reshape(n, k) != 0


ALGORITHMS = {"magnitude": magnitude_mask, "transposable": transposable_mask}


def sparse24_mask(w: torch.Tensor, *, algorithm: str = "magnitude") -> torch.Tensor:
    """w [N, K] -> bool [N, K]: two of each four neighbours in a row; transposable: in a column too."""
    return ALGORITHMS[algorithm](w.detach())


def _size(w: torch.Tensor, infinite: float) -> torch.Tensor:
    return w.abs().nan_to_num(nan=infinite, posinf=infinite)


def _two_of(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """At least two are True: of its three comparisons an entry has won as many."""
    return (a & (b | c)) | (b & c)


def _bits(digits: torch.Tensor) -> torch.Tensor:
    """[..., 4] numbers of codes -> [..., 4, 4], 1 where kept."""
    codes = ROW_CODES >> 4 * digits
    return codes[..., None] >> torch.arange(4, device=digits.device) & 1


def _ways(device) -> torch.Tensor:
    """[6, 15, 4]: the rows' codes of all 90 ways, by the first row's. No constants: exporting does not take them."""
    number = torch.arange(6**4, device=device)
    digits = torch.stack([number // 6**i % 6 for i in (3, 2, 1, 0)], -1)
    valid = (_bits(digits).sum(-2) == 2).all(-1)
    order = valid.to(torch.uint8).argsort(descending=True, stable=True)
    return digits.index_select(0, order[:90]).view(6, 15, 4)
