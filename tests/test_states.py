"""The states of a server in docs/architecture.md are those of the code: every event in every state that can be reached.

A search over what a real `Receiver` does: from each situation that an earlier path led to, each event is tried on a new
receiver that is brought there first. What changes the state is a row of the document's table; there are no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pydantic import BaseModel

from sender import FP8Sender
from shared import protocol
from shared.digest import digest
from tests.test_push_memory import Server
from tests.tiny_models import Trainer

DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"
VERSION = 1


class Situation(NamedTuple):
    state: str
    fenced: bool  # whether it would be FENCED if the push ended here
    arrived: bool


class Rig:
    """A receiver with a sender's plan, and every event that it can meet."""

    def __init__(self, fence: str | None) -> None:
        self.server = Server(fence)
        self.sender = FP8Sender([self.server.control], plane="memory", timeout_s=5.0)
        plan = self.sender.prepare(Trainer())
        self._fleet, self._session = self.sender._fleet, self.sender._fleet._session
        buckets = [torch.zeros(bucket.num_bytes, dtype=torch.uint8) for bucket in plan.layout.buckets]
        self._buckets = buckets
        self._version, self.arrived = 0, False

    def _tell(self, message: BaseModel) -> None:
        self.server.receiver.handle(message)

    def situation(self) -> Situation:
        reply = self.server.receiver.handle(protocol.Describe())
        moving = reply.state in ("RECEIVING", "STAGED")
        return Situation(reply.state, reply.fence is not None, self.arrived and moving)

    def begin(self) -> None:
        session = self.server.receiver._session
        busy = session is None or session.transfer is not None
        self._version += 0 if busy else 1
        self.arrived = self.arrived and busy
        self._tell(protocol.Begin(session=self._session, version=max(self._version, VERSION), deadline_s=30.0))

    def bytes_arrive(self) -> None:
        session = self.server.receiver._session
        if session is None or session.transfer is None or self.arrived:
            return
        assert self._fleet._plane is not None
        for bucket in self._buckets:
            self._fleet._plane.send(bucket, 0)
        assert session.transfer.done.wait(10.0)
        self.arrived = True

    def verify(self) -> None:
        secret, version = self._fleet._secret, self._version
        numbered = enumerate(self._buckets)
        digests = tuple(digest(data, secret=secret, version=version, bucket=index) for index, data in numbered)
        self._tell(protocol.Verify(session=self._session, version=self._version, digests=digests))

    def verify_other_digests(self) -> None:
        self._tell(protocol.Verify(session=self._session, version=self._version, digests=(1,) * len(self._buckets)))

    def commit(self) -> None:
        self._tell(protocol.Commit(session=self._session, version=self._version, drain_s=5.0))

    def commit_while_requests_run(self) -> None:
        self.server.engine.idle = False
        self.commit()
        self.server.engine.idle = True

    def commit_and_a_copy_fails(self) -> None:
        def fail() -> None:
            raise RuntimeError("the device is lost")

        self.server.engine.on_synchronize = fail
        self.commit()
        self.server.engine.on_synchronize = lambda: None

    def abort(self) -> None:
        self._tell(protocol.Abort(session=self._session, version=self._version, reason="why"))

    def close(self) -> None:
        self._tell(protocol.Close(session=self._session))

    def the_deadline_passes(self) -> None:
        session = self.server.receiver._session
        if session is not None and session.transfer is not None:
            session.transfer.deadline = time.monotonic() - 1.0

    def another_route_changes_the_weights(self) -> None:
        self.server.receiver.weights_changed("a route of SGLang")


EVENTS: dict[str, Callable[[Rig], None]] = {
    "Begin": Rig.begin,
    "the bytes arrive": Rig.bytes_arrive,
    "Verify": Rig.verify,
    "Verify with other digests": Rig.verify_other_digests,
    "Commit": Rig.commit,
    "Commit while requests run": Rig.commit_while_requests_run,
    "Commit, and a copy fails": Rig.commit_and_a_copy_fails,
    "Abort": Rig.abort,
    "Close": Rig.close,
    "the deadline passes": Rig.the_deadline_passes,
    "another route changes the weights": Rig.another_route_changes_the_weights,
}
Steps = tuple[str, ...]


def brought(fence: str | None, path: Steps) -> Rig:
    rig = Rig(fence)
    for event in path:
        EVENTS[event](rig)
        rig.situation()  # a server hears of time and connections when it is asked something
    return rig


def explore(fence: str | None) -> set[tuple[Situation, str, Situation]]:
    """All that can happen, starting from a server with or without `fence`."""
    found: set[tuple[Situation, str, Situation]] = set()
    paths: dict[Situation, Steps] = {Rig(fence).situation(): ()}
    left = list(paths)
    while left:
        start = left.pop()
        for event in EVENTS:
            rig = brought(fence, paths[start])
            assert rig.situation() == start
            EVENTS[event](rig)
            after = rig.situation()
            rig.sender.close()
            found.add((start, event, after))
            if after not in paths:
                paths[after] = (*paths[start], event)
                left.append(after)
    return found


@pytest.fixture(scope="module")
def happened() -> set[tuple[Situation, str, Situation]]:
    return explore(None) | explore("started without weights")


def documented() -> set[tuple[str, str, str]]:
    text = DOCUMENT.read_text(encoding="utf-8").split("## States of a server")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {
        (state.strip(), event.strip(), after)
        for states, events, after in rows[2:]
        for state in states.split(",")
        for event in events.split("; ")
    }


def test_the_document_has_every_change_of_state_and_no_other(happened: set[tuple[Situation, str, Situation]]) -> None:
    changes = set()
    for start, event, after in happened:
        if start.state == after.state:
            continue
        ended = after.state in ("SERVING", "FENCED") and event not in ("Commit", "Commit, and a copy fails")
        back = ended and after.fenced == start.fenced and event != "another route changes the weights"
        changes.add((start.state, event, "back" if back else after.state))
    assert changes == documented()


def test_only_a_commit_lifts_a_fence(happened: set[tuple[Situation, str, Situation]]) -> None:
    assert {event for start, event, after in happened if start.fenced and not after.fenced} == {"Commit"}


def test_nothing_is_served_that_was_not_staged(happened: set[tuple[Situation, str, Situation]]) -> None:
    committed = {start.state for start, event, after in happened if event == "Commit" and start.state != after.state}
    assert committed == {"STAGED"}
