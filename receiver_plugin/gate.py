"""The fence: it keeps requests from weights that must not be served.

It holds in two places. `Gate` answers 503 at the door. A request may pass the door and then wait inside SGLang until a
commit is over; so `Control.refuse_if_fenced` raises `FencedError` where a request leaves for the schedulers.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response

from shared import protocol as wire

# What a fenced server still answers: what one needs to see, drain, stop or heal it. Nothing here runs the model.
_OPEN_WHILE_FENCED = {
    wire.CONTROL_PATH,
    wire.INFO_PATH,
    "/model_info",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/weights_checker",
    "/metrics",
    "/metrics/",
    "/v1/models",
    "/flush_cache",
    "/abort_request",
    "/freeze_gc",
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
}
# Routes that would let requests run beside a push that none may run beside.
_NOT_WHILE_EXCLUDED = {"/pause_generation", "/continue_generation"}
# Routes of SGLang that change weights or take them away; the schedulers fence on them, and so does this process.
_CHANGE_WEIGHTS = {
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/update_weights_from_ipc",
    "/end_weight_update",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/weights_checker",
}

_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]


_HEALTH = {"/health", "/health_generate"}


class FencedError(HTTPException):
    """A request met the fence."""

    def __init__(self, reason: str) -> None:
        super().__init__(status_code=503, detail=_text(reason))
        self.response = _refuse(reason)


class Fence(Protocol):
    """What the gate asks: `receiver_plugin.http.Control`."""

    @property
    def version(self) -> int:
        """The version that requests are served with."""

    @property
    def state(self) -> wire.ServerState:
        """Of a push, as far as it is known."""

    @property
    def excludes(self) -> bool:
        """Whether a push is under way that no request may run beside."""

    async def fence(self) -> str | None:
        """Why requests must be refused, or None."""

    async def while_weights_change(self, call: Awaitable[None], path: str) -> None:
        """Await `call`, which serves `path`, with the fence up."""


class Gate:
    """ASGI middleware: a fenced server answers 503, with the reason, to everything that would run its model."""

    def __init__(self, app: _App, control: Fence) -> None:
        self._app, self._control = app, control

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        if path in _HEALTH:
            send = self._naming_state(send)
        if path in _CHANGE_WEIGHTS:
            await self._control.while_weights_change(self._app(scope, receive, send), path)
        elif path in _NOT_WHILE_EXCLUDED and self._control.excludes:
            text = f"{path} has to wait: no request may run before the push under way has ended"
            await Response(text, status_code=409, headers={"Retry-After": "5"})(scope, receive, send)
        elif path in _OPEN_WHILE_FENCED or (reason := await self._control.fence()) is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013, "reason": "fenced"})
        else:
            await _refuse(reason)(scope, receive, send)

    def _naming_state(self, send: Any) -> Any:
        """`send`, with headers for who drains or restarts servers by their health."""

        async def send_named(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-fp8sync-state"], headers["x-fp8sync-version"] = (
                    self._control.state,
                    str(self._control.version),
                )
            await send(message)

        return send_named


def route_path(scope: _Scope) -> str:
    """The path without the root path that a server behind a reverse proxy is given."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def runs_the_model(path: str) -> bool:
    return path not in _OPEN_WHILE_FENCED and path not in _CHANGE_WEIGHTS


def _text(reason: str) -> str:
    return f"fp8sync has fenced this server: {reason}. It serves again after the next full push."


def _refuse(reason: str) -> Response:
    body = {"error": {"type": "ServerFenced", "message": _text(reason), "code": 503}}
    return Response(json.dumps(body), status_code=503, media_type="application/json", headers={"Retry-After": "5"})
