"""Connections from the sender to every server rank, one each, over which both have proved who they are.

Only the sender listens, on one interface, and only while a session is opened: a server never does. Nothing of a
stranger is parsed before he has proved that he knows the secret of the session (`shared/planes/signing.py`):

    receiver -> sender    rank | nonce R                 as which rank it comes
    sender -> receiver    nonce S | tag(R, S, rank)      the sender is the one that handed out the secret
    receiver -> sender    tag(R, S, rank)                the receiver is one that was given it

All of these have fixed sizes. What is wrong ends the connection, never a process.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import socket
import struct
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from shared.errors import TransferError
from shared.planes.signing import HEADER_BYTES, TAG_BYTES, Signer
from shared.protocol import Rendezvous

logger = logging.getLogger(__name__)

_HELLO = struct.Struct("<I32s")
_NONCE_BYTES = 32
_HANDSHAKE_S = 10.0
_MOST_STRANGERS = 64  # who may be in the middle of a handshake at a time, beyond the ranks that are expected
_LITTLE_BYTES = 4096
_MOST_AT_ONCE = 1 << 30  # bytes given to the kernel in one call


class Links:
    """The sender's ends. Listens on `bind_host`; `join` blocks until every server rank has joined."""

    def __init__(self, bind_host: str) -> None:
        family = socket.AF_INET6 if ipaddress.ip_address(bind_host).version == 6 else socket.AF_INET
        self._listener = socket.create_server((bind_host, 0), family=family, backlog=1024)
        self.host, self.port = bind_host, int(self._listener.getsockname()[1])
        self._ranks: dict[int, socket.socket] = {}
        self._joining, self._closed = threading.Condition(), False
        self._pool: ThreadPoolExecutor | None = None

    def join(self, rendezvous: Rendezvous) -> None:
        """Raises: TransferError: not every server rank joined within `rendezvous.timeout_s`."""
        self.signer, expected = Signer(rendezvous.secret), rendezvous.world_size - 1
        deadline = time.monotonic() + rendezvous.timeout_s
        threading.Thread(target=self._accept, args=(expected, deadline), name="fp8sync-accept", daemon=True).start()
        with self._joining:
            self._joining.wait_for(lambda: self._closed or len(self._ranks) == expected, rendezvous.timeout_s)
            missing = sorted(set(range(expected)) - set(self._ranks))
        self._stop_listening()
        if missing:
            raise TransferError(
                f"the data plane did not come together in {rendezvous.timeout_s:.0f} s: "
                f"server rank(s) {missing[:20]} of {expected} did not join",
                tuple(missing),
            )
        self._pool = ThreadPoolExecutor(max_workers=expected, thread_name_prefix="fp8sync-send")

    def _accept(self, expected: int, deadline: float) -> None:
        at_the_door = threading.BoundedSemaphore(expected + _MOST_STRANGERS)

        def greet(connection: socket.socket) -> None:
            try:
                self._greet(connection, expected, min(deadline, time.monotonic() + _HANDSHAKE_S))
            except (OSError, TransferError) as error:
                logger.warning("fp8sync: a connection to the data plane was refused: %s", error)
                connection.close()
            finally:
                at_the_door.release()

        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # no longer listening
                return
            _set_up(connection)
            if at_the_door.acquire(blocking=False):
                threading.Thread(target=greet, args=(connection,), name="fp8sync-greet", daemon=True).start()
            else:
                connection.close()

    def _greet(self, connection: socket.socket, expected: int, deadline: float) -> None:
        rank, theirs = _HELLO.unpack(_receive_bytes(connection, _HELLO.size, deadline))
        mine = secrets.token_bytes(_NONCE_BYTES)
        parts = (theirs, mine, _HELLO.pack(rank, theirs))
        _send_all(connection, mine + self.signer.tag("sender", *parts), deadline)
        if not self.signer.signs(_receive_bytes(connection, TAG_BYTES, deadline), "receiver", *parts):
            raise TransferError("it does not know the secret of this session")
        with self._joining:
            if self._closed or not 0 <= rank < expected or rank in self._ranks:
                raise TransferError(f"server rank {rank} of {expected} is not expected, or no longer")
            self._ranks[rank] = connection
            self._joining.notify_all()

    def tell(self, *parts: bytes | memoryview, deadline: float) -> None:
        """Send `parts` to every rank; much, to all at once. `deadline`: of `time.monotonic`.

        Raises: TransferError: a rank left, or did not take them in time; `ranks` has its number.
        """
        if self._pool is None:
            raise TransferError("the data plane is closed")

        def serve(rank: int) -> None:
            try:
                for part in parts:
                    _send_all(self._ranks[rank], part, deadline)
            except (OSError, TransferError) as error:
                raise TransferError(f"server rank {rank} left the data plane: {error}", (rank,)) from error

        if sum(len(part) for part in parts) <= _LITTLE_BYTES:  # as much as a connection takes without a wait
            for rank in self._ranks:
                serve(rank)
            return
        done, _ = wait([self._pool.submit(serve, rank) for rank in self._ranks], return_when=FIRST_EXCEPTION)
        for served in done:
            served.result()

    def tell_one(self, rank: int, message: bytes, deadline: float) -> None:
        """Send that rank alone a few bytes. Raises: TransferError: as `tell`."""
        try:
            _send_all(self._ranks[rank], message, deadline)
        except (OSError, TransferError) as error:
            raise TransferError(f"server rank {rank} left the data plane: {error}", (rank,)) from error

    def hear(self, rank: int, num_bytes: int, deadline: float | None) -> bytes:
        """What that rank says next; without a `deadline` until it says so much, or is gone. Raises: TransferError."""
        return _receive_bytes(self._ranks[rank], num_bytes, deadline)

    def stop_hearing(self, rank: int) -> None:
        """Whoever waits in `hear` for that rank gives up, from any thread; it can still be told something."""
        with contextlib.suppress(OSError):
            self._ranks[rank].shutdown(socket.SHUT_RD)

    def leave(self, rank: int) -> None:
        """That rank alone. Idempotent."""
        _end(self._ranks[rank])

    def gone(self) -> tuple[int, ...]:
        """The ranks that have left, where they have nothing to say after the handshake."""
        return tuple(sorted(rank for rank, connection in self._ranks.items() if not _is_open(connection)))

    def close(self) -> None:
        with self._joining:
            self._closed = True
            self._joining.notify_all()
        self._stop_listening()
        for connection in self._ranks.values():
            _end(connection)
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def _stop_listening(self) -> None:
        _end(self._listener)  # a thread that waits in accept is woken by that alone


class Link:
    """The end of server rank `rank`. Raises: TransferError: it cannot join."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self.signer = Signer(rendezvous.secret)
        deadline = time.monotonic() + rendezvous.timeout_s
        try:
            self._sender = socket.create_connection((rendezvous.host, rendezvous.port), timeout=rendezvous.timeout_s)
            _set_up(self._sender)
        except OSError as error:
            raise TransferError(f"cannot reach the sender: {error}") from error
        try:
            self._introduce(rank, deadline)
        except BaseException:
            self.close()
            raise

    def _introduce(self, rank: int, deadline: float) -> None:
        mine = secrets.token_bytes(_NONCE_BYTES)
        hello = _HELLO.pack(rank, mine)
        try:
            _send_all(self._sender, hello, deadline)
            answer = _receive_bytes(self._sender, _NONCE_BYTES + TAG_BYTES, deadline)
            theirs, tag = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
            if not self.signer.signs(tag, "sender", mine, theirs, hello):
                raise TransferError("who listens at the sender's address does not know the secret of this session")
            _send_all(self._sender, self.signer.tag("receiver", mine, theirs, hello), deadline)
        except OSError as error:
            raise TransferError(f"the sender did not let this rank join: {error}") from error

    def receive_header(self, number: int, num_bytes: int, deadline: float) -> int:
        """Of bucket `number` of the session, which must have `num_bytes`; its digest. Raises: TransferError."""
        announced, digest = self.signer.read_header(self.receive_bytes(HEADER_BYTES, deadline), number)
        if announced != num_bytes:
            raise TransferError(f"a bucket of {announced} bytes arrived, expected {num_bytes}")
        return digest

    def receive_bytes(self, num_bytes: int, deadline: float | None) -> bytes:
        """Raises: TransferError: the sender left, or was silent until `deadline`, of `time.monotonic`."""
        return _receive_bytes(self._sender, num_bytes, deadline)

    def receive_into(self, data: memoryview, deadline: float) -> None:
        """As `receive_bytes`, into `data`."""
        _receive_into(self._sender, data, deadline)

    def say(self, message: bytes, deadline: float) -> None:
        """Send a few bytes. Raises: TransferError: the sender left, or does not take them."""
        try:
            _send_all(self._sender, message, deadline)
        except OSError as error:
            raise TransferError(f"the sender left the data plane: {error}") from error

    def is_open(self) -> bool:
        """Whether the sender is still there, as far as its connection tells."""
        return _is_open(self._sender)

    def is_silent(self) -> bool:
        """Whether the sender is there and has said nothing that was not received."""
        return _is_open(self._sender, silent=True)

    def finish(self) -> None:
        """Nothing more is said from here, which the sender hears; what it says can still be received."""
        with contextlib.suppress(OSError):
            self._sender.shutdown(socket.SHUT_WR)

    def shut(self) -> None:
        """Whoever waits here gives up, from any thread."""
        with contextlib.suppress(OSError):
            self._sender.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        _end(self._sender)


# One call moves a whole bucket outside of Python: its deadline is the kernel's, and no other thread is waited for.


def _receive_bytes(connection: socket.socket, num_bytes: int, deadline: float | None) -> bytes:
    data = bytearray(num_bytes)
    _receive_into(connection, memoryview(data), deadline)
    return bytes(data)


def _receive_into(connection: socket.socket, data: memoryview, deadline: float | None) -> None:
    done = 0
    while done < len(data):
        try:
            _set_deadline(connection, socket.SO_RCVTIMEO, deadline)
            num = connection.recv_into(data[done : done + _MOST_AT_ONCE], flags=socket.MSG_WAITALL)
        except BlockingIOError:
            continue  # the deadline passed: said above
        except OSError as error:
            raise TransferError(f"the connection of the data plane broke: {error}") from error
        if num == 0:
            raise TransferError("the other side closed the data plane")
        done += num


def _send_all(connection: socket.socket, data: bytes | memoryview, deadline: float) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        _set_deadline(connection, socket.SO_SNDTIMEO, deadline)
        with contextlib.suppress(BlockingIOError):
            done += connection.send(view[done : done + _MOST_AT_ONCE])


def _set_deadline(connection: socket.socket, option: int, deadline: float | None) -> None:
    left_us = 0  # without an end
    if deadline is not None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TransferError("the data plane was silent until its deadline passed")
        left_us = int(left_s * 1e6) + 1
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(left_us, 1_000_000)))


def _is_open(connection: socket.socket, silent: bool = False) -> bool:
    """Whether the other side is there; and, if it is to be `silent`, has said nothing."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b"" and not silent
    except BlockingIOError:
        return True  # it has nothing to say
    except OSError:
        return False


def _set_up(connection: socket.socket) -> None:
    """A host that went down, or a path that a firewall forgot, is noticed within a minute, also between pushes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a message waits 40 ms for the one before
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
