"""`receiver_plugin/version_headers.py`: demands at the door and where a request leaves; what replies say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from shared import protocol
from shared.versions import EXACT_HEADER, MIN_HEADER, Versions, end_comment
from tests.fake_model import MODEL_ROUTES, FakeServer


def minimum(version: int | str) -> dict[str, str]:
    return {MIN_HEADER: str(version)}


def exact(version: int | str) -> dict[str, str]:
    return {EXACT_HEADER: str(version)}


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20.0))


# At the door


@pytest.mark.parametrize("path", MODEL_ROUTES)
def test_a_demand_before_and_after_the_push(path: str) -> None:
    async def test() -> None:
        server = FakeServer()
        early = await server.ask(path, minimum(1))
        assert early.status_code == 409 and early.headers["retry-after"] == "1" and server.left == 0
        error = early.json()["error"]
        assert error["type"] == "VersionMismatch" and error["code"] == 409
        assert error["wanted"] == {"min": 1, "exact": None} and error["served"] == 0
        assert "demands version 1 or newer; version 0 is served" in error["message"]
        assert (await server.ask(path, exact(0))).status_code == 200
        await server.push(1)
        for headers in (minimum(1), exact(1), minimum(0), {**minimum(1), **exact(1)}, {}):
            assert (await server.ask(path, headers)).status_code == 200
        for headers in (minimum(2), exact(0), exact(2)):
            assert (await server.ask(path, headers)).status_code == 409

    run(test)


@pytest.mark.parametrize("headers", [minimum("x"), exact(-1), exact("1" * 21), {**minimum(4), **exact(3)}])
def test_malformed_demands_are_refused(headers: dict[str, str]) -> None:
    async def test() -> None:
        server = FakeServer()
        reply = await server.ask("generate", headers)
        assert reply.status_code == 400 and reply.json()["error"]["type"] == "BadRequest"
        assert "retry-after" not in reply.headers and server.left == 0

    run(test)


@pytest.mark.parametrize("headers", [minimum(0), exact(0), minimum(5), minimum("x")])
def test_no_demand_opens_a_fenced_server(headers: dict[str, str]) -> None:
    async def test() -> None:
        server = FakeServer(fence="started with random weights")
        for path in MODEL_ROUTES:
            reply = await server.ask(path, headers)
            assert reply.status_code == 503 and reply.json()["error"]["type"] == "ServerFenced"
        assert server.left == 0

    run(test)


def test_routes_that_run_no_model_ask_nothing() -> None:
    async def test() -> None:
        reply = await FakeServer().ask("model_info", minimum(7))
        assert reply.status_code == 200 and Versions.from_headers(reply.headers) == Versions()

    run(test)


def test_websockets_are_asked_at_the_door() -> None:
    client = TestClient(FakeServer().app)
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime", headers=minimum(1)):
        pass
    with client.websocket_connect("/v1/realtime", headers=minimum(0)) as socket:
        assert socket.receive_text() == "served"


# Behind the door


async def behind_a_commit(server: FakeServer, path: str, headers: dict[str, str], version: int) -> httpx.Response:
    """The reply to a request that arrives while a commit waits, and leaves for the model when it is over."""
    server.channel.drain_s = 0.05
    server.door.clear()
    server.waiting.clear()
    commit = asyncio.create_task(server.push(version))
    while server.control.coming is None:
        await asyncio.sleep(0)
    asked = asyncio.create_task(server.ask(path, headers))
    await asyncio.wait({asked, asyncio.create_task(server.waiting.wait())}, return_when=asyncio.FIRST_COMPLETED)
    await commit
    server.door.set()
    return await asked


@pytest.mark.parametrize("path", MODEL_ROUTES)
def test_a_demand_that_comes_true_behind_the_door(path: str) -> None:
    async def test() -> None:
        server = await FakeServer().pushed(1)
        for headers, version in ((minimum(2), 2), (exact(3), 3)):
            reply = await behind_a_commit(server, path, headers, version)
            assert reply.status_code == 200 and Versions.from_headers(reply.headers).start == version

    run(test)


@pytest.mark.parametrize("path", MODEL_ROUTES)
def test_a_demand_that_was_true_at_the_door_only(path: str) -> None:
    """Also for streams, whose status SGLang sends before the request has left for the schedulers."""

    async def test() -> None:
        server = await FakeServer().pushed(1)
        reply = await behind_a_commit(server, path, exact(1), 2)
        assert reply.status_code == 409 and reply.json()["error"]["served"] == 2
        assert server.left == 0

    run(test)


@pytest.mark.parametrize("path", MODEL_ROUTES)
def test_a_commit_that_fails_keeps_no_promise(path: str) -> None:
    async def test() -> None:
        server = await FakeServer().pushed(1)
        error = protocol.WireError(kind="CommitError", message="not staged")
        server.channel.on_message = lambda message: error if message.kind == "commit" else None
        reply = await behind_a_commit(server, path, minimum(2), 2)
        assert reply.status_code == 409 and reply.json()["error"]["served"] == 1
        assert server.control.coming is None

    run(test)


@pytest.mark.parametrize("path", ["generate", "stream"])
@pytest.mark.parametrize("headers", [{}, minimum(1), minimum(2)])
def test_a_commit_that_fences_refuses_those_who_waited(path: str, headers: dict[str, str]) -> None:
    async def test() -> None:
        server = await FakeServer().pushed(1)

        def failing(message: Any) -> protocol.WireError | None:
            if message.kind != "commit":
                return None
            server.channel.fence = "copied in part only"
            return protocol.WireError(kind="CommitError", message="fenced")

        server.channel.on_message = failing
        reply = await behind_a_commit(server, path, headers, 2)
        assert reply.status_code == 503 and "copied in part only" in reply.json()["error"]["message"]

    run(test)


def test_what_does_not_fit_the_coming_version_either_does_not_wait() -> None:
    async def test() -> None:
        server = await FakeServer().pushed(1)
        reply = await behind_a_commit(server, "generate", minimum(3), 2)
        assert reply.status_code == 409 and reply.json()["error"]["served"] == 1

    run(test)


# A version that changes while the request runs


@pytest.mark.parametrize("path", ["generate", "batch"])
def test_an_exact_demand_that_is_overtaken_is_no_reply(path: str) -> None:
    async def test() -> None:
        server = await FakeServer().pushed(1)
        server.between = lambda: server.push(2)
        reply = await server.ask(path, exact(1))
        assert reply.status_code == 409 and reply.json()["error"]["served"] == 2

    run(test)


def test_an_exact_stream_that_is_overtaken_ends_with_an_error() -> None:
    async def test() -> None:
        server = await FakeServer().pushed(1)
        answers = iter([1, 2, 2])

        async def between() -> None:
            if next(answers) == 2:
                await server.push(2)

        server.between = between
        reply = await server.ask("stream", exact(1))
        events = reply.text.split("\n\n")
        assert events[0] == "data: 1" and events[1].startswith("data: error the request demands exactly version 1")
        assert "data: 2" not in events

    run(test)


def test_others_name_both_versions() -> None:
    async def test() -> None:
        server = await FakeServer().pushed(1)
        server.between = lambda: server.push(2)
        for headers in ({}, minimum(1)):
            await server.push(1)
            reply = await server.ask("generate", headers)
            assert reply.status_code == 200 and Versions.from_headers(reply.headers) == Versions(1, 2)

    run(test)


# What replies say


def test_replies_name_their_versions() -> None:
    async def test() -> None:
        server = FakeServer()
        assert Versions.from_headers((await server.ask("generate")).headers) == Versions(0, 0)
        await server.push(7)
        for path, versions in (("generate", Versions(7, 7)), ("batch", Versions(7, 7)), ("stream", Versions(7, None))):
            assert Versions.from_headers((await server.ask(path)).headers) == versions
        eager = await server.ask("eager")
        assert Versions.from_headers(eager.headers).start == 7 and eager.text.startswith("data: created\n\ndata: 7")
        assert Versions.from_headers((await server.ask("invalid")).headers) == Versions()
        assert (await server.ask("broken")).status_code == 500

    run(test)


def test_an_event_stream_names_its_end_to_those_who_demanded() -> None:
    """Clients that asked for nothing of ours get nothing more: some parse every line as an event."""

    async def test() -> None:
        server = await FakeServer().pushed(7)
        assert (await server.ask("stream")).text.endswith("data: [DONE]\n\n")
        assert (await server.ask("stream", minimum(0))).text.endswith(f"data: [DONE]\n\n{end_comment(7)}\n\n")
        assert end_comment(7) not in (await server.ask("lines", minimum(0))).text

    run(test)


def test_not_more_than_a_little_is_held_back() -> None:
    async def test() -> None:
        server, sent = FakeServer(), []

        async def between() -> None:
            sent.append(sum(len(message.get("body", b"")) for message in messages))

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(10.0)
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            messages.append(message)

        messages: list[MutableMapping[str, Any]] = []
        server.between = between
        scope = {"type": "http", "method": "POST", "path": "/talkative", "headers": [], "query_string": b""}
        await server.app(scope, receive, send)
        assert [num_bytes >> 10 for num_bytes in sent] == [0, 64, 96, 128, 160]

    run(test)


def test_the_label_of_pushed_weights_is_theirs() -> None:
    """Otherwise `meta_info.weight_version` could be made to say anything."""

    async def test() -> None:
        server = FakeServer()
        assert (await server.ask("update_weight_version")).json() == {"label": "changed"}
        await server.push(1)
        reply = await server.ask("update_weight_version")
        assert reply.status_code == 409 and "version 1 of a push" in reply.json()["error"]["message"]

    run(test)
