"""What a push did, in numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict

from sender.links_plan import BusiestLink
from shared.protocol import StagingWay

PHASES = ("plan", "gather", "quantize", "send", "verify", "commit")


class PushReport(BaseModel):
    """The result of a push, the same on every rank. `seconds` are those of rank 0, by phase, and `total`.

    `bf16_bytes` is the model in 2-byte elements, `wire_bytes` what one receiver was sent (codes, scales, the tensors
    that stay in BF16, alignment). `num_tensors` counts checkpoint tensors, scales not included. Of the `num_quantized`,
    `num_quantized_early` were quantized before the gather, by the ranks that hold them, and came to rank 0 as
    `early_bytes` of codes and scales. `skew_s` is the time between the first and the last server that confirmed the
    commit, as rank 0 saw it; 0 with one server. `servers` serve the version; `left_out` are those that a push with a
    quorum went on without, and why. `senders`: the trainer ranks that sent, and `sent_bytes` of each, to one receiver
    (with `holders` to all ranks of a server together, without what lies between tensors in a bucket).
    Unless it was settled that rank 0 sends, `busiest_link` of the push, by arithmetic, and of one from rank 0 alone
    (`sender/links_plan.py`). `staging`: how each server staged. `stood_still_s`: for how long each let no new
    request run, the wait for those under way included, as rank 0 saw it (so never less than it was).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    num_tensors: int
    num_quantized: int
    num_quantized_early: int
    num_buckets: int
    bf16_bytes: int
    wire_bytes: int
    early_bytes: int
    seconds: dict[str, float]
    skew_s: float
    stood_still_s: dict[str, float]
    staging: dict[str, StagingWay]
    servers: tuple[str, ...]
    senders: tuple[int, ...] = (0,)
    sent_bytes: dict[int, int] = {}
    busiest_link: BusiestLink | None = None
    busiest_link_of_rank_0: BusiestLink | None = None
    left_out: dict[str, str] = {}


class PhaseClock:
    """Adds up the seconds spent in each phase."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        return {**self._seconds, "total": time.perf_counter() - self._started}
