"""A server that has nothing to do looks at its model before a push comes; what it found holds until anything runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from receiver_plugin import receiver as module
from receiver_plugin.probe import fingerprint
from sender import FP8Sender
from shared import errors, protocol
from tests.test_push_memory import Server, expected
from tests.tiny_models import FakeEngine, Trainer


class Watched(FakeEngine):
    """Counts the looks at it. `moved_experts`: what a plan depends on has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.looks, self.moved_experts = 0, False
        self.makeup = object()

    def unsafe(self) -> list[str]:
        self.looks += 1
        return super().unsafe()

    def info(self, incarnation: str) -> protocol.ServerInfo:
        return super().info(incarnation + ("@moved" if self.moved_experts else ""))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(module, "_CALM_S", 0.0)
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.0)
    found = Server()
    found.engine = found.receiver._engine = Watched()
    return found


@pytest.fixture
def engine(server: Server) -> Watched:
    assert isinstance(server.engine, Watched)
    return server.engine


@pytest.fixture(params=["reserved", "in_place"])
def sender(server: Server, request: pytest.FixtureRequest) -> Iterator[FP8Sender]:
    with FP8Sender([server.control], plane="memory", bucket_bytes=64 << 10, staging=request.param) as sender:
        sender.push(Trainer(1))
        yield sender


def idle(server: Server) -> None:
    time.sleep(0.002)
    server.receiver.idle()


def test_what_was_looked_at_is_not_looked_at_again(server: Server, engine: Watched, sender: FP8Sender) -> None:
    idle(server)
    engine.looks = 0
    sender.push(Trainer(2))  # its Begin finds the model looked at; its Commit comes after a message
    assert engine.looks == 1 and fingerprint(server.model) == expected(Trainer(2))


def test_after_anything_has_run_it_is(server: Server, engine: Watched, sender: FP8Sender) -> None:
    idle(server)
    server.receiver.busy()
    engine.looks = 0
    sender.push(Trainer(2))
    assert engine.looks == (2 if server.receiver._session.way == "in_place" else 1)  # type: ignore[union-attr]


def test_an_idle_server_looks_once(server: Server, engine: Watched, sender: FP8Sender) -> None:
    engine.looks = 0
    for _ in range(3):
        idle(server)
    assert engine.looks == 1


@pytest.mark.parametrize("wait", ["_CALM_S", "_LOOK_EVERY_S"])
def test_it_waits_a_little_before_it_looks(
    server: Server, engine: Watched, sender: FP8Sender, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    idle(server)
    monkeypatch.setattr(module, wait, 60.0)
    engine.looks = 0
    server.receiver.busy()
    idle(server)
    assert engine.looks == 0


def test_beside_a_push_it_looks_once(server: Server, engine: Watched, sender: FP8Sender) -> None:
    """Whatever runs between: requests do not wait for look after look."""
    session = server.receiver._session
    assert session is not None
    shut = protocol.Shut(drain_s=9.0, hold_s=9.0, in_flight="wait") if session.exclusive else None
    server.receiver.handle(protocol.Begin(session=session.id, version=9, deadline_s=9.0, shut=shut))
    engine.looks = 0
    for _ in range(3):
        assert server.receiver.is_receiving
        idle(server)
        server.receiver.busy()
    assert engine.looks == 1


def test_a_server_whose_sender_is_gone_does_not_look(server: Server, engine: Watched, sender: FP8Sender) -> None:
    assert server.receiver._session is not None
    server.receiver._session.lost = "its sender is gone"
    engine.looks = 0
    idle(server)
    assert engine.looks == 0


@pytest.mark.parametrize("what", ["memory_leaves", "weights_changed", "weights_lost"])
def test_whatever_changes_weights_ends_what_was_seen(
    server: Server, engine: Watched, sender: FP8Sender, what: str
) -> None:
    """At once: a message may come in the same turn."""
    idle(server)
    assert server.receiver._calm
    arguments: dict[str, list[Any]] = {
        "memory_leaves": [["weights"]],
        "weights_changed": ["another route"],
        "weights_lost": [],
    }
    getattr(server.receiver, what)(*arguments[what])
    assert not server.receiver._calm


def test_without_a_sender_nobody_looks(server: Server, engine: Watched) -> None:
    server.receiver.busy()
    idle(server)
    assert engine.looks == 0


def test_what_it_finds_wrong_is_told_by_the_next_push(server: Server, engine: Watched, sender: FP8Sender) -> None:
    engine.unsafe_reasons, engine.looks = ["a cache of old weights"], 0
    for _ in range(3):
        idle(server)
        server.receiver.busy()
    assert engine.looks == 1, "each look in vain is a long one"
    with pytest.raises(errors.IncompatibleServerError, match="a cache of old weights"):
        sender.push(Trainer(2))
    engine.unsafe_reasons = []
    idle(server)
    sender.push(Trainer(2))
    assert fingerprint(server.model) == expected(Trainer(2))


def test_a_look_that_fails_ends_nothing(
    server: Server, engine: Watched, sender: FP8Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> list[str]:
        raise ZeroDivisionError("in the look")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "unsafe", fails)
        idle(server)
    engine.looks = 0
    sender.push(Trainer(2))
    assert engine.looks > 0


def test_experts_that_moved_since_are_noticed(server: Server, engine: Watched, sender: FP8Sender) -> None:
    idle(server)
    engine.moved_experts = True
    server.receiver.busy()  # which a forward pass that moves them is
    sender.push(Trainer(2))  # planned anew
    assert fingerprint(server.model) == expected(Trainer(2))
    assert server.receiver._planned_for.endswith("@moved")


@pytest.mark.parametrize("message", [protocol.Describe(), protocol.Probe()])
def test_every_message_counts_as_something_that_ran(
    server: Server, engine: Watched, sender: FP8Sender, message: protocol.Describe
) -> None:
    idle(server)
    assert server.receiver._calm
    server.receiver.handle(message)
    assert not server.receiver._calm
