"""Maps whose rows are split across ranks: the rows around a rank's own, and operators that need nothing else."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..ops._checks import as_bool, as_int, as_pair, check_tensor, index_of, is_int, shape, type_error, value_error
from ..ops.dwconv import NAMES as ACTIVATIONS
from ..ops.dwconv import OP as DWCONV_OP
from ..ops.window_attention import OP as WINDOW_OP
from ._ranks import as_autocast, check_sizes, gather_rows, own_runs, process_group, scatter_rows, sizes_of_ranks
from ._windows import as_runs, window_rows

__all__ = ["halo_dwconv", "halo_exchange", "halo_window_attention"]
_MAX_HALO = 1 << 30


def _around(sizes, before, after):
    """For every rank (runs, zeros, zeros): rows from `before` rows before its own to `after` rows after them.

    The zeros are rows beyond the ends of the whole, which no run has.
    """
    length, start, plans = sum(sizes), 0, []
    for size in sizes:
        low, high = start - before, start + size + after
        first, end = max(low, 0), min(high, length)
        start += size
        plans.append((((first, end - first),) if first < end else (), first - low, high - end))
    return plans


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
        Gradients are those of the sum of all ranks' losses. The backward communicates: all ranks must run it, one with
        an empty part too, and x must require gradients on all ranks or on none. Data are only moved: bitwise what a
        slice of the whole is.

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
    runs = tuple(
        tuple(run for run in ((-1, zeros), *inside, (-1, more)) if run[1])
        for inside, zeros, more in _around(sizes, before, after)
    )
    return gather_rows((x,), sizes, runs, dim, group)[0].contiguous()


def _checked_dwconv(op, x, weight, bias, pregate, postgate, causal, dilation, act, window):
    """(tensors as maps, options as the operator's schema has them, the dim that is split) of a valid call."""
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight)
    if x.dim() not in (3, 4):
        raise value_error(op, "x", "[B, L, C] or [B, H, W, C]", shape(x))
    flat = x.dim() == 3
    if weight.dim() == x.dim() and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if weight.dim() != x.dim() - 1:
        expected = "[C, k] or [C, 1, k]" if flat else "[C, kh, kw] or [C, 1, kh, kw]"
        raise value_error(op, "weight", f"{expected} like x {shape(x)}", shape(weight))
    for name, gate in (("pregate", pregate), ("postgate", postgate)):
        if gate is not None:
            check_tensor(op, name, gate)
            if gate.shape != x.shape:
                raise value_error(op, name, f"{shape(x)} like x", shape(gate))
    if flat:
        x, weight = x.unsqueeze(1), weight.unsqueeze(1)
        pregate, postgate = (None if t is None else t.unsqueeze(1) for t in (pregate, postgate))
        for name, option in (("dilation", dilation), ("window", window)):
            if not (is_int(option) or (name == "window" and option is None)):
                raise type_error(op, name, "an int" if name == "dilation" else "an int or None", repr(option))
    dilation = as_pair(op, "dilation", dilation, (1, 32768))
    windows = [0, 0] if window is None else as_pair(op, "window", window, (1, 1 << 24))
    if flat:
        dilation, windows = [1, dilation[1]], windows if window is None else [1, windows[1]]
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[1:], strict=True)]
    before = [r // 2 for r in reach]
    if as_bool(op, "causal", causal):
        if weight.shape[1] != 1:
            raise value_error(op, "weight", "[C, 1, kw], of one row, where causal is given", shape(weight))
        before = reach
    after = [r - b for r, b in zip(reach, before, strict=True)]
    options = {"before": before, "after": after, "dilation": dilation, "window": [0, 0]}
    options["act"] = index_of(op, "act", act, ACTIVATIONS)
    tensors = x, weight, bias, pregate, postgate
    if not torch.compiler.is_compiling():  # there the operator's fake kernel validates
        options = DWCONV_OP.named(op).validate(*tensors, None, **options)
    return tensors, options | {"window": windows}, 2 if flat else 1


def halo_dwconv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pregate: torch.Tensor | None = None,
    postgate: torch.Tensor | None = None,
    group: dist.ProcessGroup | dist.DeviceMesh | None = None,
    *,
    causal: bool = False,
    dilation: int | tuple[int, int] = 1,
    act: str = "none",
    window: int | tuple[int, int] | None = None,
    sizes: list[int] | None = None,
) -> torch.Tensor:
    """effvit.dwconv, with padding="same", of sequences or maps of which every rank holds some tokens or rows.

    The rows that a kernel reaches beyond a rank's own come from other ranks in one all-to-all, zeros stand beyond both
    ends of the whole alone; the backward sends gradients back in one. A causal convolution of a sequence gets them as
    its state, without a copy of x.

    Args:
        x: this rank's part, [B, L_r, C] split by tokens or [B, H_r, W, C] split by rows, as effvit.dwconv takes it. The
            parts follow each other in the order of the ranks. Their lengths may differ, be 0, and be shorter than the
            kernel; everything else must be the same on all ranks.
        weight, bias: as in effvit.dwconv, the same on all ranks; every rank's gradient is the part of its own outputs,
            to be summed over the ranks.
        pregate, postgate: of the shape and dtype of x: this rank's part.
        group: the ranks that share the whole; all if None.
        causal, dilation, act: as in effvit.dwconv. Before the first rank's tokens are zeros.
        window: as in effvit.dwconv, of the whole: it divides that, not each part. A window that straddles ranks is
            computed by each of them, and each keeps its own rows.
        sizes: the lengths of all ranks' parts. If None they are asked for, by one more collective whose result the host
            waits for; under torch.compile they must be given.

    Returns:
        [B, L_r, C] or [B, H_r, W, C] in the dtype of x: this rank's part of the result for the whole; differentiable
        in every tensor argument by autograd. Gradients are those of the sum of all ranks' losses. The backward
        communicates: all ranks must run it, one with an empty part too, and a tensor must require gradients on all
        ranks or on none.

    Works under autocast and torch.compile. Deterministic.

    Raises:
        TypeError, ValueError: as effvit.dwconv, or sizes are not those of the ranks, on the ranks where the arguments
            are wrong; before any exchange of rows.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "halo_dwconv"
    x, pregate, postgate = as_autocast(x, pregate, postgate)
    tensors, options, dim = _checked_dwconv(op, x, weight, bias, pregate, postgate, causal, dilation, act, window)
    check_sizes(op, sizes)
    group = process_group(op, group)
    sizes = sizes_of_ranks(op, sizes, x.shape[1], group, x.device)
    if window is not None:
        map_of = (sum(sizes), x.shape[2]) if dim == 1 else (1, sum(sizes))
        if any(n % w for n, w in zip(map_of, options["window"], strict=True)):
            expected = f"such that it divides {list(map_of)[dim - 1 :]}, all ranks' rows together"
            raise value_error(op, "window", expected, options["window"][dim - 1 :])
    if len(sizes) == 1:
        out = torch.ops.effvit.dwconv.default(*tensors, **options)
    elif window is not None:
        out = _windowed(tensors, options, sizes, dim, group)
    else:
        out = _with_halo(tensors, options, sizes, dim, group, causal)
    return out.squeeze(1) if dim == 2 else out


def _windowed(tensors, options, sizes, dim, group):
    """dwconv of all windows that hold rows of this rank's, and of the result its own rows."""
    x, weight, bias, pregate, postgate = tensors
    window, start, runs = options["window"][dim - 1], 0, []
    for size in sizes:
        first, end = start // window * window, -(-(start + size) // window) * window
        start += size
        runs.append(((first, end - first),) if size else ())
    runs = tuple(runs)
    if _is_own(runs, sizes):
        return torch.ops.effvit.dwconv.default(*tensors, **options)
    own = own_runs(runs, sizes)
    maps = gather_rows((x,) if pregate is None else (x, pregate), sizes, runs, dim, group)
    if postgate is not None:
        (postgate,) = gather_rows((postgate,), sizes, own, dim, group)
    pregate = None if pregate is None else maps[1]
    out = torch.ops.effvit.dwconv.default(maps[0], weight, bias, pregate, postgate, **options)
    return scatter_rows((out,), sizes, own, dim, group)[0]


def _with_halo(tensors, options, sizes, dim, group, causal):
    """dwconv of this rank's rows and of those around them, without padding where other ranks have rows."""
    x, weight, bias, pregate, postgate = tensors
    conv, axis, rank = torch.ops.effvit.dwconv.default, dim - 1, dist.get_rank(group)
    before, after = options["before"][axis], options["after"][axis]
    if before == after == 0:
        return conv(*tensors, **options)
    maps = (x,) if pregate is None else (x, pregate)
    if causal:
        runs, start = [], 0
        for size in sizes:
            inside = min(before, start)
            runs.append(tuple(run for run in ((-1, before - inside), (start - inside, inside)) if run[1]))
            start += size
        maps = gather_rows(maps, sizes, tuple(runs), dim, group)
        state = maps[0] if pregate is None else maps[0] * maps[1]
        return conv(*tensors, state, **options)
    plans = _around(sizes, before, after)
    maps = gather_rows(maps, sizes, tuple(runs for runs, _, _ in plans), dim, group)
    pads = {"before": list(options["before"]), "after": list(options["after"])}
    pads["before"][axis], pads["after"][axis] = plans[rank][1:]
    pregate = None if pregate is None else maps[1]
    return conv(maps[0], weight, bias, pregate, postgate, **options | pads)


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
        all ranks' losses. The backward communicates: all ranks must run it, one with an empty part too, and a tensor
        must require gradients on all ranks or on none.

    Works under autocast and torch.compile. Deterministic.

    Raises:
        TypeError, ValueError: as effvit.window_attention, or sizes are not those of the ranks, on the ranks where the
            arguments are wrong; before any exchange of rows.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "halo_window_attention"
    q, k, v, pad_k, pad_v = as_autocast(q, k, v, pad_k, pad_v)
    options = {"scale": scale, "mask_value": mask_value, "roll_before_pad": roll_before_pad}
    for name, pair, least in (
        ("window", window, 1), ("shift", shift, 0), ("dilation", dilation, 1), ("halo", halo, 0),
    ):  # fmt: skip
        options[name] = as_pair(op, name, pair, (least, 32768))
    if not torch.compiler.is_compiling():  # there the operator's fake kernel validates
        options = WINDOW_OP.named(op).validate(q, k, v, bias_table, logit_scale, pad_k, pad_v, **options)
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
    own = own_runs(needed, sizes)
    k, v = gather_rows((k, v), sizes, needed, 1, group)
    (q,) = gather_rows((q,), sizes, own, 1, group)
    out, lse = attention(q, k, v, *pads, **options)
    return scatter_rows((out,), sizes, own, 1, group)[0], scatter_rows((lse,), sizes, own, 2, group)[0]
