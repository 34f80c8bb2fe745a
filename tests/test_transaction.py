"""The end of a push on several servers: who is told what, in which order, where one of them fails or is silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from sender import FP8Sender
from sender.control import InProcessControl
from shared import errors, protocol
from tests.replicas import Replicas, refuse
from tests.test_many_servers import LOST, Fleet, Watched, all_closed, raising
from tests.test_push_memory import Server, expected
from tests.test_ways import lend
from tests.tiny_models import Trainer

__all__ = ["all_closed"]  # a fixture that ends every `Fleet`


class Held(Replicas):
    """A server with a real door, which a push holds from its begin on: it stages where requests would run."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        super().__init__()
        for engine in self.engines:
            lend(engine, "kv_pool")
        self.client = InProcessControl(name, self._note)
        self.events: list[str] = []
        stack.enter_context(self._http)  # one event loop, so that the door stays held between two messages

    def _note(self, message: Any) -> protocol.Reply:
        self.events.append(message.kind)
        return self.send(message)


@pytest.fixture
def held() -> Iterator[tuple[Held, Held]]:
    with ExitStack() as stack:
        yield Held("a", stack), Held("b", stack)


# ---- doors


@pytest.mark.parametrize("strict", [False, True])
def test_no_door_opens_before_the_abort_that_it_waits_for(held: tuple[Held, Held], strict: bool) -> None:
    """A door that opens under a promise breaks it, and the server would be fenced with nothing wrong on it."""
    with FP8Sender([server.client for server in held], plane="memory", timeout_s=5.0, strict=strict) as sender:
        sender.push(Trainer(seed=1))
        for server in held:
            server.events.clear()
        held[1].on_message = lambda replica, message: (
            refuse("CommitError", "not now")() if message.kind == "prepare" and message.before == "commit" else None
        )
        with pytest.raises(errors.CommitError, match="not now"):
            sender.push(Trainer(seed=2))
        for server in held:
            heard = [kind for kind in server.events if kind in ("begin", "prepare", "commit", "abort", "release")]
            assert heard[:3] == ["begin", "prepare", "abort"], "the door was open before it heard Abort"
            assert server.describe().state == "SERVING" and server.describe().fence is None
            assert server.serves() == 1 and server.held() == [expected(Trainer(seed=1))] * 2
            assert not server.control.excludes and server.control.coming is None
        held[1].on_message = lambda replica, message: None
        sender.push(Trainer(seed=3))
    assert [server.serves() for server in held] == [2, 2]


def test_doors_open_after_every_server_has_committed(held: tuple[Held, Held]) -> None:
    at_release: list[list[int]] = []

    def note(replica: int, message: Any) -> None:
        if message.kind == "release":
            at_release.append([version for server in held for version in server.versions()])

    for server in held:
        server.on_message = note
    with FP8Sender([server.client for server in held], plane="memory", timeout_s=5.0) as sender:
        sender.push(Trainer(seed=1))
    assert at_release and all(versions == [1, 1, 1, 1] for versions in at_release)
    assert [server.serves() for server in held] == [1, 1]


# ---- a server that is left out


@pytest.mark.parametrize("strict", [False, True])
def test_a_server_whose_promise_was_not_heard_is_told_that_it_was_left_out(strict: bool) -> None:
    """Else it is fenced when its promise runs out, though it did all that it was asked for."""
    fleet = Fleet(quorum=2, strict=strict)
    fleet.sender.push(Trainer(seed=1))
    fleet.controls[1].after = raising("hold" if strict else "prepare", LOST)
    fleet.controls[1].kinds.clear()
    report = fleet.sender.push(Trainer(seed=2))
    assert report.servers == ("a", "c") and list(report.left_out) == ["b"] and fleet.serving(2) == "ac"
    assert fleet.controls[1].kinds[-1] == "abort"
    assert fleet.states() == ["SERVING"] * 3 and fleet.serving(1) == "b"
    fleet.controls[1].after = lambda message: None
    assert fleet.sender.push(Trainer(seed=3)).left_out == {} and fleet.serving(3) == "abc"


def test_a_server_is_not_told_of_an_abort_for_longer_than_it_takes() -> None:
    """What is insisted on is a word to one that may be dead: little time, and nothing is raised."""
    fleet, waited = Fleet(quorum=2, timeout_s=60.0), list[float]()
    call = fleet.controls[1].call

    def silent(message: Any, timeout_s: float) -> protocol.Reply:
        if message.kind not in ("prepare", "abort"):
            return call(message, timeout_s)
        waited.append(timeout_s)
        raise LOST

    fleet.controls[1].call = silent  # type: ignore[method-assign]
    assert list(fleet.sender.push(Trainer(seed=1)).left_out) == ["b"]
    assert len(waited) == 2 and waited[1] <= 5.0


# ---- a push to one server is decided by its commit


@pytest.mark.parametrize("error", [LOST, errors.CommitError("no")])
@pytest.mark.parametrize("quorum", [None, 1])
def test_a_single_server_is_told_that_its_commit_may_have_been_done(error: Exception, quorum: int | None) -> None:
    """And it is not asked to commit a second time, whatever the quorum."""
    server = Server()
    control, aborts = Watched(server, "alone"), list[protocol.Abort]()

    def on_message(message: Any) -> None:
        if message.kind == "abort":
            aborts.append(message)
        raising("commit", error)(message)

    control.on_message = on_message
    with FP8Sender([control], plane="memory", timeout_s=5.0, quorum=quorum) as sender:
        with pytest.raises(type(error)):
            sender.push(Trainer())
        assert control.kinds.count("commit") == 1
        assert [abort.fence for abort in aborts] == [True]
        control.on_message = lambda message: None
        sender.push(Trainer(seed=1))
    assert server.state() == "SERVING"


def test_one_that_is_left_alone_with_its_promise_is_fenced_by_a_commit_that_fails() -> None:
    fleet = Fleet(quorum=1)
    for control in fleet.controls[1:]:
        control.on_message = raising("prepare", errors.PushError("its disk is full"))
    fleet.controls[0].on_message = raising("commit", errors.CommitError("no"))
    with pytest.raises(errors.CommitError, match="no"):
        fleet.sender.push(Trainer(seed=1))
    assert fleet.states() == ["FENCED", "SERVING", "SERVING"]


# ---- a catch-up brings no server back


@pytest.mark.parametrize("fenced", [False, True])
def test_a_catch_up_stops_where_a_newer_version_is_served(fenced: bool) -> None:
    """Another sender pushed it: a server that is fed the older one would serve beside it."""
    fleet = Fleet(keep_snapshot=True)
    fleet.sender.push(Trainer(seed=1))
    with FP8Sender([fleet.controls[2]], plane="memory", timeout_s=5.0) as other:
        other.push(Trainer(seed=5), version=7)
    fleet.servers[1].receiver.weights_changed("a stock route")
    if fenced:
        fleet.servers[2].receiver.weights_changed("a stock route")
    for control in fleet.controls:
        control.kinds.clear()
    with pytest.raises(errors.StaleVersionError, match="version 7 is served and the snapshot is version 1"):
        fleet.sender.catch_up()
    assert [control.kinds for control in fleet.controls] == [["describe"]] * 3, "it only asked"
    assert fleet.servers[1].state() == "FENCED" and fleet.serving(1) == "a"
    with pytest.raises(errors.SessionLostError, match="took over"):
        fleet.sender.push(Trainer(seed=8))
    assert fleet.sender.push(Trainer(seed=8)).version == 8 and fleet.serving(8) == "abc"
    fleet.servers[1].receiver.weights_changed("a stock route")
    assert fleet.sender.catch_up() == ("b",) and fleet.serving(8) == "abc"


# ---- a quorum needs its servers


def test_no_server_is_removed_that_the_quorum_needs() -> None:
    fleet, late = Fleet(quorum=2), Server(name="late")
    fleet.sender.push(Trainer(seed=1))
    fleet.sender.remove_server("c")
    with pytest.raises(errors.ConfigError, match="b is needed for quorum=2"):
        fleet.sender.remove_server("b")
    assert fleet.sender.push(Trainer(seed=2)).servers == ("a", "b") and fleet.serving(2) == "ab"
    fleet.sender.add_server(late.control)
    fleet.sender.remove_server("b")
    assert fleet.sender.push(Trainer(seed=3)).servers == ("a", "late") and fleet.serving(3) == "a"


# ---- where it is staged


@pytest.mark.parametrize(
    ("forced", "says", "text"),
    [
        ("auto", None, "did not say where it stages"),
        ("kv_pool", None, "did not say where it stages"),
        ("reserved", "in_place", "stages in another way than 'reserved'"),
        ("in_place", "reserved", "stages in another way than 'in_place'"),
    ],
)
def test_a_server_that_stages_elsewhere_than_it_was_told_is_no_server(forced: Any, says: Any, text: str) -> None:
    """Doors are held, and what an error leaves behind is judged, by that word."""
    fleet = Fleet(staging=forced)
    for server in fleet.servers:
        server.engine.memory.pool = [server.engine.memory.reserved.clone()]  # type: ignore[union-attr]
    handle = fleet.controls[1]._handle

    def other(message: Any) -> protocol.Reply:
        reply = handle(message)
        return reply.model_copy(update={"staging": says}) if message.kind == "open" else reply

    fleet.controls[1]._handle = other
    with pytest.raises(errors.PushError, match=text):
        fleet.sender.push(Trainer(seed=1))
    assert not any("begin" in control.kinds for control in fleet.controls) and fleet.states() == ["SERVING"] * 3
    fleet.controls[1]._handle = handle
    fleet.sender.push(Trainer(seed=2))
    assert fleet.serving(2) == "abc"
