"""The door of a server: a commit finds no request at work, because none is admitted while it is shut.

    Commit                          shut, commit, open
    Hold ... Commit ... Release     the same in three messages: with `strict`, no server opens before all have answered
    Begin ... Commit, Release       where a push arrives in memory that requests use (`receiver_plugin/rooms.py`): shut
                                    before its first byte

Requests under way when it shuts end first (`wait`), are put back and start over from their prompt and what they have
generated (`retract`), or are ended (`abort`). In each case no KV cache of the old weights is left. With `keep` the door
stays open: the schedulers commit between two batches, and requests go on.

A door that its sender forgets opens by itself; one for a push that the schedulers have given up opens soon after it.
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

_Shuts = wire.Hold | wire.Begin  # with `shut`


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
    message: _Shuts
    opening: AsyncExitStack
    timer: asyncio.Task[None]

    @property
    def session(self) -> str:
        return self.message.session

    @property
    def version(self) -> int:
        return self.message.version

    @property
    def exclusive(self) -> bool:
        """What arrives uses what requests use."""
        return isinstance(self.message, wire.Begin)


@dataclass
class _Draining:
    """Requests end before `message`. `until` is the deadline of that; none once the message itself is at work."""

    message: wire.Commit | _Shuts
    until: asyncio.Timeout
    given_up: bool = False

    @property
    def exclusive(self) -> bool:
        return isinstance(self.message, wire.Begin)

    def give_up(self) -> None:
        self.given_up = True
        if self.until.when() is not None:
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
        """Whether it is held, or being shut, for a push that no request may run beside."""
        return any(found is not None and found.exclusive for found in (self._held, self._draining))

    async def begin(self, message: wire.Begin) -> wire.Reply:
        """Shut the door first, if the message says so, and keep it shut if the push has begun."""
        if message.shut is None:
            return await self._ask(message)
        if (refusal := await self._taken()) is not None:
            return refusal
        if self._channel.busy:  # no request has to end for a push that cannot begin
            reply = await self._ask(_could_begin(message))
            if reply.error is not None:
                return reply
        return await self._shut_and_keep(message, message.shut, lambda deadline: self._begin_idle(message, deadline))

    async def _begin_idle(self, message: wire.Begin, deadline: float) -> wire.Reply:
        if self._channel.num_replicas > 1:  # one that has begun cannot begin again while another is waited for
            reply = await self._ask_until_idle(_could_begin(message, idle=True), deadline)
            if reply.error is not None:
                return reply
            reply = await self._ask(message)
        else:
            reply = await self._ask_until_idle(message, deadline)
        given_up = self._draining is not None and self._draining.given_up
        if reply.error is not None or given_up:
            # Also where nobody answered: who may have begun gives up before the door opens.
            await self._ask(wire.Release(session=message.session, version=message.version))
        if reply.error is None and given_up:
            return await self._failed("its push was given up as it began; nothing was touched")
        return reply

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
            return await self._shut(opening, message, message.drain_s, message.in_flight, commit)

    async def hold(self, message: wire.Hold) -> wire.Reply:
        """Shut the door and keep it shut, if the schedulers say that they could commit."""
        if (refusal := await self._taken()) is not None:
            return refusal
        return await self._shut_and_keep(message, message, lambda deadline: self._prepare_idle(message, deadline))

    async def _taken(self) -> wire.Reply | None:
        """The refusal, if the door is shut for something else that is still at work."""
        await self._open_if_given_up()
        if self.coming is None:
            return None
        return await self._failed(f"its door is shut for version {self.coming} already; nothing was touched")

    async def _shut_and_keep(
        self, message: _Shuts, shut: wire.Shut, then: Callable[[float], Awaitable[wire.Reply]]
    ) -> wire.Reply:
        """The reply of `then`, called with the door shut, which stays so unless that is an error."""
        async with AsyncExitStack() as opening:
            reply = await self._shut(opening, message, shut.drain_s, shut.in_flight, then)
            if reply.error is None:
                timer = asyncio.create_task(self._end_in_time(message, shut.hold_s))
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

    async def _end_in_time(self, message: _Shuts, hold_s: float) -> None:
        why = await self._no_longer_needed(hold_s)
        async with self._committing:
            if (held := self._held) is not None:
                logger.warning("fp8sync: version %d %s: its door opens", message.version, why)
                await self._open(held)

    async def _no_longer_needed(self, hold_s: float) -> str:
        """Return when the push that the door is held for is dead, or too late; and why."""
        end = time.monotonic() + hold_s
        while (left_s := end - time.monotonic()) > _WATCH_S:
            await asyncio.sleep(_WATCH_S)
            async with self._committing:
                if self._held is None or await self._is_given_up(self._held.message):
                    return "was given up"
        await asyncio.sleep(max(0.0, left_s))
        return f"was held for {hold_s:.0f} s and not released"

    async def _is_given_up(self, message: wire.Commit | _Shuts, begun: bool = True) -> bool:
        """Whether the schedulers have let go of what the door is shut for, without having committed it."""
        if isinstance(message, wire.Begin) and not begun:
            reply = await self._ask(_could_begin(message))
            return reply.error is not None and reply.error.kind == "SessionLostError"
        reply = await self._ask(wire.Describe())
        exclusive = isinstance(message, wire.Begin)
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
            if held is not None and await self._is_given_up(held.message):
                held.timer.cancel()
                await self._open(held)

    async def _shut(
        self,
        opening: AsyncExitStack,
        message: wire.Commit | _Shuts,
        drain_s: float,
        in_flight: wire.Drain,
        then: Callable[[float], Awaitable[wire.Reply]],
    ) -> wire.Reply:
        """The reply of `then`, called with the door shut; closing `opening` opens it."""
        deadline = time.monotonic() + drain_s
        try:
            async with asyncio.timeout(drain_s) as until:
                self._draining = _Draining(message, until)
                watch = asyncio.create_task(self._watch_drain(self._draining))
                try:
                    await opening.enter_async_context(self._shut_off(in_flight))
                finally:
                    watch.cancel()
                until.reschedule(None)  # a commit that was sent is waited for: cut off, nobody knew what it did
                return await then(deadline)
        except TimeoutError:
            text = f"requests were still running after {drain_s:.0f} s (timeout_s)"
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
            if await self._is_given_up(draining.message, begun=False):
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
            if self._draining is not None and self._draining.given_up:
                break
            await asyncio.sleep(_DRAIN_POLL_S)
            reply = await self._ask(message)
        return reply

    async def _failed(self, text: str, kind: str = "CommitError") -> wire.Reply:
        error = wire.WireError(kind=kind, message=text)
        return (await self._ask(wire.Describe())).model_copy(update={"error": error, "info": None})


def _could_begin(message: wire.Begin, idle: bool = False) -> wire.Prepare:
    return wire.Prepare(session=message.session, version=message.version, before="begin", idle=idle)


def _prepare(message: wire.Commit | wire.Hold) -> wire.Prepare:
    prepare = wire.Prepare(session=message.session, version=message.version, in_flight=message.in_flight)
    if isinstance(message, wire.Commit):
        return prepare
    return prepare.model_copy(update={"hold_s": message.hold_s, "promise": message.promise})


def _still_running(reply: wire.Reply) -> bool:
    return reply.error is not None and reply.error.kind == "ServerBusyError"
