"""`receiver_plugin/http.py`: what a fenced server answers, what reaches the schedulers, and how a commit drains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from receiver_plugin.gate import FencedError, Gate
from receiver_plugin.http import Control
from shared import errors, protocol
from shared.protocol import CONTROL_PATH, INFO_PATH

CLOSED = ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/health", "/health_generate", "/"]
OPEN = [
    "/model_info",
    "/get_model_info",
    "/get_server_info",
    "/v1/models",
    "/metrics",
    "/flush_cache",
    "/abort_request",
]
COMMIT = protocol.Commit(session="s", version=4, drain_s=5.0)


class FakeChannel:
    """The schedulers of one replica. `on_message` is what a message meets: an error to answer with, or one raised."""

    num_replicas, busy = 1, False

    def __init__(self, fence: str | None = None) -> None:
        self.fence, self.version = fence, 0
        self.kinds: list[str] = []
        self.published: list[int] = []
        self.events: list[str] = []
        self.on_message: Callable[[Any], protocol.WireError | None] = lambda message: None
        self.drain_s = self.answer_s = 0.0
        self.state: protocol.ServerState = "SERVING"

    async def ask(self, message: Any) -> tuple[protocol.Reply, ...]:
        decoded = protocol.decode_message(message.model_dump_json())
        self.kinds.append(decoded.kind)
        self.events.append(f"ask {decoded.kind}")
        await asyncio.sleep(self.answer_s)
        error = self.on_message(decoded)
        if isinstance(decoded, protocol.Commit) and error is None:
            self.version, self.fence = decoded.version, None
        state: protocol.ServerState = "FENCED" if self.fence else self.state
        return (protocol.Reply(state=state, version=self.version, fence=self.fence, error=error),)

    @asynccontextmanager
    async def drained(self, in_flight: protocol.InFlight) -> AsyncIterator[None]:
        await asyncio.sleep(self.drain_s)
        self.events.append("drained")
        try:
            yield
        finally:
            self.events.append("admitting")

    def abort_all(self) -> None:
        self.events.append("abort all")

    def publish(self, version: int) -> None:
        self.events.append(f"publish {version}")
        self.published.append(version)


class Server:
    def __init__(self, fence: str | None = None) -> None:
        self.channel = FakeChannel(fence)
        self.control = Control(self.channel)

        async def answer(request: Request) -> PlainTextResponse:
            return PlainTextResponse("served")

        async def talk(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text("served")

        app = Starlette(
            routes=[
                Route(CONTROL_PATH, self.control.control, methods=["POST"]),
                Route(INFO_PATH, self.control.info, methods=["GET"]),
                WebSocketRoute("/v1/realtime", talk),
                Route("/{path:path}", answer, methods=["GET", "POST"]),
            ],
            middleware=[Middleware(Gate, control=self.control)],
        )
        self.client = TestClient(app, raise_server_exceptions=False)

    def send(self, message: BaseModel | bytes) -> tuple[int, protocol.Reply]:
        body = message if isinstance(message, bytes) else message.model_dump_json().encode()
        response = self.client.post(CONTROL_PATH, content=body)
        return response.status_code, protocol.Reply.model_validate_json(response.content)

    def serves(self) -> bool:
        return self.client.post("/generate").text == "served"

    def health(self) -> tuple[int, str, str]:
        found = self.client.get("/health")
        return found.status_code, found.headers["x-fp8sync-state"], found.headers["x-fp8sync-version"]


def test_health_names_the_state_and_the_version() -> None:
    server = Server(fence="random weights")
    assert server.health() == (503, "FENCED", "0")
    server.send(COMMIT)
    assert server.health() == (200, "SERVING", "4")
    server.channel.state = "RECEIVING"
    server.send(protocol.Describe())
    server.channel.state = "SERVING"  # its sender died, and nobody tells this process
    with server.client:  # one event loop, as a server has
        assert server.health() == (200, "RECEIVING", "4")
        assert server.health() == (200, "SERVING", "4")


# ---- the gate


@pytest.mark.parametrize("path", CLOSED)
def test_a_fenced_server_refuses_with_the_reason(path: str) -> None:
    response = Server(fence="started with random weights").client.post(path)
    assert response.status_code == 503 and response.headers["retry-after"]
    error = response.json()["error"]
    assert error["type"] == "ServerFenced" and "started with random weights" in error["message"]


@pytest.mark.parametrize("path", OPEN)
def test_what_runs_no_model_is_open(path: str) -> None:
    assert Server(fence="why").client.get(path).text == "served"


def test_a_fenced_server_refuses_websockets() -> None:
    """SGLang's /v1/realtime runs the model too."""
    with pytest.raises(WebSocketDisconnect), Server(fence="why").client.websocket_connect("/v1/realtime"):
        pass
    with Server().client.websocket_connect("/v1/realtime") as socket:
        assert socket.receive_text() == "served"


@pytest.mark.parametrize("path", CLOSED)
def test_a_server_without_fence_serves(path: str) -> None:
    assert Server().client.post(path).text == "served"


def test_a_commit_opens_the_gate() -> None:
    server = Server(fence="why")
    assert not server.serves()
    status, reply = server.send(COMMIT)
    assert status == 200 and reply.error is None and reply.fence is None
    assert server.serves()


def test_the_fence_is_asked_for_once() -> None:
    server = Server()
    assert all(server.serves() for _ in range(5))
    assert server.channel.kinds == ["describe"]


def test_schedulers_that_do_not_answer_mean_a_fence_until_they_do() -> None:
    server = Server()
    server.channel.on_message = refusing(errors.PushError("no answer in 55 s"))
    response = server.client.post("/generate")
    assert response.status_code == 503 and "no answer in 55 s" in response.text
    server.channel.on_message = lambda message: None
    assert server.serves()


def refusing(error: Exception, kind: str | None = None) -> Callable[[Any], protocol.WireError | None]:
    def on_message(message: Any) -> protocol.WireError | None:
        if kind in (None, message.kind):
            raise error
        return None

    return on_message


# ---- promises


PROMISE = protocol.Prepare(session="s", version=4, hold_s=0.3, idle=False, promise=True)


def promised(server: Server) -> None:
    """Schedulers that say PROMISED until they are asked for something else than that."""
    ask = server.channel.ask

    async def ask_promised(message: Any) -> tuple[protocol.Reply, ...]:
        (reply,) = await ask(message)
        over = server.channel.fence is not None or server.channel.version == 4
        return (reply if over else reply.model_copy(update={"state": "PROMISED"}),)

    server.channel.ask = ask_promised  # type: ignore[method-assign]
    assert server.send(PROMISE)[1].state == "PROMISED"


def test_a_promise_that_nobody_takes_up_closes_the_gate_in_time() -> None:
    """Also where the schedulers do not answer by then."""
    server = Server()
    promised(server)
    assert server.serves()
    time.sleep(0.35)
    server.channel.on_message = refusing(errors.PushError("no answer in 55 s"))
    response = server.client.post("/generate")
    assert response.status_code == 503 and "promised to commit" in response.text
    with pytest.raises(FencedError):
        server.control.refuse_if_fenced()
    server.channel.on_message = lambda message: None
    server.channel.fence = "it promised version 4 and heard nothing of it in time"
    deadline = time.monotonic() + 5.0
    while "promised version 4" not in (answer := server.client.post("/generate")).text:
        assert answer.status_code == 503 and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("end", ["abort", "commit"])
def test_a_promise_that_was_taken_up_leaves_the_gate_open(end: str) -> None:
    server = Server()
    promised(server)
    server.channel.version = 4 if end == "commit" else 0
    server.channel.ask = FakeChannel.ask.__get__(server.channel)  # type: ignore[method-assign]
    server.send(COMMIT if end == "commit" else protocol.Abort(session="s", version=4, reason="why"))
    time.sleep(0.35)
    assert server.serves()


def test_a_promise_holds_while_the_requests_under_way_end() -> None:
    """Its commit was heard in time: the schedulers are told so before it waits."""
    server = Server()
    promised(server)
    server.channel.kinds.clear()
    server.channel.drain_s = 0.5
    assert server.send(COMMIT)[1].version == 4
    assert server.channel.kinds == ["prepare", "commit"] and server.serves()


def test_a_promise_whose_answer_was_lost_may_have_been_given() -> None:
    server = Server()
    assert server.serves()
    server.channel.on_message = refusing(errors.PushError("no answer in 55 s"))
    server.send(PROMISE)
    assert server.serves()
    time.sleep(0.35)
    assert not server.serves()


def test_a_held_door_opens_after_the_fence_is_known() -> None:
    server = Server()
    hold = protocol.Hold(session="s", version=4, drain_s=5.0, hold_s=5.0, in_flight="wait", promise=True)
    with server.client:  # one event loop for both
        assert server.send(hold)[1].error is None
        server.send(protocol.Abort(session="s", version=4, reason="others did", fence=True))
    assert server.channel.events[-2:] == ["ask abort", "admitting"]


# ---- the control route


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xff",
        b'{"kind":"shutdown"}',
        b'{"kind":"close"}',
        b'{"kind":"close","session":"s","extra":1}',
        b'{"kind":"close","session":7}',
        b'{"kind":"describe","protocol":4}',
    ],
)
def test_what_is_no_message_goes_nowhere(body: bytes) -> None:
    server = Server()
    response = server.client.post(CONTROL_PATH, content=body)
    assert response.status_code == 400 and response.json()["error"]["kind"] in (
        "ConfigError",
        "IncompatibleServerError",
    )
    assert server.channel.events == []


def test_a_body_that_is_too_large_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    body = protocol.Close(session="s" * 200).model_dump_json().encode()
    monkeypatch.setattr(protocol, "MAX_BODY_BYTES", len(body) - 1)
    assert "more than" in server.client.post(CONTROL_PATH, content=body).json()["error"]["message"]
    assert server.channel.events == []
    monkeypatch.setattr(protocol, "MAX_BODY_BYTES", len(body))
    assert server.send(body)[0] == 200


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("ConfigError", 400),
        ("PlanError", 422),
        ("IncompatibleServerError", 422),
        ("ServerBusyError", 409),
        ("SessionLostError", 409),
        ("StaleVersionError", 409),
        ("TransferError", 500),
        ("CommitError", 500),
        ("SomethingNewer", 500),
    ],
)
def test_errors_of_the_schedulers_have_their_status(kind: str, status: int) -> None:
    server, error = Server(), protocol.WireError(kind=kind, message="why", problems=("x",))
    server.channel.on_message = lambda message: error
    found, reply = server.send(protocol.Close(session="s"))
    assert (found, reply.error) == (status, error)


def test_info_answers_without_touching_anything() -> None:
    server = Server(fence="why")
    response = server.client.get(INFO_PATH)
    assert response.status_code == 200 and protocol.Reply.model_validate_json(response.content).fence == "why"
    assert server.channel.kinds == ["describe"]


# ---- commit


def test_a_commit_drains_first_and_publishes_before_it_admits() -> None:
    server = Server()
    assert server.send(COMMIT)[1].version == 4
    assert server.channel.events == ["drained", "ask commit", "publish 4", "admitting"]


def test_other_messages_do_not_drain() -> None:
    server = Server()
    server.send(protocol.Begin(session="s", version=4, deadline_s=1.0))
    assert server.channel.events == ["ask begin"]


def test_requests_that_the_schedulers_still_finish_are_waited_for() -> None:
    server, busy = Server(), protocol.WireError(kind="ServerBusyError", message="requests are still running")
    answers = iter([busy, busy, None])
    server.channel.on_message = lambda message: next(answers)
    assert server.send(COMMIT)[0] == 200
    assert server.channel.kinds == ["commit"] * 3 and server.channel.published == [4]


def test_a_refused_commit_publishes_nothing() -> None:
    server, error = Server(), protocol.WireError(kind="CommitError", message="not staged")
    server.channel.on_message = lambda message: error
    assert server.send(COMMIT) == (500, protocol.Reply(state="SERVING", version=0, fence=None, error=error))
    assert server.channel.published == [] and server.channel.events[-1] == "admitting"


@pytest.mark.parametrize("who", ["http", "schedulers"])
def test_a_drain_that_takes_too_long_touches_nothing(who: str) -> None:
    server = Server()
    if who == "http":
        server.channel.drain_s = 5.0
    else:
        busy = protocol.WireError(kind="ServerBusyError", message="requests are still running; nothing was touched")
        server.channel.on_message = lambda message: busy if message.kind == "commit" else None
    started = time.monotonic()
    status, reply = server.send(COMMIT.model_copy(update={"drain_s": 0.1}))
    assert time.monotonic() - started < 2.0
    assert reply.error is not None and "nothing was touched" in reply.error.message
    assert (status, reply.error.kind) in [(500, "CommitError"), (409, "ServerBusyError")][: 1 if who == "http" else 2]
    assert reply.state == "SERVING" and reply.version == 0 and server.channel.published == []
    if who == "http":
        assert "commit" not in server.channel.kinds
    assert server.serves()


def test_a_commit_under_way_is_not_called_untouched() -> None:
    """`drain_s` bounds the draining. The copy itself may take longer, and then its own answer counts."""
    server = Server()
    server.channel.answer_s = 0.3
    _, reply = server.send(COMMIT.model_copy(update={"drain_s": 0.1}))
    assert reply.error is None or "nothing was touched" not in reply.error.message
    assert reply.error is not None or (reply.version == 4 and server.channel.published == [4])


def test_a_commit_that_nobody_confirms_fences() -> None:
    server = Server()
    assert server.serves()
    server.channel.on_message = refusing(errors.PushError("no answer in 55 s"), kind="commit")
    status, reply = server.send(COMMIT)
    assert status == 500 and reply.state == "FENCED" and reply.error is not None and reply.error.kind == "PushError"
    response = server.client.post("/generate")
    assert response.status_code == 503 and "no rank confirmed the commit of version 4" in response.text
    assert server.channel.published == []
    server.channel.on_message = lambda message: None
    assert server.send(COMMIT)[0] == 200 and server.serves()


@pytest.mark.parametrize("error", [asyncio.CancelledError(), ValueError("no reply of ours")])
def test_a_commit_that_is_cut_off_is_asked_after(error: BaseException) -> None:
    """Here it had failed in the copy: those who wait behind the door and those who come are refused."""
    server = Server()
    assert server.serves()

    def cut_off(message: Any) -> protocol.WireError | None:
        if message.kind == "commit":
            server.channel.fence = "copied in part only"
            raise error
        return None

    server.channel.on_message = cut_off
    with pytest.raises(type(error)):
        asyncio.run(server.control._door.commit(COMMIT))
    with pytest.raises(HTTPException, match="cut off"):
        server.control.refuse_if_fenced()
    response = server.client.post("/generate")
    assert response.status_code == 503 and "copied in part only" in response.text


def test_an_answer_that_is_lost_outside_of_a_commit_fences_nothing() -> None:
    server = Server()
    assert server.serves()
    server.channel.on_message = refusing(errors.PushError("no answer in 55 s"))
    status, reply = server.send(protocol.Close(session="s"))
    assert status == 500 and reply.state == "SERVING" and reply.error is not None
    assert server.serves()


# ---- a push that no request may run beside


BEGIN = protocol.Begin(
    session="s", version=4, deadline_s=5.0, shut=protocol.Shut(drain_s=5.0, hold_s=60.0, in_flight="wait")
)


class Exclusive(Server):
    """Schedulers in the middle of such a push, from `Begin` to `Release`; the door lives as long as the test."""

    def __init__(self) -> None:
        super().__init__()
        ask, self.exclusive, self.fence = self.channel.ask, False, None

        async def answer(message: Any) -> tuple[protocol.Reply, ...]:
            (reply,) = await ask(message)
            if message.kind in ("begin", "release", "commit"):
                self.exclusive = message.kind == "begin"
            return (reply.model_copy(update={"exclusive": self.exclusive}),)

        self.channel.ask = answer  # type: ignore[method-assign]

    def __enter__(self) -> Exclusive:
        self.client.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.client.__exit__(None, None, None)


def begun(server: Exclusive) -> None:
    assert server.send(BEGIN)[0] == 200


@pytest.mark.parametrize("path", ["/pause_generation", "/continue_generation"])
def test_nobody_else_lets_requests_run_beside_it(path: str) -> None:
    with Exclusive() as server:
        assert server.client.post(path).status_code == 200
        begun(server)
        assert server.client.post(path).status_code == 409
        server.send(COMMIT.model_copy(update={"held": True}))
        assert server.client.post(path).status_code == 409
        server.send(protocol.Release(session="s", version=4))
        assert server.client.post(path).status_code == 200 and server.serves()


@pytest.mark.parametrize("kind", ["abort", "close", "release"])
def test_the_schedulers_are_asked_first(kind: str) -> None:
    with Exclusive() as server:
        begun(server)
        message: BaseModel = protocol.Release(session="s", version=4)
        if kind == "abort":
            message = protocol.Abort(session="s", version=4, reason="why")
        elif kind == "close":
            message = protocol.Close(session="s")
        server.send(message)
        order = [event for event in server.channel.events if event in ("ask release", f"ask {kind}", "admitting")]
        assert order[-1] == "admitting" and order[-2] == "ask release" and f"ask {kind}" in order
        assert server.serves()


def test_a_door_that_opens_without_their_word_leaves_a_fence() -> None:
    def silent(message: Any) -> None:
        if message.kind == "release":
            raise errors.PushError("the schedulers did not answer")

    with Exclusive() as server:
        begun(server)
        server.channel.on_message = silent
        server.send(protocol.Close(session="s"))
        assert server.channel.events[-1] != "ask release" and not server.serves()
        server.send(protocol.Describe())  # they still say that they are in the middle of it
        assert not server.serves() and server.client.post("/continue_generation").status_code == 200
        server.channel.on_message = lambda message: None
        server.exclusive = False
        server.send(protocol.Describe())
        assert server.serves()
