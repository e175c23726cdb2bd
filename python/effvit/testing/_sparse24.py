"""What the specs of the operators on 2:4-sparse weights share: weights, calls of any shape, bad inputs."""

import torch

from effvit.reference.sparse24_compress import sparse24_compress
from effvit.testing._int8 import integers
from effvit.testing._spec import BadInput, split_call


def sparse_weight(n, k, dtype, generator, keep=None):
    """[N, K] with two of each four at random places, and now and then fewer; `keep`: how many in a group."""
    w = integers((n, k), generator, -128) if dtype == torch.int8 else torch.randn(n, k, generator=generator).to(dtype)
    order = torch.rand(n, k // 4, 4, generator=generator).argsort(-1).argsort(-1)
    count = 2 if keep is None else keep
    w = torch.where((order < count).view(n, k), w, torch.zeros_like(w))
    if keep is None:  # zeros among those kept: groups of one and of none
        w = torch.where(torch.rand(n, k, generator=generator) < 0.2, torch.zeros_like(w), w)
    return w


def compressed(n, k, dtype, generator):
    return sparse24_compress(sparse_weight(n, k, dtype, generator))


def transposed(t):
    """The same values column after column."""
    return t.mT.contiguous().mT


def bad_meta(good_call, names, *, last_byte=True):
    """Nibbles that are not two positions in ascending order; shapes that do not go with values."""

    def bad(name, match, change):
        def make():
            call = dict(good_call())
            call["meta"] = change(call["meta"].clone())
            return split_call(call, names)

        return BadInput(f"meta_{name}", make, ValueError, f"meta must be {match}")

    def at(value):
        def change(meta):
            meta[-1, -1] = value
            return meta

        return change

    for value in (0b1110_0000, 0b0101_1110, 0b1110_1010, 0b1111_1110, 0b1110_0001, 0b1011_1110):
        yield bad(f"{value:08b}", f"two positions i0 < i1 in every nibble.*got {value:#04x} at ", at(value))
    yield bad("wide", r"\[N, ceil\(K / 8\)\]", lambda t: torch.cat((t, t), 1))
    yield bad("narrow", r"\[N, ceil\(K / 8\)\]", lambda t: t[:, :-1])
