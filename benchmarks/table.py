"""The rows of `benchmarks.push`, and the tables that they become."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from benchmarks.limits import Limits
from benchmarks.rounds import Load
from sender.report import PHASES

_COLUMNS = ("way", "GB", "prepare", "first", "later", "first / later", "to the wire", "to the flattened bucket")
_MORE = (*PHASES, "stood still", "CPU, Python thread", "CPU, process", "memory, GB", "memory, buckets", "note")
_LOAD = ("under load", "streams", "normal gap", "longest gap", "over the normal gap", "longest, first push")
_MORE_LOAD = ("longest, no push", "tokens lost", "of so many", "tokens/s, receiving", "tokens/s, no push", "slower by")
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
    trainer's device (rank 0's) held beside its model; `bucket_bytes`: of one bucket. `load`: what streams saw of it."""

    way: str
    num_bytes: int = 0
    prepare_s: float | None = None
    pushes: list[Pushed] = []
    extra_bytes: int | None = None
    bucket_bytes: int | None = None
    load: Load | None = None
    note: str = ""
    failed: str = ""

    @property
    def later_s(self) -> float | None:
        """The median of all pushes but the first."""
        return statistics.median(push.total_s for push in self.pushes[1:]) if self.pushes[1:] else None

    def __str__(self) -> str:
        """In one line."""
        said = [] if self.later_s is None else [f"{_ms(self.later_s)} ms, first {_ms(self.pushes[0].total_s)} ms"]
        if self.load is not None:
            told = zip(_LOAD[1:] + _MORE_LOAD, _load_cells(self.way, self.load)[1:], strict=True)
            said.append(", ".join(f"{name}: {cell}" for name, cell in told))
        return f"{self.way}: {self.failed or '; '.join(filter(None, [*said, self.note]))}"


def table(rows: Sequence[Row], limits: Limits | None) -> str:
    """Milliseconds, but where a column says otherwise. Rows under load have a second table."""
    columns = [*_COLUMNS, *_MORE]
    sent = next((row.num_bytes for row in rows if row.num_bytes), 0)  # FP8 ways come first
    lines = _head(columns)
    if limits is not None and sent:
        what = [(f"limit: a copy, {limits.copied / 1e9:.0f} GB/s read and written", limits.commit_s(sent))]
        if limits.wire is not None:
            what.insert(0, (f"limit: the wire, {limits.wire / 1e9:.1f} GB/s", sent / limits.wire))
        lines += [_line([name, _gb(sent), "", "", _ms(value), *[""] * (len(columns) - 5)]) for name, value in what]
    flattened = next((row.later_s for row in rows if row.way == FLATTENED), None)
    lines += [_line(_cells(row, limits, flattened)) for row in rows]
    if loads := [_line(_load_cells(row.way, row.load)) for row in rows if row.load is not None]:
        lines += ["", *_head([*_LOAD, *_MORE_LOAD]), *loads]
    return "\n".join(lines)


def _cells(row: Row, limits: Limits | None, flattened_s: float | None) -> list[str]:
    if row.failed or not row.pushes:
        told = f"failed: {row.failed}" if row.failed else row.note
        return [row.way, *[""] * (len(_COLUMNS) + len(_MORE) - 2), " ".join(told.split())]
    later, first = row.later_s, row.pushes[0].total_s
    wire_s = limits.wire_s(row.num_bytes) if limits is not None and row.num_bytes else None
    timed = row.pushes[1:] or row.pushes
    all_later = [_ms(push.total_s) for push in sorted(row.pushes[1:], key=lambda push: push.total_s)]
    buckets = row.extra_bytes / row.bucket_bytes if row.extra_bytes is not None and row.bucket_bytes else None
    return [
        *(row.way, _gb(row.num_bytes), _ms(row.prepare_s), _ms(first)),
        f"{_ms(later)} ({all_later[0]} to {all_later[-1]})" if later else "",
        *(_ratio(first, later), _ratio(later, wire_s), _ratio(later, flattened_s)),
        *(_ms(_phase(row, phase)) for phase in (*PHASES, "stood still")),
        _ms(statistics.median(push.thread_s for push in timed)),
        _ms(statistics.median(push.process_s for push in timed)),
        "" if row.extra_bytes is None else _gb(row.extra_bytes),
        "" if buckets is None else f"{buckets:.2f}",
        row.note,
    ]


def _phase(row: Row, phase: str) -> float | None:
    found = [push.phases[phase] for push in row.pushes[1:] if phase in push.phases]
    return statistics.median(found) if found else None


def _load_cells(way: str, load: Load) -> list[str]:
    lost, of = _range(statistics.median(load.lost), load.lost), load.quiet_tokens
    return [
        *(way, str(load.num_streams), _ms(load.normal_s), _ms(load.longest_s), _ms(load.longest_s - load.normal_s)),
        *(_ms(load.longest_first_s), _ms(load.longest_quiet_s), lost, _range(statistics.mean(of), of)),
        *(f"{load.receiving_rate:.0f}", f"{load.quiet_rate:.0f}"),
        f"{100 * (1 - load.receiving_rate / load.quiet_rate):.0f}%",
    ]


def _range(middle: float, values: Sequence[float]) -> str:
    return f"{middle:.0f} ({min(values):.0f} to {max(values):.0f})"


def _head(columns: Sequence[str]) -> list[str]:
    return [_line(columns), "|---" * len(columns) + "|"]


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
