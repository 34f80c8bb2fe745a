"""The plane of one host, over shared memory: who may write where and until when, what a rank that lies can do, and
whole pushes. On GPUs: tests/gpu/test_same_host.py.
"""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from receiver_plugin.rooms import Need, enter
from sender import FP8Sender
from shared import errors, protocol
from shared.errors import TransferError
from shared.planes import open_receiver, same_host, same_host_messages, shared_memory
from shared.planes.same_host import SameHostReceiver, SameHostSender
from shared.planes.same_host_messages import Said
from shared.planes.shared_memory import SharedMapping, allocate
from shared.planes.signing import Signer
from tests.same_host_process import Peer
from tests.test_distributed import ServerProcess, at_bucket, our_threads, soon
from tests.test_hostile import OTHER, SECRET, Middle, flipped, pool, rendezvous
from tests.test_push_memory import Server, expected
from tests.test_ranks import PROCESSES
from tests.test_ways import Watched, exclusive_way, way
from tests.tiny_models import FakeMemory, Trainer

__all__ = ["exclusive_way", "pool", "way"]

# No process can open GPU memory of its own, and where there is a GPU these ranks would export that.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its server ranks are in this process")

SIZES = [128, 1 << 20, 256, 3 << 20, 4096]


def bucket(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8)


def shared_maps() -> int:
    """How often shared memory of ours is mapped in this process."""
    return sum("memfd:fp8sync" in line for line in Path("/proc/self/maps").read_text().splitlines())


def unmapped(before: int) -> bool:
    gc.collect()  # an error in a cycle keeps the memory of its frames
    return shared_maps() <= before


@pytest.fixture(autouse=True)
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No thread, no memory, and never a name in the folder of shared memory."""
    caplog.set_level("CRITICAL")  # a logged error is kept by pytest, and with it the frames and memory it came from
    yield
    assert soon(lambda: not our_threads()), our_threads()
    assert soon(lambda: unmapped(0)), shared_maps()
    assert shared_memory._files == {}
    assert not any("fp8sync" in name for name in os.listdir("/dev/shm"))


@pytest.fixture
def plane() -> Iterator[SameHostSender]:
    made = SameHostSender("127.0.0.1", timeout_s=5.0)
    yield made
    made.close()


def meeting_of(plane: SameHostSender, num_ranks: int = 1, **changed: Any) -> protocol.Rendezvous:
    return rendezvous("same_host", plane.port, world_size=1 + num_ranks, **changed)


@pytest.fixture
def join(plane: SameHostSender, pool: ThreadPoolExecutor) -> Iterator[Callable[..., list[SameHostReceiver]]]:
    halves: list[SameHostReceiver] = []

    def joined(num_ranks: int = 1) -> list[SameHostReceiver]:
        meeting = meeting_of(plane, num_ranks)
        coming = [pool.submit(SameHostReceiver, meeting, rank) for rank in range(num_ranks)]
        plane.join(meeting)
        halves.extend(future.result(5.0) for future in coming)
        return halves

    yield joined
    plane.close()
    for half in halves:
        half.close()


# ---- a bucket


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_buckets_arrive_bit_for_bit(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor, num_ranks: int, num_slots: int
) -> None:
    sent = [bucket(size) for size in SIZES]

    def take_all(half: SameHostReceiver) -> list[tuple[int, torch.Tensor]]:
        memory, found, coming = allocate(num_slots * max(SIZES)), list[Any](), list[Any]()

        def take() -> None:
            half.arrive(5.0)
            digest, arrived = coming.pop(0)
            found.append((digest, arrived.clone()))
            arrived.fill_(255)

        for number, size in enumerate(SIZES):
            if len(coming) == num_slots:
                take()
            to = memory[number % num_slots * max(SIZES) :][:size]
            coming.append((half.receive(to, 5.0), to))
        while coming:
            take()
        return found

    taking = [pool.submit(take_all, half) for half in join(num_ranks)]
    for number, data in enumerate(sent):
        plane.send(data, digest=(1 << 63) + number)
        data.add_(1)  # its memory is the sender's again on return
    plane.flush()
    for future in taking:
        found = future.result(10.0)
        assert [digest for digest, _ in found] == [(1 << 63) + number for number in range(len(SIZES))]
        assert all(torch.equal(arrived, data - 1) for (_, arrived), data in zip(found, sent, strict=True))


def test_nothing_is_written_before_the_place_is_free(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor
) -> None:
    half, to = join()[0], allocate(4096)
    receiving = pool.submit(half.receive, to, 5.0)
    first, second = bucket(4096), bucket(4096)
    plane.send(first, 1)
    assert receiving.result(5.0) == 1
    half.arrive(5.0)
    sending = pool.submit(plane.send, second, 2)
    time.sleep(0.2)  # a rank that is slow to take what it has
    assert torch.equal(to, first) and not sending.done()
    assert half.receive(to, 5.0) == 2
    half.arrive(5.0)
    sending.result(5.0)
    assert torch.equal(to, second)


def test_a_rank_without_a_place_is_named_at_the_deadline(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor
) -> None:
    plane._timeout_s = 0.3
    halves = join(3)
    taking = [pool.submit(halves[rank].receive, allocate(128), 5.0) for rank in (0, 2)]
    with pytest.raises(TransferError, match=r"\[1\] had no place for bucket 0") as caught:
        plane.send(bucket(128), 1)
    assert caught.value.ranks == (1,)
    plane.close()
    for future in taking:
        with pytest.raises(TransferError):
            future.result(5.0)


def test_a_rank_that_waits_for_another_size_is_named(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor
) -> None:
    halves, places = join(2), [allocate(256), allocate(256)]
    taking = [pool.submit(halves[0].receive, places[0][:128], 5.0), pool.submit(halves[1].receive, places[1], 5.0)]
    with pytest.raises(TransferError, match=r"\[1\] wait for another size than the 128 bytes of bucket 0") as caught:
        plane.send(bucket(128), 1)
    assert caught.value.ranks == (1,)
    plane.close()
    assert all(isinstance(future.exception(5.0), TransferError) for future in taking)
    assert not any(place.any() for place in places), "nothing was written"


def test_memory_that_no_other_process_can_open_is_an_error_on_both_sides(plane: SameHostSender, join: Any) -> None:
    half = join()[0]
    with pytest.raises(TransferError, match="does not lie in shared memory"):
        half.receive(torch.zeros(128, dtype=torch.uint8), 5.0)
    with pytest.raises(TransferError, match=r"rank\(s\) \[0\] left the data plane: .*does not lie in shared memory"):
        plane.send(bucket(128), 1)


# ---- coming and going


def test_a_server_of_another_host_is_refused(
    plane: SameHostSender, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = iter([bytes(16), same_host_messages.this_host()])  # as the rank says it, as the sender has it
    monkeypatch.setattr(same_host_messages, "this_host", lambda: next(hosts))
    meeting, started = meeting_of(plane), time.monotonic()
    coming = pool.submit(open_receiver, meeting, 0)
    with pytest.raises(TransferError, match="server rank 0 cannot join: it is on another host than") as caught:
        plane.join(meeting)
    assert caught.value.ranks == (0,)
    plane.close()
    assert isinstance(coming.exception(5.0), TransferError)
    assert time.monotonic() - started < 3.0


def test_a_server_whose_memory_cannot_be_opened_is_refused(
    plane: SameHostSender, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another PID namespace: the number of its process is that of no process here, or of another one."""
    monkeypatch.setattr(os, "getpid", lambda: (1 << 22) + 1)
    meeting = meeting_of(plane)
    coming = pool.submit(open_receiver, meeting, 0)
    with pytest.raises(TransferError, match=r"server rank 0 cannot join: .*one PID namespace"):
        plane.join(meeting)
    plane.close()
    assert isinstance(coming.exception(5.0), TransferError)


def test_a_sender_of_another_secret_cannot_write(plane: SameHostSender, join: Any, pool: ThreadPoolExecutor) -> None:
    half, to = join()[0], allocate(128)
    plane.links.signer = Signer(OTHER)
    receiving = pool.submit(half.receive, to, 5.0)
    with pytest.raises(TransferError, match="not signed"):
        plane.send(bucket(128), 1)
    assert isinstance(receiving.exception(5.0), TransferError) and not to.any()


def test_an_idle_rank_sees_that_its_sender_is_gone(plane: SameHostSender, join: Any) -> None:
    half = join()[0]
    assert half.alive()
    plane.close()
    assert not half.alive()
    half.close()
    half.close()


def test_release_unmaps(plane: SameHostSender, join: Any, pool: ThreadPoolExecutor) -> None:
    half = join()[0]
    for number in range(10):  # more often than pieces of memory may be open at a time
        to = allocate(128)
        receiving = pool.submit(half.receive, to, 5.0)
        plane.send(bucket(128), number)
        assert receiving.result(5.0) == number
        half.arrive(5.0)
        assert shared_maps() == 2  # one on each side
        half.release(5.0)
        assert shared_maps() == 1 and half.alive()
        del to, receiving
    assert shared_maps() == 0


# ---- until when a sender may write


class Slow:
    """Copies that are under way until the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over, write = threading.Event(), SharedMapping.write

        def begin(mapping: SharedMapping, data: torch.Tensor, offset: int) -> Callable[[], bool]:
            write(mapping, data, offset)
            return self.over.is_set

        monkeypatch.setattr(SharedMapping, "write", begin)


@pytest.mark.parametrize("who", ["the rank gives up", "the sender gives up"])
def test_memory_is_kept_until_the_last_copy_has_ended(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    slow, half, to = Slow(monkeypatch), join()[0], allocate(128)
    receiving, sending = pool.submit(half.receive, to, 5.0), pool.submit(plane.send, bucket(128), 1)
    assert receiving.result(5.0) == 1
    arriving = pool.submit(half.arrive, 5.0)
    ending = pool.submit(half.interrupt if who == "the rank gives up" else plane.close)
    with pytest.raises(TransferError, match=r"left the data plane|closed"):
        sending.result(5.0)
    closing = pool.submit(half.close)
    time.sleep(0.2)
    assert half._exported and not closing.done()
    slow.over.set()
    closing.result(5.0)
    ending.result(5.0)
    assert not half._exported and isinstance(arriving.exception(5.0), TransferError)


def test_a_bucket_is_there_when_its_copy_has_ended(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, half, to = Slow(monkeypatch), join()[0], allocate(128)
    receiving, sending = pool.submit(half.receive, to, 5.0), pool.submit(plane.send, bucket(128), 1)
    assert receiving.result(5.0) == 1  # the digest goes ahead
    arriving = pool.submit(half.arrive, 5.0)
    time.sleep(0.1)
    assert not arriving.done() and not sending.done()
    slow.over.set()
    arriving.result(5.0)
    sending.result(5.0)


def test_a_copy_that_never_ends_is_never_let_go(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_host, "_END_S", 0.2)
    slow, half = Slow(monkeypatch), join()[0]
    plane._timeout_s = 0.2
    receiving = pool.submit(half.receive, allocate(128), 5.0)
    with pytest.raises(TransferError, match="bucket 0 was not copied"):
        plane.send(bucket(128), 1)
    receiving.result(5.0)
    plane.close()
    closing = pool.submit(half.close)
    time.sleep(0.3)
    assert not closing.done()
    slow.over.set()
    closing.result(5.0)


def send_and_wait(pipe: Connection, secret: str) -> None:
    """A sender in a process of its own, which sends one bucket and then does nothing."""
    plane = SameHostSender("127.0.0.1", timeout_s=5.0)
    pipe.send(plane.port)
    plane.join(meeting_of(plane, secret=secret))
    plane.send(torch.full((128,), 7, dtype=torch.uint8), 7)
    pipe.send("sent")
    time.sleep(60.0)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("ready", [True, False])
def test_a_rank_outlives_its_sender(pool: ThreadPoolExecutor, end: signal.Signals, ready: bool) -> None:
    mine, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=send_and_wait, args=(theirs, SECRET), daemon=True)
    process.start()
    try:
        assert mine.poll(30.0)
        half, to = SameHostReceiver(rendezvous("same_host", mine.recv()), 0), allocate(128)
        assert half.receive(to, 5.0) == 7
        half.arrive(5.0)
        assert to.eq(7).all() and mine.poll(5.0)
        if ready:
            waiting = pool.submit(half.receive, to, 1.0)
        os.kill(process.pid or 0, end)
        if ready:
            assert isinstance(waiting.exception(3.0), TransferError)
        if end == signal.SIGKILL:
            assert soon(lambda: not half.alive())
        closing = pool.submit(half.close)
        if end == signal.SIGSTOP:
            time.sleep(0.3)
            assert not closing.done(), "it may write as soon as it goes on"
            os.kill(process.pid or 0, signal.SIGCONT)
        closing.result(5.0)
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_rank_that_dies_is_named_at_once(plane: SameHostSender, steps: int) -> None:
    """Before its first place, with a place, and when it has taken a bucket."""
    with Peer(plane, "cpu", 1, SIZES) as peer:
        peer.step(steps)
        if steps == 2:
            plane.send(bucket(SIZES[0]), 1)
            assert peer.line().startswith("1 ")
        peer.process.kill()
        started = time.monotonic()
        with pytest.raises(TransferError, match="left the data plane") as caught:
            for size in SIZES[steps == 2 :]:
                plane.send(bucket(size), 1)
            plane.flush()
        assert caught.value.ranks == (0,) and time.monotonic() - started < 2.0


def test_a_rank_that_stops_is_waited_for_until_the_deadline(plane: SameHostSender) -> None:
    plane._timeout_s = 0.5
    with Peer(plane, "cpu", 1, SIZES) as peer:
        os.kill(peer.process.pid, signal.SIGSTOP)
        with pytest.raises(TransferError, match=r"\[0\] had no place"):
            plane.send(bucket(SIZES[0]), 1)
        started = time.monotonic()
        plane.close()
        assert time.monotonic() - started < 1.0


# ---- what is made where it is sent from


def test_a_bucket_can_be_made_where_it_goes(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves, places = join(2), [allocate(256) for _ in range(2)]
    assert plane.room(128) is None, "no rank has a place yet"
    receiving = [pool.submit(half.receive, to[:128], 5.0) for half, to in zip(halves, places, strict=True)]
    assert soon(lambda: plane.room(128) is not None)
    assert plane.room(256) is None, "another bucket than comes next"
    made = plane.room(128)
    assert made is not None
    made.copy_(torch.arange(128, dtype=torch.uint8))
    assert places[0][:128].eq(made).all(), "it lies there already"
    copies, copy = list[torch.Tensor](), torch.Tensor.copy_

    def noted(to: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        copies.append(to)
        return copy(to, of)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    plane.send(made, 1)
    monkeypatch.undo()
    assert len(copies) == 1, "to the second rank alone"
    for future, half, to in zip(receiving, halves, places, strict=True):
        assert future.result(5.0) == 1
        half.arrive(5.0)
        assert to[:128].eq(torch.arange(128, dtype=torch.uint8)).all()
    assert plane.room(128) is None
    plane.close()
    assert plane.room(128) is None


def test_a_rank_may_say_ahead_where_buckets_go(plane: SameHostSender, join: Any, pool: ThreadPoolExecutor) -> None:
    """Nobody waits then between one bucket and the next; each goes to its own place, in order."""
    (half,), memory = join(), allocate(3 * 128)
    places = [memory[at : at + 128] for at in (0, 128, 256)]
    for place in places:
        half.expect(place, 5.0)
    assert soon(lambda: plane.knows_place(2)) and not plane.knows_place(3)
    rooms = [plane.room(128, ahead) for ahead in range(3)]
    assert plane.room(128, 3) is None
    for number, room in enumerate(rooms):
        assert room is not None
        room.fill_(number + 1)
        plane.send(room, number)
    assert not plane.knows_place(0)
    for number, place in enumerate(places):
        assert half.receive(place, 5.0) == number, "it was told once"
        half.arrive(5.0)
        assert place.eq(number + 1).all()
    receiving = pool.submit(half.receive, places[1], 5.0)  # of a push that says nothing ahead
    plane.send(bucket(128), 7)
    assert receiving.result(5.0) == 7
    half.arrive(5.0)
    del rooms, room


def test_memory_that_kernels_may_yet_write_to_is_not_let_go(
    plane: SameHostSender, join: Any, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as they may be asked to: what was asked, the device ends before the memory is unmapped."""

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(same_host._Rank, "room", lambda rank, num_bytes, ahead: OnGpu())
    (half,), memory = join(), allocate(2 * 128)
    for at in (0, 128):
        half.expect(memory[at : at + 128], 5.0)
    assert soon(lambda: plane.knows_place(1))
    for ahead in range(2):
        assert plane.room(128, ahead) is not None
        quiet = pool.submit(plane.until_quiet)
        time.sleep(0.05)
        assert not quiet.done()
        plane.made(ahead)
        quiet.result(5.0)
    plane.room(128, 1)
    for number in range(2):
        plane.send(bucket(128), number)
    plane.until_quiet()  # it was made elsewhere, after all


def test_a_rank_that_says_too_much_ahead_is_refused(plane: SameHostSender, join: Any) -> None:
    (half,), memory = join(), allocate(128)
    for _ in range(7):
        half.expect(memory, 5.0)
    with pytest.raises(TransferError, match="more buckets than are ever under way"):
        for _ in range(7):
            plane.send(bucket(128), 1)


# ---- ranks and senders that lie


def signed(said: Said, secret: str = SECRET, rank: int = 0) -> bytes:
    return said.signed(Signer(secret), rank)


@pytest.mark.parametrize("at", [0, 4, 12, 20, 30, 45, 100, 660])
def test_a_changed_bit_in_what_a_rank_says(at: int) -> None:
    whole = bytearray(signed(Said(b"plac", 1, 128, 0, bytes(16), b"host", b"x")))
    assert Said.read(bytes(whole), Signer(SECRET), 0).number == 1
    for rank, secret in ((1, SECRET), (0, OTHER)):
        with pytest.raises(TransferError, match="not signed"):
            Said.read(bytes(whole), Signer(secret), rank)
    whole[at] ^= 1
    with pytest.raises(TransferError, match="not signed"):
        Said.read(bytes(whole), Signer(SECRET), 0)


def test_what_a_sender_told_before_is_worth_nothing_again() -> None:
    mine, kind, other = Signer(SECRET), same_host_messages.WRITTEN, same_host_messages.LET_GO
    message = same_host_messages.told(mine, kind, 3)
    assert len(message) == same_host_messages.TOLD_BYTES
    same_host_messages.check_told(message, mine, kind, 3)
    for number in (2, 4):
        with pytest.raises(TransferError, match="out of its order"):
            same_host_messages.check_told(message, mine, kind, number)
    for changed, signer, what in (
        (message, Signer(OTHER), kind),
        (message, mine, other),
        (other + message[4:], mine, other),
    ):
        with pytest.raises(TransferError, match="without the signature"):
            same_host_messages.check_told(changed, signer, what, 3)


LIES = {
    "a number again": ([1, 1], {}, "expected bucket"),
    "a number ahead": ([2], {}, "expected bucket"),
    "too many": ([1, 2, 3, 4, 5, 6, 7], {}, "more buckets than are ever under way"),
    "beyond its memory": ([1], {"offset": 1 << 62}, "not in its memory"),
    "larger than its memory": ([1], {"num_bytes": 4097}, "not in its memory"),
    "meets again": ([1], {"what": b"meet"}, "it said b'meet'"),
}


@pytest.mark.parametrize(("numbers", "changed", "match"), LIES.values(), ids=LIES)
def test_a_rank_that_lies_ends_the_plane_and_nothing_else(
    plane: SameHostSender, join: Any, numbers: list[int], changed: dict[str, Any], match: str
) -> None:
    half, to = join()[0], allocate(4096)
    said = Said(b"plac", 0, 128, 0, bytes(16), b"host", shared_memory.where(to))
    half._link.say(signed(said), time.monotonic() + 5.0)
    assert soon(lambda: bool(plane._ranks[0].places))
    with suppress(TransferError):  # the plane may leave before the last lie
        for number in numbers:
            half._link.say(signed(said._replace(number=number, **changed)), time.monotonic() + 5.0)
    assert soon(lambda: plane._ranks[0].gone is not None)
    with pytest.raises(TransferError, match=match) as caught:
        plane.send(bucket(128), 1)
    assert caught.value.ranks == (0,) and not to.any()


def test_too_much_memory_is_not_mapped(plane: SameHostSender, join: Any) -> None:
    half, pieces = join()[0], [allocate(128) for _ in range(9)]
    with suppress(TransferError):  # the plane may leave before the last piece
        for number, to in enumerate(pieces):
            said = Said(b"plac", number, 128, 0, bytes([number] * 16), b"host", shared_memory.where(to))
            half._link.say(signed(said), time.monotonic() + 5.0)
    assert soon(lambda: plane._ranks[0].gone is not None)
    assert soon(lambda: shared_maps() <= len(pieces) + 1)


def where(process: int, file: int, **changed: int) -> bytes:
    found = os.fstat(file)
    fields = {"inode": found.st_ino, "num_bytes": found.st_size, **changed}
    return shared_memory._WHERE.pack(process, file, fields["inode"], fields["num_bytes"])


def test_no_file_but_sealed_memory_is_opened() -> None:
    """A rank that lies may not make the trainer write to a file of its choice."""
    memory, me = allocate(4096), os.getpid()
    file = shared_memory._files[memory.data_ptr()]
    SharedMapping(where(me, file)).close()
    unsealed = os.memfd_create("fp8sync", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with tempfile.TemporaryFile() as other, open("/dev/null", "r+b") as device:
        other.write(bytes(4096))
        other.flush()
        read, write = os.pipe()
        for number in (other.fileno(), device.fileno(), read, unsealed):
            with pytest.raises(TransferError):
                SharedMapping(where(me, number))
        for descriptor in (read, write, unsealed):
            os.close(descriptor)
    for changed in ({"inode": 1}, {"num_bytes": 8192}, {"num_bytes": 0}):
        with pytest.raises(TransferError, match="not the memory"):
            SharedMapping(where(me, file, **changed))
    empty = os.memfd_create("fp8sync", os.MFD_ALLOW_SEALING)
    with pytest.raises(TransferError):
        SharedMapping(where(me, empty))
    os.close(empty)


def test_memory_is_for_this_user_and_never_smaller() -> None:
    memory = allocate(4096)
    file = shared_memory._files[memory.data_ptr()]
    assert os.fstat(file).st_mode & 0o777 == 0o600 and memory.numel() == 4096
    for size in (0, 1 << 20):
        with pytest.raises(OSError):
            os.ftruncate(file, size)
    del memory
    assert file not in shared_memory._files.values()
    with pytest.raises(OSError):
        os.fstat(file)


def test_memory_at_the_address_of_memory_that_is_going() -> None:
    """Python unmaps it before it says so: meanwhile another thread may be given the address."""
    memory = allocate(4096)
    shared_memory._forget(memory.data_ptr(), os.dup(0))
    shared_memory.where(memory)


GREETING = 64
TOLD = same_host_messages.TOLD_BYTES
TAMPERED = [GREETING + 1, GREETING + 5, GREETING + TOLD - 1]
TAMPERED += [GREETING + TOLD + 1, GREETING + TOLD + 5, GREETING + TOLD + 21, GREETING + 2 * TOLD - 1]
TAMPERED += [GREETING + 2 * TOLD + 1, GREETING + 2 * TOLD + 5, GREETING + 3 * TOLD - 1]


@pytest.mark.parametrize("at", TAMPERED)
def test_what_is_changed_on_its_way_is_never_served(at: int) -> None:
    server, middle = Server(), Middle(flipped(at))
    server.receiver = Receiver(server.model, server.engine, SingleRank(), join=middle.join)
    server.control._handle = server.receiver.handle
    before = fingerprint(server.model)
    with FP8Sender([server.control], plane="same_host", timeout_s=2.0, bucket_bytes=64 << 10) as sender:
        with pytest.raises(TransferError):
            sender.push(Trainer())
        assert fingerprint(server.model) == before and server.state() == "SERVING" and server.version == 0
        middle.change = None
        sender.push(Trainer())
    assert fingerprint(server.model) == expected(Trainer())


# ---- whole pushes


def sender_to(*servers: Server, **settings: Any) -> FP8Sender:
    settings = {"timeout_s": 5.0, "bucket_bytes": 64 << 10, **settings}
    return FP8Sender([server.control for server in servers], plane="same_host", **settings)


def test_each_way_serves_the_bytes_of_a_checkpoint(way: protocol.StagingWay) -> None:
    server = Watched(way)
    with sender_to(server) as sender:
        for seed in (1, 2, 3):
            report = sender.push(Trainer(seed=seed))
            assert report.staging == {"server": way} and report.num_buckets > 3
            assert fingerprint(server.model) == expected(Trainer(seed=seed))
            assert shared_maps() == (2 if way == "reserved" else 0), "lent memory is given back"
    assert soon(lambda: unmapped(0))


def test_the_bucket_of_every_way_is_exported() -> None:
    need = Need({"a": 256}, 4096, torch.device("cpu"), exported=True)
    memory = FakeMemory()
    memory.pool = [torch.zeros(4096, dtype=torch.uint8)]
    for chosen in ("reserved", "kv_pool", "in_place"):
        shared_memory.where(enter(chosen, need, memory).bucket)


def test_bytes_that_are_spoilt_in_the_memory_are_never_served(
    way: protocol.StagingWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, write = Watched(way), SharedMapping.write
    before, spoilt = fingerprint(server.model), [2]

    def begin(mapping: SharedMapping, data: torch.Tensor, offset: int) -> Callable[[], bool]:
        spoilt[0] -= 1
        if spoilt[0] == 0:
            data = data.clone()
            data[77] ^= 4
        return write(mapping, data, offset)

    monkeypatch.setattr(SharedMapping, "write", begin)
    with sender_to(server) as sender:
        with pytest.raises((TransferError, errors.ReceiveError), match=r"\[1\] are not those that were sent|closed"):
            sender.push(Trainer())
        if way == "in_place":
            assert server.state() == "FENCED"
        else:
            assert fingerprint(server.model) == before and server.state() == "SERVING"
        sender.push(Trainer())
    assert fingerprint(server.model) == expected(Trainer())


def test_buckets_are_packed_where_they_go(way: protocol.StagingWay, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the server has taken the bucket before; else they are packed as usual."""
    server, rooms, room = Watched(way), list[bool](), SameHostSender.room

    def wait_for_room(plane: SameHostSender, num_bytes: int, ahead: int) -> torch.Tensor | None:
        if len(rooms) % 2:
            assert soon(lambda: room(plane, num_bytes, ahead) is not None)
        found = room(plane, num_bytes, ahead) if len(rooms) % 2 else None
        rooms.append(found is not None)
        return found

    monkeypatch.setattr(SameHostSender, "room", wait_for_room)
    with sender_to(server, keep_snapshot=True) as sender:
        for seed in (1, 2):
            report = sender.push(Trainer(seed=seed))
            assert fingerprint(server.model) == expected(Trainer(seed=seed))
        kept = sender._keeper._last
        assert kept is not None and not any(shared_memory._files.get(b.data_ptr()) for b in kept.buckets)
        late = Server(name="late")
        sender.add_server(late.control)
        assert sender.catch_up() == ("late",)
        assert fingerprint(late.model) == expected(Trainer(seed=2))
    assert len(rooms) == 2 * report.num_buckets and rooms.count(True) == report.num_buckets


def test_several_servers_async_pushes_and_a_joiner() -> None:
    servers = [Server(name=name) for name in "abc"]
    with sender_to(*servers[:2], keep_snapshot=True) as sender:
        model = Trainer(seed=1)
        handle = sender.push_async(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        handle.wait()
        assert [fingerprint(s.model) for s in servers[:2]] == [expected(Trainer(seed=1))] * 2
        sender.push(Trainer(seed=2))
        sender.add_server(servers[2].control)
        assert sender.catch_up() == ("c",)
        assert [fingerprint(s.model) for s in servers] == [expected(Trainer(seed=2))] * 3
        sender.push(Trainer(seed=3))
        assert [fingerprint(s.model) for s in servers] == [expected(Trainer(seed=3))] * 3


def test_a_server_that_is_lost_is_left_out_with_a_quorum() -> None:
    victim, survivor = ServerProcess("victim"), Server(name="survivor")
    settings: dict[str, Any] = {"timeout_s": 10.0, "bucket_bytes": 64 << 10, "quorum": 1}
    with FP8Sender([victim, survivor.control], plane="same_host", **settings) as sender:
        at_bucket(sender, 2, victim.close)
        report = sender.push(Trainer())
        assert list(report.left_out) == ["victim"] and report.servers == ("survivor",)
    assert fingerprint(survivor.model) == expected(Trainer())


def test_an_aborted_push_gives_memory_back_at_once(exclusive_way: protocol.StagingWay) -> None:
    server, model = Watched(exclusive_way), Trainer()
    with sender_to(server) as sender:
        bad = Trainer()
        with torch.no_grad():
            bad.get_parameter("model.layers.1.mlp.up_proj.weight").view(-1)[3] = float("nan")
        with pytest.raises(errors.NonFiniteWeightError):
            sender.push(bad)
        assert soon(lambda: unmapped(0))
        sender.push(model)
    assert fingerprint(server.model) == expected(model)
