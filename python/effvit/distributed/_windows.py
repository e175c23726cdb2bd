"""The geometry of windows over a map whose rows are split across ranks."""

from __future__ import annotations

from ._ranks import cached


def as_runs(rows):
    """Row indices -> ((first, rows), ...) of consecutive ones; -1 stands for a row of zeros."""
    runs = []
    for row in rows:
        if (
            runs
            and (row == runs[-1][0] + runs[-1][1] if row >= 0 else runs[-1][0] < 0)
            and (row < 0) == (runs[-1][0] < 0)
        ):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return tuple(runs)


def _positions(size, padded, shift, roll_before_pad):
    """The row of a map at every place of the rolled, padded axis, as axis_layout of the reference has it; or -1."""
    if roll_before_pad:
        return [(i + shift) % size for i in range(size)] + [-1] * (padded - size)
    rolled = ((i + shift) % padded for i in range(padded))
    return [row if row < size else -1 for row in rolled]


@cached
def window_rows(sizes, window, shift, dilation, halo, roll_before_pad):
    """For every rank (rows, shift): a smaller map in which its rows are in the same windows, with the same keys.

    `rows` are those of the whole map, from top to bottom of the small one. Windows are cut from a rolled axis in blocks
    of window * dilation rows; a rank's map consists of the blocks that hold rows of its own and of those that their
    halo reaches. Only the last block knows of the shift, by its mask, and only the end of a map is padded: a map that
    has any of it ends like the whole one and is shifted alike; any other is what the rolled axis has, not shifted.
    """
    height, extent = sum(sizes), window * dilation
    blocks = -(-height // extent)
    padded = blocks * extent
    rolled = _positions(height, padded, shift, roll_before_pad) if height else []
    block_of = {row: i // extent for i, row in enumerate(rolled) if row >= 0}
    end = min(padded - extent if shift else padded, rolled.index(-1) if height < padded else padded) // extent
    reach = -(-halo // window)
    plans, first = [], 0
    for size in sizes:
        kept = {
            near
            for own in {block_of[row] for row in range(first, first + size)}
            for near in range(max(own - reach, 0), min(own + reach + 1, blocks))
        }
        first += size
        ends = bool(kept) and max(kept) >= end
        if ends:
            kept.update(range(end, blocks))
            # Else rows that wrap around would be taken for padding.
            if len(kept) < blocks and len(kept) * extent - (padded - height) < shift:
                kept.add(end - 1)
        places = [block * extent + i for block in sorted(kept) for i in range(extent)]
        if not ends:
            plans.append(([rolled[i] for i in places], 0))
            continue
        own = len(places) - (padded - height)
        rows = [0] * own
        for row, i in zip(_positions(own, len(places), shift, roll_before_pad), places, strict=True):
            if row >= 0:
                rows[row] = rolled[i]
        plans.append((rows, shift))
    return tuple(plans)
