"""The ways to update a server that `benchmarks.push` compares: each is a `Row`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from benchmarks.stock_route import BUCKET_BYTES
from benchmarks.table import Pushed, Row
from sender import FP8Sender
from sender.report import PushReport
from sender.sending_ranks import SendFrom
from shared.config import FP8BlockConfig
from shared.protocol import InFlight, PlaneName, StagingChoice

SEEDS = (1, 2)  # of the two sets of weights; the last push is of the first
PUSH_TIMEOUT_S = 90.0
STEP_S = 0.3
_Route = TypeVar("_Route", bound="Route")


class Trains(Protocol):
    """What is pushed: `benchmarks.shapes.Trainer`, or a sharded one."""

    model: nn.Module

    def fill(self, seed: int) -> None:
        """The weights of `seed`, complete on return, on all ranks."""


@dataclass(frozen=True)
class Way:
    """How the trainer pushes."""

    plane: PlaneName
    staging: StagingChoice
    bucket_bytes: int
    in_flight: InFlight = "wait"
    send_from: SendFrom = "rank_0"

    def sender(self, url: str | Sequence[str], config: FP8BlockConfig) -> FP8Sender:
        return FP8Sender(
            [url] if isinstance(url, str) else url,
            plane=self.plane,
            config=config,
            staging=self.staging,
            bucket_bytes=self.bucket_bytes,
            in_flight=self.in_flight,
            send_from=self.send_from,
            timeout_s=PUSH_TIMEOUT_S,
        )

    def __str__(self) -> str:
        ranks = self.send_from if isinstance(self.send_from, str) else f"ranks {list(self.send_from)}"
        who = "" if ranks == "rank_0" else f", from {ranks}"
        return f"push, {self.plane}, {self.staging}, buckets of {self.bucket_bytes >> 20} MiB{who}"


def timed(step: Callable[[], object]) -> tuple[Pushed, Any]:
    """What `step` took, and what it returned."""
    began = time.perf_counter(), time.thread_time(), time.process_time()
    found = step()
    ended = time.perf_counter(), time.thread_time(), time.process_time()
    total_s, thread_s, process_s = (end - start for start, end in zip(began, ended, strict=True))
    return Pushed(total_s=total_s, thread_s=thread_s, process_s=process_s), found


class Memory:
    """The most bytes that the trainer's device holds in a step, beside what it held when this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before, self._most = device, 0, 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(device)

    def timed(self, step: Callable[[], object]) -> tuple[Pushed, Any]:
        if self._device.type != "cuda":
            return timed(step)
        torch.cuda.reset_peak_memory_stats(self._device)  # drawing weights is no part of it
        found = timed(step)
        self._most = max(self._most, torch.cuda.max_memory_allocated(self._device) - self._before)
        return found

    @property
    def extra(self) -> int | None:
        """Of all steps; None on a CPU."""
        return self._most if self._device.type == "cuda" else None


def fill_for(trainer: Trains, number: int, num_pushes: int) -> None:
    """Before push `number` of `num_pushes`: the other weights than those of the one before, and a little of the time
    that a step of training takes, in which servers do nothing either."""
    trainer.fill(SEEDS[(num_pushes - 1 - number) % len(SEEDS)])
    time.sleep(STEP_S)


def phases(report: PushReport) -> dict[str, float]:
    return {**report.seconds, "stood still": max(report.stood_still_s.values())}


def push_row(
    way: Way, url: str | Sequence[str], trainer: Trains, config: FP8BlockConfig, num_pushes: int, device: torch.device
) -> Row:
    """The first push after `prepare`, then `num_pushes` more. Collective; the row of rank 0 is the one to read."""
    memory, pushes = Memory(device), []
    with way.sender(url, config) as sender:
        prepared, _ = memory.timed(lambda: sender.prepare(trainer.model))
        for number in range(1 + num_pushes):
            fill_for(trainer, number, 1 + num_pushes)
            pushed, report = memory.timed(lambda: sender.push(trainer.model))
            pushes.append(pushed.model_copy(update={"phases": phases(report)}))
    early = f", {report.num_quantized_early} of {report.num_quantized} matrices quantized before the gather"
    return Row(
        way=str(way),
        num_bytes=report.wire_bytes,
        prepare_s=prepared.total_s,
        pushes=pushes,
        extra_bytes=memory.extra,
        bucket_bytes=way.bucket_bytes,
        note=f"{report.num_buckets} buckets{early if report.num_quantized_early else ''}",
    )


def async_rows(
    way: Way, url: str, trainer: Trains, config: FP8BlockConfig, num_pushes: int, device: torch.device
) -> list[Row]:
    """`push_async`: for how long training stands still until it returns, and until `wait` has ended right after it.

    The Python thread of the second row is that of the caller; what is sent is sent by another one.
    """
    memory, returned, ended = Memory(device), [], []
    with way.sender(url, config) as sender:
        prepared, _ = memory.timed(lambda: sender.prepare(trainer.model))
        for number in range(1 + num_pushes):
            fill_for(trainer, number, 1 + num_pushes)
            until_return, handle = memory.timed(lambda: sender.push_async(trainer.model))
            rest, report = memory.timed(handle.wait)
            both = ((name, value + getattr(rest, name)) for name, value in until_return if name != "phases")
            returned.append(until_return)
            ended.append(Pushed(**dict(both), phases=phases(report)))
    about: dict[str, Any] = {
        "num_bytes": report.wire_bytes,
        "prepare_s": prepared.total_s,
        "extra_bytes": memory.extra,
        "bucket_bytes": way.bucket_bytes,
    }
    name = str(way).replace("push", "push_async", 1)
    return [
        Row(way=f"{name}, until it returns", pushes=returned, **about),
        Row(way=f"{name}, until wait() ends", pushes=ended, **about),
    ]


class Route(Protocol):
    """A way into a server that SGLang has on board."""

    def abandon(self) -> None:
        """After a failure: nothing waits for it any more."""


def stock_row(
    way: str,
    connect: Callable[[], _Route],
    trainer: Trains,
    push: Callable[[_Route], int],
    num_pushes: int,
    device: torch.device,
) -> Row:
    """The same of `push`, which returns the bytes that it sent. `prepare` is what `connect` takes: of a process group,
    without its communicator, which the first push makes."""
    import sglang.srt.utils  # noqa: F401  (takes seconds, which are not those of a process group)

    memory, pushes = Memory(device), []
    prepared, route = memory.timed(connect)
    try:
        for number in range(1 + num_pushes):
            fill_for(trainer, number, 1 + num_pushes)
            pushed, num_bytes = memory.timed(lambda: push(route))
            pushes.append(pushed)
    except BaseException:
        route.abandon()  # or later ways would wait behind a broadcast that nobody receives
        raise
    return Row(
        way=way,
        num_bytes=num_bytes,
        prepare_s=prepared.total_s,
        pushes=pushes,
        extra_bytes=memory.extra,
        bucket_bytes=BUCKET_BYTES,
    )
