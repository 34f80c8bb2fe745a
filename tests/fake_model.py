"""What requests meet in the HTTP process of a server, with a model and schedulers that are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from receiver_plugin.gate import FencedError, Gate
from receiver_plugin.http import Control
from receiver_plugin.version_headers import VersionHeaders, current
from shared import protocol
from tests.test_http import FakeChannel

COMMIT = protocol.Commit(session="s", version=1, drain_s=5.0)
MODEL_ROUTES = ("generate", "batch", "stream", "eager", "lines")
ROUTES = (*MODEL_ROUTES, "talkative", "invalid", "broken", "model_info", "update_weight_version")


class FakeServer:
    """Gate and versions before a model that, as SGLang's, first waits at the door, then sends, then replies."""

    def __init__(self, fence: str | None = None) -> None:
        self.channel = FakeChannel(fence)
        self.control = Control(self.channel)
        self.door = asyncio.Event()
        self.door.set()
        self.waiting = asyncio.Event()
        self.between: Callable[[], Awaitable[object]] = self.nothing  # what happens between two parts of a reply
        self.left = 0
        routes = [Route(f"/{name}", getattr(self, name), methods=["GET", "POST"]) for name in ROUTES]
        self.app = Starlette(
            routes=[*routes, WebSocketRoute("/v1/realtime", self.talk)],
            middleware=[Middleware(Gate, control=self.control), Middleware(VersionHeaders, served=self.control)],
        )

    async def nothing(self) -> None: ...

    async def model(self, num_parts: int) -> AsyncIterator[int]:
        self.waiting.set()
        await self.door.wait()
        passage = current()
        try:
            self.control.refuse_if_fenced()
        except FencedError as error:
            passage.refusal = error.response
            raise
        passage.send(self.control.version)
        self.left += 1
        for _ in range(num_parts):
            await self.between()
            passage.reply(self.control.version)
            yield self.control.version

    async def generate(self, request: Request) -> Response:
        try:
            return JSONResponse({"version": [part async for part in self.model(1)][-1]})
        except ValueError as error:  # as SGLang does
            return JSONResponse({"error": str(error)}, status_code=400)

    async def batch(self, request: Request) -> Response:
        parts = await asyncio.gather(*(anext(self.model(1)) for _ in range(3)))
        return JSONResponse({"version": parts})

    async def stream(self, request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            try:
                async for part in self.model(3):
                    yield f"data: {part}\n\n"
            except ValueError as error:
                yield f"data: error {error}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def eager(self, request: Request) -> Response:
        """As `/v1/responses`: an event of its own before the request has left."""

        async def events() -> AsyncIterator[str]:
            yield "data: created\n\n"
            try:
                async for part in self.model(2):
                    yield f"data: {part}\n\n"
            except ValueError as error:
                yield f"data: error {error}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def talkative(self, request: Request) -> Response:
        """Events without end that no model has a part in."""

        async def events() -> AsyncIterator[str]:
            for _ in range(5):
                yield "x" * (32 << 10)
                await self.between()

        return StreamingResponse(events(), media_type="text/event-stream")

    async def lines(self, request: Request) -> Response:
        return StreamingResponse((f"{part}\n" async for part in self.model(3)), media_type="application/x-ndjson")

    async def invalid(self, request: Request) -> Response:
        return JSONResponse({"error": "no prompt"}, status_code=400)

    async def broken(self, request: Request) -> Response:
        raise RuntimeError("a defect")

    async def model_info(self, request: Request) -> Response:
        return JSONResponse({})

    async def update_weight_version(self, request: Request) -> Response:
        return JSONResponse({"label": "changed"})

    async def talk(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("served")

    # From outside

    async def ask(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, headers=headers)

    async def push(self, version: int) -> protocol.Reply:
        return await self.control.answer(COMMIT.model_copy(update={"version": version}))

    async def pushed(self, version: int) -> FakeServer:
        await self.push(version)
        return self
