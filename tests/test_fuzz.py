"""Whatever comes in: an answer or an error of `shared.errors`, no weight changed, and the next push is taken.

About 20 s. `FP8SYNC_FUZZ=50 pytest tests/test_fuzz.py` tries 50 times as many inputs, other ones every time.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from receiver_plugin.probe import fingerprint
from sender import FP8Sender
from sender.connections import _Connection
from sender.control import HttpControl, checked
from shared import protocol
from shared.errors import Fp8SyncError, PushError, ServerUnreachableError, TransferError
from shared.planes.links import Links
from shared.planes.signing import HEADER_BYTES, SignedStore, Signer
from shared.protocol import CONTROL_PATH, Reply, decode_message
from shared.versions import EXACT_HEADER, MIN_HEADER, START_HEADER, Demand, Versions, end_of_stream
from tests.messages import MESSAGES, RENDEZVOUS, SECRET
from tests.replicas import Replicas
from tests.test_push_memory import Server, expected
from tests.tiny_models import Trainer

FACTOR = int(os.environ.get("FP8SYNC_FUZZ", "1"))
LONGEST_ERROR = 4096


def tries(number: int) -> Any:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=number * FACTOR, deadline=None, database=None, derandomize=FACTOR == 1, suppress_health_check=slow
    )


# ---- what comes in: anything, and what was a message or a reply once

NUMBERS = st.one_of(
    st.integers(), st.sampled_from([0, -1, 2**31, 2**62 - 1, 2**62, 2**63, 2**64, 10**400]), st.floats(width=64)
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=20), st.sampled_from(["s", "gloo", "a" * 20_000])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


def damage(whole: BaseModel, values: list[Any], dice: random.Random) -> bytes:
    """`whole` with values, anywhere in it, replaced by `values`, dropped or added, or with its bytes cut or changed."""
    fields = json.loads(whole.model_dump_json())
    for value in values:
        place = fields
        while inner := [part for part in (place.values() if isinstance(place, dict) else place) if _has_parts(part)]:
            if dice.random() < 0.5:
                break
            place = dice.choice(inner)
        key = dice.choice(list(place) if isinstance(place, dict) else range(len(place))) if place else None
        if key is None or dice.random() < 0.1:
            fields["new"] = value
        elif dice.random() < 0.8:
            place[key] = value
        else:
            del place[key]
    data = bytearray(json.dumps(fields).encode())
    for _ in range(dice.choice([0, 0, 0, 1, 5])):
        at = dice.randrange(len(data))
        data[at : at + dice.randrange(3)] = dice.randbytes(dice.randrange(1, 3))
    return bytes(data)


def _has_parts(value: Any) -> bool:
    return isinstance(value, (dict, list)) and bool(value)


def damaged(*whole: BaseModel) -> st.SearchStrategy[bytes]:
    dice = st.integers(0, 2**32).map(random.Random)
    return st.builds(damage, st.sampled_from(whole), st.lists(VALUES, max_size=3), dice)


BODIES = st.one_of(
    damaged(*MESSAGES),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=200),
    st.integers(1, 5000).map(lambda depth: b'{"kind":' * depth),
    st.integers(1, 5000).map(lambda depth: b"[" * depth + b"]" * depth),
)


@tries(600)
@given(BODIES)
def test_a_body_is_a_message_or_an_error_of_ours(body: bytes) -> None:
    try:
        message = decode_message(body)
    except Fp8SyncError as error:
        assert len(str(error)) < LONGEST_ERROR
    else:
        assert decode_message(message.model_dump_json()) == message


# ---- the control route, with receivers behind it


class Target:
    """Two replicas behind their HTTP process, whose weights must stay what they are, and a sender of theirs."""

    def __init__(self) -> None:
        self.server = Replicas()
        self.sender = FP8Sender([self.server.client], plane="memory", timeout_s=2.0, bucket_bytes=64 << 10)
        self.sender.push(Trainer())
        self.weights = self.server.held()

    def check(self) -> None:
        assert self.server.held() == self.weights

    def takes_a_push(self) -> None:
        wait_until(lambda: self.server.describe().state == "SERVING")
        self.sender.close()  # its session may be gone
        with FP8Sender([self.server.client], plane="memory", timeout_s=60.0) as sender:
            sender.push(Trainer(seed=7))
        assert self.server.held() == [expected(Trainer(seed=7))] * 2 and self.server.serves() is not None


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it is in the middle of a push that nobody ends"
        time.sleep(0.02)


def test_any_body_leaves_the_weights_and_the_next_push_alone() -> None:
    target = Target()

    @tries(250)
    @given(BODIES)
    def post(body: bytes) -> None:
        response = target.server._http.post(CONTROL_PATH, content=body)  # raises what the route raises
        reply = Reply.model_validate_json(response.content)
        assert (reply.error is None) == (response.status_code == 200)
        target.check()

    post()
    target.takes_a_push()


def test_any_order_of_messages_leaves_the_weights_and_the_next_push_alone() -> None:
    """Of the session under way and of others. Nothing arrives on the data plane, so nothing may be committed."""
    target = Target()
    short = st.sampled_from([0.01, 0.05])
    versions = st.sampled_from([0, 1, 2, 3, 2**62 - 2])

    def messages(session: str, opened: protocol.Open) -> st.SearchStrategy[BaseModel]:
        who = {"session": st.sampled_from([session, session, session, "s", ""]), "version": versions}
        digests = st.lists(st.integers(0, 2**64 - 1), max_size=9).map(tuple)
        in_flight = st.sampled_from(["wait", "retract", "abort"])
        return st.one_of(
            st.sampled_from([protocol.Describe(), protocol.Probe(), opened, MESSAGES[1], MESSAGES[2]]),
            st.builds(protocol.Begin, **who, deadline_s=short),
            st.builds(protocol.Begin, **who, deadline_s=short),
            st.builds(protocol.Verify, **who, digests=digests),
            st.builds(protocol.Prepare, **who, hold_s=short),
            st.builds(protocol.Hold, **who, drain_s=short, hold_s=short, in_flight=in_flight),
            st.builds(protocol.Commit, **who, drain_s=short, in_flight=in_flight, held=st.booleans()),
            st.builds(protocol.Release, **who),
            st.builds(protocol.Abort, **who, reason=st.text(max_size=9)),
            st.builds(protocol.Close, session=who["session"]),
        )

    @tries(40)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fleet = target.sender._fleet
        if target.server.receivers[0]._session is None:
            target.sender.close()
            target.sender = FP8Sender([target.server.client], plane="memory", timeout_s=2.0, bucket_bytes=64 << 10)
            wait_until(lambda: target.server.describe().state == "SERVING")
            target.sender.prepare(Trainer())
            fleet = target.sender._fleet
        incarnation = fleet._incarnations[target.server.client.name]
        opened = protocol.Open(
            sender="f", session="s", incarnation=incarnation, plan_hash="p", bucket_bytes=9, rendezvous=(RENDEZVOUS,)
        )
        for message in data.draw(st.lists(messages(fleet._session, opened), min_size=1, max_size=8)):
            target.server.send(message)
            target.check()

    run()
    target.takes_a_push()


# ---- a hostile server


CONTROL = HttpControl("http://server:1")
INFO = Server().receiver.handle(protocol.Describe())
REPLIES = st.one_of(damaged(INFO, INFO.model_copy(update={"plan_hash": "p", "fence": "why"})), BODIES)


class Line(io.RawIOBase):
    """A socket to a server that answers with these parts, whatever it is told, and then hangs up."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._left = parts, b""

    def makefile(self, mode: str, buffering: int) -> Line:
        return self

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._parts, b"")
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def sendall(self, data: bytes) -> None:
        """Nobody listens."""

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0


def hear(control: HttpControl, parts: Iterator[bytes]) -> None:
    """The next call of `control` gets these parts as its answer."""

    def connect(timeout: float) -> _Connection:
        connection = _Connection("server", 1)
        connection.sock = Line(parts)
        return connection

    control._connections.close()
    control._connections._make = connect


@tries(200)
@given(
    REPLIES,
    st.sampled_from([200, 200, 201, 204, 302, 400, 401, 403, 404, 409, 500, 503, 999]),
    st.sampled_from([None, "gzip", "deflate", "br", "nonsense"]),
    st.booleans(),
    st.sampled_from(["length", "too long", "too short", "chunked", "no chunks", "to the end", "both", "nonsense"]),
    st.integers(0, 2**32),
)
def test_an_answer_is_a_reply_or_an_error_of_ours(
    body: bytes, status: int, encoding: str | None, zipped: bool, framing: str, seed: int
) -> None:
    dice = random.Random(seed)
    body = gzip.compress(body) if zipped else body
    length = {"too long": len(body) + 5, "too short": len(body) // 2, "nonsense": -7}.get(framing, len(body))
    head = f"HTTP/1.1 {status} Said\r\nLocation: http://[bad\r\nContent-Type: \xff\r\n"
    head += f"Content-Encoding: {encoding}\r\n" if encoding is not None else ""
    if framing in ("chunked", "no chunks", "both"):
        head += "Transfer-Encoding: chunked\r\n"
    if framing not in ("chunked", "no chunks", "to the end"):
        head += f"Content-Length: {length}\r\n"
    if framing == "chunked":
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    answer = bytearray(head.encode("latin-1") + b"\r\n" + body)
    for _ in range(dice.choice([0, 0, 0, 1, 5])):
        at = dice.randrange(len(answer))
        answer[at : at + dice.randrange(3)] = dice.randbytes(dice.randrange(1, 3))
    hear(CONTROL, iter([bytes(answer)]))
    try:
        reply = CONTROL.call(protocol.Describe(), timeout_s=1.0)
    except Fp8SyncError:
        return
    assert isinstance(reply, Reply) and reply.error is None


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"


def drip(first: bytes, part: bytes, pause_s: float) -> Iterator[bytes]:
    yield first
    while True:
        time.sleep(pause_s)
        yield part


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with HttpControl("http://server:1") as control:
        hear(control, drip(HEAD, b" " * 1000, 0.05))
        with pytest.raises(PushError, match="did not answer whole within"):
            control.call(protocol.Describe(), timeout_s=0.2)
        hear(control, drip(HEAD[:20], b"X", 0.05))  # nor are its headers waited for any longer
        with pytest.raises(PushError, match="did not answer within"):
            control.call(protocol.Describe(), timeout_s=0.2)
        monkeypatch.setattr("sender.connections.MAX_BODY_BYTES", 10_000)
        hear(control, drip(HEAD, b" " * 1000, 0.0))
        with pytest.raises(PushError, match="more than 10000 bytes"):
            control.call(protocol.Describe(), timeout_s=30.0)


@pytest.mark.parametrize("length", [b"1001", b"5"])
def test_an_answer_in_part_is_none(length: bytes) -> None:
    """A commit whose answer was cut off may have happened: that is another error than one that the server reports."""
    with HttpControl("http://server:1") as control:
        hear(control, iter([HEAD.replace(b"1000000000", length), b"{"]))
        with pytest.raises(ServerUnreachableError, match="cannot be reached: IncompleteRead"):
            control.call(protocol.Describe(), timeout_s=1.0)


@tries(8)
@given(
    st.sets(st.integers(0, 7), min_size=1, max_size=2), st.lists(VALUES, min_size=1, max_size=2), st.integers(0, 999)
)
def test_a_server_that_lies_cannot_break_a_trainer(lies: set[int], values: list[Any], seed: int) -> None:
    """Every answer in a push may be another one: the push succeeds or raises an error of ours, in its time."""
    server, dice = Server(), random.Random(seed)
    handle, count = server.receiver.handle, iter(range(1000))

    def lie(message: Any) -> Reply:
        reply = handle(message)
        if next(count) not in lies:
            return reply
        try:
            return checked("server", Reply.model_validate_json(damage(reply, values, dice)))
        except ValidationError as error:  # as HttpControl does
            raise PushError("no reply of ours") from error

    server.control._handle = lie
    started = time.monotonic()
    sender = FP8Sender([server.control], plane="memory", timeout_s=0.3, bucket_bytes=64 << 10)
    with sender, contextlib.suppress(Fp8SyncError):
        sender.push(Trainer())
    assert time.monotonic() - started < 60.0
    server.control._handle = handle
    wait_until(lambda: server.state() in ("SERVING", "FENCED"))
    with FP8Sender([server.control], plane="memory", timeout_s=60.0) as sender:
        sender.push(Trainer(seed=3), version=5)
    assert fingerprint(server.model) == expected(Trainer(seed=3))


# ---- headers of versions, the store, what arrives on the data plane

HEADER_VALUES = st.one_of(st.binary(max_size=24), st.integers(-5, 10**22).map(lambda n: str(n).encode()))
NAMES = st.sampled_from([MIN_HEADER.encode(), EXACT_HEADER.upper().encode(), b"x-other", b"\xff"])


@tries(500)
@given(st.lists(st.tuples(NAMES, HEADER_VALUES), max_size=4), st.text(max_size=30))
def test_headers_of_versions(headers: list[tuple[bytes, bytes]], text: str) -> None:
    for read in (
        lambda: Demand.from_headers(headers),
        lambda: Versions.from_headers({START_HEADER: text}),
        lambda: end_of_stream(f": x-fp8sync-version-end: {text}"),
    ):
        try:
            read()
        except Fp8SyncError as error:
            assert len(str(error)) < LONGEST_ERROR


@tries(500)
@given(st.one_of(st.binary(max_size=400), st.just(b"\0" * 5000)), st.text(min_size=1, max_size=9))
def test_nothing_in_a_store_is_taken_without_a_signature(value: bytes, name: str) -> None:
    plain = dist.HashStore()
    signed = SignedStore(plain, Signer(SECRET), "k/")
    plain.set(f"k/{name}", value)  # type: ignore[arg-type]
    with pytest.raises(TransferError):
        signed.get(name)


GOOD_HEADER = Signer(SECRET).header(3, 4096, 7)


@tries(500)
@given(st.one_of(st.binary(max_size=100), st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.integers(0, 447)))
def test_no_other_header_announces_a_bucket(found: bytes | int) -> None:
    if isinstance(found, int):
        changed = int.from_bytes(GOOD_HEADER, "little") ^ (1 << found)
        found = changed.to_bytes(HEADER_BYTES, "little")
    with pytest.raises(TransferError):
        Signer(SECRET).read_header(found, 3)


@tries(150)
@given(st.binary(max_size=200))
def test_nobody_comes_in_by_what_he_says(said: bytes) -> None:
    sender = Links("127.0.0.1")
    sender.signer = Signer(SECRET)
    ours, theirs = socket.socketpair()
    try:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((TransferError, OSError)):
            sender._greet(ours, 4, time.monotonic() + 1.0)
        assert not sender._ranks
    finally:
        for end in (ours, theirs):
            end.close()
        sender.close()
