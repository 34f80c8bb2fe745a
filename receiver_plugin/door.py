"""The door of a server: a commit finds no request at work, because none is admitted while it is shut.

    Commit                          shut, commit, open
    Hold ... Commit ... Release     the same in three messages: with `strict`, no server opens before all have answered
    Hold, Begin ... Commit, Release     where a push arrives in memory that requests use (`receiver_plugin/rooms.py`)

Requests under way when it shuts end first (`wait`), are put back and start over from their prompt and what they have
generated (`retract`), or are ended (`abort`). In each case no KV cache of the old weights is left. With `keep` the door
stays open: the schedulers commit between two batches, and requests go on.

A hold that its sender forgets ends by itself, and one for a push that the schedulers have given up ends soon after it.
Before the last kind opens, the schedulers hear of it, so that nothing that was not committed is in the way of requests.
Nothing here knows SGLang: `Channel.drained` does the work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from shared import protocol as wire
from shared.errors import Fp8SyncError

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.01
_WATCH_S = 0.5
_BEGIN_S = 60.0  # beyond the time that other servers have to drain


class Drains(Protocol):
    """What the door needs of the way to the schedulers (`receiver_plugin.http.Channel`)."""

    num_replicas: int

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""

    def drained(self, in_flight: wire.Drain) -> Any:
        """An async context manager: no request runs and none is admitted inside it."""

    def abort_all(self) -> None:
        """End every request that the schedulers have."""


@dataclass
class _Held:
    message: wire.Hold
    opening: AsyncExitStack
    timer: asyncio.Task[None]
    begun: bool = False

    @property
    def session(self) -> str:
        return self.message.session

    @property
    def version(self) -> int:
        return self.message.version

    @property
    def exclusive(self) -> bool:
        """What arrives uses what requests use."""
        return self.message.before == "begin"


@dataclass
class _Draining:
    """Requests end before `message`. `until` is the deadline of that; none once the message itself is at work."""

    message: wire.Commit | wire.Hold
    until: asyncio.Timeout
    given_up: bool = False

    def give_up(self) -> None:
        if self.until.when() is not None:
            self.given_up = True
            self.until.reschedule(asyncio.get_running_loop().time())


class Door:
    """`ask` sends a message to the schedulers and never raises; `fenced` says whether requests must be refused."""

    def __init__(
        self, channel: Drains, ask: Callable[[Any], Awaitable[wire.Reply]], fenced: Callable[[], bool]
    ) -> None:
        self._channel, self._ask, self._fenced = channel, ask, fenced
        self._held: _Held | None = None
        self._draining: _Draining | None = None
        self._passing: int | None = None
        self._committing = asyncio.Lock()  # a held door does not open before its commit was answered

    @property
    def coming(self) -> int | None:
        """The version for which the door is shut, or is being shut; or whose commit lets requests pass."""
        if self._held is not None:
            return self._held.version
        return self._draining.message.version if self._draining is not None else self._passing

    @property
    def passing(self) -> int | None:
        """The version that requests may have met already, because its commit does not keep them out."""
        return self._passing

    @property
    def excludes(self) -> bool:
        """Whether it is held for a push that no request may run beside."""
        return self._held is not None and self._held.exclusive

    async def begin(self, message: wire.Begin) -> wire.Reply:
        if not message.held:
            return await self._ask(message)
        async with self._committing:
            held = self._held
            if held is not None and held.exclusive and self._is_held_for(message.session, message.version):
                reply = await self._ask(message)
                held.begun = held.begun or reply.error is None
                return reply
        return await self._failed("its door is not held for this version, or no longer; nothing was touched")

    async def commit(self, message: wire.Commit) -> wire.Reply:
        """Of several replicas none commits before all have said that they can."""
        several = self._channel.num_replicas > 1
        waits = self._channel.busy and message.in_flight != "keep" and not message.held
        if message.digests is not None and (several or waits):  # no request has to end for what did not arrive
            verify = wire.Verify(session=message.session, version=message.version, digests=message.digests)
            reply = await self._ask(verify)
            if reply.error is not None:
                return reply
            if reply.state == "RECEIVING":
                return await self._failed("its bytes are still on their way; nothing was touched", "StillComingError")
        if message.held:
            async with self._committing:
                held = self._held
                if held is not None and self._is_held_for(message.session, message.version):
                    reply = await self._ask(message)
                    if message.opens and reply.error is None:
                        held.timer.cancel()
                        await self._open(held, committed=True)
                    return reply
            return await self._failed("its door is not held for this version, or no longer; nothing was touched")
        await self._open_if_given_up()
        if self._held is not None:
            return await self._failed(f"its door is held for version {self._held.version}; nothing was touched")

        async def commit(deadline: float) -> wire.Reply:
            if several:
                reply = await self._ask_until_idle(_prepare(message), deadline)
                if reply.error is not None:
                    return reply
            return await self._ask_until_idle(message, deadline)

        if message.in_flight == "keep":
            return await self._pass(message, commit)
        async with AsyncExitStack() as opening:
            return await self._shut(opening, message, message.in_flight, commit)

    async def hold(self, message: wire.Hold) -> wire.Reply:
        """Shut the door and keep it shut, if the schedulers say that they could commit."""
        await self._open_if_given_up()
        if self.coming is not None:
            return await self._failed(f"its door is shut for version {self.coming} already; nothing was touched")
        if message.before == "begin" and self._channel.busy:  # no request has to end for a push that cannot begin
            reply = await self._ask(_could_begin(message))
            if reply.error is not None:
                return reply
        async with AsyncExitStack() as opening:
            reply = await self._shut(opening, message, message.in_flight, lambda at: self._prepare_idle(message, at))
            if reply.error is None:
                timer = asyncio.create_task(self._end_in_time(message))
                self._held = _Held(message, opening.pop_all(), timer)
            return reply

    async def _prepare_idle(self, message: wire.Hold, deadline: float) -> wire.Reply:
        """A promise is asked for once all replicas are idle: that of one beside a busy one would be taken back."""
        prepare = _prepare(message)
        reply = await self._ask_until_idle(prepare.model_copy(update={"promise": False}), deadline)
        return await self._ask(prepare) if message.promise and reply.error is None else reply

    async def release(self, session: str, version: int | None = None) -> None:
        """Open the door if it is held, or being shut, for `session` (and `version`); otherwise nothing. Idempotent."""
        draining = self._draining
        if draining is not None and draining.message.session == session:
            if version in (None, draining.message.version):
                draining.give_up()
            return
        async with self._committing:
            held = self._held
            if held is None or held.session != session or version not in (None, held.version):
                return
            held.timer.cancel()
            await self._open(held)

    async def _open(self, held: _Held, committed: bool = False) -> None:
        try:
            if held.exclusive and not committed:
                await self._ask(wire.Release(session=held.session, version=held.version))
        finally:
            self._held = None
            await held.opening.aclose()

    def _is_held_for(self, session: str, version: int) -> bool:
        return self._held is not None and (self._held.session, self._held.version) == (session, version)

    async def _end_in_time(self, message: wire.Hold) -> None:
        why = await self._no_longer_needed(message)
        async with self._committing:
            if (held := self._held) is not None:
                logger.warning("fp8sync: version %d %s: its door opens", message.version, why)
                await self._open(held)

    async def _no_longer_needed(self, message: wire.Hold) -> str:
        """Return when the push that the door is held for is dead, or too late; and why."""
        start = time.monotonic()
        while (held_s := time.monotonic() - start) < message.hold_s:
            left_s = message.hold_s - held_s
            await asyncio.sleep(min(_WATCH_S, left_s))
            if left_s <= _WATCH_S:
                break
            async with self._committing:
                held = self._held
                if held is None or await self._is_given_up(held.message, held.begun):
                    return "was given up"
            if held.exclusive and not held.begun and held_s > message.drain_s + _BEGIN_S:
                return "was held for and not begun"
        return f"was held for {message.hold_s:.0f} s and not released"

    async def _is_given_up(self, message: wire.Commit | wire.Hold, begun: bool = False) -> bool:
        """Whether the schedulers have let go of what the door is shut for, without having committed it."""
        exclusive = isinstance(message, wire.Hold) and message.before == "begin"
        if isinstance(message, wire.Hold) and exclusive and not begun:
            reply = await self._ask(_could_begin(message))
            return reply.error is not None and reply.error.kind == "SessionLostError"
        reply = await self._ask(wire.Describe())
        arrives = exclusive or (isinstance(message, wire.Commit) and message.digests is not None)
        at_work = reply.state in {"STAGED", "PROMISED", *(["RECEIVING"] if arrives else [])}
        if exclusive:
            at_work = at_work and reply.exclusive
        committed = reply.version >= message.version and reply.fence is None
        return reply.error is None and not at_work and not committed

    async def _open_if_given_up(self) -> None:
        """A sender that is gone does not keep the next one waiting."""
        async with self._committing:
            held = self._held
            if held is not None and await self._is_given_up(held.message, held.begun):
                held.timer.cancel()
                await self._open(held)

    async def _shut(
        self,
        opening: AsyncExitStack,
        message: wire.Commit | wire.Hold,
        in_flight: wire.Drain,
        then: Callable[[float], Awaitable[wire.Reply]],
    ) -> wire.Reply:
        """The reply of `then`, called with the door shut; closing `opening` opens it."""
        deadline = time.monotonic() + message.drain_s
        try:
            async with asyncio.timeout(message.drain_s) as until:
                self._draining = _Draining(message, until)
                watch = asyncio.create_task(self._watch_drain(self._draining))
                try:
                    await opening.enter_async_context(self._shut_off(in_flight))
                finally:
                    watch.cancel()
                until.reschedule(None)  # a commit that was sent is waited for: cut off, nobody knew what it did
                return await then(deadline)
        except TimeoutError:
            text = f"requests were still running after {message.drain_s:.0f} s (timeout_s)"
            if self._draining is not None and self._draining.given_up:
                text = "its push was given up while requests were ending"
        except Fp8SyncError as error:
            text = str(error)
        finally:
            self._draining = None
        return await self._failed(f"{text}; nothing was touched")

    async def _watch_drain(self, draining: _Draining) -> None:
        """New requests do not wait for a push that is dead."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if await self._is_given_up(draining.message):
                logger.warning("fp8sync: version %d was given up: its door opens", draining.message.version)
                draining.give_up()
                return

    async def _pass(self, message: wire.Commit, then: Callable[[float], Awaitable[wire.Reply]]) -> wire.Reply:
        """The reply of `then`, called while requests go on and new ones come."""
        self._passing = message.version
        try:
            return await then(time.monotonic() + message.drain_s)
        finally:
            self._passing = None
            if self._fenced():
                self._channel.abort_all()  # also those of replicas whose own commit went well

    @asynccontextmanager
    async def _shut_off(self, in_flight: wire.Drain) -> AsyncIterator[None]:
        async with self._channel.drained(in_flight):
            try:
                yield
            finally:
                if in_flight == "retract" and self._fenced():
                    self._channel.abort_all()  # what was put back would start over, on weights not to be served

    async def _ask_until_idle(self, message: Any, deadline: float) -> wire.Reply:
        reply = await self._ask(message)
        while _still_running(reply) and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
            reply = await self._ask(message)
        return reply

    async def _failed(self, text: str, kind: str = "CommitError") -> wire.Reply:
        error = wire.WireError(kind=kind, message=text)
        return (await self._ask(wire.Describe())).model_copy(update={"error": error, "info": None})


def _could_begin(message: wire.Hold) -> wire.Prepare:
    return _prepare(message).model_copy(update={"idle": False})


def _prepare(message: wire.Commit | wire.Hold) -> wire.Prepare:
    prepare = wire.Prepare(session=message.session, version=message.version, in_flight=message.in_flight)
    if isinstance(message, wire.Commit):
        return prepare
    more = {"hold_s": message.hold_s, "before": message.before, "promise": message.promise}
    return prepare.model_copy(update=more)


def _still_running(reply: wire.Reply) -> bool:
    return reply.error is not None and reply.error.kind == "ServerBusyError"
