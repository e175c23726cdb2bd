"""What the operators on 2:4-sparse weights check alike; the form is defined in reference/sparse24_compress.py."""

from __future__ import annotations

from ..reference.sparse24_mask import ALGORITHMS as _MASKS
from ._checks import has_readable_values, shape, value_error

ALGORITHMS = tuple(_MASKS)  # the schema's int is an index into these


def derive_meta(op, dims, options, tensors) -> None:
    """K and K8 from values [N, K / 2]; where meta comes with a K8 of its own, it must be that."""
    values = tensors["values"]
    if dims["K2"] % 2:
        raise value_error(op, "values", "[N, K / 2] with K a multiple of 4", shape(values))
    dims["K"] = 2 * dims["K2"]
    steps = (dims["K"] + 7) // 8
    if dims.setdefault("K8", steps) != steps:
        expected = f"[N, ceil(K / 8)] = [{dims['N']}, {steps}] like values {shape(values)}"
        raise value_error(op, "meta", expected, shape(tensors["meta"]))


def check_meta(op, dims, options, tensors) -> None:
    """Two positions in ascending order in every nibble, where the values can be read."""
    meta = tensors["meta"]
    if not has_readable_values(meta):
        return
    low, high = meta & 15, meta >> 4
    wrong = ((low & 3) >= low >> 2) | ((high & 3) >= high >> 2)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        given = f"{meta[row, column].item():#04x} at [{row}, {column}]"
        raise value_error(op, "meta", "two positions i0 < i1 in every nibble, as i0 | i1 << 2", given)


def check_sparse(op, dims, options, tensors) -> None:
    """At most two nonzero in every group. Reads a GPU's values too: weights must not get lost without a word."""
    w = tensors["w"]
    if not has_readable_values(w, wait=True):
        return
    count = (w.detach().unflatten(1, (w.shape[1] // 4, 4)) != 0).sum(-1)
    wrong = count > 2
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        given = f"{count[row, group].item()} in row {row}, columns {4 * group} to {4 * group + 3}"
        raise value_error(op, "w", "2:4 sparse, with at most 2 nonzero of each 4 neighbours in a row", given)


def derive_groups(op, dims, options, tensors) -> None:
    """K, and N where blocks are masked, a multiple of 4."""
    blocks = options["algorithm"] == ALGORITHMS.index("transposable")
    if dims["K"] % 4 or (blocks and dims["N"] % 4):
        expected = "[N, K] with N and K multiples of 4" if blocks else "[N, K] with K a multiple of 4"
        raise value_error(op, "w", expected, shape(tensors["w"]))
