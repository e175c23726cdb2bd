"""Process groups, the lengths of all ranks' parts, and differentiable exchanges of rows and of splits."""

from __future__ import annotations

import functools
import math

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from ..ops._checks import is_int, type_error, value_error


def cached(function):
    """A function of hashable arguments that remembers its results; torch.compile, which would warn, traces it."""
    remembered = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def call(*args):
        return (function if torch.compiler.is_compiling() else remembered)(*args)

    return call


def process_group(op, group):
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"effvit::{op}: torch.distributed must be initialised, got no process group")
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise value_error(op, "group", "a mesh of one dimension", f"{group.ndim}")
        return group.get_group()
    if group is None:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise type_error(op, "group", "a ProcessGroup, a DeviceMesh or None", type(group).__name__)
    return group


def as_autocast(*tensors):
    """Maps as operators cast them under autocast, before they are sent: the first one decides on the device."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


# Newer versions of torch warn of the old name.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


def of_all_ranks(x, group):  # [ranks, *x.shape]
    return collectives.wait_tensor(_all_gather(x[None].contiguous(), 0, group))


def check_sizes(op, sizes):
    """What can be said without a process group."""
    if sizes is None:
        if torch.compiler.is_compiling():
            raise value_error(op, "sizes", "given under torch.compile", None)
        return
    if not isinstance(sizes, (tuple, list, torch.Size)) or not all(is_int(n) for n in sizes):
        raise type_error(op, "sizes", "a list of ints", repr(sizes))
    if any(n < 0 for n in sizes):
        raise value_error(op, "sizes", "a list of lengths, at least 0", list(sizes))


def sizes_of_ranks(op, sizes, length, group, device):
    """The lengths of all ranks' parts, given or asked of the ranks."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if sizes is None:
        return tuple(of_all_ranks(torch.tensor(length, device=device), group).tolist()) if ranks > 1 else (length,)
    if len(sizes) != ranks:
        raise value_error(op, "sizes", f"{ranks} lengths, one of each rank", len(sizes))
    if sizes[rank] != length:
        raise value_error(op, "sizes", f"{length} at {rank}, the length of this rank's part", sizes[rank])
    return tuple(int(n) for n in sizes)


def _swap(chunks, shapes, like, group):
    """chunks[r]: tensors for rank r; shapes[r]: those of the tensors that come from it, which are returned."""
    counts = [sum(t.numel() for t in given) for given in chunks]
    expected = [sum(math.prod(shape) for shape in taken) for taken in shapes]
    flat = [t.reshape(-1) for given in chunks for t in given]
    buffer = torch.cat(flat) if flat else like.new_empty(0)
    received = collectives.wait_tensor(collectives.all_to_all_single(buffer, expected, counts, group))
    pieces = received.split([math.prod(shape) for taken in shapes for shape in taken])
    pieces = iter(pieces)
    return [[next(pieces).view(shape) for shape in taken] for taken in shapes]


# ---- rows of a whole whose parts are on the ranks ------------------------------------------------------------------


def _with_size(shape, dim, n):
    return (*shape[:dim], n, *shape[dim + 1 :])


def _pieces(runs, sizes):
    """Runs of rows of the whole, as (rank, first row of its part, rows); rank -1: zeros."""
    pieces = []
    for start, n in runs:
        if start < 0:
            pieces.append((-1, 0, n))
            continue
        offset = 0
        for rank, size in enumerate(sizes):
            first, end = max(start, offset), min(start + n, offset + size)
            if first < end:
                pieces.append((rank, first - offset, end - first))
            offset += size
    return pieces


@cached
def _traffic(sizes, runs, rank):
    """This rank's pieces; what it sends to every rank; whether any rank sends anything."""
    pieces = [_pieces(of_rank, sizes) for of_rank in runs]
    sent = [
        [(first, n) for source, first, n in of_rank if source == rank] if r != rank else []
        for r, of_rank in enumerate(pieces)
    ]
    moves = any(source not in (-1, r) for r, of_rank in enumerate(pieces) for source, _, _ in of_rank)
    return pieces[rank], sent, moves


class _Gather(torch.autograd.Function):
    """Rows that a rank needs, of every tensor, from all ranks: in the order of its runs. One all-to-all."""

    @staticmethod
    def forward(ctx, *args):  # tensors first: torch.compile takes a first tuple for ctx
        *parts, sizes, runs, dim, group = args
        ctx.plan = sizes, runs, dim, group
        rank = dist.get_rank(group)
        mine, sent, moves = _traffic(sizes, runs, rank)
        arrived = [[] for _ in sizes]
        if moves:
            chunks = [[t.narrow(dim, first, n) for first, n in to for t in parts] for to in sent]
            shapes = [
                [_with_size(t.shape, dim, n) for source, _, n in mine if source == s != rank for t in parts]
                for s in range(len(sizes))
            ]
            arrived = _swap(chunks, shapes, parts[0], group)
        arrived = [iter(pieces) for pieces in arrived]
        gathered = [[] for _ in parts]
        for source, first, n in mine:
            for pieces, t in zip(gathered, parts, strict=True):
                if source == -1:
                    pieces.append(t.new_zeros(_with_size(t.shape, dim, n)))
                else:
                    pieces.append(t.narrow(dim, first, n) if source == rank else next(arrived[source]))
        return tuple(
            torch.cat(pieces, dim) if pieces else t.new_empty(_with_size(t.shape, dim, 0))
            for pieces, t in zip(gathered, parts, strict=True)
        )

    @staticmethod
    def backward(ctx, *grads):
        return *_Scatter.apply(*grads, *ctx.plan), None, None, None, None


def _joined(sent):
    """Union of the runs that are sent, as a sorted list of disjoint (first, end)."""
    ends, union = {}, []
    for first, n in [run for to in sent for run in to]:
        ends[first] = max(ends.get(first, 0), first + n)
    for first in sorted(ends):  # of ints: torch.compile does not sort tuples
        if union and first <= union[-1][1]:
            union[-1] = (union[-1][0], max(ends[first], union[-1][1]))
        else:
            union.append((first, ends[first]))
    return union


class _Scatter(torch.autograd.Function):
    """The transpose of _Gather: gathered rows back to where they came from, where they are added, lower ranks first."""

    @staticmethod
    def forward(ctx, *args):
        *gathered, sizes, runs, dim, group = args
        ctx.plan = sizes, runs, dim, group
        rank = dist.get_rank(group)
        mine, sent, moves = _traffic(sizes, runs, rank)
        chunks, own, at = [[] for _ in sizes], [], 0
        for source, first, n in mine:
            if source == rank:
                own.append((at, first, n))
            elif source >= 0:
                chunks[source] += [g.narrow(dim, at, n) for g in gathered]
            at += n
        parts = []
        for g in gathered:
            if len(own) == 1 and own[0][2] == sizes[rank]:
                parts.append(g.narrow(dim, own[0][0], sizes[rank]).clone(memory_format=torch.contiguous_format))
                continue
            part = g.new_zeros(_with_size(g.shape, dim, sizes[rank]))
            for at, first, n in own:
                part.narrow(dim, first, n).add_(g.narrow(dim, at, n))
            parts.append(part)
        if not moves:
            return tuple(parts)
        shapes = [[_with_size(g.shape, dim, n) for _, n in to for g in gathered] for to in sent]
        arrived = _swap(chunks, shapes, gathered[0], group)
        for i, part in enumerate(parts):
            for low, high in _joined(sent):
                # Rounded once, however many ranks add to it.
                total = part.narrow(dim, low, high - low).to(torch.promote_types(part.dtype, torch.float32))
                for to, pieces in zip(sent, arrived, strict=True):
                    for j, (first, n) in enumerate(to):
                        if low <= first < high:
                            total.narrow(dim, first - low, n).add_(pieces[j * len(parts) + i])
                part.narrow(dim, low, high - low).copy_(total)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads):
        return *_Gather.apply(*grads, *ctx.plan), None, None, None, None


def _check_dtypes(parts):
    """They share a buffer, which another rank cuts by the dtype of its own."""
    for t in parts:
        if t.dtype != parts[0].dtype:
            raise TypeError(f"effvit.distributed: rows sent together must be {parts[0].dtype}, got {t.dtype}")


def gather_rows(parts, sizes, runs, dim, group):
    """Tensors of the rows that this rank needs.

    parts: tensors of one dtype whose `dim` is split across the ranks, all alike. sizes: how many rows every rank has.
    runs: for every rank the rows of the whole that it needs, as a tuple of (first, rows); first -1: that many zeros.
    """
    _check_dtypes(parts)
    return _Gather.apply(*parts, sizes, runs, dim, group)


@cached
def own_runs(runs, sizes):
    """The same runs with zeros where the rows are not the rank's own."""
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    return tuple(
        tuple((start + first, n) if source == rank else (-1, n) for source, first, n in _pieces(of_rank, sizes))
        for rank, (of_rank, start) in enumerate(zip(runs, starts, strict=True))
    )


def scatter_rows(gathered, sizes, runs, dim, group):
    """What ranks hold for the rows of `runs`, added up where these rows are."""
    _check_dtypes(gathered)
    return _Scatter.apply(*gathered, sizes, runs, dim, group)


# ---- another dim split ---------------------------------------------------------------------------------------------


class _Resplit(torch.autograd.Function):
    """A tensor split by `dim` becomes one split by `to`: one all-to-all; its derivative is the way back."""

    @staticmethod
    def forward(ctx, x, dim, sizes, to, to_sizes, group):
        ctx.plan = to, to_sizes, dim, sizes, group
        rank = dist.get_rank(group)
        chunks = [[t] for t in x.split(to_sizes, to)]
        own = _with_size(x.shape, to, to_sizes[rank])
        shapes = [[_with_size(own, dim, n)] for n in sizes]
        return torch.cat([t for pieces in _swap(chunks, shapes, x, group) for t in pieces], dim)

    @staticmethod
    def backward(ctx, grad):
        return _Resplit.apply(grad, *ctx.plan), None, None, None, None, None


def resplit(x, dim, sizes, to, to_sizes, group):
    """x, of whose `dim` every rank has `sizes[rank]`, with `dim` whole and `to_sizes[rank]` of `to`."""
    return x if len(sizes) == 1 else _Resplit.apply(x, dim, sizes, to, to_sizes, group)
