"""Two replicas of one rank each as one server, in this process, with a place for faults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from receiver_plugin.gate import Gate
from receiver_plugin.http import Control
from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from receiver_plugin.replicas import for_replica
from sender.control import InProcessControl
from shared import errors, protocol
from tests.tiny_models import FakeEngine, Served

SILENT = errors.ServerUnreachableError("the schedulers of replica(s) [1] did not answer within 55 s")


class Replicas:
    """The channel to two replicas of one rank each, and their server.

    `on_message(replica, message)` runs before a replica gets a message; it may raise (the replica never gets it), or
    return an error in place of the replica's answer.
    """

    num_replicas, busy = 2, False

    def __init__(self, fence: str | None = None) -> None:
        self.models, self.engines = [Served(), Served()], [FakeEngine(), FakeEngine()]
        parts = zip(self.models, self.engines, strict=True)
        self.receivers = [Receiver(model, engine, SingleRank(), fence) for model, engine in parts]
        self.on_message: Callable[[int, Any], protocol.WireError | None] = lambda replica, message: None
        self.kinds: list[str] = []
        self.drain_s: float | None = None  # in place of the sender's
        self.published = 0
        self.control = Control(self)

        async def served(request: Request) -> PlainTextResponse:
            return PlainTextResponse(str(self.published))

        routes = [Route(protocol.CONTROL_PATH, self.control.control, methods=["POST"]), Route("/generate", served)]
        self._http = TestClient(Starlette(routes=routes, middleware=[Middleware(Gate, control=self.control)]))
        self.client = InProcessControl("http://replicas", self.send)

    async def ask(self, message: Any) -> tuple[protocol.Reply, ...]:
        self.kinds.append(message.kind)
        replies, unanswered = [], None
        for replica, receiver in enumerate(self.receivers):
            try:
                error = self.on_message(replica, message)
            except errors.PushError as silence:
                unanswered = silence
                continue
            reply = receiver.handle(for_replica(message, replica, 1))
            replies.append(reply.model_copy(update={"error": error}) if error else reply)
        if unanswered is not None:
            raise unanswered
        return tuple(replies)

    @asynccontextmanager
    async def drained(self, in_flight: protocol.InFlight) -> AsyncIterator[None]:
        yield

    def abort_all(self) -> None:
        """No request ever runs here."""

    def publish(self, version: int) -> None:
        self.published = version

    def send(self, message: Any) -> protocol.Reply:
        if self.drain_s and isinstance(message, protocol.Commit):
            message = message.model_copy(update={"drain_s": self.drain_s})
        response = self._http.post(protocol.CONTROL_PATH, content=message.model_dump_json())
        return protocol.Reply.model_validate_json(response.content)

    def describe(self) -> protocol.Reply:
        return self.send(protocol.Describe())

    def serves(self) -> int | None:
        """The version that requests are answered with, None where they are refused."""
        response = self._http.get("/generate")
        return int(response.text) if response.status_code == 200 else None

    def held(self) -> list[dict[str, str]]:
        return [fingerprint(model) for model in self.models]

    def versions(self) -> list[int]:
        return [receiver.handle(protocol.Describe()).version for receiver in self.receivers]


def on(kind: str, replica: int, what: Callable[[], protocol.WireError | None]) -> Callable[[int, Any], Any]:
    return lambda which, message: what() if (which, message.kind) == (replica, kind) else None


def refuse(kind: str, text: str = "why") -> Callable[[], protocol.WireError]:
    return lambda: protocol.WireError(kind=kind, message=text)


def silence() -> None:
    raise SILENT
