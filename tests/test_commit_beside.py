"""The commit of a single server goes out while the last buckets are on their way, as from a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from receiver_plugin.probe import fingerprint
from sender import FP8Sender, sending
from sender.packer import Packer
from shared import errors, protocol
from shared.planes.memory import MemoryPlane
from tests.test_push_memory import Server, expected
from tests.tiny_models import Trainer


class Late(MemoryPlane):
    """The last bucket leaves in `flush`, as `leave` says; it is called with what would send it."""

    leave: Callable[[Callable[[], None]], None] = staticmethod(lambda send: send())

    def __init__(self, rendezvous: protocol.Rendezvous) -> None:
        super().__init__(rendezvous)
        self._last: tuple[torch.Tensor, int] | None = None

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        self._send_last()
        self._last = bucket, digest

    def flush(self) -> None:
        type(self).leave(self._send_last)

    def _send_last(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            super().send(*last)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[Late]:
    pack = Packer.pack
    monkeypatch.setattr(Packer, "pack", lambda *a, **more: pack(*a, **more).clone())
    monkeypatch.setattr(sending, "_leaves_later", lambda bucket: True)
    return type("Plane", (Late,), {})


@pytest.fixture
def sender(server: Server, late: type[Late]) -> Iterator[FP8Sender]:
    with FP8Sender([server.control], plane="memory", timeout_s=5.0, bucket_bytes=64 << 10) as made:
        made._fleet._make_memory_plane = late
        made.push(Trainer(1))
        yield made


def commits(server: Server) -> list[str]:
    asked, handle = list[str](), server.control._handle

    def note(message: Any) -> protocol.Reply:
        reply = handle(message)
        asked.append(f"{message.kind}: {reply.error.kind if reply.error else reply.state}")
        return reply

    server.control._handle = note
    return asked


def test_one_message_commits_what_comes_beside_it(server: Server, sender: FP8Sender, late: type[Late]) -> None:
    """The commit is there first, and waits for the bucket."""
    asked, there, handle = commits(server), threading.Event(), server.control._handle

    def commit_first(message: Any) -> protocol.Reply:
        if message.kind == "commit":
            there.set()
        return handle(message)

    server.control._handle = commit_first
    late.leave = staticmethod(lambda send: (there.wait(5.0), send())[1])
    sender.push(Trainer(2))
    assert asked == ["begin: RECEIVING", "commit: SERVING"]
    assert fingerprint(server.model) == expected(Trainer(2)) and server.version == 2


def test_a_bucket_that_takes_long(server: Server, sender: FP8Sender, late: type[Late]) -> None:
    asked = commits(server)

    def slowly(send: Callable[[], None]) -> None:
        time.sleep(0.3)
        send()

    late.leave = staticmethod(slowly)
    sender.push(Trainer(2))
    assert asked[:2] == ["begin: RECEIVING", "commit: StillComingError"] and asked[-1] == "commit: SERVING"
    assert fingerprint(server.model) == expected(Trainer(2)) and server.version == 2


def broken(send: Callable[[], None]) -> None:
    raise errors.TransferError("the wire broke")


def test_a_bucket_that_never_leaves(server: Server, sender: FP8Sender, late: type[Late]) -> None:
    late.leave = staticmethod(broken)
    with pytest.raises(errors.TransferError, match="the wire broke"):
        sender.push(Trainer(2))
    assert fingerprint(server.model) == expected(Trainer(1)) and (server.version, server.state()) == (1, "SERVING")
    late.leave = staticmethod(lambda send: send())
    sender.push(Trainer(3))
    assert fingerprint(server.model) == expected(Trainer(3)) and server.version == 2


def test_a_wire_that_breaks_once_all_is_there(server: Server, sender: FP8Sender, late: type[Late]) -> None:

    def too_late(send: Callable[[], None]) -> None:
        send()
        broken(send)

    late.leave = staticmethod(too_late)
    assert sender.push(Trainer(2)).version == 2
    assert fingerprint(server.model) == expected(Trainer(2)) and server.version == 2
    late.leave = staticmethod(lambda send: send())
    assert sender.push(Trainer(3)).version == 3
    assert fingerprint(server.model) == expected(Trainer(3))


def test_a_server_that_fails_says_so_in_its_own_words(server: Server, sender: FP8Sender, late: type[Late]) -> None:
    server.engine.unsafe_reasons = ["a layer was wrapped"]
    with pytest.raises(errors.IncompatibleServerError, match="a layer was wrapped"):
        sender.push(Trainer(2))
    server.engine.unsafe_reasons = []
    assert fingerprint(server.model) == expected(Trainer(1)) and (server.version, server.state()) == (1, "SERVING")
    sender.push(Trainer(3))
    assert fingerprint(server.model) == expected(Trainer(3)) and server.version == 2


def test_nothing_is_committed_that_is_not_finite(server: Server, sender: FP8Sender) -> None:
    asked, model = commits(server), Trainer(2)
    with torch.no_grad():
        model.get_parameter(next(name for name, _ in model.named_parameters()))[0, 0] = float("nan")
    with pytest.raises(errors.NonFiniteWeightError):
        sender.push(model)
    assert not any(line.startswith("commit") for line in asked) and server.version == 1
