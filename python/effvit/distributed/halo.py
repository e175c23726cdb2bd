"""Maps whose rows are split across ranks: the rows around a rank's own, and operators that need nothing else."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..ops._checks import as_int, check_tensor, shape, value_error
from ..ops.window_attention import OP as WINDOW_OP
from ._ranks import check_sizes, gather_rows, process_group, scatter_rows, sizes_of_ranks
from ._windows import as_runs, window_rows

__all__ = ["halo_dwconv", "halo_exchange", "halo_window_attention"]
_MAX_HALO = 1 << 30


def _around(sizes, before, after):
    """For every rank the runs of rows from `before` rows before its own to `after` rows after them."""
    length, start, runs = sum(sizes), 0, []
    for size in sizes:
        low, high = start - before, start + size + after
        inside = max(low, 0), min(high, length)
        start += size
        of_rank = ((-1, inside[0] - low), (inside[0], inside[1] - inside[0]), (-1, high - inside[1]))
        runs.append(tuple(run for run in of_rank if run[1] > 0))
    return tuple(runs)


def _is_own(runs, sizes):
    """Whether every rank needs its own rows and no others."""
    start = 0
    for of_rank, size in zip(runs, sizes, strict=True):
        if of_rank != (((start, size),) if size else ()):
            return False
        start += size
    return True


def halo_exchange(
    x: torch.Tensor,
    before: int,
    after: int,
    group: dist.ProcessGroup | dist.DeviceMesh | None = None,
    *,
    dim: int = 1,
    sizes: list[int] | None = None,
) -> torch.Tensor:
    """A rank's part of a tensor with the rows around it, which other ranks hold; zeros beyond both ends of the whole.

    Every rank sends what others need, in one all-to-all to and from those ranks alone: the neighbours, unless their
    parts are shorter than the halo. The backward sends the gradients of these rows back, once, to where they came
    from, and adds them in float32.

    Args:
        x: this rank's part, of any number of dims and any floating-point dtype: [B, L, C], or [B, H, W, C] split by
            rows. The parts follow each other along `dim` in the order of the ranks. Their lengths may differ and be 0;
            everything else must be the same on all ranks.
        before, after: how many rows to add on both sides, the same on all ranks.
        group: the ranks that share the whole; all if None.
        dim: the dim that is split.
        sizes: the lengths of all ranks' parts. If None they are asked for, by one more collective whose result the host
            waits for; under torch.compile they must be given.

    Returns:
        A tensor like x with ``before + L + after`` in `dim`, contiguous; differentiable, any number of times.
        Gradients are those of the sum of all ranks' losses. Data are only moved: bitwise what a slice of the whole is.

    Raises:
        TypeError, ValueError: an argument is none of the above, on the ranks where it is; before any exchange of rows.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "halo_exchange"
    check_tensor(op, "x", x)
    if not x.is_floating_point():
        raise TypeError(f"effvit::{op}: x must be of a floating-point dtype, got {x.dtype}")
    before, after = (as_int(op, n, i, (0, _MAX_HALO)) for n, i in (("before", before), ("after", after)))
    dim = as_int(op, "dim", dim, None)
    if not -x.dim() <= dim < x.dim():
        raise value_error(op, "dim", f"a dim of x {shape(x)}", dim)
    dim %= x.dim()
    check_sizes(op, sizes)
    group = process_group(op, group)
    sizes = sizes_of_ranks(op, sizes, x.shape[dim], group, x.device)
    return gather_rows((x,), sizes, _around(sizes, before, after), dim, group)[0]


def halo_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor | None = None,
    logit_scale: torch.Tensor | None = None,
    pad_k: torch.Tensor | None = None,
    pad_v: torch.Tensor | None = None,
    group: dist.ProcessGroup | dist.DeviceMesh | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    halo: int | tuple[int, int] = 0,
    scale: float | None = None,
    mask_value: float = -100.0,
    roll_before_pad: bool = False,
    sizes: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """effvit.window_attention over maps of which every rank holds some rows.

    Windows may straddle ranks, and those of a shifted map reach from the last rank to the first. Keys and values of the
    rows that a rank's windows hold besides its own, and of their halo, come from where they are in one all-to-all, none
    if no window straddles; the backward sends their gradients back in one. Queries stay: a straddling window is
    computed by each of its ranks, whole, and each keeps its own rows. With windows as tall as the map (MaxViT's grid)
    every rank therefore computes all of it.

    Args:
        q, k, v: this rank's rows [B, H_r, W, h, d or dv], as effvit.window_attention takes them. The parts follow each
            other in the order of the ranks. Their numbers of rows may differ and be 0; everything else must be the same
            on all ranks.
        bias_table, logit_scale, pad_k, pad_v: as in effvit.window_attention, the same on all ranks; every rank's
            gradient is the part of its own rows (of a pad: of its own rows' queries), to be summed over the ranks.
        group: the ranks that share the maps; all if None.
        window, shift, dilation, halo, scale, mask_value, roll_before_pad: as in effvit.window_attention, of the whole
            map.
        sizes: the numbers of rows of all ranks. If None they are asked for, by one more collective whose result the
            host waits for; under torch.compile they must be given.

    Returns:
        ``out`` [B, H_r, W, h, dv] and ``lse`` [B, h, H_r, W] of this rank's rows, as effvit.window_attention returns
        them for the whole map; differentiable in every tensor argument by autograd. Gradients are those of the sum of
        all ranks' losses.

    Works under autocast and torch.compile. Deterministic.

    Raises:
        TypeError, ValueError: as effvit.window_attention, or sizes are not those of the ranks, on the ranks where the
            arguments are wrong; before any exchange of rows.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "halo_window_attention"
    options = {
        "window": window, "shift": shift, "dilation": dilation, "halo": halo, "scale": scale, "mask_value": mask_value,
        "roll_before_pad": roll_before_pad,
    }  # fmt: skip
    named = WINDOW_OP.named(op)
    if torch.compiler.is_compiling():  # there the operator's fake kernel validates
        options = named.complete(options)
    else:
        options = named.validate(q, k, v, bias_table, logit_scale, pad_k, pad_v, **options)
    check_sizes(op, sizes)
    group = process_group(op, group)
    sizes = sizes_of_ranks(op, sizes, q.shape[1], group, q.device)
    geometry = (options[n][0] for n in ("window", "shift", "dilation", "halo"))
    plans = window_rows(sizes, *geometry, options["roll_before_pad"])
    needed = tuple(as_runs(rows) for rows, _ in plans)
    attention, pads = torch.ops.effvit.window_attention.default, (bias_table, logit_scale, pad_k, pad_v)
    rank = dist.get_rank(group)
    options["shift"] = [plans[rank][1], options["shift"][1]]
    if _is_own(needed, sizes):
        return attention(q, k, v, *pads, **options)
    own, start = [], 0
    for (rows, _), size in zip(plans, sizes, strict=True):
        own.append(as_runs(row if start <= row < start + size else -1 for row in rows))
        start += size
    k, v = gather_rows((k, v), sizes, needed, 1, group)
    (q,) = gather_rows((q,), sizes, tuple(own), 1, group)
    out, lse = attention(q, k, v, *pads, **options)
    return scatter_rows((out,), sizes, tuple(own), 1, group)[0], scatter_rows((lse,), sizes, tuple(own), 2, group)[0]
