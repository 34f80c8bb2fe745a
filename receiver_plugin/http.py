"""The HTTP side of a server: the control route, and the gate that keeps requests from a fenced server.

Plain ASGI and starlette; it knows SGLang only through the `Channel` that it is given. Everything goes through SGLang's
own HTTP server and its authentication.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from shared import protocol as wire
from shared.errors import ConfigError, Fp8SyncError

logger = logging.getLogger(__name__)

CONTROL_PATH = "/fp8sync/control"
INFO_PATH = "/fp8sync/info"
MAX_BODY_BYTES = 64 << 20
_DRAIN_POLL_S = 0.01

# What a fenced server still answers: what one needs to see, drain, stop or heal it. Nothing here runs the model.
_OPEN_WHILE_FENCED = (
    "/fp8sync/",
    "/model_info",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/weights_checker",
    "/metrics",
    "/v1/models",
    "/flush_cache",
    "/abort_request",
    "/freeze_gc",
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
)
_STATUS = {
    "ConfigError": 400,
    "PlanError": 422,
    "IncompatibleServerError": 422,
    "ServerBusyError": 409,
    "SessionLostError": 409,
    "StaleVersionError": 409,
}


class Channel(Protocol):
    """The way from the HTTP process to the schedulers."""

    async def ask(self, message: str) -> wire.Reply:
        """One control message, as JSON, to every rank; the merged answer. Raises: PushError: no answer in time."""

    def drained(self) -> Any:
        """An async context manager: no request runs and none is admitted inside it."""

    def publish(self, version: int) -> None:
        """Let the replies of this process carry `version`."""


class Control:
    """The control route and the fence, as this process knows it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._known = False
        self._fence: str | None = None

    async def fence(self) -> str | None:
        """Why requests must be refused, or None."""
        if not self._known:
            await self._ask(wire.Describe())
        return self._fence

    async def control(self, request: Request) -> Response:
        try:
            message = wire.decode_message(await _body(request))
        except Fp8SyncError as error:  # in the form of a reply, so that any sender can read it
            return Response(self._reply(error).model_dump_json(), status_code=400, media_type="application/json")
        reply = await (self._commit(message) if isinstance(message, wire.Commit) else self._ask(message))
        status = 200 if reply.error is None else _STATUS.get(reply.error.kind, 500)
        return Response(reply.model_dump_json(), status_code=status, media_type="application/json")

    async def info(self, request: Request) -> Response:
        reply = await self._ask(wire.Describe())
        return Response(reply.model_dump_json(), media_type="application/json")

    async def _ask(self, message: Any) -> wire.Reply:
        try:
            reply = await self._channel.ask(message.model_dump_json())
        except Fp8SyncError as error:
            return self._no_answer(message, error)
        self._known, self._fence = True, reply.fence
        return reply

    async def _commit(self, message: wire.Commit) -> wire.Reply:
        """Wait until no request runs, then commit: a reply never mixes two versions."""
        deadline = time.monotonic() + message.drain_s
        try:
            async with asyncio.timeout(message.drain_s) as draining, self._channel.drained():
                draining.reschedule(None)  # a commit that was sent is waited for: cut off, nobody knew what it did
                reply = await self._ask(message)
                while _still_running(reply) and time.monotonic() < deadline:
                    await asyncio.sleep(_DRAIN_POLL_S)
                    reply = await self._ask(message)
                if reply.error is None:
                    self._channel.publish(reply.version)
                return reply
        except TimeoutError:
            text = f"requests were still running after {message.drain_s:.0f} s; nothing was touched"
            error = wire.WireError(kind="CommitError", message=text)
            return (await self._ask(wire.Describe())).model_copy(update={"error": error, "info": None})

    def _no_answer(self, message: Any, error: Fp8SyncError) -> wire.Reply:
        if isinstance(message, wire.Commit):  # nobody knows what became of it: fail closed
            self._fence = f"no rank confirmed the commit of version {message.version}: {error}"
        elif not self._known:
            self._fence = f"the schedulers did not say whether their weights may be served: {error}"
        return self._reply(error)

    def _reply(self, error: Fp8SyncError) -> wire.Reply:
        """An answer that the schedulers had no part in: of state and version it says what this process knows."""
        found = wire.WireError(kind=type(error).__name__, message=str(error))
        return wire.Reply(state="FENCED" if self._fence else "SERVING", version=0, fence=self._fence, error=found)


def _still_running(reply: wire.Reply) -> bool:
    return reply.error is not None and reply.error.kind == "ServerBusyError"


async def _body(request: Request) -> bytes:
    """Raises: ConfigError: more than `MAX_BODY_BYTES`."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ConfigError(f"a control message of more than {MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]


class Gate:
    """ASGI middleware: a fenced server answers 503, with the reason, to everything that would run its model."""

    def __init__(self, app: _App, control: Control) -> None:
        self._app, self._control = app, control

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and not scope["path"].startswith(_OPEN_WHILE_FENCED):
            reason = await self._control.fence()
            if reason is not None:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1013, "reason": "fenced"})
                else:
                    await _refuse(reason)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refuse(reason: str) -> Response:
    text = f"fp8sync has fenced this server: {reason}. It serves again after the next full push."
    body = {"error": {"type": "ServerFenced", "message": text, "code": 503}}
    return Response(json.dumps(body), status_code=503, media_type="application/json", headers={"Retry-After": "5"})
