"""Who is on the network and does not know the secret: he joins nothing, ends no process, and changes no weight."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from sender import FP8Sender
from shared import errors, protocol
from shared.errors import TransferError
from shared.planes import ReceiveHalf, links, open_receiver
from shared.planes.distributed import GroupSender
from shared.planes.signing import HEADER_BYTES, MAX_STORED_BYTES, SignedStore, Signer, new_secret
from shared.planes.sockets import SocketSender
from tests.test_distributed import ServerProcess
from tests.test_push_memory import Server, expected
from tests.tiny_models import Trainer

SECRET, OTHER = new_secret(), new_secret()
BUCKET = torch.arange(4096, dtype=torch.int64).to(torch.uint8)
JUNK = [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 36, bytes(36), os.urandom(1 << 16)]


def rendezvous(plane: protocol.PlaneName, port: int, **changed: Any) -> protocol.Rendezvous:
    fields = {"secret": SECRET, "world_size": 2, "first_rank": 0, "timeout_s": 5.0, **changed}
    return protocol.Rendezvous(plane=plane, host="127.0.0.1", port=port, key="k", **fields)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5.0)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=8) as made:
        yield made


# ---- at the sender's door


@pytest.fixture
def door() -> Iterator[SocketSender]:
    sender = SocketSender("127.0.0.1", timeout_s=5.0)
    yield sender
    sender.close()


def joins_and_receives(door: SocketSender, pool: ThreadPoolExecutor, **changed: Any) -> None:
    meeting = rendezvous("tcp", door.port, **changed)
    joining: list[Future[Any]] = [pool.submit(door.join, meeting)]
    half = open_receiver(meeting, 0)
    joining[0].result()
    arrived = torch.zeros_like(BUCKET)
    door.send(BUCKET, digest=7)
    assert half.receive(arrived, timeout_s=5.0) == 7 and torch.equal(arrived, BUCKET)
    half.close()


def test_strangers_do_not_keep_the_ranks_from_joining(door: SocketSender, pool: ThreadPoolExecutor) -> None:
    strangers = [connect(door.port) for _ in range(40)]  # more than one of each, some of which wait for ever
    for stranger, junk in zip(strangers, JUNK * 5, strict=False):
        stranger.sendall(junk)
    for stranger in strangers[::3]:
        stranger.close()
    joins_and_receives(door, pool)
    for stranger in strangers:
        stranger.close()


def test_more_strangers_than_are_let_in(
    door: SocketSender, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fill the door until their time is over; then the ranks come in, or the join fails in its own time."""
    monkeypatch.setattr(links, "_MOST_STRANGERS", 2)
    strangers = [connect(door.port) for _ in range(10)]
    meeting, started = rendezvous("tcp", door.port, timeout_s=1.0), time.monotonic()
    joining = pool.submit(door.join, meeting)
    with pytest.raises(TransferError, match=r"did not join|did not let this rank join|closed|broke|silent"):
        open_receiver(meeting, 0)
    with pytest.raises(TransferError, match=r"server rank\(s\) \[0\] of 1 did not join"):
        joining.result()
    assert time.monotonic() - started < 3.0
    for stranger in strangers:
        stranger.close()


def test_a_rank_with_another_secret_never_joins(door: SocketSender, pool: ThreadPoolExecutor) -> None:
    joining = pool.submit(door.join, rendezvous("tcp", door.port, timeout_s=1.0))
    with pytest.raises(TransferError, match="does not know the secret"):
        open_receiver(rendezvous("tcp", door.port, secret=OTHER), 0)
    with pytest.raises(TransferError, match="did not join"):
        joining.result()


@pytest.mark.parametrize("answer", ["nothing", "the sender's own tag", "of an earlier rank"])
def test_a_rank_that_cannot_answer_never_joins(door: SocketSender, pool: ThreadPoolExecutor, answer: str) -> None:
    """It saw another rank join, and sends what it saw."""
    joining = pool.submit(door.join, rendezvous("tcp", door.port, timeout_s=1.0, world_size=3))
    seen, nonce = Signer(SECRET), bytes(32)
    stranger = connect(door.port)
    stranger.sendall(struct.pack("<I32s", 1, nonce))
    challenge = stranger.recv(64, socket.MSG_WAITALL)
    old = seen.tag("receiver", nonce, bytes(32), struct.pack("<I32s", 1, nonce))
    stranger.sendall({"nothing": bytes(32), "the sender's own tag": challenge[32:], "of an earlier rank": old}[answer])
    assert stranger.recv(1) == b"", "it was let in"
    with pytest.raises(TransferError, match=r"\[0, 1\] of 2 did not join"):
        joining.result()


@pytest.mark.parametrize("left_s", [1e-9, 0.9999996, 0.9999999999, 1.0, 59.9999997, 86400.0])
def test_every_deadline_is_one_that_the_kernel_takes(left_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as connection:
        monkeypatch.setattr(links, "time", SimpleNamespace(monotonic=lambda: 0.0))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            links._set_deadline(connection, option, left_s)


def test_a_rank_joins_once(door: SocketSender, pool: ThreadPoolExecutor) -> None:
    meeting = rendezvous("tcp", door.port, world_size=3)
    joining = pool.submit(door.join, meeting)
    first = open_receiver(meeting, 0)
    wait_for(lambda: 0 in door.links._ranks)
    again, beyond = open_receiver(meeting, 0), open_receiver(meeting, 9)
    for half in (again, beyond):
        with pytest.raises(TransferError, match=r"closed|broke"):
            half.receive(BUCKET.clone(), timeout_s=5.0)
        half.close()
    last = open_receiver(meeting, 1)
    joining.result()
    door.send(BUCKET, digest=7)
    for half in (first, last):
        assert half.receive(BUCKET.clone(), timeout_s=5.0) == 7
        half.close()


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("junk", [*JUNK, bytes(64), os.urandom(64)], ids=lambda junk: f"{len(junk)} bytes {junk[:2]!r}")
@pytest.mark.parametrize("stays", [True, False])
def test_whoever_has_the_senders_address_is_no_sender(junk: bytes, stays: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept: list[socket.socket] = []

        def answer() -> None:
            connection, _ = listener.accept()
            kept.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(junk)
            if not stays:
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        started = time.monotonic()
        with pytest.raises(TransferError):
            open_receiver(rendezvous("tcp", listener.getsockname()[1], timeout_s=0.5), 0)
        assert time.monotonic() - started < 3.0
        thread.join()
        kept[0].close()


# ---- between the sender and a rank


class Middle:
    """Stands between a rank and the sender. `change(data, offset)` is what the rank gets of what the sender sent."""

    def __init__(self, change: Callable[[bytes, int], bytes]) -> None:
        self.change: Callable[[bytes, int], bytes] | None = change

    def join(self, meeting: protocol.Rendezvous, rank: int) -> ReceiveHalf:
        if self.change is None:
            return open_receiver(meeting, rank)
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, args=(listener, meeting.port), daemon=True).start()
        return open_receiver(meeting.model_copy(update={"port": listener.getsockname()[1]}), rank)

    def _serve(self, listener: socket.socket, port: int) -> None:
        change = self.change
        assert change is not None
        with listener, listener.accept()[0] as rank, connect(port) as sender:
            threading.Thread(target=self._pass, args=(rank, sender, lambda data, offset: data), daemon=True).start()
            self._pass(sender, rank, change)

    @staticmethod
    def _pass(source: socket.socket, to: socket.socket, change: Callable[[bytes, int], bytes]) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                to.sendall(change(data, offset))
                offset += len(data)
            to.shutdown(socket.SHUT_RDWR)


GREETING = 64  # bytes that the sender sends before the first header


def flipped(at: int, bit: int = 1) -> Callable[[bytes, int], bytes]:
    def change(data: bytes, offset: int) -> bytes:
        if not offset <= at < offset + len(data):
            return data
        found = bytearray(data)
        found[at - offset] ^= bit
        return bytes(found)

    return change


def inserted(at: int, what: bytes) -> Callable[[bytes, int], bytes]:
    def change(data: bytes, offset: int) -> bytes:
        cut = at - offset
        return data[:cut] + what + data[cut:] if 0 <= cut < len(data) else data

    return change


def two_flipped(first: int, second: int, bit: int) -> Callable[[bytes, int], bytes]:
    return lambda data, offset: flipped(second, bit)(flipped(first, bit)(data, offset), offset)


PAYLOAD = GREETING + HEADER_BYTES
TAMPERED = {
    "nonce": flipped(3),
    "tag of the sender": flipped(40),
    "number": flipped(GREETING),
    "size": flipped(GREETING + 8),
    "size, far too large": flipped(GREETING + 14, 0x7F),
    "digest": flipped(GREETING + 16),
    "tag of the header": flipped(GREETING + 30),
    "payload": flipped(PAYLOAD + 1000),
    "payload, two signs": two_flipped(PAYLOAD + 1007, PAYLOAD + 2015, 0x80),
    "bytes put in before a header": inserted(GREETING, b"x" * 100),
    "bytes put into a bucket": inserted(PAYLOAD + 4096, b"x" * 128),
    "a header of nobody": inserted(GREETING, struct.pack("<QQQ", 0, 1 << 62, 0) + bytes(32)),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_what_is_changed_on_its_way_is_never_served(change: Callable[[bytes, int], bytes]) -> None:
    server, middle = Server(), Middle(change)
    server.receiver = Receiver(server.model, server.engine, SingleRank(), join=middle.join)
    server.control._handle = server.receiver.handle
    before, started = fingerprint(server.model), time.monotonic()
    with FP8Sender([server.control], timeout_s=3.0, bucket_bytes=64 << 10) as sender:
        with pytest.raises(TransferError):
            sender.push(Trainer())
        assert time.monotonic() - started < 12.0
        assert fingerprint(server.model) == before and server.state() == "SERVING" and server.version == 0
        middle.change = None
        sender.push(Trainer())
    assert fingerprint(server.model) == expected(Trainer())


def test_who_only_listens_learns_neither_secret_nor_digests() -> None:
    seen = bytearray()

    def note(data: bytes, offset: int) -> bytes:
        seen.extend(data)
        return data

    server, middle = Server(), Middle(note)
    server.receiver = Receiver(server.model, server.engine, SingleRank(), join=middle.join)
    server.control._handle = server.receiver.handle
    with FP8Sender([server.control], timeout_s=5.0, bucket_bytes=64 << 10) as sender:
        sender.push(Trainer())
        secret, digests, session = sender._fleet.half.secret, sender._fleet._all_digests, sender._fleet._session
    assert len(seen) > 10_000
    for word in (secret.encode(), bytes.fromhex(secret), session.encode(), bytes.fromhex(session)):
        assert word not in seen
    assert not any(found.to_bytes(8, "little") in seen for found in digests)


def test_the_secret_is_in_no_text() -> None:
    meeting = rendezvous("tcp", 1)
    assert SECRET not in repr(meeting) and SECRET not in str(meeting)
    body = meeting.model_dump_json().replace(SECRET, SECRET[:-1] + "Z").encode()
    with pytest.raises(errors.ConfigError) as caught:
        protocol.decode_message(b'{"kind":"open","rendezvous":[' + body + b"]}")
    assert SECRET[:-1] not in str(caught.value)


# ---- a server that says something else than it should


@pytest.mark.parametrize(
    ("kind", "change", "error"),
    [
        ("describe", lambda reply: info_with(reply, sglang_version="latest"), errors.IncompatibleServerError),
        (
            "describe",
            lambda reply: reply.model_copy(update={"version": protocol.MOST_VERSION}),
            errors.StaleVersionError,
        ),
        ("offer", lambda reply: manifest_of(reply, slice(1, None)), errors.PlanError),
        ("offer", lambda reply: manifest_of(reply, slice(None, None, -1)), errors.PlanError),
        ("offer", lambda reply: manifest_with(reply, shape=(1,)), errors.PlanError),
        ("offer", lambda reply: manifest_with(reply, dtype="float32"), errors.PlanError),
    ],
)
def test_a_server_that_lies_is_named(
    kind: str, change: Callable[[protocol.Reply], protocol.Reply], error: type[errors.Fp8SyncError]
) -> None:
    server = Server()
    handle = server.control._handle
    server.control._handle = lambda message: change(handle(message)) if message.kind == kind else handle(message)
    with FP8Sender([server.control], plane="memory", timeout_s=2.0) as sender, pytest.raises(error):
        sender.push(Trainer())


def info_with(reply: protocol.Reply, **fields: Any) -> protocol.Reply:
    assert reply.info is not None
    return reply.model_copy(update={"info": reply.info.model_copy(update=fields)})


def manifest_of(reply: protocol.Reply, part: slice) -> protocol.Reply:
    assert reply.manifest is not None
    return reply.model_copy(update={"manifest": reply.manifest[part]})


def manifest_with(reply: protocol.Reply, **fields: Any) -> protocol.Reply:
    assert reply.manifest is not None
    first, *others = reply.manifest
    return reply.model_copy(update={"manifest": (first.model_copy(update=fields), *others)})


# ---- the store of the gloo plane


@pytest.fixture
def store() -> Iterator[GroupSender]:
    sender = GroupSender("127.0.0.1", timeout_s=5.0)
    yield sender
    sender.close()


def stranger_in(sender: GroupSender) -> dist.TCPStore:
    return dist.TCPStore(sender.host, sender.port, is_master=False, timeout=timedelta(seconds=5))


STANDING = {
    "nothing": lambda store: b"",
    "a word": lambda store: b"hello",
    "a tag's length": lambda store: bytes(32),
    "junk": lambda store: os.urandom(400),
    "8 MiB": lambda store: bytes(8 << 20),
    "what stands under another name": lambda store: store.get("k/0/0"),
    "signed with another secret": lambda store: Signer(OTHER).tag("store", b"0/1", b"x" * 300) + b"x" * 300,
}


@pytest.mark.parametrize("make", STANDING.values(), ids=STANDING)
def test_what_a_stranger_writes_into_the_store_fails_the_join(
    store: GroupSender, pool: ThreadPoolExecutor, make: Callable[[Any], bytes]
) -> None:
    started = time.monotonic()
    joining = pool.submit(store.join, rendezvous("gloo", store.port, timeout_s=3.0))
    hostile = stranger_in(store)
    hostile.set("k/0/1", make(hostile))  # type: ignore[arg-type]
    with pytest.raises(TransferError, match=r"not signed by a rank|not of this session"):
        joining.result()
    assert time.monotonic() - started < 5.0


def test_a_server_process_survives_a_hostile_store() -> None:
    """It joins where a stranger wrote before it, says so, and takes the next push."""
    server, model = ServerProcess("server"), Trainer()
    with FP8Sender([server], plane="gloo", timeout_s=3.0, bucket_bytes=64 << 10) as sender:
        call, stop = server.call, threading.Event()

        def call_beside_a_stranger(message: Any, timeout_s: float) -> protocol.Reply:
            if isinstance(message, protocol.Open):
                plane = sender._fleet.half.plane
                assert isinstance(plane, GroupSender)
                hostile, key = stranger_in(plane), message.rendezvous[0].key

                def write() -> None:
                    while not stop.is_set():
                        with contextlib.suppress(RuntimeError):
                            hostile.set(f"{key}/0/0", "hello")

                threading.Thread(target=write, daemon=True).start()
            return call(message, timeout_s)

        server.call = call_beside_a_stranger  # type: ignore[method-assign]
        with pytest.raises(TransferError):
            sender.push(model)
        stop.set()
        server.call = call  # type: ignore[method-assign]
        assert server.process.is_alive()
        assert sender.push(model).version >= 1


@pytest.mark.parametrize("where", ["store", "gloo"])
def test_junk_at_the_ports_of_gloo_does_not_keep_the_ranks_from_joining(
    store: GroupSender, pool: ThreadPoolExecutor, where: str
) -> None:
    """Junk only. Who knows gloo's own protocol can do more: docs/security.md."""
    meeting = rendezvous("gloo", store.port)
    joining = pool.submit(store.join, meeting)
    port = store.port if where == "store" else _port_in(bytes(stranger_in(store).get("k/0/0")))
    strangers = [connect(port) for _ in JUNK]
    for stranger, junk in zip(strangers, JUNK, strict=True):
        with contextlib.suppress(OSError):
            stranger.sendall(junk)
    half = open_receiver(meeting, 0)
    joining.result()
    arrived = torch.zeros_like(BUCKET)
    sent = pool.submit(store.send, BUCKET, 7)
    assert half.receive(arrived, timeout_s=5.0) == 7 and torch.equal(arrived, BUCKET)
    sent.result()
    half.close()
    for stranger in strangers:
        stranger.close()


def _port_in(record: bytes) -> int:
    """Of the address in a signed record of gloo's: family 2, then the port in network order, then 127.0.0.1."""
    found = record.index(b"\x7f\x00\x00\x01")
    return int.from_bytes(record[found - 2 : found], "big")


def test_a_rank_of_gloo_with_another_secret_never_joins(store: GroupSender, pool: ThreadPoolExecutor) -> None:
    joining = pool.submit(store.join, rendezvous("gloo", store.port, timeout_s=2.0))
    with pytest.raises(TransferError, match="not signed by a rank"):
        open_receiver(rendezvous("gloo", store.port, timeout_s=2.0, secret=OTHER), 0)
    with pytest.raises(TransferError):
        joining.result()


def test_whoever_has_the_stores_address_is_no_store() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.sendall(os.urandom(4096))
                    connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(TransferError, match="cannot reach the sender's store"):
            open_receiver(rendezvous("gloo", listener.getsockname()[1], timeout_s=1.0), 0)
        listener.shutdown(socket.SHUT_RDWR)


# ---- the signatures themselves


def test_a_store_takes_and_gives_signed_values_only(tmp_path: Path) -> None:
    plain = dist.HashStore()
    ours, theirs = SignedStore(plain, Signer(SECRET), "k/"), SignedStore(plain, Signer(OTHER), "k/")
    ours.set("a", b"value")
    assert ours.get("a") == b"value"
    with pytest.raises(TransferError, match="a in the store of the data plane is not signed"):
        theirs.get("a")
    plain.set("k/b", plain.get("k/a"))  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="b in the store"):
        ours.get("b")
    with pytest.raises(TransferError, match="too many"):
        ours.set("c", bytes(MAX_STORED_BYTES + 1))
    plain.set("k/c", bytes(MAX_STORED_BYTES + 33))  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="bytes: not of this session"):
        ours.get("c")


def test_a_tag_is_of_one_secret_one_use_and_these_parts() -> None:
    signer = Signer(SECRET)
    tags = [
        signer.tag("a", b"bc"),
        signer.tag("a", b"b", b"c"),
        signer.tag("ab", b"c"),
        signer.tag("a", b"bc", b""),
        Signer(OTHER).tag("a", b"bc"),
    ]
    assert len(set(tags)) == len(tags) and all(len(tag) == 32 for tag in tags)


def test_a_header_is_of_one_bucket_of_one_session() -> None:
    signer = Signer(SECRET)
    header = signer.header(3, 1 << 40, 2**64 - 1)
    assert len(header) == HEADER_BYTES and signer.read_header(header, 3) == (1 << 40, 2**64 - 1)
    for wrong, number in ((header, 4), (header[:-1], 3), (b"", 3), (header + b"\0", 3)):
        with pytest.raises(TransferError):
            signer.read_header(wrong, number)
    with pytest.raises(TransferError):
        Signer(OTHER).read_header(header, 3)
    assert (2**64 - 1).to_bytes(8, "little") not in header
