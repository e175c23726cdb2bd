"""What the kernels of all operators share: tensors as kernel arguments, tiles of tokens, shares of the work.

A tensor is one argument, a named tuple of its pointer and strides; an absent one is None. `Tokens` and `FeatureMap`
hold whole tensors, `Rows` the tokens of one head, which is what a program works on. All rows have a last stride of 1.
Offsets of rows are 64-bit, unless a kernel has seen to it that 32 bits do.

The interpreter mistreats bfloat16 arithmetic: tiles are float32 there from the load on. On a GPU `_load_tile` leaves
the tensor's type, for tl.dot; whatever else computes casts to float32 first.
"""

from typing import Any, NamedTuple

from ._common import INTERPRETED, device_function, tl

_INTERPRETED = tl.constexpr(INTERPRETED)


class Tokens(NamedTuple):
    """[B, L, h, D] with a last stride of 1, or one number per token, [B, L, h]."""

    pointer: Any
    stride_b: Any
    stride_l: Any
    stride_h: Any


class FeatureMap(NamedTuple):
    """[B, H, W, h, D] with a last stride of 1, or one number per position, [B, H, W, h]."""

    pointer: Any
    stride_b: Any
    stride_y: Any
    stride_x: Any
    stride_h: Any


class Rows(NamedTuple):
    """The tokens of one head: [L, D] with a last stride of 1, or one number per token, [L]."""

    pointer: Any
    stride: Any


def tokens(x):
    """A torch tensor or None as a kernel argument."""
    return None if x is None else Tokens(x, *x.stride()[:3])


def feature_map(x):
    """A torch tensor or None as a kernel argument."""
    return None if x is None else FeatureMap(x, *x.stride()[:4])


# ----------------------------------------------------------------------------------------------------- index arithmetic


@device_function
def _divide(a, b):
    """(quotient, remainder) of a >= 0. For tiles along a tensor's columns use // and %: the compiler then knows which
    of them follow each other."""
    quotient = a // b
    return quotient, a - quotient * b


@device_function
def _share_of(units, walk, share, INDEX: tl.constexpr):
    """Pieces of work of the program that has the share-th run of `walk` of them: (first, count)."""
    first = share.to(INDEX) * walk
    return first, tl.minimum(units - first, walk).to(tl.int32)


@device_function
def _rows_of(x, b, head):
    """Rows of the Tokens x; None where x is. b and head are int64."""
    if x is not None:
        return Rows(x.pointer + (b * x.stride_b + head * x.stride_h), x.stride_l)


@device_function
def _map_offset(x, b, row, column, head):
    """Offsets in the FeatureMap x; b, row, column and head are int64."""
    return b * x.stride_b + row * x.stride_y + column * x.stride_x + head * x.stride_h


# ---------------------------------------------------------------------------------------------------------------- tiles


@device_function
def _tile_mask(ok, column, D: tl.constexpr):
    """Rows `ok` of a tile, and columns below D where the tile has others."""
    mask = ok[:, None]
    if _INTERPRETED or D % column.shape[0] != 0:
        mask = mask & (column < D)[None, :]
    return mask


@device_function
def _load_tile(pointer, offset, ok, column, D: tl.constexpr):
    """Rows at `offset` where `ok`, columns below D, zeros elsewhere. For operands; see _load_rows."""
    x = tl.load(pointer + offset[:, None] + column[None, :], mask=_tile_mask(ok, column, D), other=0.0)
    if _INTERPRETED:
        x = x.to(tl.float32)
    return x


@device_function
def _store_tile(pointer, offset, ok, column, value, D: tl.constexpr):
    pointers = pointer + offset[:, None] + column[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=_tile_mask(ok, column, D))


@device_function
def _load_rows(x, row, ok, column, D: tl.constexpr):
    """Tokens `row` of Rows, in float32."""
    return _load_tile(x.pointer, row * x.stride, ok, column, D).to(tl.float32)


@device_function
def _store_rows(x, row, ok, column, value, D: tl.constexpr):
    _store_tile(x.pointer, row * x.stride, ok, column, value, D)


@device_function
def _load_numbers(x, row, ok):
    """One number per token, in float32."""
    return tl.load(x.pointer + row * x.stride, mask=ok, other=0.0).to(tl.float32)


@device_function
def _store_numbers(x, row, ok, value):
    tl.store(x.pointer + row * x.stride, value.to(x.pointer.dtype.element_ty), mask=ok)


@device_function
def _load_vector(pointer, column, D):
    """A row that all tokens share, zeros beyond D; in float32 in the interpreter, like _load_tile."""
    x = tl.load(pointer + column, mask=column < D, other=0.0)
    if _INTERPRETED:
        x = x.to(tl.float32)
    return x


@device_function
def _rounded(x, DTYPE: tl.constexpr):
    """A float32 tile as an operand of tl.dot of this type; in float32 in the interpreter, like _load_tile."""
    x = x.to(DTYPE)
    if _INTERPRETED:
        x = x.to(tl.float32)
    return x
