"""Faults of a push to a server that stages in place, or in its KV cache, while the others stage in reserved memory."""

from __future__ import annotations

import time

import torch

from shared.protocol import StagingWay
from tests.faults.case import COPYING
from tests.faults.kinds import flip
from tests.faults.models import Trainer
from tests.faults.run import FENCED, OLD, Ends, Pushed, Run, Violation
from tests.faults.tripwire import InjectedError, Place, raising

ANY = (OLD, "new")


def stage_as(run: Run, way: StagingWay) -> None:
    """From here on, with a sender of its own, the victim of the fault stages so."""
    for engine in run.victim.engines:
        engine.memory.reserved = None
        engine.memory.pool = [torch.zeros(100_001, dtype=torch.uint8) for _ in range(16 if way == "kv_pool" else 0)]
    run.new_sender()
    run.sender.inner.prepare(Trainer(0))
    taken = run.sender.inner._fleet.staging[run.victim.name]
    if taken != way:
        raise Violation(f"{run.victim.name} was to stage {way} and stages {taken}")


def exception_in_place(run: Run) -> tuple[Ends, Pushed]:
    """Before the first byte nothing is lost; but another rank may have been faster."""
    stage_as(run, "in_place")
    case, first = run.case, run.case.seed % 3 == 0
    run.on_rank(case.stage, raising(InjectedError(f"injected at {case.stage}")))
    pushed = run.try_push(run.new_seed())
    if case.stage in COPYING:
        return Ends((FENCED,), ANY), pushed
    return Ends((FENCED,) if not first else (OLD,) if case.tp_size == 1 else (OLD, FENCED)), pushed


def exception_in_the_kv_cache(run: Run) -> tuple[Ends, Pushed]:
    stage_as(run, "kv_pool")
    run.on_rank(run.case.stage, raising(InjectedError(f"injected at {run.case.stage}")))
    pushed = run.try_push(run.new_seed())
    dirty = [engine for engine in run.victim.engines if any(buffer.any() for buffer in engine.memory.pool)]
    if dirty:
        raise Violation("bytes of weights were left in a KV cache")
    copying = run.case.stage in COPYING
    return Ends((FENCED,) if copying else (OLD,), ANY if copying else (OLD,)), pushed


def byte_flipped_in_place(run: Run) -> tuple[Ends, Pushed]:
    """The bucket is not written, so that the first one does no harm."""
    stage_as(run, "in_place")

    def on_send(index: int, bucket: torch.Tensor) -> tuple[torch.Tensor]:
        travelling = bucket.clone()
        if index == run.bucket():
            flip(travelling)
        return (travelling,)

    run.watch_plane().on_send = on_send
    run.arm(Place("send", 0, 0, run.bucket()), lambda data: None)
    return Ends((FENCED,) if run.bucket() else (OLD,)), run.try_push(run.new_seed())


def sender_vanished_in_place(run: Run) -> tuple[Ends, Pushed]:
    """Nobody tells the server; it opens its door, fenced, when the push has had its time."""
    stage_as(run, "in_place")
    run.reusable = False
    run.watch_plane()
    nth = run.bucket() if run.case.stage == "send" else 0
    run.sender.tripwire.arm(Place(run.case.stage, 0 if nth else run.case.server, nth=nth), run.sender.vanish)
    pushed = run.try_push(run.new_seed())
    run.give_up_at = time.monotonic() + run.timeout_s + run.slack_s
    return Ends((FENCED,), ANY if run.case.stage == "ask commit" else (OLD,)), pushed
