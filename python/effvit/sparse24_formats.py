"""Layouts of 2:4-sparse weights that hardware reads, made from the canonical form of `effvit.sparse24_compress`.

``pack(values, meta, format="sm80")`` and ``unpack(packed, (N, K), format="sm80")``, which is its inverse; a format is a
name and two functions, and :func:`register_format` adds one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .ops import _checks, sparse24_prepack
from .ops._sparse24 import check_meta, derive_meta
from .reference.sparse24_compress import kept_positions, pack_nibbles, sparse24_compress, sparse24_decompress
from .reference.sparse24_prepack import packed_width, sparse24_unpack

_NAME = "sparse24_formats"
_PADDING = 0b1110_1110  # of metadata: two groups of zeros


@dataclasses.dataclass(frozen=True)
class Format:
    """One layout. pack: ``(values, meta) -> packed``; unpack: ``(packed, n, k) -> (values, meta)``."""

    name: str
    pack: Callable
    unpack: Callable


_FORMATS: dict[str, Format] = {}


def register_format(name: str, pack: Callable, unpack: Callable) -> None:
    """Add a format.

    Args:
        name: what `pack` and `unpack` call it; one that is taken is a ValueError.
        pack: ``(values, meta) -> packed``, a tensor or a tuple of some, of a canonical form that was checked.
        unpack: ``(packed, n, k) -> (values, meta)``, for which ``unpack(pack(values, meta), n, k)`` is what
            `effvit.sparse24_compress` returns for the same weight.
    """
    if not isinstance(name, str) or not name:
        raise _checks.type_error(_NAME, "name", "a word", repr(name))
    if name in _FORMATS:
        raise _checks.value_error(_NAME, "name", f"none of {', '.join(_FORMATS)}, which are taken", repr(name))
    for argument, function in (("pack", pack), ("unpack", unpack)):
        if not callable(function):
            raise _checks.type_error(_NAME, argument, "a function", type(function).__name__)
    _FORMATS[name] = Format(name, pack, unpack)


def formats() -> tuple[str, ...]:
    """The names of all formats."""
    return tuple(_FORMATS)


def pack(values: torch.Tensor, meta: torch.Tensor, *, format: str):
    """A weight in the layout of `format`.

    Args:
        values, meta: the canonical form, as :func:`effvit.ops.sparse24_compress` returns it.
        format: "cpu": what `effvit.sparse24_prepack` returns (int8). "sm80": (values, metadata) of the sparse tensor
            cores of compute capability 8.0, ``mma.sp``, as CUTLASS and `torch.sparse.to_sparse_semi_structured` hold
            them: int8 with int32 metadata, N padded to a multiple of 16 and K of 64; bfloat16 and float16 with int16
            metadata, both padded to multiples of 32. "sm90": (values, metadata) as CUTLASS 3 reads them for
            ``wgmma.sp`` in a kernel whose tile is 128 or more along K, "sm90_k64" 64, "sm90_k32" 32 (16-bit only):
            values [N, K / 2] with K padded to a multiple of 32 (int8) or 16; metadata uint8
            [ceil(K / tile), ceil(N / 64), 8 * tile]. Or one that `register_format` has added.

    Returns:
        A tensor or a tuple of some, on the device of values. Padding is zeros and, in metadata, 0xEE.

    Raises:
        TypeError: an argument is no dense tensor or has a dtype that the format has not.
        ValueError: a shape, device, nibble or format is outside the above. The message names the argument.
    """
    for name, t in (("values", values), ("meta", meta)):
        _checks.check_tensor(_NAME, name, t)
        if t.dim() != 2:
            shown = "[N, K / 2]" if name == "values" else "[N, ceil(K / 8)]"
            raise _checks.value_error(_NAME, name, shown, _checks.shape(t))
    if meta.dtype != torch.uint8:
        raise _checks.type_error(_NAME, "meta", torch.uint8, meta.dtype)
    _checks.check_like(_NAME, "meta", meta, "values", values, dtype=False)
    dims, tensors = {"N": values.shape[0], "K2": values.shape[1], "K8": meta.shape[1]}, {"values": values, "meta": meta}
    derive_meta(_NAME, dims, {}, tensors)
    if meta.shape[0] != values.shape[0]:
        expected = f"[N, ceil(K / 8)] = [{values.shape[0]}, {meta.shape[1]}] like values {_checks.shape(values)}"
        raise _checks.value_error(_NAME, "meta", expected, _checks.shape(meta))
    check_meta(_NAME, dims, {}, tensors)
    return _named(format).pack(values, meta)


def unpack(packed, shape: Sequence[int], *, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, meta) of which `pack` made packed: the canonical form.

    Args:
        packed: what `pack` returned for the format.
        shape: (N, K) of the weight.
        format: as in `pack`.
    """
    chosen = _named(format)
    if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) != 2 or not all(map(_checks.is_int, shape)):
        raise _checks.type_error(_NAME, "shape", "(N, K)", repr(shape))
    n, k = shape
    if n < 0 or k < 0 or k % 4:
        raise _checks.value_error(_NAME, "shape", "(N, K) with K a multiple of 4", tuple(shape))
    return chosen.unpack(packed, n, k)


def _named(format: str) -> Format:
    return _FORMATS[formats()[_checks.index_of(_NAME, "format", format, formats())]]


def _check_part(name: str, t: object, shape: list, dtypes: Sequence[torch.dtype]) -> None:
    """A part of a packed weight has the shape and dtype that its format gives it."""
    _checks.check_tensor(_NAME, name, t)
    if t.dtype not in dtypes:
        raise _checks.type_error(_NAME, name, " or ".join(map(str, dtypes)), t.dtype)
    if list(t.shape) != shape:
        raise _checks.value_error(_NAME, name, shape, _checks.shape(t))


def _check_dtype(format: str, values: torch.Tensor) -> None:
    if values.dtype not in (torch.int8, torch.bfloat16, torch.float16):
        raise _checks.type_error(_NAME, "values", f"int8, bfloat16 or float16 for {format}", values.dtype)


def _two_parts(format: str, packed) -> tuple:
    if not isinstance(packed, (tuple, list)) or len(packed) != 2:
        raise _checks.type_error(_NAME, "packed", f"(values, metadata) for {format}", type(packed).__name__)
    _checks.check_tensor(_NAME, "values", packed[0])
    _check_dtype(format, packed[0])
    return tuple(packed)


def _padded(t: torch.Tensor, rows: int, columns: int, value: int = 0) -> torch.Tensor:
    return F.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]), value=value).contiguous()


def _canonical(values: torch.Tensor, meta: torch.Tensor, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of a padded weight, as sparse24_compress has it."""
    values, meta = values[:n, : k // 2], meta[:n, : (k + 7) // 8]
    check_meta(_NAME, {}, {}, {"meta": meta})
    return sparse24_compress(sparse24_decompress(values, meta))


# ---- cpu -----------------------------------------------------------------------------------------------------------


def _unpack_cpu(packed, n, k):
    _check_part("packed", packed, [(n + 15) // 16, packed_width(k)], (torch.int8,))
    return sparse24_unpack(packed, n, k)


register_format("cpu", sparse24_prepack, _unpack_cpu)


# ---- sm80: mma.sp ----------------------------------------------------------------------------------------------------
# The metadata of a thread's fragment lies together: rows are regrouped, each 2 x 2 block is transposed, and pairs of
# columns are interleaved. An element is 4 bytes of metadata for int8 (rows regrouped by 16), 2 for 16-bit (by 32).

_SM80 = {
    torch.int8: (torch.int32, 16, 2), torch.bfloat16: (torch.int16, 32, 4), torch.float16: (torch.int16, 32, 4)
}  # fmt: skip


def _sm80_shape(n, k, dtype):
    """(N, K) padded: whole groups of rows, and two elements of metadata, as their columns go in pairs."""
    element, rows, _ = _SM80[dtype]
    columns = 16 * element.itemsize
    return -(-n // rows) * rows, -(-k // columns) * columns


def _sm80_places(rows: int, columns: int, dtype: torch.dtype, device) -> torch.Tensor:
    """Where element (row, column) of the metadata goes: [rows * columns]."""
    _, group, between = _SM80[dtype]
    row = torch.arange(rows, device=device)[:, None]
    row = row // group * group + row % 8 * between + row % group // 8
    column = torch.arange(columns, device=device)[None]
    across = column % 2 - row % 2  # of a 2 x 2 block the two off its diagonal change places
    row, column = row + across, column - across
    return (column // 2 * (2 * rows) + 2 * row + column % 2).flatten()


def _pack_sm80(values, meta):
    _check_dtype("sm80", values)
    n, k = _sm80_shape(values.shape[0], 2 * values.shape[1], values.dtype)
    values, meta = _padded(values, n, k // 2), _padded(meta, n, k // 8, _PADDING)
    # Beside one nonzero CUTLASS's tools keep another zero than the canonical form does.
    groups = sparse24_decompress(values, meta).view(n, k // 4, 4)
    nonzero = groups != 0
    positions = kept_positions(nonzero)
    alone = (nonzero.sum(-1) == 1) & (nonzero[..., 0] | nonzero[..., 1])
    second = torch.where(alone, 2, positions[..., 1])
    positions = torch.stack((positions[..., 0], second), -1)
    nibbles = pack_nibbles(positions[..., 0] | second << 2)
    element = _SM80[values.dtype][0]
    elements = nibbles.flatten().view(element).view(n, k // (8 * element.itemsize))
    places = _sm80_places(*elements.shape, values.dtype, values.device)
    reordered = torch.empty_like(elements).view(-1).scatter_(0, places, elements.flatten()).view_as(elements)
    return groups.gather(-1, positions).view(n, k // 2), reordered


def _unpack_sm80(packed, n, k):
    values, reordered = _two_parts("sm80", packed)
    element = _SM80[values.dtype][0]
    rows, columns = _sm80_shape(n, k, values.dtype)
    _check_part("values", values, [rows, columns // 2], (values.dtype,))
    _check_part("metadata", reordered, [rows, columns // (8 * element.itemsize)], (element,))
    places = _sm80_places(*reordered.shape, values.dtype, values.device)
    meta = reordered.flatten()[places].view_as(reordered).view(torch.uint8)
    return _canonical(values, meta, n, k)


register_format("sm80", _pack_sm80, _unpack_sm80)


# ---- sm90: wgmma.sp --------------------------------------------------------------------------------------------------
# The metadata of 64 rows and one tile of K (128 of a larger one) lies together: an atom, 8 * tile bytes. Atoms of one
# tile of K follow each other along N. In an atom 8-bit weights have row after row; 16-bit ones, from the innermost: the
# 2 bytes of 16 neighbours along K, two rows 8 apart, the steps of 32 along K, 8 rows, the other 16 of a step, and the
# four times 16 rows. tests/data/sparse24_sm90.cu prints the places.

_SM90_TILES = {"sm90": 128, "sm90_k64": 64, "sm90_k32": 32}


def _sm90_shape(format, n, k, dtype):
    """(columns of values, shape of metadata): values are padded to the 16 bytes that TMA copies."""
    tile = _SM90_TILES[format]
    aligned = 32 // dtype.itemsize
    return -(-k // aligned) * aligned // 2, [-(-k // tile), -(-n // 64), 8 * tile]


def _check_sm90(format, values):
    _check_dtype(format, values)
    if values.dtype == torch.int8 and _SM90_TILES[format] < 64:
        raise _checks.type_error(_NAME, "values", f"bfloat16 or float16 for {format}", values.dtype)


def _pack_sm90(format, values, meta):
    _check_sm90(format, values)
    n, k = values.shape[0], 2 * values.shape[1]
    columns, (tiles, blocks, size) = _sm90_shape(format, n, k, values.dtype)
    meta = _padded(meta, 64 * blocks, tiles * size // 64, _PADDING)
    if values.dtype == torch.int8:
        atoms = meta.view(blocks, 64, tiles, size // 64).permute(2, 0, 1, 3)
    else:
        atoms = meta.view(blocks, 4, 2, 8, tiles, size // 256, 2, 2).permute(4, 0, 1, 6, 3, 5, 2, 7)
    return _padded(values, n, columns), atoms.reshape(tiles, blocks, size)


def _unpack_sm90(format, packed, n, k):
    values, atoms = _two_parts(format, packed)
    _check_sm90(format, values)
    columns, shape = _sm90_shape(format, n, k, values.dtype)
    _check_part("values", values, [n, columns], (values.dtype,))
    _check_part("metadata", atoms, shape, (torch.uint8,))
    tiles, blocks, size = shape
    if values.dtype == torch.int8:
        meta = atoms.reshape(tiles, blocks, 64, size // 64).permute(1, 2, 0, 3)
    else:
        meta = atoms.reshape(tiles, blocks, 4, 2, 8, size // 256, 2, 2).permute(1, 2, 6, 4, 0, 5, 3, 7)
    return _canonical(values, meta.reshape(64 * blocks, tiles * size // 64), n, k)


for _format in _SM90_TILES:
    register_format(_format, functools.partial(_pack_sm90, _format), functools.partial(_unpack_sm90, _format))
