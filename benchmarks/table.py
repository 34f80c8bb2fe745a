"""The rows of `benchmarks.push`, and the table that they become."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from benchmarks.limits import Limits
from sender.report import PHASES

_COLUMNS = ("way", "GB", "prepare", "first", "later", "first / later", "to the wire", "to the flattened bucket")
_MORE = (*PHASES, "stood still", "CPU", "GPU memory", "note")
FLATTENED = "stock, flattened bucket, FP8"


class Pushed(BaseModel):
    """One push. Seconds; `thread_s` of its Python thread on a CPU, `process_s` of the whole trainer; `phases`: by name,
    with `stood still`, where the way has them."""

    total_s: float
    thread_s: float
    process_s: float
    phases: dict[str, float] = {}


class Row(BaseModel):
    """A way to update a server: its pushes in their order, or why there is none. `extra_bytes`: the most that the
    trainer's device held beside its model."""

    way: str
    num_bytes: int = 0
    prepare_s: float | None = None
    pushes: list[Pushed] = []
    extra_bytes: int | None = None
    note: str = ""
    failed: str = ""

    @property
    def later_s(self) -> float | None:
        """The median of all pushes but the first."""
        return statistics.median(push.total_s for push in self.pushes[1:]) if self.pushes[1:] else None


def table(rows: Sequence[Row], limits: Limits | None) -> str:
    """Milliseconds, but where a column says otherwise."""
    columns = [*_COLUMNS, *_MORE]
    sent = next((row.num_bytes for row in rows if row.num_bytes), 0)  # FP8 ways come first
    lines = [_line(columns), "|---" * len(columns) + "|"]
    if limits is not None and sent:
        what = (
            (f"limit: the wire, {limits.wire / 1e9:.1f} GB/s", limits.wire_s(sent)),
            (f"limit: a copy, {limits.copied / 1e9:.0f} GB/s read and written", limits.commit_s(sent)),
        )
        lines += [_line([name, _gb(sent), "", "", _ms(value), *[""] * (len(columns) - 5)]) for name, value in what]
    flattened = next((row.later_s for row in rows if row.way == FLATTENED), None)
    return "\n".join([*lines, *(_line(_cells(row, limits, flattened)) for row in rows)])


def _cells(row: Row, limits: Limits | None, flattened_s: float | None) -> list[str]:
    if row.failed or not row.pushes:
        told = f"failed: {row.failed}" if row.failed else row.note
        return [row.way, *[""] * (len(_COLUMNS) + len(_MORE) - 2), " ".join(told.split())]
    later, first = row.later_s, row.pushes[0].total_s
    all_later = [push.total_s for push in row.pushes[1:]]
    spread = f"{_ms(later)} ({_ms(min(all_later))} to {_ms(max(all_later))})" if later else ""
    wire_s = limits.wire_s(row.num_bytes) if limits is not None and row.num_bytes else None
    timed = row.pushes[1:] or row.pushes
    thread_s = statistics.median(push.thread_s for push in timed)
    process_s = statistics.median(push.process_s for push in timed)
    return [
        *(row.way, _gb(row.num_bytes), _ms(row.prepare_s), _ms(first), spread, _ratio(first, later)),
        *(_ratio(later, wire_s), _ratio(later, flattened_s)),
        *(_ms(_phase(row, phase)) for phase in (*PHASES, "stood still")),
        f"{_ms(thread_s)} of {_ms(process_s)}",
        "" if row.extra_bytes is None else _gb(row.extra_bytes),
        row.note,
    ]


def _phase(row: Row, phase: str) -> float | None:
    found = [push.phases[phase] for push in row.pushes[1:] if phase in push.phases]
    return statistics.median(found) if found else None


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g}"


def _ratio(value: float | None, of: float | None) -> str:
    return "" if not value or not of else f"{value / of:.2f}"


def as_json(rows: Sequence[Row], limits: Limits | None, about: dict[str, Any]) -> dict[str, Any]:
    found = None if limits is None else limits.model_dump()
    return {"about": about, "limits": found, "rows": [row.model_dump() for row in rows]}
