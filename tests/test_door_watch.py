"""A held door whose push is gone: it opens soon, and only then. Promises of replicas that do not all give theirs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import pytest

from receiver_plugin import door as door_module
from receiver_plugin.gate import FencedError
from receiver_plugin.http import Control
from sender import FP8Sender
from shared import protocol
from tests.replicas import Replicas
from tests.staged import staged
from tests.test_door import COMMIT, EARLY, HELD, HOLD, Schedulers
from tests.test_http import PROMISE, FakeChannel
from tests.tiny_models import Trainer

WAIT_S = 0.15  # several looks


class Watched(Schedulers):
    """Says what `reply` says; `asked` are the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.reply: dict[str, Any] = {}
        self.asked: list[Any] = []

    async def ask(self, message: Any) -> protocol.Reply:
        self.asked.append(message)
        return (await super().ask(message)).model_copy(update=self.reply)

    def keeps_shut_for(self) -> int | None:
        return self.door.coming


def run(steps: Callable[[Watched], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "_WATCH_S", 0.02)

    async def all_steps() -> None:
        await steps(Watched())

    asyncio.run(all_steps())


GIVEN_UP: dict[str, dict[str, Any]] = {
    "it was aborted": {"state": "SERVING", "version": 3},
    "it began again": {"state": "RECEIVING", "version": 3},
    "its promise was not kept": {"state": "FENCED", "version": 3, "fence": "why"},
    "it committed and was fenced": {"state": "FENCED", "version": 4, "fence": "why"},
}
UNDER_WAY: dict[str, dict[str, Any]] = {
    "it is staged": {"state": "STAGED", "version": 3},
    "it has promised": {"state": "PROMISED", "version": 3},
    "it has committed": {"state": "SERVING", "version": 4},
    "its schedulers do not answer": {
        "state": "SERVING",
        "version": 3,
        "error": protocol.WireError(kind="PushError", message="no answer"),
    },
}


@pytest.mark.parametrize("now", GIVEN_UP.values(), ids=GIVEN_UP)
def test_a_strict_hold_ends_with_what_it_is_held_for(now: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that died beside it does not keep requests out until `hold_s` is over."""

    async def steps(schedulers: Watched) -> None:
        assert (await schedulers.door.hold(HOLD)).error is None
        await asyncio.sleep(WAIT_S)
        assert schedulers.keeps_shut_for() == 4
        schedulers.reply = now
        await asyncio.sleep(WAIT_S)
        assert schedulers.keeps_shut_for() is None and schedulers.events[-1] == "open"
        assert (await schedulers.door.commit(HELD)).error is not None and "commit" not in schedulers.events

    run(steps, monkeypatch)


@pytest.mark.parametrize("now", UNDER_WAY.values(), ids=UNDER_WAY)
def test_a_strict_hold_stays_as_long_as_it_may_be_needed(now: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after its commit: with strict, other servers may not have answered theirs."""

    async def steps(schedulers: Watched) -> None:
        await schedulers.door.hold(HOLD)
        schedulers.reply = now
        await asyncio.sleep(WAIT_S)
        assert schedulers.keeps_shut_for() == 4 and "open" not in schedulers.events
        assert schedulers.events.count("describe") > 1
        await schedulers.door.release("s", 4)
        assert schedulers.events[-1] == "open"

    run(steps, monkeypatch)


@pytest.mark.parametrize("message", [HOLD, EARLY, COMMIT])
def test_the_next_sender_finds_a_strict_hold_that_was_given_up(message: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Watched) -> None:
        monkeypatch.setattr(door_module, "_WATCH_S", 60.0)
        await schedulers.door.hold(HOLD)
        other = message.model_copy(update={"session": "t", "version": 5})
        door = schedulers.door
        call = door.commit if message is COMMIT else door.begin if message is EARLY else door.hold
        assert (await call(other)).error is not None, "it is still at work"
        schedulers.reply = {"state": "SERVING"}
        assert (await call(other)).error is None
        await schedulers.door.release("t")

    run(steps, monkeypatch)


# ---- pushes for which requests have to end before they begin


@pytest.mark.parametrize(
    ("kind", "opens"), [("SessionLostError", True), ("ServerBusyError", False), ("PushError", False), (None, False)]
)
def test_requests_end_for_a_push_whose_session_is_gone(
    kind: str | None, opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ones do not wait any longer; while the push is there, they do."""

    async def steps(schedulers: Watched) -> None:
        schedulers.drain_s = 2 * WAIT_S
        beginning = asyncio.create_task(schedulers.door.begin(EARLY))
        await asyncio.sleep(0)
        if kind is not None:
            schedulers.refused["prepare"] = kind
        await asyncio.sleep(WAIT_S)
        assert beginning.done() == opens
        looks = [message for message in schedulers.asked if message.kind == "prepare"]
        assert looks and all(look.before == "begin" and not look.idle and not look.promise for look in looks)
        reply = await beginning
        assert (reply.error is not None) == opens and ("begin" in schedulers.events) == (not opens)
        await schedulers.door.release("s")

    run(steps, monkeypatch)


@pytest.mark.parametrize("kind", ["SessionLostError", "StaleVersionError", "ServerBusyError"])
def test_no_request_has_to_end_for_a_push_that_cannot_begin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Watched) -> None:
        schedulers.refused["prepare"], schedulers.busy = kind, True
        reply = await schedulers.door.begin(EARLY)
        assert reply.error is not None and reply.error.kind == kind
        assert schedulers.events == ["prepare"], "the door was shut"
        assert not schedulers.asked[0].idle, "requests may run while it is asked"

    run(steps, monkeypatch)


# ---- a promise that ran out, as the HTTP process knows it


def test_requests_do_not_wait_for_schedulers_that_are_silent() -> None:
    """They are asked again, by one question at a time, while requests are refused."""

    async def steps() -> None:
        channel = FakeChannel()
        control, ask = Control(channel), channel.ask

        async def ask_promised(message: Any) -> tuple[protocol.Reply, ...]:
            return tuple(reply.model_copy(update={"state": "PROMISED"}) for reply in await ask(message))

        channel.ask = ask_promised  # type: ignore[method-assign]
        assert (await control.answer(PROMISE.model_copy(update={"hold_s": 0.05}))).state == "PROMISED"
        await asyncio.sleep(0.1)
        channel.kinds.clear()
        channel.ask, channel.answer_s = ask, 0.5  # type: ignore[method-assign]
        started = time.monotonic()
        for _ in range(20):
            assert "promised to commit" in str(await control.fence())
            await asyncio.sleep(0.005)
        assert time.monotonic() - started < 0.4 and channel.kinds == ["describe"]
        with pytest.raises(FencedError):
            control.refuse_if_fenced()
        await asyncio.sleep(0.6)
        assert await control.fence() is None, "they said that nothing is wrong"
        assert channel.kinds == ["describe"]

    asyncio.run(steps())


# ---- replicas of which one promises and another cannot


def both(server: Replicas) -> list[str]:
    return [receiver.state for receiver in server.receivers]


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_promise_that_not_all_replicas_give_is_taken_back(refusing: int) -> None:
    """Else it would fence the server in the end, though the sender was told that it refused."""
    server = Replicas()
    sender, session = staged(server.client)
    server.engines[refusing].unsafe_reasons = ["its memory is released"]
    reply = server.send(protocol.Prepare(session=session, version=1, idle=False, promise=True, hold_s=0.1))
    assert reply.error is not None and "its memory is released" in reply.error.message
    assert server.kinds[-2:] == ["prepare", "abort"] and both(server) == ["SERVING"] * 2
    time.sleep(0.15)
    assert server.serves() == 0 and server.describe().fence is None
    sender.close()


def test_a_refusal_without_a_promise_ends_nothing() -> None:
    server = Replicas()
    sender, session = staged(server.client)
    server.engines[1].unsafe_reasons = ["its memory is released"]
    for promise in (True, False):
        server.engines[0].unsafe_reasons = ["its memory is released"] if promise else []
        server.send(protocol.Prepare(session=session, version=1, idle=False, promise=promise))
        assert server.kinds[-1] == "prepare" and both(server) == ["STAGED"] * 2
    sender.close()


def test_a_replica_whose_requests_still_end_is_waited_for_before_any_promise() -> None:
    """A promise beside it would have to be taken back, and with it what is staged."""
    server = Replicas()
    sender, session = staged(server.client)
    server.engines[1].idle, asked = False, list[str]()

    def on_message(replica: int, message: Any) -> None:
        if message.kind == "prepare":
            asked.append(message.kind)
            server.engines[1].idle = len(asked) > 4

    server.on_message = on_message
    hold = protocol.Hold(session=session, version=1, drain_s=5.0, hold_s=5.0, in_flight="wait", promise=True)
    with ExitStack() as stack:
        stack.enter_context(server._http)  # one event loop, so that the door stays held
        reply = server.send(hold)
        assert reply.error is None and reply.state == "PROMISED"
        assert server.send(protocol.Commit(session=session, version=1, drain_s=5.0, held=True)).version == 1
        server.send(protocol.Release(session=session, version=1))
        assert server.serves() == 1 and "abort" not in server.kinds
    sender.close()


@pytest.mark.parametrize("busy", [0, 1])
def test_replicas_begin_together_once_the_last_request_has_ended(busy: int) -> None:
    """One that had begun could not begin again while another is waited for, and its server would stand still."""
    server = Replicas()
    with FP8Sender([server.client], plane="memory", staging="in_place", timeout_s=20.0) as sender:
        sender.prepare(Trainer())
        server.kinds.clear()
        server.engines[busy].idle = False

        def on_message(replica: int, message: Any) -> None:
            server.engines[busy].idle = server.kinds.count("prepare") > 4

        server.on_message = on_message
        shut = protocol.Shut(drain_s=5.0, hold_s=20.0, in_flight="wait")
        begin = protocol.Begin(session=sender._fleet._session, version=1, deadline_s=10.0, shut=shut)
        with server._http:  # one event loop, so that the door stays shut
            reply = server.send(begin)
            assert reply.error is None and reply.state == "RECEIVING"
            assert server.kinds.count("begin") == 1 and both(server) == ["RECEIVING"] * 2
            assert server.send(protocol.Abort(session=begin.session, version=1, reason="over")).state == "SERVING"
