"""What nobody knows of a commit: interrupts, silence, lost answers; and what a push that is dead keeps others from."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from receiver_plugin import door as door_module
from sender import FP8Sender
from sender.control import _read
from shared import errors, protocol
from tests.test_blame import end, joined_by, small_buffers, stalling
from tests.test_door import COMMIT, HOLD
from tests.test_door_watch import GIVEN_UP, UNDER_WAY, Watched
from tests.test_http import PROMISE
from tests.test_http import Server as HttpServer
from tests.test_many_servers import LOST, Fleet, all_closed, promised, raising
from tests.test_push_memory import Server
from tests.tiny_models import Trainer

__all__ = ["all_closed", "end"]

# ---- the sender does not know


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(1), RuntimeError("an alarm")])
@pytest.mark.parametrize("strict", [False, True])
def test_an_interrupt_in_the_middle_of_the_commits_leaves_no_old_version(interrupt: Any, strict: bool) -> None:
    fleet = Fleet(strict=strict)
    fleet.sender.push(Trainer(seed=1))
    committed = threading.Semaphore(0)
    for index in (0, 2):
        fleet.controls[index].after = lambda message: committed.release() if message.kind == "commit" else None

    def interrupted(message: Any) -> None:
        if message.kind == "commit":
            assert committed.acquire(timeout=5.0) and committed.acquire(timeout=5.0)
            raise interrupt

    fleet.controls[1].on_message = interrupted
    with pytest.raises(type(interrupt)):
        fleet.sender.push(Trainer(seed=2))
    assert fleet.states() == ["SERVING", "FENCED", "SERVING"] and fleet.serving(2) == "ac"
    fleet.controls[1].on_message = lambda message: None
    fleet.sender.push(Trainer(seed=3))
    assert fleet.serving(3) == "abc"


def test_a_server_that_the_question_has_fenced_is_said_to_be() -> None:
    fleet = Fleet()
    fleet.sender.push(Trainer(seed=1))
    for index, error in enumerate((errors.CommitError("no"), LOST, errors.CommitError("no"))):
        fleet.controls[index].on_message = raising("commit", error)
    with pytest.raises(errors.CommitError, match=r"served by no server.*b: the server is fenced: it promised"):
        fleet.sender.push(Trainer(seed=2))
    assert fleet.states() == ["SERVING", "FENCED", "SERVING"] and fleet.serving(1) == "ac"


def test_what_a_proxy_answers_says_nothing_of_the_server() -> None:
    for status in (500, 502, 504):
        with pytest.raises(errors.ServerUnreachableError, match=f"HTTP {status} with no reply of ours"):
            _read("a", status, b"<html>")
    with pytest.raises(errors.PushError, match="HTTP 413") as refused:
        _read("a", 413, b"<html>")
    assert type(refused.value) is errors.PushError


def test_whom_the_plane_names_is_left_out_and_not_who_is_slow_to_answer(end: threading.Event) -> None:
    fleet, model = Fleet(plane="tcp", quorum=2, timeout_s=4.0), Trainer(seed=1)
    joined_by(fleet, 1, stalling(end))
    fleet.sender.prepare(model)
    small_buffers(fleet.sender)
    fleet.controls[2].on_message = raising("verify", LOST, times=1)
    report = fleet.sender.push(model)
    assert list(report.left_out) == ["b"] and fleet.serving(1) == "ac"


# ---- a promise that nobody will keep


def test_a_promise_ends_as_a_fence_when_its_sender_begins_anew() -> None:
    server, fences = Server(), list[str | None]()
    first, _ = promised(server)
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as again:
        again._fleet._name = first._fleet._name
        handle = server.control._handle

        def note(message: Any) -> protocol.Reply:
            reply = handle(message)
            fences.append(reply.fence if message.kind == "open" else None)
            return reply

        server.control._handle = note
        assert again.push(Trainer(seed=2)).version == 1
    assert "it promised version 1: its sender opened another session" in fences
    assert server.state() == "SERVING"
    first.close()


def test_a_promise_ends_as_a_fence_when_its_sender_is_gone_and_another_begins() -> None:
    server = Server()
    first, _ = promised(server)
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as other:
        with pytest.raises(errors.ServerBusyError):
            other.push(Trainer(seed=2))
        assert server.state() == "PROMISED"
        session = server.receiver._session
        assert session is not None
        session.lost = "its sender is gone"
        other.push(Trainer(seed=2))
    assert server.state() == "SERVING"
    first.close()


def test_an_open_that_comes_twice_ends_nothing() -> None:
    server = Server()
    first, _ = promised(server)
    session = server.receiver._session
    assert session is not None
    with pytest.raises(errors.ServerBusyError):
        server.receiver._sessions.make_way(_open(session.sender, session.id))
    assert server.state() == "PROMISED"
    first.close()


def _open(sender: str, session: str) -> protocol.Open:
    meeting = protocol.Rendezvous(
        plane="memory", host="", port=0, key="", secret="0" * 64, world_size=2, first_rank=0, timeout_s=5.0
    )
    return protocol.Open(
        sender=sender, session=session, incarnation="", plan_hash="", bucket_bytes=1, rendezvous=(meeting,)
    )


def test_a_promise_that_cannot_be_prolonged_stands() -> None:
    """Others may have committed: it ends with a fence, and not with an Abort of this process."""
    server = HttpServer()
    server.channel.state = "PROMISED"
    assert server.send(PROMISE.model_copy(update={"hold_s": 30.0}))[1].error is None
    refusal = protocol.WireError(kind="CommitError", message="it moved in memory")
    server.channel.on_message = lambda message: refusal if message.kind == "prepare" else None
    _, reply = server.send(COMMIT)
    assert reply.error is not None and "it moved" in reply.error.message
    assert "abort" not in server.channel.kinds and "commit" not in server.channel.kinds


def test_a_promise_that_only_some_replicas_give_is_taken_back() -> None:
    server = HttpServer()
    server.channel.state = "PROMISED"
    refusal = protocol.WireError(kind="CommitError", message="not here")
    server.channel.on_message = lambda message: refusal if message.kind == "prepare" else None
    server.send(PROMISE)
    assert server.channel.kinds[-1] == "abort"


# ---- requests that wait for a push that is dead


def drain(steps: Callable[[Watched, asyncio.Task[Any]], Awaitable[None]], message: Any = COMMIT) -> tuple[Any, Watched]:
    """The reply to `message`, whose requests end after 5 s, or when `steps` says so."""

    async def all_steps() -> tuple[Any, Watched]:
        behind = Watched()
        behind.drain_s, behind.reply = 5.0, {"state": "STAGED", "version": 3}
        door = behind.door
        asked = asyncio.create_task(door.hold(message) if message is HOLD else door.commit(message))
        await asyncio.sleep(0.05)
        await steps(behind, asked)
        return await asyncio.wait_for(asked, 1.0), behind

    return asyncio.run(all_steps())


@pytest.mark.parametrize("message", [COMMIT, HOLD])
def test_an_abort_ends_the_wait_for_requests(message: Any) -> None:
    async def steps(behind: Watched, asked: asyncio.Task[Any]) -> None:
        await behind.door.release("another")
        await behind.door.release("s", 5)
        await asyncio.sleep(0.05)
        assert not asked.done() and behind.door.coming == 4
        await behind.door.release("s")
        await behind.door.release("s")

    reply, behind = drain(steps, message)
    assert reply.error.message == "its push was given up while requests were ending; nothing was touched"
    assert behind.door.coming is None and "commit" not in behind.events and "prepare" not in behind.events


@pytest.mark.parametrize("now", GIVEN_UP.values(), ids=GIVEN_UP)
def test_requests_do_not_wait_for_a_push_that_is_dead(now: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "_WATCH_S", 0.02)

    async def steps(behind: Watched, asked: asyncio.Task[Any]) -> None:
        assert not asked.done()
        behind.reply = now

    reply, behind = drain(steps)
    assert "was given up" in reply.error.message and behind.door.coming is None


@pytest.mark.parametrize("now", UNDER_WAY.values(), ids=UNDER_WAY)
def test_requests_may_end_for_one_that_is_not(now: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "_WATCH_S", 0.02)

    async def steps(behind: Watched, asked: asyncio.Task[Any]) -> None:
        behind.reply = now
        await asyncio.sleep(0.2)
        assert not asked.done() and behind.door.coming == 4
        await behind.door.release("s")

    drain(steps)
