"""Long convolutions of sequences that are split across ranks: by channels while they are convolved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..ops._checks import as_bool, as_int, check_like, check_tensor, shape, value_error
from ..ops.fft_conv import OP, fft_conv
from ._ranks import as_autocast, check_sizes, process_group, resplit, sizes_of_ranks

__all__ = ["channels_of_rank", "distributed_fft_conv"]


def _split(channels, ranks):
    return tuple(channels // ranks + (rank < channels % ranks) for rank in range(ranks))


def channels_of_rank(channels: int, group: dist.ProcessGroup | dist.DeviceMesh | None = None) -> tuple[int, int]:
    """(first, end) of the channels that distributed_fft_conv convolves on this rank.

    As many on every rank; where `channels` is not a multiple of their number, one more on the first ranks.

    Raises:
        TypeError, ValueError: channels is not a number of channels, or group not a group.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "channels_of_rank"
    channels = as_int(op, "channels", channels, (0, 1 << 62))
    group = process_group(op, group)
    counts, rank = _split(channels, dist.get_world_size(group)), dist.get_rank(group)
    return sum(counts[:rank]), sum(counts[: rank + 1])


def _own_channels(op, name, t, dim, counts, rank):
    """This rank's channels of a tensor that has these alone or all of them."""
    if t is None:
        return None
    if t.dim() < -dim or t.shape[dim] not in (sum(counts), counts[rank]):
        expected = f"of the {sum(counts)} channels of u, or of this rank's {counts[rank]}"
        raise value_error(op, name, expected, shape(t))
    if t.shape[dim] == counts[rank]:
        return t
    return t.narrow(dim, sum(counts[:rank]), counts[rank])


def _check(op, u, tensors, gates, options):
    """The operator's own checks, on tensors without data."""
    try:
        given = {n: None if t is None else t.to("meta") for n, t in tensors.items()}
        fft_conv(u, **given, **dict.fromkeys(gates), **options)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(f"effvit::{OP.name}:", f"effvit::{op}:")) from None


def distributed_fft_conv(
    u: torch.Tensor,
    k: torch.Tensor | None = None,
    d: torch.Tensor | None = None,
    group: dist.ProcessGroup | dist.DeviceMesh | None = None,
    *,
    pregate: torch.Tensor | None = None,
    postgate: torch.Tensor | None = None,
    k_rev: torch.Tensor | None = None,
    spectrum: torch.Tensor | None = None,
    mode: str | Sequence[str] = "causal",
    channels_last: bool = False,
    act: str = "none",
    freq_keep: int | Sequence[int] | None = None,
    kernel_scale: float = 1.0,
    sizes: Sequence[int] | None = None,
) -> torch.Tensor:
    r"""effvit.fft_conv over sequences, or maps split by rows, of which every rank holds a part.

    One all-to-all turns parts of the sequence with all channels into the whole sequence of some channels, which a rank
    convolves; a second one is the way back. The backward has one of each again. Every rank sends and receives its part
    of u once, whatever the number of ranks. Gates belong to tokens and are applied before and after, where they are.

    Args:
        u: this rank's part, [B, C, L_r, ...] or [B, L_r, ..., C] with `channels_last`, as effvit.fft_conv takes it,
            split in the first axis after B and C. The parts follow each other in the order of the ranks. Their lengths
            may differ and be 0; everything else must be the same on all ranks. C may be any number.
        k, k_rev, spectrum, d: as in effvit.fft_conv, for the whole sequence: of all C channels, the same on all ranks,
            or only of the channels that this rank convolves (:func:`channels_of_rank`). Of all channels, a rank's
            gradient is the part of those it convolves and 0 elsewhere, to be summed over the ranks.
        group: the ranks that share the sequences; all if None.
        pregate, postgate: of u's shape and dtype: this rank's part.
        mode, channels_last, act, freq_keep, kernel_scale: as in effvit.fft_conv, of the whole sequence.
        sizes: the lengths of all ranks' parts. If None they are asked for, by one more collective whose result the host
            waits for; under torch.compile they must be given.

    Returns:
        The shape and dtype of u: this rank's part of the result; differentiable in every tensor argument by autograd.
        Gradients are those of the sum of all ranks' losses. The backward communicates: all ranks must run it, one with
        an empty part too, and a tensor must require gradients on all ranks or on none. With gates in half precision
        their products are rounded to it, which effvit.fft_conv computes in float32.

    Works under autocast and torch.compile. Deterministic.

    Raises:
        TypeError, ValueError: as effvit.fft_conv, or sizes are not those of the ranks, on the ranks where the arguments
            are wrong; before any exchange of tokens.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "distributed_fft_conv"
    u, pregate, postgate = as_autocast(u, pregate, postgate)
    kernels = {"k": k, "d": d, "k_rev": k_rev, "spectrum": spectrum}
    gates = {"pregate": pregate, "postgate": postgate}
    check_tensor(op, "u", u)
    if not 3 <= u.dim() <= 5:
        expected = "[B, *S, C]" if as_bool(op, "channels_last", channels_last) else "[B, C, *S]"
        raise value_error(op, "u", f"{expected} with one to three axes", shape(u))
    for name, t in (kernels | gates).items():
        if t is not None:
            check_tensor(op, name, t)
            check_like(op, name, t, "u", u, dtype=name in gates)
            if name in gates and t.shape != u.shape:
                raise value_error(op, name, f"{shape(u)} like u", shape(t))
    axes, (channel_dim, dim) = u.dim() - 2, (u.dim() - 1, 1) if as_bool(op, "channels_last", channels_last) else (1, 2)
    check_sizes(op, sizes)
    group = process_group(op, group)
    sizes = sizes_of_ranks(op, sizes, u.shape[dim], group, u.device)
    rank = dist.get_rank(group)
    counts = _split(u.shape[channel_dim], len(sizes))
    own = {n: _own_channels(op, n, t, -1 if n == "d" else -axes - 1, counts, rank) for n, t in kernels.items()}
    options = {
        "mode": mode, "channels_last": channels_last, "act": act, "freq_keep": freq_keep, "kernel_scale": kernel_scale,
    }  # fmt: skip
    if not torch.compiler.is_compiling():  # there the operator's fake kernel validates
        whole = list(u.shape)
        whole[dim], whole[channel_dim] = sum(sizes), counts[rank]
        _check(op, torch.empty(whole, dtype=u.dtype, device="meta"), own, gates, options)
    if len(sizes) == 1:
        return fft_conv(u, **own, **gates, **options)
    if pregate is not None:
        u = u * pregate
    u = resplit(u, dim, sizes, channel_dim, counts, group)
    out = resplit(fft_conv(u, **own, **options), channel_dim, counts, dim, sizes, group)
    return out if postgate is None else out * postgate.to(out.dtype)
