"""A progress bar: tqdm's where it is installed, else a line now and then. On stderr, so that results can be piped."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator

SECONDS_BETWEEN_LINES = 2.0


def progress(items: Iterable, title: str, total: int | None = None, enabled: bool = True) -> Iterator:
    """The items, one after the other, with a bar for how many there were."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if not enabled:
        yield from items
    elif importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        yield from tqdm(items, desc=title, total=total, leave=False, file=sys.stderr)
    else:
        yield from _lines(items, title, total)


def _lines(items: Iterable, title: str, total: int | None) -> Iterator:
    shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown >= SECONDS_BETWEEN_LINES or done == total:
            shown = time.monotonic()
            print(f"{title}: {done}" + ("" if total is None else f"/{total}"), file=sys.stderr, flush=True)
