"""`sgl.Engine` under the plugin, with a fake engine: what is asked where, and in whose event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from receiver_plugin import sglang_requests
from receiver_plugin.door import _Draining
from receiver_plugin.engine import EngineControl, requires_version
from receiver_plugin.http import Control
from sender.control import ControlClient
from shared import errors, protocol
from tests.test_http import FakeChannel

COMMIT = protocol.Commit(session="s", version=1, drain_s=5.0)


def reply_to(request: Any, *labels: str) -> dict[str, Any]:
    """As SGLang's; the last part of one has `labels` of its tokens from 0.5.19 on."""
    spans = [{"version": label, "start": n, "end": n + 1} for n, label in enumerate(labels)]
    return {"text": f"reply to {request}", "meta_info": {"weight_versions": spans} if spans else {}}


class FakeManager:
    """SGLang's tokenizer manager with our hooks around it; `requests` are those that left for the schedulers."""

    def __init__(self) -> None:
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self.requests: list[Any] = []
        self._result_dispatcher = self.is_pause = self.server_args = self.server_status = None
        names = ("_cond", "_lock", "_readers", "acquire_writer", "release_writer")
        self.model_update_lock = SimpleNamespace(**dict.fromkeys(names))

    async def _generate_request(self, request: Any) -> AsyncIterator[dict[str, Any]]:
        self.event_loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        sglang_requests.send(FakeManager._send_one_request, self, request)
        yield reply_to(request)

    def _send_one_request(self, request: Any) -> None:
        self.requests.append(request)

    async def _update_weights_from_disk(self, folder: str) -> str:
        return f"loaded {folder}"

    def generate_request(self, request: Any) -> AsyncIterator[Any]:
        return sglang_requests.generate(FakeManager._generate_request, self, request)

    async def update_weights_from_disk(self, folder: str) -> Any:
        return await sglang_requests.change_weights(FakeManager._update_weights_from_disk, self, folder)


class FakeEngine:
    def __init__(self) -> None:
        self.tokenizer_manager, self.loop = FakeManager(), asyncio.new_event_loop()

    def generate(self, request: Any) -> Any:
        return self.loop.run_until_complete(anext(self.tokenizer_manager.generate_request(request)))

    def update_weights_from_disk(self, folder: str) -> Any:
        return self.loop.run_until_complete(self.tokenizer_manager.update_weights_from_disk(folder))


class Attached:
    """An engine with our control, whose schedulers are a `FakeChannel`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fence: str | None = None) -> None:
        self.engine, self.channel = FakeEngine(), FakeChannel(fence)
        monkeypatch.setattr("receiver_plugin.sglang_http.make_control", lambda manager: Control(self.channel))
        self.client = EngineControl(self.engine)

    def push(self, version: int) -> protocol.Reply:
        return self.client.call(COMMIT.model_copy(update={"version": version}), 5.0)


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> Attached:
    return Attached(monkeypatch)


def test_an_engine_that_is_not_attached_sends_nothing() -> None:
    engine = FakeEngine()
    with pytest.raises(RuntimeError, match=r"not attached: receiver_plugin\.engine\.attach"):
        engine.generate("a")
    assert engine.tokenizer_manager.requests == []


def test_a_fenced_engine_refuses_until_a_push(monkeypatch: pytest.MonkeyPatch) -> None:
    attached = Attached(monkeypatch, fence="started with random weights")
    for _ in range(2):
        with pytest.raises(errors.ServerFencedError, match="started with random weights"):
            attached.engine.generate("a")
    assert attached.engine.tokenizer_manager.requests == []
    assert attached.push(1).version == 1
    assert attached.engine.generate("b") == reply_to("b")


def test_demands(attached: Attached) -> None:
    for demand in ({"minimum": 1}, {"exact": 1}):
        with pytest.raises(errors.VersionMismatchError, match="version 0 is served"), requires_version(**demand):
            attached.engine.generate("a")
    attached.push(1)
    for demand in ({"minimum": 1}, {"exact": 1}):
        with requires_version(**demand) as versions:
            attached.engine.generate("b")
        assert (versions.start, versions.end) == (1, 1)
    assert attached.engine.tokenizer_manager.requests == ["b", "b"]
    attached.engine.generate("c")  # outside of the block nothing is demanded


def test_another_route_fences(attached: Attached) -> None:
    """A server's gate sees such routes; here the call itself is watched."""
    attached.engine.generate("a")
    attached.channel.fence = "its weights were changed by UpdateWeightFromDisk"
    assert attached.engine.update_weights_from_disk("folder") == "loaded folder"
    with pytest.raises(errors.ServerFencedError, match="UpdateWeightFromDisk"):
        attached.engine.generate("b")


def test_a_second_control_is_the_first_one(attached: Attached) -> None:
    attached.push(1)
    second: ControlClient = EngineControl(attached.engine)
    assert second.call(protocol.Describe(), 5.0).version == 1 and second.name == attached.client.name
    with requires_version(exact=1):
        attached.engine.generate("a")


def test_errors_are_raised_as_what_they_were(attached: Attached) -> None:
    error = protocol.WireError(kind="StaleVersionError", message="version 1 is not newer")
    attached.channel.on_message = lambda message: error
    with pytest.raises(errors.StaleVersionError, match="of this process: version 1 is not newer"):
        attached.client.call(protocol.Close(session="s"), 5.0)


def test_a_push_into_a_loop_that_runs(attached: Attached) -> None:
    """`async_generate`: the loop is the caller's, the push comes from another thread."""

    async def serve() -> tuple[Any, protocol.Reply]:
        reply = await anext(attached.engine.tokenizer_manager.generate_request("a"))
        return reply, await asyncio.to_thread(attached.push, 1)

    reply, pushed = asyncio.run(serve())
    assert reply == reply_to("a") and pushed.version == 1


def test_a_loop_that_is_blocked_is_no_hang(attached: Attached) -> None:
    async def serve() -> None:
        await anext(attached.engine.tokenizer_manager.generate_request("a"))
        found: list[BaseException] = []

        def push() -> None:
            try:
                attached.client.call(protocol.Describe(), 0.1)
            except errors.Fp8SyncError as error:
                found.append(error)

        thread = threading.Thread(target=push)
        thread.start()
        thread.join(10.0)  # blocks the loop, as `sender.push(model)` inside a coroutine would
        assert isinstance(found[0], errors.ServerUnreachableError) and "push from another thread" in str(found[0])

    asyncio.run(serve())


def test_an_answer_that_takes_too_long(attached: Attached) -> None:
    attached.channel.answer_s = 0.3
    with pytest.raises(errors.ServerUnreachableError, match="did not answer"):
        attached.client.call(protocol.Describe(), 0.05)
    attached.channel.answer_s = 0.0
    assert attached.client.call(protocol.Describe(), 5.0).error is None


@pytest.mark.parametrize("many", [False, True])
def test_tokens_of_a_commit_that_not_all_have_confirmed(attached: Attached, many: bool) -> None:
    """A replica may serve the new version already while the answer of another one is waited for."""
    attached.push(1)

    async def two_parts(manager: FakeManager, request: Any) -> AsyncIterator[Any]:
        sglang_requests.send(FakeManager._send_one_request, manager, request)
        commit = protocol.Commit(session="s", version=2, drain_s=5.0)
        attached.client._control._door._draining = _Draining(commit, asyncio.timeout(None))
        for label in ("1", "2"):
            reply = {"meta_info": {"weight_versions": [{"version": label, "start": 0, "end": 3}]}}
            yield [reply, {"meta_info": {}}] if many else reply

    async def ask() -> list[Any]:
        return [part async for part in sglang_requests.generate(two_parts, attached.engine.tokenizer_manager, "a")]

    with requires_version(minimum=1) as versions:
        assert len(attached.engine.loop.run_until_complete(ask())) == 2
    assert (versions.start, versions.end) == (1, 2)
    overtaken = pytest.raises(errors.VersionMismatchError, match="exactly version 1; version 2 is served")
    with overtaken, requires_version(exact=1):
        attached.engine.loop.run_until_complete(ask())


@pytest.mark.parametrize(
    ("labels", "during", "served", "end"),
    [
        (("1",), None, 2, 1),  # it ended before the commit, and was read after it
        (("1", "2"), None, 2, 2),
        (("1", "2"), 2, 1, 2),  # the commit's answer is still on its way
        (("default",), None, 1, 0),
        ((), None, 2, 2),  # releases without labels: as far as this process knows
        ((), 2, 1, 2),
    ],
)
def test_the_end_of_a_reply_that_goes_on_across_a_commit(
    attached: Attached, labels: tuple[str, ...], during: int | None, served: int, end: int
) -> None:
    for version in range(1, served + 1):
        attached.push(version)

    async def one_part(manager: FakeManager, request: Any) -> AsyncIterator[Any]:
        sglang_requests.send(FakeManager._send_one_request, manager, request)
        attached.client._control._door._passing = during
        yield reply_to(request, *labels)

    async def ask() -> list[Any]:
        return [part async for part in sglang_requests.generate(one_part, attached.engine.tokenizer_manager, "a")]

    with requires_version() as versions:
        attached.engine.loop.run_until_complete(ask())
    assert (versions.start, versions.end) == (served, end)


@asynccontextmanager
async def held(lock: asyncio.Lock) -> AsyncIterator[None]:
    async with lock:
        yield


def test_the_lock_is_let_go_when_one_part_is_taken(attached: Attached) -> None:
    """SGLang takes the one part of a plain reply and drops the generator; its lock must come free all the same."""
    lock = asyncio.Lock()

    async def one_part(manager: FakeManager, request: Any) -> AsyncIterator[dict[str, Any]]:
        async with held(lock):
            sglang_requests.send(FakeManager._send_one_request, manager, request)
            yield reply_to(request)

    async def ask() -> None:
        manager = attached.engine.tokenizer_manager
        assert await anext(sglang_requests.generate(one_part, manager, "a")) == reply_to("a")
        await asyncio.wait_for(lock.acquire(), 5.0)

    attached.engine.loop.run_until_complete(ask())


def test_engines_that_share_an_event_loop_are_asked_at_once_and_answer_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang gives engines that are made on one thread the same loop; a sender asks its servers on threads."""
    engines = [Attached(monkeypatch) for _ in range(3)]
    for number, attached in enumerate(engines):
        attached.engine.loop = engines[0].engine.loop
        attached.channel.answer_s = 0.3 if number else 0.1  # the first one to end must not stop the loop for others
    replies: list[protocol.Reply] = []
    threads = [threading.Thread(target=lambda a=attached: replies.append(a.push(1))) for attached in engines]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(10.0)
    assert [reply.version for reply in replies] == [1, 1, 1]
