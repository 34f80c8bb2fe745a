"""`receiver_plugin/door.py`: when requests are kept out for a commit; the door opens again whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import ValidationError

from receiver_plugin import door as door_module
from receiver_plugin.door import Door, _prepare
from shared import protocol
from shared.errors import PushError

COMMIT = protocol.Commit(session="s", version=4, drain_s=5.0)
KEEP = COMMIT.model_copy(update={"in_flight": "keep"})
HELD = COMMIT.model_copy(update={"held": True})
HOLD = protocol.Hold(session="s", version=4, drain_s=5.0, hold_s=5.0, in_flight="wait")


class Schedulers:
    """What lies behind a door: notes what happens, and refuses what `refused` names."""

    num_replicas, busy = 1, False

    def __init__(self) -> None:
        self.events: list[str] = []
        self.refused: dict[str, str] = {}  # kind of message -> kind of error
        self.fenced = False
        self.drain_s = 0.0
        self.drain_error: Exception | None = None
        self.door = Door(self, self.ask, lambda: self.fenced)

    async def ask(self, message: Any) -> protocol.Reply:
        self.events.append(message.kind)
        kind = self.refused.get(message.kind)
        error = None if kind is None else protocol.WireError(kind=kind, message="why")
        return protocol.Reply(state="STAGED", version=3, fence=None, error=error)

    @asynccontextmanager
    async def drained(self, in_flight: protocol.InFlight) -> AsyncIterator[None]:
        if self.drain_error is not None:
            raise self.drain_error
        await asyncio.sleep(self.drain_s)
        self.events.append(f"shut ({in_flight})")
        try:
            yield
        finally:
            self.events.append("open")

    def abort_all(self) -> None:
        self.events.append("abort all")


def run(steps: Callable[[Schedulers], Awaitable[Any]]) -> tuple[Any, list[str]]:
    schedulers = Schedulers()

    async def all_steps() -> Any:
        return await steps(schedulers)

    return asyncio.run(all_steps()), schedulers.events


def test_a_commit_shuts_and_opens() -> None:
    reply, events = run(lambda schedulers: schedulers.door.commit(COMMIT))
    assert reply.error is None and events == ["shut (wait)", "commit", "open"]


def test_strict_holds_from_hold_to_release() -> None:
    async def steps(schedulers: Schedulers) -> None:
        door = schedulers.door
        assert (await door.hold(HOLD)).error is None
        assert (await door.commit(HELD)).error is None
        schedulers.events.append("others")
        await door.release("s", 4)
        await door.release("s", 4)

    _, events = run(steps)
    assert events == ["shut (wait)", "prepare", "commit", "others", "open"]


def test_a_hold_that_the_schedulers_refuse_opens_at_once() -> None:
    async def steps(schedulers: Schedulers) -> protocol.Reply:
        schedulers.refused["prepare"] = "TransferError"
        return await schedulers.door.hold(HOLD)

    reply, events = run(steps)
    assert reply.error is not None and reply.error.kind == "TransferError"
    assert events == ["shut (wait)", "prepare", "open"]


def test_a_hold_that_nobody_releases_ends_by_itself() -> None:
    async def steps(schedulers: Schedulers) -> protocol.Reply:
        await schedulers.door.hold(HOLD.model_copy(update={"hold_s": 0.05}))
        await asyncio.sleep(0.2)
        return await schedulers.door.commit(HELD)

    reply, events = run(steps)
    assert events == ["shut (wait)", "prepare", "open", "describe"]
    assert reply.error is not None and "no longer; nothing was touched" in reply.error.message


@pytest.mark.parametrize("other", [{"session": "t"}, {"version": 5}])
def test_only_its_own_commit_may_use_a_hold(other: dict[str, Any]) -> None:
    async def steps(schedulers: Schedulers) -> protocol.Reply:
        await schedulers.door.hold(HOLD)
        reply = await schedulers.door.commit(HELD.model_copy(update=other))
        await schedulers.door.release("s")
        return reply

    reply, events = run(steps)
    assert reply.error is not None and "commit" not in events and events[-1] == "open"


def test_a_release_of_others_opens_nothing() -> None:
    async def steps(schedulers: Schedulers) -> None:
        await schedulers.door.hold(HOLD)
        await schedulers.door.release("t")
        await schedulers.door.release("s", 3)
        assert "open" not in schedulers.events
        await schedulers.door.release("s")

    assert run(steps)[1][-1] == "open"


def test_a_second_hold_is_refused() -> None:
    async def steps(schedulers: Schedulers) -> protocol.Reply:
        await schedulers.door.hold(HOLD)
        reply = await schedulers.door.hold(HOLD)
        await schedulers.door.release("s")
        return reply

    reply, _ = run(steps)
    assert reply.error is not None and "shut for version 4 already" in reply.error.message


def test_of_two_holds_at_once_one_is_refused() -> None:
    """Else the second would take the first one's place, and nobody could open the door of the first."""

    async def steps(schedulers: Schedulers) -> list[protocol.Reply]:
        schedulers.drain_s = 0.05
        replies = await asyncio.gather(schedulers.door.hold(HOLD), schedulers.door.hold(HOLD))
        await schedulers.door.release("s")
        return list(replies)

    replies, events = run(steps)
    assert [reply.error is None for reply in replies] == [True, False]
    assert events.count("shut (wait)") == events.count("open") == 1


def test_a_commit_of_another_finds_a_held_door() -> None:
    async def steps(schedulers: Schedulers) -> protocol.Reply:
        await schedulers.door.hold(HOLD)
        reply = await schedulers.door.commit(COMMIT.model_copy(update={"session": "t"}))
        await schedulers.door.release("s")
        return reply

    reply, events = run(steps)
    assert reply.error is not None and "held for version 4" in reply.error.message and "commit" not in events


@pytest.mark.parametrize("by", ["release", "time"])
def test_a_held_door_does_not_open_before_its_commit_was_answered(by: str) -> None:
    async def steps(schedulers: Schedulers) -> None:
        async def slow(message: Any) -> protocol.Reply:
            await asyncio.sleep(0.2 if message.kind == "commit" else 0.0)
            reply = await schedulers.ask(message)
            schedulers.events.append(f"{message.kind} answered")
            return reply

        door = Door(schedulers, slow, lambda: False)
        await door.hold(HOLD.model_copy(update={"hold_s": 0.05 if by == "time" else 5.0}))
        commit = asyncio.create_task(door.commit(HELD))
        await asyncio.sleep(0.01)
        if by == "release":
            await door.release("s", 4)
        await commit
        await asyncio.sleep(0.1)

    _, events = run(steps)
    assert events[-2:] == ["commit answered", "open"]


@pytest.mark.parametrize("call", ["commit", "hold"])
def test_requests_that_do_not_end_leave_all_as_it_was(call: str) -> None:
    async def steps(schedulers: Schedulers) -> protocol.Reply:
        schedulers.drain_s = 1.0
        message = (COMMIT if call == "commit" else HOLD).model_copy(update={"drain_s": 0.05})
        reply: protocol.Reply = await getattr(schedulers.door, call)(message)
        return reply

    reply, events = run(steps)
    assert reply.error is not None and "still running" in reply.error.message
    assert "nothing was touched" in reply.error.message and events == ["describe"]


def test_what_keeps_it_from_draining_is_told() -> None:
    async def steps(schedulers: Schedulers) -> protocol.Reply:
        schedulers.drain_error = PushError("generation is paused")
        return await schedulers.door.commit(COMMIT)

    reply, _ = run(steps)
    assert reply.error is not None and reply.error.message == "generation is paused; nothing was touched"


def test_with_keep_the_door_stays_open() -> None:
    async def steps(schedulers: Schedulers) -> tuple[protocol.Reply, list[Any]]:
        met: list[Any] = []

        async def ask(message: Any) -> protocol.Reply:
            met.append((door.coming, door.passing))
            return await schedulers.ask(message)

        door = Door(schedulers, ask, lambda: False)
        reply = await door.commit(KEEP)
        return reply, [*met, door.coming, door.passing]

    (reply, met), events = run(steps)
    assert reply.error is None and events == ["commit"] and met == [(4, 4), None, None]


def test_with_keep_replicas_are_asked_first_and_told_what_becomes_of_requests() -> None:
    async def steps(schedulers: Schedulers) -> protocol.Reply:
        schedulers.num_replicas = 2
        schedulers.refused["prepare"] = "IncompatibleServerError"
        return await schedulers.door.commit(KEEP)

    reply, events = run(steps)
    assert reply.error is not None and reply.error.kind == "IncompatibleServerError" and events == ["prepare"]
    assert _prepare(KEEP).in_flight == "keep" and _prepare(HOLD).in_flight == "wait"


def test_nothing_is_held_with_keep() -> None:
    with pytest.raises(ValidationError):
        protocol.Hold(session="s", version=4, drain_s=5.0, hold_s=5.0, in_flight="keep")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["an answer", "cut off"])
def test_with_keep_requests_end_where_the_server_is_fenced(how: str) -> None:
    async def steps(schedulers: Schedulers) -> None:
        schedulers.fenced = True
        if how == "cut off":
            schedulers.ask = cut_off  # type: ignore[method-assign]
            schedulers.door = Door(schedulers, cut_off, lambda: True)
            with pytest.raises(asyncio.CancelledError):
                await schedulers.door.commit(KEEP)
        else:
            await schedulers.door.commit(KEEP)

    async def cut_off(message: Any) -> protocol.Reply:
        raise asyncio.CancelledError

    assert run(steps)[1][-1] == "abort all"


@pytest.mark.parametrize(("in_flight", "aborted"), [("wait", False), ("retract", True), ("abort", False)])
def test_requests_that_were_put_back_do_not_start_over_on_a_fenced_server(
    in_flight: protocol.InFlight, aborted: bool
) -> None:
    async def steps(schedulers: Schedulers) -> None:
        schedulers.fenced = True
        await schedulers.door.commit(COMMIT.model_copy(update={"in_flight": in_flight}))

    assert ("abort all" in run(steps)[1]) == aborted


def test_a_cancelled_commit_opens_the_door() -> None:
    async def steps(schedulers: Schedulers) -> None:
        async def hang(message: Any) -> protocol.Reply:
            await asyncio.sleep(10.0)
            raise AssertionError

        door = Door(schedulers, hang, lambda: False)
        task = asyncio.create_task(door.hold(HOLD))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert run(steps)[1] == ["shut (wait)", "open"]


# ---- held from before the first byte: what arrives uses what requests use

EARLY = protocol.Begin(
    session="s", version=4, deadline_s=5.0, shut=protocol.Shut(drain_s=5.0, hold_s=5.0, in_flight="wait")
)


def shut_for(**changes: Any) -> protocol.Begin:
    assert EARLY.shut is not None
    return EARLY.model_copy(update={"shut": EARLY.shut.model_copy(update=changes)})


class Receiving(Schedulers):
    """Between `Begin` and its end, replies say that no request may run."""

    def __init__(self) -> None:
        super().__init__()
        self.exclusive, self.version, self.gone = False, 3, False
        self.running = 0  # times that Begin finds a request that is still at work
        self.silent = False  # nobody answers Begin, though it was heard

    async def ask(self, message: Any) -> protocol.Reply:
        reply = await super().ask(message)
        if message.kind == "begin" and self.running > 0:
            self.running -= 1
            busy = protocol.WireError(kind="ServerBusyError", message="requests are still running")
            return reply.model_copy(update={"error": busy})
        if reply.error is None and message.kind in ("begin", "commit", "release"):
            self.exclusive = message.kind == "begin"
            self.version = 4 if message.kind == "commit" else self.version
        if message.kind == "begin" and self.silent:
            error = protocol.WireError(kind="ServerUnreachableError", message="no answer")
            return reply.model_copy(update={"error": error})
        return reply.model_copy(update={"exclusive": self.exclusive, "version": self.version})

    def heard(self) -> list[str]:
        return [event for event in self.events if event != "describe"]


def run_early(steps: Callable[[Receiving], Awaitable[Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    monkeypatch.setattr(door_module, "_WATCH_S", 0.02)
    schedulers = Receiving()

    async def all_steps() -> Any:
        return await steps(schedulers)

    return asyncio.run(all_steps()), schedulers.heard()


def test_the_schedulers_hear_of_it_before_the_door_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> None:
        door, schedulers.busy = schedulers.door, True
        assert (await door.begin(EARLY)).exclusive and door.excludes
        await asyncio.sleep(0.1)
        assert (await door.commit(HELD)).error is None
        await asyncio.sleep(0.1)  # strict: others may still commit
        assert door.excludes
        await door.release("s", 4)
        assert not door.excludes

    _, events = run_early(steps, monkeypatch)
    assert events == ["prepare", "shut (wait)", "begin", "commit", "release", "open"]


def test_a_push_that_is_gone_opens_the_door_also_while_memory_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies say `exclusive` then, whether a transfer is at work or not."""

    async def steps(schedulers: Receiving) -> None:
        ask = schedulers.ask

        async def released(message: Any) -> protocol.Reply:
            gone = message.kind == "describe" and schedulers.gone
            return (await ask(message)).model_copy(
                update={"exclusive": True, "state": "FENCED" if gone else "RECEIVING", "fence": "why" if gone else None}
            )

        schedulers.door._ask = released
        assert (await schedulers.door.begin(EARLY)).error is None
        await asyncio.sleep(0.1)
        assert schedulers.door.excludes, "it is at work"
        schedulers.gone = True
        await asyncio.sleep(0.1)
        assert not schedulers.door.excludes

    run_early(steps, monkeypatch)


def test_a_commit_opens_the_door_if_it_is_to_and_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> None:
        door, last = schedulers.door, HELD.model_copy(update={"opens": True})
        assert (await door.begin(EARLY)).error is None
        schedulers.refused["commit"] = "TransferError"
        assert (await door.commit(last)).error is not None and door.excludes
        schedulers.refused.clear()
        assert (await door.commit(last)).error is None
        assert (door.excludes, door.coming) == (False, None)

    _, events = run_early(steps, monkeypatch)
    assert events == ["shut (wait)", "begin", "commit", "commit", "open"], "nothing ran, nobody asked first"


@pytest.mark.parametrize("other", [HOLD, EARLY])
def test_a_push_does_not_begin_while_the_door_is_shut_for_another(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> protocol.Reply:
        door, found = schedulers.door, other.model_copy(update={"version": 5})
        assert (await (door.begin(found) if other is EARLY else door.hold(found))).error is None
        schedulers.events.clear()
        reply = await door.begin(EARLY)
        assert door.coming == 5
        await door.release("s")
        return reply

    reply, events = run_early(steps, monkeypatch)
    assert reply.error is not None and "nothing was touched" in reply.error.message and "begin" not in events


def test_a_push_begins_when_the_last_request_has_left_the_schedulers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> None:
        schedulers.running = 2
        assert (await schedulers.door.begin(EARLY)).error is None and schedulers.door.excludes
        await schedulers.door.release("s")

    events = run_early(steps, monkeypatch)[1]
    assert events == ["shut (wait)", "begin", "begin", "begin", "release", "open"]


@pytest.mark.parametrize("why", ["silent", "refused", "running"])
def test_the_door_opens_again_if_the_push_cannot_begin(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the schedulers have let go of it: where their answer was lost, they may have begun."""

    async def steps(schedulers: Receiving) -> None:
        schedulers.silent, schedulers.running = why == "silent", 10_000 if why == "running" else 0
        if why == "refused":
            schedulers.refused["begin"] = "PlanError"
        reply = await schedulers.door.begin(shut_for(drain_s=0.05))
        assert reply.error is not None and not schedulers.exclusive
        assert not schedulers.door.excludes and schedulers.door.coming is None

    events = run_early(steps, monkeypatch)[1]
    assert events[0] == "shut (wait)" and events[-3:] == ["begin", "release", "open"]


def test_requests_do_not_wait_for_a_push_that_was_given_up_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> None:
        schedulers.running = 10_000
        beginning = asyncio.create_task(schedulers.door.begin(EARLY))
        await asyncio.sleep(0.05)
        assert schedulers.door.excludes
        await schedulers.door.release("s")
        reply = await asyncio.wait_for(beginning, 1.0)
        assert reply.error is not None and schedulers.door.coming is None

    assert run_early(steps, monkeypatch)[1][-2:] == ["release", "open"]


def test_a_push_that_was_given_up_while_it_began_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> None:
        ask = schedulers.ask

        async def give_up(message: Any) -> protocol.Reply:
            if message.kind == "begin":
                await schedulers.door.release("s")  # as an Abort does, whose question comes after this one
            return await ask(message)

        schedulers.door._ask = give_up
        reply = await schedulers.door.begin(EARLY)
        assert reply.error is not None and "given up as it began" in reply.error.message
        assert schedulers.door.coming is None and not schedulers.exclusive

    assert run_early(steps, monkeypatch)[1] == ["shut (wait)", "begin", "release", "open"]


def test_the_door_opens_when_the_schedulers_have_given_the_push_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> None:
        await schedulers.door.begin(EARLY)
        await asyncio.sleep(0.1)
        assert schedulers.door.excludes
        schedulers.exclusive = False  # its sender is dead
        await asyncio.sleep(0.2)
        assert not schedulers.door.excludes

    assert run_early(steps, monkeypatch)[1][-2:] == ["release", "open"]


def test_a_push_that_never_ends_is_given_up_before_the_door_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> None:
        await schedulers.door.begin(shut_for(hold_s=0.15))
        await asyncio.sleep(0.4)
        assert not schedulers.door.excludes and not schedulers.exclusive

    assert run_early(steps, monkeypatch)[1][-2:] == ["release", "open"]


def test_a_sender_that_is_gone_does_not_keep_the_next_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(schedulers: Receiving) -> None:
        monkeypatch.setattr(door_module, "_WATCH_S", 60.0)
        schedulers.busy = True
        await schedulers.door.begin(EARLY)
        other = EARLY.model_copy(update={"session": "t", "version": 5})
        assert (await schedulers.door.begin(other)).error is not None  # it is still at work
        schedulers.exclusive = False
        assert (await schedulers.door.begin(other)).error is None
        await schedulers.door.release("t")

    events = run_early(steps, monkeypatch)[1]
    assert events[2:] == ["begin", "release", "open", "prepare", "shut (wait)", "begin", "release", "open"]
