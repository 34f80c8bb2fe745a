"""Faults of several servers: pushes that go on without one, promises that run out, servers that join meanwhile."""

from __future__ import annotations

import threading
import time
from functools import partial

import torch

from shared import errors, protocol
from tests.faults.case import CHECKS, COPYING
from tests.faults.kinds import at_moment, refusal_of
from tests.faults.models import Trainer
from tests.faults.processes import ServerProcess
from tests.faults.run import FENCED, GONE, NEW, OLD, Ends, Pushed, Run, Violation
from tests.faults.tripwire import InjectedError, Place, raising

_LEFT_OUT = Ends((OLD,), (NEW,), ("succeeded",))


def left_out(run: Run) -> tuple[Ends, Pushed]:
    """One of three servers fails before its promise: the other two are pushed to."""
    run.on_rank(run.case.stage, raising(InjectedError(f"injected at {run.case.stage}")))
    return _LEFT_OUT, run.try_push(run.new_seed(), allow_s=run.timeout_s)


def unheard(run: Run) -> tuple[Ends, Pushed]:
    """A message to it is lost: the decision makes the difference between a server that is left out and a fenced one."""
    lost = raising(errors.ServerUnreachableError("request lost"))
    run.arm(Place(f"ask {run.case.stage}", run.case.server), lost)
    ends = Ends((FENCED,), (NEW,), ("succeeded",)) if run.case.stage == "commit" else _LEFT_OUT
    if run.case.stage == "begin":  # of a session that was open: it is asked anew before it is left out, and answers
        ends = Ends((NEW,), (NEW,), ("succeeded",))
    return ends, run.try_push(run.new_seed(), allow_s=run.timeout_s)


def killed(run: Run) -> tuple[Ends, Pushed]:
    """Its process is gone; in the middle of a bucket it takes the data plane of all with it."""
    case = run.case
    server = run.servers[case.server]
    assert isinstance(server, ServerProcess)
    server.arm(Place(case.stage, case.server, case.rank), "kill")
    pushed = run.try_push(run.new_seed(), allow_s=2 * run.timeout_s)
    run.tripwire.struck.append(Place(case.stage))
    run.reusable = case.stage in (*CHECKS, *COPYING)
    return Ends((GONE,), (NEW,), ("succeeded",)), pushed


def commit_after_its_promise(run: Run) -> tuple[Ends, Pushed]:
    """It comes when the promise has run out, and again, and again after an abort: a fence stays."""
    version, session = run.next_version(), run.sender.inner._fleet._session

    def too_late(data: torch.Tensor | None) -> None:
        time.sleep(run.promise_s + 0.2)

    run.sender.tripwire.arm(Place("ask commit", run.case.server), too_late)
    pushed = run.try_push(run.new_seed(), allow_s=run.promise_s + run.timeout_s)
    commit = protocol.Commit(session=session, version=version, drain_s=1.0)
    abort = protocol.Abort(session=session, version=version, reason="late")
    for message in (commit, abort, commit):
        if not refusal_of(partial(run.victim.call, message, 5.0)):
            raise Violation(f"a {message.kind} after the fence was taken")
    return Ends((FENCED,), (NEW,)), pushed


def joiner(run: Run) -> tuple[Ends, Pushed]:
    """A server joins and is fed while a push of the others is at work; it has its turn after it."""
    sender, found = run.sender, list[str]()
    control = sender.controls[run.case.server]
    sender.inner.remove_server(run.victim.name)
    run.reusable = True

    def join() -> None:
        try:
            sender.inner.add_server(control)
            found.extend(sender.inner.catch_up())
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=join, daemon=True)
    sender.inner.prepare(Trainer(0))
    pushed = at_moment(run, lambda data: thread.start(), server=1 if run.case.server == 0 else 0)
    thread.join(2 * run.timeout_s)
    if thread.is_alive() or found != [run.victim.name]:
        raise Violation(f"the joiner was to be fed: {found or 'it still runs'}")
    return Ends((NEW,), (NEW,), ("succeeded",)), pushed
