"""How each kind of fault is staged: what is armed, and what may come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from pydantic import BaseModel

from shared import errors, protocol
from tests.faults.case import CHECKS, COPYING
from tests.faults.models import Trainer
from tests.faults.run import FENCED, NEW, OLD, Ends, Pushed, Run, Violation
from tests.faults.server import Server
from tests.faults.tripwire import Action, InjectedError, Place, raising

Staged = Callable[[Run], tuple[Ends, Pushed]]
ANY = (OLD, NEW)


def late(run: Run, victim: tuple[str, ...] = ()) -> Ends:
    """Of a fault that strikes one server after its promise, if there are several: it cannot go back alone."""
    if run.case.num_servers == 1:
        return Ends((OLD, *victim))
    return Ends((FENCED, *victim), (NEW,))


def exception(run: Run) -> tuple[Ends, Pushed]:
    stage = run.case.stage
    run.on_rank(stage, raising(InjectedError(f"injected at {stage}")))
    pushed = run.try_push(run.new_seed())
    if stage in COPYING:
        return Ends((FENCED,), (NEW,)), pushed
    return late(run) if stage in CHECKS else Ends(), pushed


def exception_with_keep(run: Run) -> tuple[Ends, Pushed]:
    """Requests run all the time. Where a copy fails they are ended, on all ranks of that server, and nowhere else."""
    run.sender.inner._fleet._in_flight = "keep"
    for server in run.servers:
        assert isinstance(server, Server)
        server.busy = True
        for engine in server.engines:
            engine.idle = False
    ends, pushed = exception(run)
    for server in run.servers:
        assert isinstance(server, Server)
        server.busy = False
        for engine in server.engines:
            engine.idle = True
            if ("ended" in engine.events) != (server.index == run.case.server):
                raise Violation(f"requests of {server.name}, and a copy that failed: {engine.events}")
    run.sender.inner._fleet._in_flight = "wait"
    return ends, pushed


def rank_lost(run: Run) -> tuple[Ends, Pushed]:
    case = run.case
    run.on_rank(case.stage, lambda data: run.victim.ranks[case.rank].lose())
    pushed = run.try_push(run.new_seed())
    victim = (FENCED,) if case.stage in COPYING or (case.stage in CHECKS and case.num_servers > 1) else (OLD, FENCED)
    return Ends(victim, (OLD,) if case.stage == "begin" else (NEW,)), pushed


def request_lost(run: Run) -> tuple[Ends, Pushed]:
    run.arm(Place(f"ask {run.case.stage}", run.case.server), raising(errors.ServerUnreachableError("request lost")))
    return late(run) if run.case.stage == "commit" else Ends(), run.try_push(run.new_seed())


def reply_lost(run: Run) -> tuple[Ends, Pushed]:
    run.arm(Place(f"answered {run.case.stage}", run.case.server), raising(errors.ServerUnreachableError("reply lost")))
    if run.case.stage != "commit":
        return Ends(), run.try_push(run.new_seed())
    several = run.case.num_servers > 1  # then they are asked what became of it
    return Ends((NEW,), (NEW,), ("succeeded",) if several else ("failed",)), run.try_push(run.new_seed())


# ---- bytes


def flip(data: torch.Tensor | None) -> None:
    assert data is not None
    data[data.numel() // 3] ^= 4


def byte_flipped(run: Run) -> tuple[Ends, Pushed]:
    def on_send(index: int, bucket: torch.Tensor) -> Sequence[torch.Tensor]:
        travelling = bucket.clone()
        flip(travelling if index == run.bucket() else travelling.clone())
        return (travelling,)

    return _damaged(run, on_send)


def byte_flipped_on_one_rank(run: Run) -> tuple[Ends, Pushed]:
    run.arm(Place("received", run.case.server, run.case.rank, run.bucket()), flip)
    return Ends(), run.try_push(run.new_seed())


def bucket_short(run: Run) -> tuple[Ends, Pushed]:
    return _damaged(run, lambda index, bucket: (bucket[:-128] if index == run.bucket() else bucket,))


def bucket_repeated(run: Run) -> tuple[Ends, Pushed]:
    """One too many at the end is never read; then nothing is wrong with this push, and its data plane is used up."""
    ends, pushed = _damaged(run, lambda index, bucket: (bucket, bucket) if index == run.bucket() else (bucket,))
    run.reusable = False
    last = run.case.stage.startswith("last")
    return (Ends(ANY, ANY, ("failed", "succeeded")) if last else ends), pushed


def bucket_dropped(run: Run) -> tuple[Ends, Pushed]:
    return _damaged(run, lambda index, bucket: () if index == run.bucket() else (bucket,))


def buckets_swapped(run: Run) -> tuple[Ends, Pushed]:
    kept: list[torch.Tensor] = []

    def on_send(index: int, bucket: torch.Tensor) -> Sequence[torch.Tensor]:
        if index == run.bucket():
            kept.append(bucket.clone())
            return ()
        return (bucket, kept.pop()) if kept else (bucket,)

    return _damaged(run, on_send)


def _damaged(run: Run, on_send: Callable[[int, torch.Tensor], Sequence[torch.Tensor]]) -> tuple[Ends, Pushed]:
    run.watch_plane().on_send = on_send
    run.arm(Place("send", 0, 0, run.bucket()), lambda data: None)
    return Ends(), run.try_push(run.new_seed())


# ---- between pushes, while receiving, while staged


def at_moment(run: Run, action: Action, server: int | None = None) -> Pushed:
    """Do it at the moment that the case names, and push. While staged: before the commit of `server`, or the victim."""
    if run.case.stage == "between pushes":
        run.tripwire.struck.append(Place(run.case.stage))
        action(None)
    elif run.case.stage == "while receiving":
        run.watch_plane()
        run.sender.tripwire.arm(Place("send", nth=run.bucket()), action)
    else:
        run.alone("ask commit", action, server)
    return run.try_push(run.new_seed())


def server_restarted(run: Run) -> tuple[Ends, Pushed]:
    pushed = at_moment(run, lambda data: run.victim.restart())
    if run.case.stage == "between pushes":
        return Ends((NEW,), (NEW,), ("succeeded",)), pushed
    return Ends((FENCED,), (NEW,) if run.case.stage == "while staged" else (OLD,)), pushed


def stock_update(run: Run) -> tuple[Ends, Pushed]:
    pushed = at_moment(run, lambda data: run.victim.stock_update())
    if run.case.stage == "between pushes":
        return Ends((NEW,), (NEW,), ("succeeded",)), pushed
    return Ends((FENCED,), (NEW,) if run.case.stage == "while staged" else (OLD,)), pushed


def memory_released(run: Run) -> tuple[Ends, Pushed]:
    def release(data: torch.Tensor | None) -> None:
        for engine in run.victim.engines:
            engine.unsafe_reasons = ["the memory of the weights is released: resume it first"]
        run.victim.weights_changed("a release of their memory")

    pushed = at_moment(run, release)
    for engine in run.victim.engines:
        engine.unsafe_reasons = []
    return Ends((FENCED,), (NEW,) if run.case.stage == "while staged" else (OLD,)), pushed


def model_moved(run: Run) -> tuple[Ends, Pushed]:
    def move(data: torch.Tensor | None) -> None:
        parameter = next(iter(run.victim.models[run.case.rank].parameters()))
        parameter.data = parameter.data.clone()

    pushed = at_moment(run, move)
    return late(run) if run.case.stage == "while staged" else Ends(), pushed


def model_changed(run: Run) -> tuple[Ends, Pushed]:
    """The trainer's: what was planned is no longer what it would send."""
    model = Trainer(run.new_seed())
    model.model.get_submodule("layers.0").add_module(
        "extra_proj", torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
    )
    run.arm(Place("ask offer", run.case.server), lambda data: None)
    return Ends(), run.bounded(lambda: run.sender.inner.push(model))


def second_sender(run: Run) -> tuple[Ends, Pushed]:
    first = run.sender

    def push_too(data: torch.Tensor | None) -> None:
        second = run.new_sender()
        run.senders.insert(0, run.senders.pop())
        refused = refusal_of(lambda: second.inner.push(Trainer(9)))
        if refused != "ServerBusyError":
            raise Violation(f"a second sender, in the middle of a push, got {refused or 'its way'}")

    assert run.sender is first
    return Ends((NEW,), (NEW,), ("succeeded",)), at_moment(run, push_too)


def second_push(run: Run) -> tuple[Ends, Pushed]:
    seed = run.new_seed()
    run.watch_plane()
    run.seeds[run.next_version()] = seed

    def push_twice() -> object:
        handle = run.sender.inner.push_async(Trainer(seed))
        refused = refusal_of(lambda: run.sender.inner.push(Trainer(9)))
        if refused != "ConfigError":
            raise Violation(f"a push of a sender that is in the middle of one got {refused or 'its way'}")
        return handle.wait()

    run.arm(Place("send"), lambda data: None)
    return Ends((NEW,), (NEW,), ("succeeded",)), run.bounded(push_twice)


def refusal_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return ""


# ---- requests


def requests_never_end(run: Run) -> tuple[Ends, Pushed]:
    run.victim.busy = True
    run.arm(Place("ask commit", run.case.server), lambda data: None)
    pushed = run.try_push(run.new_seed())
    run.victim.busy = False
    return late(run), pushed


def generation_paused(run: Run) -> tuple[Ends, Pushed]:
    run.victim.paused = True
    run.arm(Place("ask commit", run.case.server), lambda data: None)
    pushed = run.try_push(run.new_seed())
    run.victim.paused = False
    return late(run), pushed


# ---- messages out of their time


def late_message(run: Run) -> tuple[Ends, Pushed]:
    """In the middle of a push come messages of an earlier push and of a sender that was displaced."""
    version, session = max(run.seeds), run.sender.inner._fleet._session
    kind = run.case.stage

    def deliver(data: torch.Tensor | None) -> None:
        for of in ("0" * 32,) if kind == "close" else ("0" * 32, session):
            refused = refusal_of(partial(run.victim.call, _message(kind, of, version), 5.0))
            if not refused and kind not in ("abort", "close"):
                raise Violation(f"a late {kind} of version {version} was taken")

    run.watch_plane()
    run.sender.tripwire.arm(Place("send", nth=run.bucket()), deliver)
    return Ends((NEW,), (NEW,), ("succeeded",)), run.try_push(run.new_seed())


def _message(kind: str, session: str, version: int) -> BaseModel:
    made: dict[str, BaseModel] = {
        "begin": protocol.Begin(session=session, version=version, deadline_s=9.0),
        "verify": protocol.Verify(session=session, version=version, digests=()),
        "prepare": protocol.Prepare(session=session, version=version),
        "commit": protocol.Commit(session=session, version=version, drain_s=1.0),
        "abort": protocol.Abort(session=session, version=version, reason="late"),
        "close": protocol.Close(session=session),
    }
    return made[kind]


def stale_version(run: Run) -> tuple[Ends, Pushed]:
    run.arm(Place("ask begin", run.case.server), lambda data: None)
    served = max(run.seeds)
    return Ends(), run.bounded(lambda: run.sender.inner.push(Trainer(9), version=served))
