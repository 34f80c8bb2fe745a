"""On the tcp plane each rank has a connection of its own: the sender knows which server took no bytes, and says so."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from sender import FP8Sender
from shared import errors, protocol
from shared.errors import TransferError
from shared.planes import ReceiveHalf, open_receiver
from shared.planes.sockets import SocketReceiver, SocketSender
from tests.test_hostile import door, pool, rendezvous
from tests.test_many_servers import Fleet, all_closed
from tests.test_push_memory import expected
from tests.test_receiver_ranks import TwoRanks
from tests.tiny_models import Trainer

__all__ = ["all_closed", "door", "pool"]

Join = Callable[[protocol.Rendezvous, int], ReceiveHalf]
SMALL = 4096  # bytes of a socket's buffer: a bucket does not fit in it


@pytest.fixture
def end() -> Iterator[threading.Event]:
    """Of the test: whoever hangs, hangs until then."""
    made = threading.Event()
    yield made
    made.set()


class Stalling:
    """Half of a plane that takes one bucket, and then nothing more, with its connection open."""

    def __init__(self, meeting: protocol.Rendezvous, rank: int, end: threading.Event) -> None:
        self._inner, self._end, self._num_left = SocketReceiver(meeting, rank), end, 1
        self._inner.link._sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        if self._num_left == 0:
            self._end.wait(30.0)
            raise TransferError("the test is over")
        self._num_left -= 1
        return self._inner.receive(bucket, timeout_s)

    def arrive(self, timeout_s: float) -> None:
        self._inner.arrive(timeout_s)

    def release(self, timeout_s: float) -> None:
        self._inner.release(timeout_s)

    def interrupt(self) -> None:
        self._inner.interrupt()

    def alive(self) -> bool:
        return self._inner.alive()

    def close(self) -> None:
        self._inner.close()


def never(end: threading.Event) -> Join:
    def join(meeting: protocol.Rendezvous, rank: int) -> ReceiveHalf:
        end.wait(30.0)
        raise TransferError("the test is over")

    return join


def stalling(end: threading.Event) -> Join:
    return lambda meeting, rank: Stalling(meeting, rank, end)


def joined_by(fleet: Fleet, index: int, join: Join) -> None:
    server = fleet.servers[index]
    server.receiver = Receiver(server.model, server.engine, SingleRank(), join=join)
    fleet.controls[index]._handle = server.receiver.handle


def small_buffers(sender: FP8Sender) -> None:
    """What is sent does not wait in the kernel of this host either."""
    plane = sender._fleet.half.plane
    assert isinstance(plane, SocketSender)
    for connection in plane.links._ranks.values():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)


# ---- who is left out


@pytest.mark.parametrize("index", [0, 2])
def test_a_rank_that_never_joins_is_named_and_left_out(end: threading.Event, index: int) -> None:
    fleet, name = Fleet(plane="tcp", quorum=2, timeout_s=3.0), "abc"[index]
    joined_by(fleet, index, never(end))
    report = fleet.sender.push(Trainer(seed=1))
    others = "abc".replace(name, "")
    assert report.servers == tuple(others) and fleet.serving(1) == others
    assert list(report.left_out) == [name]
    assert report.left_out[name].startswith("TransferError: the data plane did not come together")
    assert f"server rank(s) [{index}] of 3 did not join" in report.left_out[name]
    assert fleet.servers[index].version == 0
    joined_by(fleet, index, open_receiver)
    assert fleet.sender.push(Trainer(seed=2)).left_out == {} and fleet.serving(2) == "abc"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_takes_no_more_bytes_is_named_and_left_out(end: threading.Event, asynchronous: bool) -> None:
    """It has its connection and answers every question: nothing but the plane knows."""
    fleet, model = Fleet(plane="tcp", quorum=2, timeout_s=4.0), Trainer(seed=1)
    joined_by(fleet, 1, stalling(end))
    fleet.sender.prepare(model)
    small_buffers(fleet.sender)
    started = time.monotonic()
    report = fleet.sender.push_async(model).wait() if asynchronous else fleet.sender.push(model)
    assert time.monotonic() - started < 15.0
    assert report.servers == ("a", "c") and fleet.serving(1) == "ac" and list(report.left_out) == ["b"]
    assert report.left_out["b"].startswith("TransferError: server rank 1 left the data plane")
    assert fleet.servers[1].state() == "SERVING" and fleet.servers[1].version == 0
    joined_by(fleet, 1, open_receiver)
    assert fleet.sender.push(Trainer(seed=2)).left_out == {} and fleet.serving(2) == "abc"


def test_without_a_quorum_the_error_says_which_rank(end: threading.Event) -> None:
    fleet = Fleet(plane="tcp", timeout_s=4.0)
    joined_by(fleet, 2, stalling(end))
    fleet.sender.prepare(Trainer(seed=1))
    small_buffers(fleet.sender)
    with pytest.raises(TransferError, match="server rank 2 left the data plane") as raised:
        fleet.sender.push(Trainer(seed=1))
    assert raised.value.ranks == (2,) and fleet.states() == ["SERVING"] * 3


def test_ranks_are_counted_over_the_servers(end: threading.Event) -> None:
    """Beside a server of two ranks, the third rank of the plane is that of the second server."""
    fleet, two = Fleet(), TwoRanks()
    joined_by(fleet, 1, never(end))
    controls: list[Any] = [two.control, *fleet.controls[1:]]
    with FP8Sender(controls, quorum=2, timeout_s=3.0, bucket_bytes=64 << 10) as sender:
        report = sender.push(Trainer(seed=1))
    assert report.servers == ("two ranks", "c") and list(report.left_out) == ["b"]
    assert "server rank(s) [2] of 4 did not join" in report.left_out["b"]
    assert [fingerprint(model) for model in two.models] == [expected(Trainer(seed=1))] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_blamed_on_its_server(end: threading.Event, rank: int) -> None:
    fleet, two = Fleet(), TwoRanks()
    join = two._join
    for receiver in two.receivers:
        receiver._join = lambda meeting, number: (never(end) if number == 1 + rank else join)(meeting, number)
    controls: list[Any] = [fleet.controls[0], two.control, fleet.controls[2]]
    with FP8Sender(controls, quorum=2, timeout_s=3.0, bucket_bytes=64 << 10) as sender:
        report = sender.push(Trainer(seed=1))
        assert list(report.left_out) == ["two ranks"] and fleet.serving(1) == "ac"
        end.set()
        for receiver in two.receivers:
            receiver._join = join
        assert sender.push(Trainer(seed=2)).left_out == {}
    assert [fingerprint(model) for model in two.models] == [expected(Trainer(seed=2))] * 2


def test_too_few_are_left_if_two_never_join(end: threading.Event) -> None:
    fleet = Fleet(plane="tcp", quorum=2, timeout_s=2.0)
    for index in (0, 2):
        joined_by(fleet, index, never(end))
    with pytest.raises(errors.PushError, match=r"1 server\(s\) are left, quorum=2.*\[0, 2\] of 3 did not join"):
        fleet.sender.push(Trainer(seed=1))
    assert fleet.states() == ["SERVING"] * 3


# ---- hosts that are gone without a word


def test_both_ends_notice_a_host_that_went_down(door: SocketSender, pool: ThreadPoolExecutor) -> None:
    """The kernel asks, within a minute, also between two pushes, when nothing is sent."""
    meeting = rendezvous("tcp", door.port)
    joining = pool.submit(door.join, meeting)
    half = open_receiver(meeting, 0)
    joining.result()
    assert isinstance(half, SocketReceiver)
    for connection in (door.links._ranks[0], half.link._sender):
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        idle, every, times = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + every * times <= 60
    half.close()
