"""The ways to update a server that `benchmarks.push` compares: each is a `Row`, and proves what it left behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.expected import compare
from benchmarks.shapes import Trainer
from benchmarks.stock_route import StockRoute
from benchmarks.streams import Streams, gaps
from benchmarks.table import Pushed, Row
from examples.local_server import LocalServer
from sender import FP8Sender
from sender.report import PushReport
from shared.config import FP8BlockConfig
from shared.protocol import InFlight, PlaneName, StagingChoice

SEEDS = (1, 2)  # of the two sets of weights; the last push is of the first
PUSH_TIMEOUT_S = 90.0
BETWEEN_PUSHES_S = 5.0  # under load: for streams to be undisturbed in between
PROMPTS = [[11, 12, 13], list(range(3, 40))]


@dataclass(frozen=True)
class Way:
    """How the trainer pushes."""

    plane: PlaneName
    staging: StagingChoice
    bucket_bytes: int
    in_flight: InFlight = "wait"

    def sender(self, server: LocalServer, config: FP8BlockConfig) -> FP8Sender:
        return FP8Sender(
            [server.url],
            plane=self.plane,
            config=config,
            staging=self.staging,
            bucket_bytes=self.bucket_bytes,
            in_flight=self.in_flight,
            timeout_s=PUSH_TIMEOUT_S,
        )

    def __str__(self) -> str:
        return f"push, {self.plane}, {self.staging}, buckets of {self.bucket_bytes >> 20} MiB"


def timed(step: Callable[[], object]) -> tuple[Pushed, Any]:
    """What `step` took, and what it returned."""
    began = time.perf_counter(), time.thread_time(), time.process_time()
    found = step()
    ended = time.perf_counter(), time.thread_time(), time.process_time()
    total_s, thread_s, process_s = (end - start for start, end in zip(began, ended, strict=True))
    return Pushed(total_s=total_s, thread_s=thread_s, process_s=process_s), found


class Memory:
    """Bytes that the trainer's device holds at most, beside what it held when this was made. None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def extra(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before


def in_turn(trainer: Trainer, number: int, num_pushes: int, push: Callable[[], object]) -> tuple[Pushed, Any]:
    """Push `number` of `num_pushes`, of the other weights than the one before; drawing them is not timed."""
    trainer.fill(SEEDS[(num_pushes - 1 - number) % len(SEEDS)])
    return timed(push)


def push_row(
    way: Way, server: LocalServer, trainer: Trainer, config: FP8BlockConfig, num_pushes: int, device: torch.device
) -> Row:
    """The first push after `prepare`, then `num_pushes` more."""
    memory, pushes = Memory(device), []
    with way.sender(server, config) as sender:
        prepared, _ = timed(lambda: sender.prepare(trainer.model))
        for number in range(1 + num_pushes):
            pushed, report = in_turn(trainer, number, 1 + num_pushes, lambda: sender.push(trainer.model))
            pushes.append(pushed.model_copy(update={"phases": _phases(report)}))
    return Row(
        way=str(way),
        num_bytes=report.wire_bytes,
        prepare_s=prepared.total_s,
        pushes=pushes,
        extra_bytes=memory.extra(),
        note=f"{report.num_buckets} buckets",
    )


def _phases(report: PushReport) -> dict[str, float]:
    return {**report.seconds, "stood still": max(report.stood_still_s.values())}


def stock_row(
    way: str,
    server: LocalServer,
    backend: str,
    trainer: Trainer,
    push: Callable[[StockRoute], int],
    num_pushes: int,
    device: torch.device,
) -> Row:
    """The same of `push`, which returns the bytes that it sent. `prepare` is the process group, without its
    communicator, which the first push makes."""
    import sglang.srt.utils  # noqa: F401  (takes seconds, which are not those of a process group)

    memory, pushes = Memory(device), []
    prepared, route = timed(lambda: StockRoute(server, backend))
    try:
        for number in range(1 + num_pushes):
            pushed, num_bytes = in_turn(trainer, number, 1 + num_pushes, lambda: push(route))
            pushes.append(pushed)
    except BaseException:
        route.abandon()  # or later ways would wait behind a broadcast that nobody receives
        raise
    return Row(way=way, num_bytes=num_bytes, prepare_s=prepared.total_s, pushes=pushes, extra_bytes=memory.extra())


def load_row(
    way: Way,
    server: LocalServer,
    trainer: Trainer,
    config: FP8BlockConfig,
    num_pushes: int,
    num_streams: int,
    new_tokens: int,
) -> Row:
    """Pushes while `num_streams` requests generate: for how long each stream is without a token near a push."""
    pushes, spans = [], []
    with way.sender(server, config) as sender, Streams(server.url, num_streams, new_tokens) as streams:
        sender.prepare(trainer.model)
        for number in range(1 + num_pushes):
            time.sleep(BETWEEN_PUSHES_S)
            pushed, report = in_turn(trainer, number, 1 + num_pushes, lambda: sender.push(trainer.model))
            ended = time.monotonic()
            spans.append((ended - pushed.total_s, ended))
            pushes.append(pushed.model_copy(update={"phases": _phases(report)}))
        time.sleep(BETWEEN_PUSHES_S)
    found = [gaps(arrivals, spans) for arrivals in streams.arrivals]
    worst = [max(gap.worst[1:] or gap.worst) for gap in found]
    note = (
        f"{num_streams} streams: longest gap near a later push {1e3 * max(worst):.0f} (in the best stream "
        f"{1e3 * min(worst):.0f}), near the first {1e3 * max(gap.worst[0] for gap in found):.0f}; normal gap "
        f"{1e3 * max(gap.normal for gap in found):.1f}"
    )
    return Row(way=f"{way}, {way.in_flight}, under load", num_bytes=report.wire_bytes, pushes=pushes, note=note)


def check(server: LocalServer, wanted: Mapping[str, str]) -> str:
    """What a server of one rank holds, against `wanted`. Raises: AssertionError: another byte; a missing tensor."""
    (held,) = server.probe()
    wrong, beside = compare(held, wanted)
    if wrong:
        raise AssertionError(
            f"{len(wrong)} of {len(wanted)} tensors differ from the reference: {wrong[:3]}; has {beside[:3]}"
        )
    return f"{len(wanted)} tensors are bit for bit the reference's ({len(beside)} hold no weights)"


def answers(server: LocalServer) -> str:
    """Raises: AssertionError: a log-probability that is no number."""
    for reply in server.generate(PROMPTS):
        if not reply["logprobs"] or not all(math.isfinite(logprob) for logprob in reply["logprobs"]):
            raise AssertionError(f"log-probabilities {reply['logprobs']}")
    return "generates finite log-probabilities"
