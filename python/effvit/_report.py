"""What the reports of effvit.patch, quantize_ and sparsify_ look like in a terminal."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2e}"


def kilobytes(x: int | None) -> str:
    return "-" if x is None else f"{x / 1024:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; none without rows."""
    rows = list(rows)
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]


def grouped(title: str, rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines of what was left alone, from (name, class, reason): one for each class and reason."""
    groups = collections.defaultdict(list)
    for name, module, reason in rows:
        groups[module, reason].append(name)
    lines = []
    for (module, reason), names in groups.items():
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        lines.append(f"{title}: {len(names)} x {module} ({some}): {reason}")
    return lines


def class_name(module: object) -> str:
    cls = type(module)
    return f"{cls.__module__.split('.')[0]}.{cls.__qualname__}"
