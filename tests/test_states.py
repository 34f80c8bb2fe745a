"""The states of a server in docs/architecture.md are those of the code: every event in every state that can be reached.

A search over what a real `Receiver` does: from each situation that an earlier path led to, each event is tried on a new
receiver that is brought there first. What changes the state is a row of the document's table; there are no others. That
is done for each way of staging.
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
from shared.protocol import StagingWay
from tests.test_ways import WAYS, Watched
from tests.tiny_models import Trainer

DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"
VERSION = 1


class Situation(NamedTuple):
    state: str
    fenced: bool  # whether it would be FENCED if the push ended here
    arrived: bool


class Rig:
    """A receiver with a sender's plan, and every event that it can meet."""

    def __init__(self, fence: str | None, way: StagingWay) -> None:
        self.way, self.server = way, Watched(way, fence=fence)
        self.sender = FP8Sender([self.server.control], plane="memory", timeout_s=5.0)
        plan = self.sender.prepare(Trainer())
        self._fleet, self._session = self.sender._fleet, self.sender._fleet._session
        buckets = [torch.zeros(bucket.num_bytes, dtype=torch.uint8) for bucket in plan.layout.buckets]
        self._buckets = buckets
        self._version, self.arrived = 0, False

    def _digests(self) -> tuple[int, ...]:
        secret, version = self._fleet.half.secret, self._version
        numbered = enumerate(self._buckets)
        return tuple(digest(data, secret=secret, version=version, bucket=index) for index, data in numbered)

    def _tell(self, message: BaseModel) -> None:
        self.server.receiver.handle(message)

    def situation(self) -> Situation:
        reply = self.server.receiver.handle(protocol.Describe())
        moving = reply.state in ("RECEIVING", "STAGED", "PROMISED")
        return Situation(reply.state, reply.fence is not None, self.arrived and moving)

    def begin(self) -> None:
        session = self.server.receiver._session
        busy = session is None or session.transfer is not None
        self._version += 0 if busy else 1
        self.arrived = self.arrived and busy
        shut = protocol.Shut(drain_s=5.0, hold_s=60.0, in_flight="wait")
        version = max(self._version, VERSION)
        self._tell(protocol.Begin(session=self._session, version=version, deadline_s=30.0, shut=shut))

    def bytes_arrive(self) -> None:
        session = self.server.receiver._session
        if session is None or session.transfer is None or self.arrived:
            return
        assert self._fleet.half.plane is not None
        for bucket, sent in zip(self._buckets, self._digests(), strict=True):
            self._fleet.half.plane.send(bucket, sent)
        assert session.transfer.done.wait(10.0)
        self.arrived = True

    def verify(self) -> None:
        self._tell(protocol.Verify(session=self._session, version=self._version, digests=self._digests()))

    def verify_other_digests(self) -> None:
        self._tell(protocol.Verify(session=self._session, version=self._version, digests=(1,) * len(self._buckets)))

    def promise(self) -> None:
        prepare = protocol.Prepare(session=self._session, version=self._version, idle=False, promise=True)
        self._tell(prepare)

    def commit(self, in_flight: protocol.InFlight = "wait") -> None:
        message = protocol.Commit(session=self._session, version=self._version, drain_s=5.0, in_flight=in_flight)
        self._tell(message)

    def commit_while_requests_run(self) -> None:
        self.server.engine.idle = False
        self.commit()
        self.server.engine.idle = True

    def commit_that_keeps_requests(self) -> None:
        self.server.engine.idle = False
        self.commit("keep")
        self.server.engine.idle = True

    def commit_and_a_copy_fails(self, in_flight: protocol.InFlight = "wait") -> None:
        def fail() -> None:
            raise RuntimeError("the device is lost")

        self.server.engine.on_synchronize = fail
        self.commit(in_flight)
        self.server.engine.on_synchronize = lambda: None

    def commit_that_keeps_requests_and_a_copy_fails(self) -> None:
        self.commit_and_a_copy_fails("keep")

    def abort(self) -> None:
        self._tell(protocol.Abort(session=self._session, version=self._version, reason="why"))

    def abort_beside_others_that_committed(self) -> None:
        abort = protocol.Abort(session=self._session, version=self._version, reason="others did", fence=True)
        self._tell(abort)

    def release(self) -> None:
        self._tell(protocol.Release(session=self._session, version=self._version))

    def close(self) -> None:
        self._tell(protocol.Close(session=self._session))

    def open_of_the_same_sender(self) -> None:
        """With a plan that the server does not have: what it does before it looks at that."""
        meeting = protocol.Rendezvous(
            plane="memory", host="", port=0, key="", secret="0" * 64, world_size=2, first_rank=0, timeout_s=5.0
        )
        (incarnation,) = self._fleet._incarnations.values()
        message = protocol.Open(
            sender=self._fleet._name,
            session="the next one",
            incarnation=incarnation,
            plan_hash="",
            bucket_bytes=1 << 20,
            rendezvous=(meeting,),
        )
        self._tell(message)

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
    "Prepare": Rig.promise,
    "Commit": Rig.commit,
    "Commit while requests run": Rig.commit_while_requests_run,
    "Commit with keep while requests run": Rig.commit_that_keeps_requests,
    "Commit, and a copy fails": Rig.commit_and_a_copy_fails,
    "Commit with keep, and a copy fails": Rig.commit_that_keeps_requests_and_a_copy_fails,
    "Abort": Rig.abort,
    "Abort, others have committed": Rig.abort_beside_others_that_committed,
    "Close": Rig.close,
    "Open of the same sender": Rig.open_of_the_same_sender,
    "Release": Rig.release,
    "the deadline passes": Rig.the_deadline_passes,
    "another route changes the weights": Rig.another_route_changes_the_weights,
}
COMMITS = {"Commit", "Commit with keep while requests run"}
Steps = tuple[str, ...]
Changes = set[tuple[Situation, str, Situation]]


def brought(fence: str | None, way: StagingWay, path: Steps) -> Rig:
    rig = Rig(fence, way)
    for event in path:
        EVENTS[event](rig)
        rig.situation()  # a server hears of time and connections when it is asked something
    return rig


def explore(fence: str | None, way: StagingWay) -> Changes:
    """All that can happen, starting from a server with or without `fence`."""
    found: set[tuple[Situation, str, Situation]] = set()
    paths: dict[Situation, Steps] = {Rig(fence, way).situation(): ()}
    left = list(paths)
    while left:
        start = left.pop()
        for event in EVENTS:
            rig = brought(fence, way, paths[start])
            assert rig.situation() == start
            EVENTS[event](rig)
            after = rig.situation()
            rig.sender.close()
            found.add((start, event, after))
            if after not in paths:
                paths[after] = (*paths[start], event)
                left.append(after)
    return found


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> StagingWay:
    found: StagingWay = request.param
    return found


@pytest.fixture(scope="module")
def happened(way: StagingWay) -> Changes:
    return explore(None, way) | explore("started without weights", way)


def documented(way: StagingWay) -> set[tuple[str, str, str]]:
    text = DOCUMENT.read_text(encoding="utf-8").split("## States of a server")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {
        (state.strip(), event.strip(), after)
        for ways, states, events, after in rows[2:]
        if ways == "each" or way in ways.split(", ")
        for state in states.split(",")
        for event in events.split("; ")
    }


def test_the_document_has_every_change_of_state_and_no_other(happened: Changes, way: StagingWay) -> None:
    changes = {
        (name(start, way), event, start.fenced, after.state)
        for start, event, after in happened
        if start.state != after.state
    }
    wanted = set()
    for state, event, after in documented(way):
        for fenced in (False, True):
            if (state, fenced) not in (("SERVING", True), ("FENCED", False)):
                wanted.add((state, event, fenced, after.replace("back", "FENCED" if fenced else "SERVING")))
    assert changes == wanted


def name(situation: Situation, way: StagingWay) -> str:
    written = way == "in_place" and situation.state == "RECEIVING" and situation.arrived
    return "RECEIVING and written" if written else situation.state


def test_only_a_commit_lifts_a_fence(happened: Changes, way: StagingWay) -> None:
    lifting = {event for start, event, after in happened if start.fenced and not after.fenced}
    assert lifting == (COMMITS if way == "reserved" else {"Commit"})


def test_nothing_is_served_that_was_not_staged(happened: Changes) -> None:
    committed = {start.state for start, event, after in happened if event in COMMITS and start.state != after.state}
    assert committed == {"STAGED", "PROMISED"}


def test_a_server_that_promised_never_goes_back_by_itself(happened: Changes, way: StagingWay) -> None:
    back = {event for start, event, after in happened if start.state == "PROMISED" and after.state == "SERVING"}
    wanted = {"reserved": {"Abort", *COMMITS}, "kv_pool": {"Abort", "Commit"}, "in_place": {"Commit"}}
    assert back == wanted[way]


def test_what_is_fenced_was_written_or_promised(happened: Changes, way: StagingWay) -> None:
    """Without a promise only a copy that failed fences, and in place what came after the first byte."""
    fencing = {
        (event, start.arrived)
        for start, event, after in happened
        if after.fenced and not start.fenced and start.state != "PROMISED"
    }
    failed = {"Commit, and a copy fails", "Commit with keep, and a copy fails", "another route changes the weights"}
    ended = {event for event, _ in fencing} - failed
    endings = {"Abort", "Abort, others have committed", "Close", "Release", "the deadline passes"}
    endings.add("Open of the same sender")
    assert ended == (endings if way == "in_place" else set())
    assert all(arrived for event, arrived in fencing if event in ended)
