"""Faults of whole processes: senders and servers that are killed, frozen, or vanish."""

from __future__ import annotations

import time

from tests.faults.case import BETWEEN, CHECKS, COPYING
from tests.faults.kinds import late
from tests.faults.processes import SenderProcess, ServerProcess, push_once, waiting
from tests.faults.run import FENCED, GONE, NEW, OLD, Ends, Pushed, Run, Violation
from tests.faults.tripwire import Place

_DECIDED = (NEW, FENCED)  # others than the one whose commit was held back: they took theirs, or their promise ran out
FROZEN_S = 0.7  # beyond the deadline
_STARTING_S = 60.0


def arms_of(stage: str, victim: int, num_servers: int, bucket: int, action: str) -> list[tuple[Place, str]]:
    """Where a sender is struck; between two commits the other servers' commits are held back."""
    if stage == BETWEEN:
        held = [(Place("ask commit", index), "wait") for index in range(num_servers) if index != victim]
        return [*held, (Place("answered commit", victim), action)]
    if stage == "send":
        return [(Place("send", nth=bucket), action)]
    return [(Place(stage, victim), action)]


def _arms(run: Run, action: str) -> list[tuple[Place, str]]:
    bucket = run.bucket() if run.case.stage == "send" else 0
    return arms_of(run.case.stage, run.case.server, run.case.num_servers, bucket, action)


def _ends(run: Run) -> Ends:
    """After the promises no server goes back: it takes the new version, or is fenced when it hears nothing."""
    if run.case.stage == BETWEEN:
        return Ends((NEW,), _DECIDED)
    if run.case.stage == "ask prepare":
        return Ends((OLD,), (OLD, FENCED))
    if run.case.stage == "ask commit" and run.case.num_servers > 1:
        return Ends((FENCED,), _DECIDED)
    return Ends()


def _end_s(run: Run) -> float:
    """How long servers may take to find that a sender is gone."""
    promised = run.case.num_servers > 1 and run.case.stage in ("ask prepare", "ask commit", BETWEEN)
    return (run.promise_s if promised else run.timeout_s) + run.slack_s


def sender_killed(run: Run) -> tuple[Ends, Pushed]:
    return _ends(run), _killed(run, _arms(run, "kill"))


def sender_killed_in_mid_bucket(run: Run) -> tuple[Ends, Pushed]:
    """Or a little later, since nobody can say how far a broadcast is: then it may have committed."""
    pushed = _killed(run, [(Place("send", nth=run.bucket()), "kill soon")])
    return Ends((OLD, NEW, FENCED), (OLD, NEW, FENCED)), pushed


def _killed(run: Run, arms: list[tuple[Place, str]]) -> Pushed:
    version, run.reusable = run.next_version(), False
    run.seeds[version] = run.new_seed()
    arguments = (run.case.plane, run.seeds[version], run.timeout_s, arms)
    sender = SenderProcess(push_once, arguments, [call for _, call in run.calls])
    try:
        if not sender.killed(_STARTING_S) or sender.outcome(1.0) is not None:
            raise Violation("the sender was to be killed and was not")
        run.tripwire.struck.append(arms[-1][0])
        run.give_up_at = time.monotonic() + run.promise_s + run.slack_s
        return Pushed("Killed")
    finally:
        sender.close()


def sender_vanished(run: Run) -> tuple[Ends, Pushed]:
    run.reusable, case = False, run.case
    if case.stage == BETWEEN:
        run.alone("answered commit", run.sender.vanish)
    else:
        if case.stage == "send":
            run.watch_plane()
        for place, _ in _arms(run, ""):
            run.sender.tripwire.arm(place, run.sender.vanish)
    pushed = run.try_push(run.new_seed())
    run.give_up_at = time.monotonic() + _end_s(run)
    return _ends(run), pushed


def sender_frozen(run: Run) -> tuple[Ends, Pushed]:
    """Where no deadline runs yet, it may go on as if nothing had been."""
    ends = _ends(run)
    if run.case.stage in ("ask offer", "ask open", "ask begin"):
        ends = Ends((OLD, NEW), (OLD, NEW), ("failed", "succeeded"))
    seconds = _end_s(run) - run.slack_s + FROZEN_S
    if run.case.plane != "memory":
        return ends, _stopped(run, seconds)
    if run.case.stage == "send":
        run.watch_plane()
    for place, _ in _arms(run, ""):
        run.sender.tripwire.arm(place, waiting(seconds))
    return ends, run.try_push(run.new_seed(), allow_s=seconds)


def _stopped(run: Run, seconds: float) -> Pushed:
    version, run.reusable = run.next_version(), False
    run.seeds[version] = run.new_seed()
    arms = _arms(run, "stop")
    arguments = (run.case.plane, run.seeds[version], run.timeout_s, arms)
    sender = SenderProcess(push_once, arguments, [call for _, call in run.calls])
    try:
        sender.wait_until_frozen(_STARTING_S)
        run.tripwire.struck.append(arms[-1][0])
        time.sleep(seconds)
        sender.resume()
        run.give_up_at = time.monotonic() + run.timeout_s + run.slack_s
        found = sender.outcome(run.timeout_s + run.slack_s)
        assert found is not None
        return Pushed(found["kind"], found["text"], found["seconds"])
    finally:
        sender.close()


def server_killed(run: Run) -> tuple[Ends, Pushed]:
    _arm_server(run, "kill")
    pushed = run.try_push(run.new_seed())
    run.tripwire.struck.append(Place(run.case.stage))
    return Ends((GONE,), (NEW,) if run.case.stage in (*CHECKS, *COPYING) else (OLD,)), pushed


def server_frozen(run: Run) -> tuple[Ends, Pushed]:
    """When it goes on, it does what it was about to do, or finds that it is too late."""
    _arm_server(run, "stop")
    server = run.servers[run.case.server]
    assert isinstance(server, ServerProcess)
    in_commit = run.case.stage in (*CHECKS, *COPYING)
    # One deadline for the answer, in a commit one for requests to end before it; and one to tell the server goodbye.
    pushed = run.try_push(run.new_seed(), allow_s=(2 if in_commit else 1) * run.timeout_s)
    run.tripwire.struck.append(Place(run.case.stage))
    server.resume()
    run.give_up_at = time.monotonic() + run.timeout_s + run.slack_s
    return late(run, (NEW, FENCED)) if in_commit else Ends(), pushed


def _arm_server(run: Run, signal_name: str) -> None:
    case = run.case
    server = run.servers[case.server]
    assert isinstance(server, ServerProcess)
    server.arm(Place(case.stage, case.server, case.rank), signal_name)
