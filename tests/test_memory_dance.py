"""Memory that an engine releases and takes again between pushes: what is fenced, where a push goes, when it serves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from receiver_plugin import sglang_requests
from receiver_plugin.engine import EngineControl
from receiver_plugin.http import Control
from receiver_plugin.probe import fingerprint
from sender import FP8Sender
from sender.control import InProcessControl
from shared import errors, protocol
from shared.protocol import StagingWay
from tests.test_http import FakeChannel
from tests.test_push_memory import expected
from tests.test_ways import WAYS, Watched, made
from tests.tiny_models import Trainer


def release(server: Watched, *tags: str) -> None:
    """As SGLang's adapter tells the receiver."""
    server.receiver.memory_leaves(tags)
    server.engine.memory.released |= {*tags}
    if "weights" in tags:
        server.receiver.weights_lost()
        server.engine.unsafe_reasons = ["the memory of the weights is released: resume it first"]


def resume(server: Watched, *tags: str) -> None:
    """Weights come back as garbage."""
    server.engine.memory.released -= {*tags}
    if "weights" in tags:
        server.engine.unsafe_reasons = []
        for parameter in server.model.parameters():
            parameter.data.view(-1).view(torch.uint8).fill_(0x7F)  # NaN
        server.receiver.weights_lost()


def is_served(server: Watched, seed: int) -> bool:
    return fingerprint(server.model) == expected(Trainer(seed)) and server.state() == "SERVING"


@pytest.mark.parametrize("way", WAYS)
def test_weights_push_kv_cache(way: StagingWay) -> None:
    """The order of a training loop, three times, in one session: with lent memory it goes straight into the weights."""
    server = Watched(way)
    with made(server) as sender:
        assert sender.push(Trainer(1)).staging == {"server": way}
        session = server.receiver._session
        for seed in (2, 3, 4):
            release(server, "weights", "kv_cache")
            assert server.state() == "FENCED"
            with pytest.raises(errors.IncompatibleServerError, match="resume it first"):
                sender.push(Trainer(seed))
            resume(server, "weights")
            assert server.state() == "FENCED"
            report = sender.push(Trainer(seed))
            assert report.staging == {"server": "reserved" if way == "reserved" else "in_place"}
            assert is_served(server, seed)
            resume(server, "kv_cache")
            assert is_served(server, seed) and (way != "kv_pool" or server.clean())
        assert session is not None


def test_a_session_takes_each_way_in_turn() -> None:
    """The KV cache is lent again as soon as there is a version to keep; it is left alone while there is none."""
    server = Watched("kv_pool")
    with made(server) as sender:
        sender.push(Trainer(1))
        session = server.receiver._session
        for seed in (2, 4):
            release(server, "weights", "kv_cache")
            resume(server, "weights", "kv_cache")
            for buffer in server.engine.memory.pool:
                buffer.fill_(5)
            assert sender.push(Trainer(seed)).staging == {"server": "in_place"}
            assert is_served(server, seed) and all((buffer == 5).all() for buffer in server.engine.memory.pool)
            assert sender.push(Trainer(seed + 1)).staging == {"server": "kv_pool"}
            assert is_served(server, seed + 1) and not server.engine.memory.pool[0][1024:2048].any()
        assert server.receiver._session is session, "the plan holds, and with it the session"


def test_a_way_that_was_asked_for_is_kept() -> None:
    server = Watched("kv_pool")
    with made(server, staging="kv_pool") as sender:
        sender.push(Trainer(1))
        release(server, "weights", "kv_cache")
        resume(server, "weights")
        with pytest.raises(errors.PlanError, match="resume it first"):
            sender.push(Trainer(2))
        assert server.state() == "FENCED"
        resume(server, "kv_cache")
        assert sender.push(Trainer(2)).staging == {"server": "kv_pool"} and is_served(server, 2)


@pytest.mark.parametrize("way", WAYS)
def test_a_push_that_fails_after_a_resume_leaves_the_fence(way: StagingWay) -> None:
    server, broken = Watched(way), Trainer(2)
    with torch.no_grad():
        broken.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 3] = float("nan")
    with made(server) as sender:
        sender.push(Trainer(1))
        release(server, "weights", "kv_cache")
        resume(server, "weights", "kv_cache")
        with pytest.raises(errors.NonFiniteWeightError):
            sender.push(broken)
        assert server.state() == "FENCED"
        sender.push(Trainer(3))
    assert is_served(server, 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_sender_that_meets_released_memory_first(way: StagingWay) -> None:
    server = Watched(way)
    release(server, "weights", "kv_cache")
    resume(server, "weights")
    with made(server) as sender:
        assert sender.push(Trainer(1)).staging == {"server": "reserved" if way == "reserved" else "in_place"}
        resume(server, "kv_cache")
    assert is_served(server, 1)


def test_others_are_not_brought_up_in_the_middle() -> None:
    """`behind` leaves those alone that a push is to follow."""
    server, other = Watched("kv_pool", "a"), Watched("kv_pool", "b")
    with made(server, other, keep_snapshot=True) as sender:
        assert sender.behind() == ()
        sender.push(Trainer(1))
        assert sender.behind() == sender.catch_up() == ()
        sender.push(Trainer(2))
        opens = server.kinds.count("open")
        assert sender.catch_up() == () and sender.push(Trainer(3)).version == 3
        assert server.kinds.count("open") == opens, "nobody was behind, so the session stood"
        release(server, "weights")
        resume(server, "weights")
        assert sender.behind() == ()
        other.receiver.weights_changed("another route")
        assert sender.behind() == ("b",)
        assert sender.catch_up(sender.behind()) == ("b",) and is_served(other, 3) and not is_served(server, 3)
        assert sender.catch_up() == ("a",) and is_served(server, 3) and is_served(other, 3)


class Process:
    """The process that takes requests, with its event loop on a thread."""

    num_replicas, busy = 1, False

    def __init__(self, server: Watched) -> None:
        self._server, self.control = server, Control(self)
        self.fenced_at_opening: list[str | None] = []
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.client = InProcessControl("server", lambda message: self.run(self.control.answer(message)))

    def run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result(10.0)

    async def ask(self, message: Any) -> tuple[protocol.Reply, ...]:
        return (self._server.receiver.handle(message),)

    @asynccontextmanager
    async def drained(self, in_flight: protocol.Drain) -> AsyncIterator[None]:
        yield
        self.fenced_at_opening.append(await self.control.fence())

    def abort_all(self) -> None:
        pass

    def publish(self, version: int) -> None:
        pass


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("way", ["reserved", "in_place"])
def test_nothing_runs_without_a_kv_cache(way: StagingWay, lost: bool) -> None:
    """The version is served as far as its weights go, and told so; requests are refused until the cache is back."""
    server = Watched(way)
    process = Process(server)
    control: Any = process.control
    with FP8Sender([process.client], plane="memory", timeout_s=5.0, bucket_bytes=64 << 10) as sender:
        sender.push(Trainer(1))
        assert process.run(control.fence()) is None and control.state == "SERVING"
        release(server, "kv_cache")
        reply = process.run(control.answer(protocol.Describe()))
        assert (reply.fence, reply.state, reply.version, reply.exclusive) == (None, "SERVING", 1, True)
        assert control.state == "FENCED" and "KV cache was released" in str(process.run(control.fence()))
        if lost:
            release(server, "weights")
            resume(server, "weights")
        process.fenced_at_opening.clear()
        report = sender.push(Trainer(2))
        assert report.version == 2 and is_served(server, 2)
        assert process.fenced_at_opening and all(process.fenced_at_opening), "a request that waited would have run"
        assert control.state == "FENCED" and "KV cache was released" in str(process.run(control.fence()))
        resume(server, "kv_cache")
        process.run(control.answer(protocol.Describe()))
        assert process.run(control.fence()) is None and control.state == "SERVING"


# The engine that releases


class Manager:
    """SGLang's tokenizer manager as far as memory goes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.model_update_lock = SimpleNamespace(_readers=0)
        self.busy_for, self.is_stuck = 0, False

    async def flush_cache(self) -> Any:
        self.busy_for -= 1
        return SimpleNamespace(success=self.busy_for < 0)

    async def release_memory_occupation(self, request: Any, http: None) -> None:
        self.calls.append(("release", list(request.tags)))
        if self.is_stuck:
            await asyncio.sleep(60.0)

    async def resume_memory_occupation(self, request: Any, http: None) -> None:
        self.calls.append(("resume", list(request.tags)))


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> EngineControl:
    engine = SimpleNamespace(tokenizer_manager=Manager())
    monkeypatch.setattr(sglang_requests, "attach_engine", lambda *args: (Control(FakeChannel()), None))
    monkeypatch.setattr("receiver_plugin.sglang_http.make_control", None)
    return EngineControl(engine)


def manager_of(control: EngineControl) -> Manager:
    manager: Manager = control.engine.tokenizer_manager
    return manager


def fails(kind: type[Exception], text: str, step: Coroutine[Any, Any, None]) -> None:
    with pytest.raises(kind, match=text):
        asyncio.run(step)


def test_memory_is_released_once(control: EngineControl) -> None:
    asyncio.run(control.release_memory(["kv_cache", "weights"], 5.0))
    fails(errors.ConfigError, "cannot be released now", control.release_memory(["weights"], 5.0))
    fails(errors.ConfigError, "cannot be resumed now", control.resume_memory(["cuda_graph"], 5.0))
    fails(errors.ConfigError, r"memory of \['heap'\]", control.release_memory(["heap", "cuda_graph"], 5.0))
    fails(errors.ConfigError, "memory of", control.release_memory([], 5.0))
    asyncio.run(control.resume_memory(["weights"], 5.0))
    asyncio.run(control.resume_memory(["kv_cache"], 5.0))
    fails(errors.ConfigError, "cannot be resumed now", control.resume_memory(["weights"], 5.0))
    assert manager_of(control).calls == [
        ("release", ["weights", "kv_cache"]),
        ("resume", ["weights"]),
        ("resume", ["kv_cache"]),
    ]


def test_requests_end_before_memory_is_released(control: EngineControl) -> None:
    """SGLang ends its schedulers if they are asked while a request runs."""
    manager = manager_of(control)
    manager.busy_for = 3
    asyncio.run(control.release_memory(["weights"], 5.0))
    assert manager.calls == [("release", ["weights"])]
    manager.model_update_lock._readers = 1
    fails(errors.ServerBusyError, "requests were running", control.release_memory(["kv_cache"], 0.1))
    assert manager.calls == [("release", ["weights"])]
    manager.model_update_lock._readers = 0
    manager.is_stuck = True
    fails(errors.ServerUnreachableError, "did not release memory", control.release_memory(["kv_cache"], 0.1))


def test_memory_that_is_released_late_is_released(control: EngineControl) -> None:
    manager = manager_of(control)

    async def slowly(request: Any, http: None) -> None:
        manager.calls.append(("release", list(request.tags)))
        await asyncio.sleep(0.3)

    manager.release_memory_occupation = slowly  # type: ignore[method-assign]

    async def steps() -> None:
        with pytest.raises(errors.ServerUnreachableError, match="did not release memory"):
            await control.release_memory(["weights"], 0.1)
        with pytest.raises(errors.ConfigError, match="cannot be released now"):
            await control.release_memory(["weights"], 5.0)
        assert control.released == {"weights"}
        await control.resume_memory(["weights"], 5.0)

    asyncio.run(steps())
    assert manager.calls == [("release", ["weights"]), ("resume", ["weights"])]


def test_two_releases_at_a_time(control: EngineControl) -> None:
    async def both() -> list[Any]:
        releases = (control.release_memory(["weights"], 5.0) for _ in range(2))
        return await asyncio.gather(*releases, return_exceptions=True)

    found = asyncio.run(both())
    assert sorted(type(outcome).__name__ for outcome in found) == ["ConfigError", "NoneType"]
    assert manager_of(control).calls == [("release", ["weights"])]


@pytest.mark.parametrize("tag", ["weights", "cuda_graph"])
def test_nothing_runs_without_any_memory_that_it_uses(tag: str) -> None:
    server = Watched("reserved")
    with made(server) as sender:
        sender.push(Trainer(1))
        server.engine.memory.released |= {tag}
        assert server.receiver.lacks_memory and server.receiver.handle(protocol.Describe()).exclusive
        server.engine.memory.released -= {tag}
        assert not server.receiver.handle(protocol.Describe()).exclusive


def test_control_messages_as_bytes(control: EngineControl) -> None:
    def ask(data: bytes, timeout_s: float = 5.0) -> protocol.Reply:
        return protocol.Reply.model_validate_json(asyncio.run(control.answer(data, timeout_s)))

    assert ask(protocol.Describe().model_dump_json().encode()).error is None
    for data in (b"", b"\x80\x04", b'{"kind": "launch"}', b'{"kind": "describe", "more": 1}'):
        reply = ask(data)
        assert reply.error is not None and reply.error.kind == "ConfigError"
    older = ask(b'{"kind": "describe", "protocol": 1}').error
    assert older is not None and older.kind == "IncompatibleServerError"
