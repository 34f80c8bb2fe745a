"""The HTTP side of a server: the control route, and what this process knows of the weights that requests would meet.

Plain starlette; it knows SGLang only through the `Channel` that it is given. Everything goes through SGLang's own HTTP
server and its authentication.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from receiver_plugin.door import Door
from receiver_plugin.gate import FencedError
from receiver_plugin.replicas import merge
from shared import protocol as wire
from shared.errors import ConfigError, Fp8SyncError

logger = logging.getLogger(__name__)

_PROMISE_SLACK_S = 60.0  # for the schedulers' own time to answer, once requests have ended

_EXCLUDED = (
    "requests would use memory that they must not use now: a push writes there, and its door is not shut; "
    "or the KV cache was released, and has to be resumed"
)
_STATUS = {
    "ConfigError": 400,
    "PlanError": 422,
    "IncompatibleServerError": 422,
    "ServerBusyError": 409,
    "StillComingError": 409,
    "SessionLostError": 409,
    "StaleVersionError": 409,
}


class Channel(Protocol):
    """The way from the HTTP process to the schedulers of all replicas."""

    num_replicas: int

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""

    async def ask(self, message: Any) -> tuple[wire.Reply, ...]:
        """One control message to every rank; the answers of all replicas, in order.

        Raises: ServerUnreachableError: a replica did not answer in time; names it.
        """

    def drained(self, in_flight: wire.Drain) -> Any:
        """An async context manager: no request runs and none is admitted inside it.

        Raises: PushError: the requests under way will not end.
        """

    def abort_all(self) -> None:
        """End every request that the schedulers have."""

    def publish(self, version: int) -> None:
        """Let the replies of this process carry `version`."""


class Control:
    """The control route and the fence, as this process knows it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._door = Door(channel, self._ask, self._fenced)
        self._known = False
        self._promised_until: float | None = None
        self._looking: asyncio.Task[wire.Reply] | None = None
        self._fence: str | None = "its schedulers have not yet said whether their weights may be served"
        self._published = 0
        self._told: wire.ServerState = "SERVING"  # by the schedulers, last
        self._labels: set[str] = set()  # of all versions that were served here

    @property
    def version(self) -> int:
        """The version that requests are served with."""
        return self._published

    @property
    def state(self) -> wire.ServerState:
        """As far as this process knows; it asks again where a push was under way, and answers with that next time."""
        if self._fence is not None:
            return "FENCED"
        if self._told not in ("SERVING", "FENCED"):
            self._look_again()
        return self._told

    @property
    def coming(self) -> int | None:
        """The version whose commit waits for requests to end, or is at work."""
        return self._door.coming

    @property
    def excludes(self) -> bool:
        """Whether the door is held for a push that no request may run beside."""
        return self._door.excludes

    @property
    def newest(self) -> int:
        """No request has met a newer version; some may have met this one before its commit was answered."""
        return max(self._published, self._door.passing or 0)

    def version_of(self, label: str) -> int:
        """The version that SGLang calls `label`; 0 for what was no version of a push."""
        coming = self._door.coming
        known = label in self._labels or (coming is not None and label == str(coming))
        return int(label) if known else 0

    async def fence(self) -> str | None:
        """Why requests must be refused, or None."""
        if self._overdue():
            self._look_again()  # a request does not wait for schedulers that may be silent
        elif not self._known:
            await self._ask(wire.Describe())
        return self._fence

    def _look_again(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._ask(wire.Describe()))

    def refuse_if_fenced(self) -> None:
        """Raises: FencedError: 503 with the reason."""
        self._overdue()
        if self._fence is not None:
            raise FencedError(self._fence)

    def _fenced(self) -> bool:
        return self._overdue() or self._fence is not None

    def _overdue(self) -> bool:
        """Whether a promise was not kept: by its deadline it ends, also if nobody asks the schedulers."""
        if self._promised_until is None or time.monotonic() < self._promised_until:
            return False
        self._fence = "it promised to commit, and heard nothing in time"
        return True

    async def control(self, request: Request) -> Response:
        try:
            message = wire.decode_message(await _body(request))
        except Fp8SyncError as error:  # in the form of a reply, so that any sender can read it
            return Response(self._reply(error).model_dump_json(), status_code=400, media_type="application/json")
        reply = await self.answer(message)
        status = 200 if reply.error is None else _STATUS.get(reply.error.kind, 500)
        return Response(reply.model_dump_json(), status_code=status, media_type="application/json")

    async def answer(self, message: Any) -> wire.Reply:
        """The server's answer to one control message."""
        if isinstance(message, wire.Commit):
            if self._promised_until is not None and not message.held:
                return await self._commit_promised(message)
            return await self._door.commit(message)
        if isinstance(message, wire.Hold):
            return await self._door.hold(message)
        if isinstance(message, wire.Begin):
            return await self._door.begin(message)
        if isinstance(message, wire.Release):
            await self._door.release(message.session, message.version)
            return await self._ask(wire.Describe())
        if isinstance(message, wire.Abort | wire.Close):
            try:
                return await self._ask(message)  # first: they may fence, or have to make room for requests
            finally:
                await self._door.release(message.session)
        return await self._ask(message)

    async def _commit_promised(self, message: wire.Commit) -> wire.Reply:
        """It was heard in time: while requests end, the promise holds."""
        hold_s = min(message.drain_s + _PROMISE_SLACK_S, wire.LONGEST_DEADLINE_S)
        reply = await self._ask(_still_promised(message, hold_s))
        return reply if reply.error is not None else await self._door.commit(message)

    async def info(self, request: Request) -> Response:
        reply = await self._ask(wire.Describe())
        return Response(reply.model_dump_json(), media_type="application/json")

    async def while_weights_change(self, call: Awaitable[None], path: str) -> None:
        """Another route changes weights: nothing is served until the schedulers have said what came of it."""
        if path != "/weights_checker":
            self._fence = f"{path} is at work on its weights"
        try:
            await call
        finally:
            self._known = False
            await self.fence()

    async def _ask(self, message: Any) -> wire.Reply:
        had_promised = self._promised_until is not None
        try:
            reply = merge(message, await self._channel.ask(message))
        except Fp8SyncError as error:
            return self._no_answer(message, error)
        except BaseException:
            # Cut off: nothing is served before the schedulers said what they did.
            if isinstance(message, wire.Commit) or (
                isinstance(message, wire.Begin | wire.Release) and self._door.excludes
            ):
                self._known, self._fence = False, f"the {message.kind} of version {message.version} was cut off"
            raise
        if reply.version != self._published:  # also where the answer to the commit itself was lost
            self._channel.publish(reply.version)
            self._published = reply.version
            self._labels.add(str(reply.version))
        if reply.state != "PROMISED":
            self._promised_until = None
        elif reply.error is None:
            self._note_promise(message)
        self._known, self._fence, self._told = True, reply.fence, reply.state
        # A push that uses the door's hold is over with these two: what may still not be used is the KV cache.
        over = isinstance(message, wire.Commit | wire.Release) and reply.error is None
        if reply.exclusive and (over or not self._door.excludes):
            self._fence = self._fence or _EXCLUDED
        self._overdue()
        asked_to_promise = isinstance(message, wire.Prepare) and message.promise
        if asked_to_promise and not had_promised and reply.error and reply.state == "PROMISED":  # some replicas did
            why = "another replica of this server could not promise"
            await self._ask(wire.Abort(session=message.session, version=message.version, reason=why))
        return reply

    def _note_promise(self, message: Any) -> None:
        """After the schedulers' own clock has started, so that it does not end before theirs."""
        if isinstance(message, wire.Prepare) and message.promise:
            self._promised_until = time.monotonic() + message.hold_s

    def _no_answer(self, message: Any, error: Fp8SyncError) -> wire.Reply:
        self._note_promise(message)  # they may have given it
        if isinstance(message, wire.Commit):  # nobody knows what became of it: fail closed
            who = "no rank" if self._channel.num_replicas == 1 else "not every replica"
            self._fence = f"{who} confirmed the commit of version {message.version}: {error}"
        elif self._door.excludes and isinstance(message, wire.Release):
            self._fence = f"nobody confirmed that version {message.version} writes no more: {error}"
        elif not self._known:
            self._fence = f"its schedulers have not said whether their weights may be served: {error}"
        return self._reply(error)

    def _reply(self, error: Fp8SyncError) -> wire.Reply:
        """An answer that the schedulers had no part in: of state and version it says what this process knows."""
        found = wire.WireError(kind=type(error).__name__, message=str(error))
        state: wire.ServerState = "FENCED" if self._fence else "SERVING"
        return wire.Reply(state=state, version=self._published, fence=self._fence, error=found)


def _still_promised(message: wire.Commit, hold_s: float) -> wire.Prepare:
    return wire.Prepare(session=message.session, version=message.version, hold_s=hold_s, idle=False, promise=True)


async def _body(request: Request) -> bytes:
    """Raises: ConfigError: more than `wire.MAX_BODY_BYTES`."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > wire.MAX_BODY_BYTES:
            raise ConfigError(f"a control message of more than {wire.MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)
