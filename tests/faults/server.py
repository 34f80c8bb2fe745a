"""A server without SGLang: its ranks on threads, in step, behind the product's own control route and gate.

    client thread   WatchedControl -> Control (receiver_plugin.http) -> one thread a rank: Receiver.handle
    requests        Gate -> /generate, which answers with the version that the server serves

`tripwire.at` is called at every point where a fault may strike; see `FaultyEngine`, `FaultyStaging`, `FaultyHalf`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from receiver_plugin.gate import Gate
from receiver_plugin.http import Control
from receiver_plugin.probe import fingerprint
from receiver_plugin.receiver import Receiver
from shared import errors, protocol
from tests.faults.models import Prints, Served
from tests.faults.parts import FaultyEngine, FaultyHalf, FaultyStaging, RankLost, Ranks
from tests.faults.tripwire import Tripwire

ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Look:
    """A server from outside and from inside. `serves`: the version that requests are answered with, None if refused."""

    reply: protocol.Reply
    serves: int | None
    reason: str
    prints: Prints
    in_step: bool


class Server:
    """`index` is its number in the push. It can be stopped and started again, as a new incarnation."""

    def __init__(self, index: int, tp_size: int, tripwire: Tripwire, fence: str | None = "no weights") -> None:
        self.index, self.tp_size, self.tripwire = index, tp_size, tripwire
        self.name = f"server {index}"
        self.busy = self.paused = False
        self._start(fence)

    def _start(self, fence: str | None) -> None:
        self.models = [Served(rank, self.tp_size, self._watch("offer", rank)) for rank in range(self.tp_size)]
        self.engines = [FaultyEngine(self.tripwire, self.index, rank, self.tp_size) for rank in range(self.tp_size)]
        self.ranks = Ranks.of(self.tp_size)
        self.in_step = True
        self._pools = [ThreadPoolExecutor(1, f"faults-rank-{self.index}-{rank}") for rank in range(self.tp_size)]
        made = [pool.submit(self._receiver, rank, fence) for rank, pool in enumerate(self._pools)]
        self.receivers = [future.result(ANSWER_TIMEOUT_S) for future in made]
        self._http = TestClient(self._app(), raise_server_exceptions=False)
        self._http.__enter__()

    def _watch(self, stage: str, rank: int) -> Any:
        return lambda: self.tripwire.at(stage, self.index, rank)

    def _receiver(self, rank: int, fence: str | None) -> Receiver:
        def make_staging(*parts: Any) -> FaultyStaging:
            self.tripwire.at("allocate", self.index, rank)
            return FaultyStaging(self.tripwire, self.index, rank, *parts)

        def join(rendezvous: protocol.Rendezvous, number: int) -> FaultyHalf:
            self.tripwire.at("join", self.index, rank)
            return FaultyHalf(self.tripwire, self.index, rank, rendezvous, number)

        model, engine = self.models[rank], self.engines[rank]
        return Receiver(model, engine, self.ranks[rank], fence, make_staging=make_staging, join=join)

    def _app(self) -> Starlette:
        channel = Channel(self)
        control = Control(channel)

        async def generate(request: Request) -> PlainTextResponse:
            control.refuse_if_fenced()
            return PlainTextResponse(str(channel.published))

        async def stock(request: Request) -> PlainTextResponse:
            await asyncio.to_thread(self.weights_changed, "a stock route")
            return PlainTextResponse("updated")

        routes = [
            Route(protocol.CONTROL_PATH, control.control, methods=["POST"]),
            Route("/generate", generate),
            Route("/update_weights_from_disk", stock, methods=["POST"]),
        ]
        return Starlette(routes=routes, middleware=[Middleware(Gate, control=control)])

    # From outside

    def call(self, message: BaseModel, timeout_s: float) -> protocol.Reply:
        response = self._http.post(protocol.CONTROL_PATH, content=message.model_dump_json())
        reply = protocol.Reply.model_validate_json(response.content)
        if reply.error is not None:
            raise errors.error_from_wire(reply.error.kind, f"{self.name}: {reply.error.message}", reply.error.problems)
        return reply

    def stock_update(self) -> None:
        """Another route writes to the weights of all ranks."""
        for model in self.models:
            next(iter(model.parameters())).data.fill_(3.0)
        self._http.post("/update_weights_from_disk")

    def look(self) -> Look:
        response = self._http.post(protocol.CONTROL_PATH, content=protocol.Describe().model_dump_json())
        reply = protocol.Reply.model_validate_json(response.content)
        answer = self._http.get("/generate")
        serves = int(answer.text) if answer.status_code == 200 else None
        return Look(reply, serves, answer.text, tuple(fingerprint(model) for model in self.models), self.in_step)

    # Its life

    def stop(self) -> None:
        """As a process that ends: its connections break, nobody is told."""
        for receiver in self.receivers:
            if receiver._session is not None:
                receiver._session.close()
        self._http.__exit__(None, None, None)
        self.ranks[0].barrier.abort()
        for pool in self._pools:
            pool.shutdown(wait=True)

    def restart(self) -> None:
        self.stop()
        self._start("started again with random weights")

    # Inside

    def submit(self, message: Any) -> list[Future[protocol.Reply]]:
        def handle(receiver: Receiver, engine: FaultyEngine) -> protocol.Reply:
            engine.doing = message.kind
            return receiver.handle(message)

        parts = zip(self._pools, self.receivers, self.engines, strict=True)
        return [pool.submit(handle, receiver, engine) for pool, receiver, engine in parts]

    def weights_changed(self, by: str) -> None:
        """As the hooks on SGLang's routes do it, on the thread of every rank."""
        parts = zip(self._pools, self.receivers, strict=True)
        for future in [pool.submit(receiver.weights_changed, by) for pool, receiver in parts]:
            future.result(ANSWER_TIMEOUT_S)

    def answer(self, message: Any) -> protocol.Reply:
        """The answer of rank 0, once all ranks have theirs; a rank that is lost takes its server's answer with it."""
        lost = [rank for rank in self.ranks if rank.lost]
        if lost and lost[0].index == 0:
            raise errors.PushError("the schedulers did not answer")
        replies = {}
        for rank, future in enumerate(self.submit(message)):
            try:
                replies[rank] = future.result(ANSWER_TIMEOUT_S)
            except (RankLost, FutureTimeoutError):
                continue
        if 0 not in replies:
            raise errors.PushError("the schedulers did not answer")
        said = [reply.model_dump(exclude={"info"}) for reply in replies.values()]
        self.in_step &= len(replies) < self.tp_size or all(found == said[0] for found in said)
        return replies[0]


class Channel:
    """From the HTTP side to the ranks, one message at a time (`receiver_plugin.http.Channel`)."""

    num_replicas, busy = 1, False

    def __init__(self, server: Server) -> None:
        self._server, self._one_at_a_time = server, threading.Lock()
        self.published = 0

    async def ask(self, message: Any) -> tuple[protocol.Reply, ...]:
        def answer() -> protocol.Reply:
            with self._one_at_a_time:
                return self._server.answer(message)

        return (await asyncio.to_thread(answer),)

    @asynccontextmanager
    async def drained(self, in_flight: protocol.InFlight) -> AsyncIterator[None]:
        if self._server.paused:
            raise errors.PushError("generation is paused with requests under way: continue or abort them first")
        while self._server.busy:
            await asyncio.sleep(0.01)
        yield

    def abort_all(self) -> None:
        """No request really runs here."""

    def publish(self, version: int) -> None:
        self.published = version
