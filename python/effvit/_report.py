"""What the reports of effvit.patch, quantize_ and sparsify_ look like in a terminal."""

from __future__ import annotations

import collections
import dataclasses
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


@dataclasses.dataclass
class Row:
    """A linear layer of the report. Errors are norms relative to the float one's; None where there was no data."""

    name: str
    module: str
    changed: bool
    detail: str  # what it is now, or why it was left alone
    weight_error: float | None = None
    output_error: float | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclasses.dataclass
class Report:
    """What `effvit.quantize_` and its kin did: a row for every linear layer."""

    rows: list[Row]
    left_alone: str = "not quantised"

    @property
    def changed(self) -> list[Row]:
        return [r for r in self.rows if r.changed]

    @property
    def unchanged(self) -> list[Row]:
        return [r for r in self.rows if not r.changed]

    @property
    def bytes_before(self) -> int:
        return sum(r.bytes_before or 0 for r in self.changed)

    @property
    def bytes_after(self) -> int:
        return sum(r.bytes_after or 0 for r in self.changed)

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        head = ("module", "class", "weight error", "output error", "KiB before", "after", "")
        lines = table(
            head,
            (
                (r.name, r.module, number(r.weight_error), number(r.output_error), kilobytes(r.bytes_before),
                 kilobytes(r.bytes_after), r.detail)
                for r in self.changed
            ),
        )  # fmt: skip
        if lines:
            lines.append(
                f"{len(self.changed)} layers, {kilobytes(self.bytes_before)} KiB before, {kilobytes(self.bytes_after)} "
                "after; errors: norm of the difference relative to the float layer's, outputs on calibration data"
            )
        lines += grouped(self.left_alone, ((r.name, r.module, r.detail) for r in self.unchanged))
        return "\n".join(lines)
