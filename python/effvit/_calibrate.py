"""What layers see on calibration data: the largest activation of every channel, and tokens to measure errors on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch

from ._progress import progress
from .ops import _checks

TOKENS = 512  # of a layer, kept for measuring


class Statistics:
    """Of one layer's input [..., K]: calls, the largest |x| of every channel [K], and up to TOKENS tokens [*, K]."""

    def __init__(self):
        self.calls = 0
        self.largest = None
        self.batches = []

    def update(self, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        self.calls += 1
        if not len(x):
            return
        largest = x.abs().amax(0).float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        step = max(len(x) * 4 // TOKENS, 1)  # a quarter at most from one batch
        self.batches.append(x[::step][: TOKENS // 4].clone())
        if len(self.batches) > 8:  # then every second of them: what stays is spread over all batches
            self.batches = self.batches[::2]

    @property
    def tokens(self) -> torch.Tensor | None:
        return torch.cat(self.batches)[:TOKENS] if self.batches else None


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """The model in evaluation, without gradients; every module's mode is what it was afterwards."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def run(model: torch.nn.Module, batch: object) -> None:
    """The model on a batch as loaders give them: an input, (input, target, ...), or keyword arguments."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(batch[0])
    else:
        model(batch)


def calibrate(
    model: torch.nn.Module, layers: Mapping[str, torch.nn.Module], batches: Iterable, limit: int | None, bar: bool
) -> dict[str, Statistics]:
    """{name: what the layer of that name saw}. ValueError where there are no batches."""
    if limit is not None and _checks.as_int("calibration", "batches", limit, None) < 1:
        raise _checks.value_error("calibration", "batches", "positive or None", limit)
    found = {name: Statistics() for name in layers}

    def watch(seen):
        return lambda module, args, kwargs: seen.update(args[0] if args else kwargs["input"])

    handles = [m.register_forward_pre_hook(watch(found[name]), with_kwargs=True) for name, m in layers.items()]
    total = len(batches) if hasattr(batches, "__len__") else None
    if limit is not None:
        total = limit if total is None else min(limit, total)
    done = 0
    try:
        with evaluating(model):
            # zip stops before it takes a batch too many
            numbered = zip(range(limit), batches, strict=False) if limit is not None else enumerate(batches)
            for _, batch in progress(numbered, "calibrating", total, bar):
                run(model, batch)
                done += 1
    finally:
        for handle in handles:
            handle.remove()
    if not done:
        raise _checks.value_error("calibration", "batches", "at least one", "none: empty, or a generator used before")
    return found
