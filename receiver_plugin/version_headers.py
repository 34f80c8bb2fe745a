"""What a request demands of the version that serves it, asked where that is true, and what its reply says of it.

    door       `VersionHeaders` reads the demand; one that cannot come true is refused before anything is parsed
    on its way the request may wait for a commit behind SGLang's lock; the version changes meanwhile
    send       `Passage.send`, where it leaves for the schedulers: asked again, and the start is noted
    replies    `Passage.reply`, where each part of an answer comes back: asked once more, and the end is noted
    out        `VersionHeaders` puts start and end on the reply, or a refusal in its place

The passage of a request goes with it in a context variable. The start of a reply is held back: SGLang starts an event
stream, and may send its first events, before the request has left. A refusal would come too late for its status.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from receiver_plugin.gate import route_path, runs_the_model
from shared.errors import ConfigError, VersionMismatchError
from shared.versions import END_HEADER, START_HEADER, Demand, end_comment

_LABEL_ROUTE = "/update_weight_version"
_RETRY_S = 1
_MOST_HELD_BYTES = 64 << 10
_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]
_passage: ContextVar[Passage | None] = ContextVar("fp8sync_passage", default=None)


class Served(Protocol):
    """What the process that takes requests knows of the weights: `receiver_plugin.http.Control`."""

    @property
    def version(self) -> int: ...

    @property
    def coming(self) -> int | None: ...


class Passage:
    """One request on its way through this process: what it demands, what it met."""

    def __init__(self, demand: Demand | None = None) -> None:
        self.demand = demand or Demand()
        self.start: int | None = None
        self.end: int | None = None
        self.refusal: Response | None = None

    def send(self, served: int) -> None:
        """The request leaves for the schedulers. Raises: VersionMismatchError."""
        self._check(served)
        self.start = served if self.start is None else self.start  # several prompts leave one by one

    def reply(self, served: int) -> None:
        """A part of the answer came back. Raises: VersionMismatchError: an exact demand was overtaken."""
        self._check(served)
        self.end = served

    def _check(self, served: int) -> None:
        if not self.demand.fits(served):
            self.refusal = mismatch(self.demand, served)
            raise VersionMismatchError(_text(self.demand, served))


def current() -> Passage:
    """That of the request at work here; an unasked one where nobody opened any."""
    return _passage.get() or Passage()


@contextmanager
def passing(passage: Passage) -> Iterator[Passage]:
    """Requests made inside the block are those of `passage`."""
    token = _passage.set(passage)
    try:
        yield passage
    finally:
        _passage.reset(token)


class VersionHeaders:
    """ASGI middleware, behind the gate: a fenced server has answered before any demand is looked at."""

    def __init__(self, app: _App, served: Served) -> None:
        self._app, self._served = app, served

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        path = route_path(scope) if scope["type"] in ("http", "websocket") else None
        if path is None or not runs_the_model(path):
            await self._app(scope, receive, send)
            return
        refusal, demand = self._at_the_door(scope)
        if refusal is not None:
            await _refuse(refusal, scope, receive, send)
            return
        with passing(Passage(demand)) as passage:
            if scope["type"] == "websocket":
                await self._app(scope, receive, send)
            else:
                await _Out(passage, demand is not None, scope, receive, send).run(self._app)

    def _at_the_door(self, scope: _Scope) -> tuple[Response | None, Demand | None]:
        version, coming = self._served.version, self._served.coming
        if route_path(scope) == _LABEL_ROUTE and version > 0:
            text = f"the weights are version {version} of a push; their label changes with them alone"
            return _error(409, "VersionMismatch", text, {"served": version}), None
        try:
            demand = Demand.from_headers(scope["headers"])
        except ConfigError as error:
            return _error(400, "BadRequest", str(error), {}), None
        if demand is None or demand.fits(version) or (coming is not None and demand.fits(coming)):
            return None, demand
        return mismatch(demand, version), demand


class _Out:
    """The reply of one request on its way out; held back until its versions, or its refusal, can be known."""

    def __init__(self, passage: Passage, demanded: bool, scope: _Scope, receive: Any, send: Any) -> None:
        self._passage, self._demanded = passage, demanded
        self._scope, self._receive, self._send = scope, receive, send
        self._held: list[dict[str, Any]] = []
        self._started = self._refused = self._commented = False

    async def run(self, app: _App) -> None:
        try:
            await app(self._scope, self._receive, self._on_message)
        except Exception:
            if self._started or self._passage.refusal is None:
                raise
            await self._put_refusal(self._passage.refusal)

    async def _on_message(self, message: dict[str, Any]) -> None:
        if self._refused:
            return
        if self._started:
            await self._pass(message)
            return
        self._held.append(message)
        if self._passage.refusal is not None:
            await self._put_refusal(self._passage.refusal)
        elif not self._has_to_wait():
            await self._start()

    def _has_to_wait(self) -> bool:
        """For the first bytes; and of an event stream for those that come after its request has left, if any do."""
        start, *parts = self._held
        if not parts:
            return True
        if self._passage.start is not None or self._scope["method"] != "POST" or not _has_events(start):
            return False
        num_bytes = sum(len(part.get("body", b"")) for part in parts)
        return bool(parts[-1].get("more_body", False)) and num_bytes < _MOST_HELD_BYTES

    async def _start(self) -> None:
        start, *parts = self._held
        self._held, self._started = [], True
        headers = MutableHeaders(raw=[*start.get("headers", ())])
        if self._passage.start is not None:
            headers[START_HEADER] = str(self._passage.start)
        if "content-length" in headers and self._passage.end is not None:  # else more may come from the model
            headers[END_HEADER] = str(self._passage.end)
        self._commented = self._demanded and _has_events(start)
        await self._send({**start, "headers": headers.raw})
        for part in parts:
            await self._pass(part)

    async def _pass(self, message: dict[str, Any]) -> None:
        if self._commented and not message.get("more_body", False) and self._passage.end is not None:
            comment = f"{end_comment(self._passage.end)}\n\n".encode()
            message = {**message, "body": message.get("body", b"") + comment}
        await self._send(message)

    async def _put_refusal(self, refusal: Response) -> None:
        self._started = self._refused = True
        await refusal(self._scope, self._receive, self._send)


def _has_events(start: dict[str, Any]) -> bool:
    headers = Headers(raw=[*start.get("headers", ())])
    return headers.get("content-type", "").startswith("text/event-stream") and "content-length" not in headers


def mismatch(demand: Demand, served: int) -> Response:
    """409, to be tried again."""
    wanted = {"min": demand.minimum, "exact": demand.exact}
    response = _error(409, "VersionMismatch", _text(demand, served), {"wanted": wanted, "served": served})
    response.headers["Retry-After"] = str(_RETRY_S)
    return response


def _text(demand: Demand, served: int) -> str:
    return f"the request demands {demand}; version {served} is served"


def _error(status: int, kind: str, text: str, more: dict[str, Any]) -> Response:
    body = {"error": {"type": kind, "message": text, "code": status, **more}}
    return Response(json.dumps(body), status_code=status, media_type="application/json")


async def _refuse(response: Response, scope: _Scope, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013, "reason": "version"})
    else:
        await response(scope, receive, send)
