"""HTTP connections to one server, kept open, so that a message costs its way through the server and little more.

Python's own client, because a control message is on the critical path of a push: what it sends leaves in one write, and
takes a fifth of the time that httpx takes (0.3 ms against 1.8 here, and no wait between two writes).
"""

from __future__ import annotations

import io
import select
import ssl
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from socket import socket
from typing import Any, cast
from urllib.parse import urlsplit

from shared.errors import ConfigError, PushError, ServerUnreachableError
from shared.protocol import MAX_BODY_BYTES

_MOST_IDLE_S = 4.0  # servers close what is idle for 5 s, and what stands between may forget it without a word


class Connections:
    """To `url`, `http://host:port` or `https://`. `ca_file`: certificates to check the server's against, in place of
    the system's. No proxy is used and no redirect followed. Calls may come from several threads.

    Raises: ConfigError: `url` is something else; OSError: `ca_file` cannot be read.
    """

    def __init__(self, url: str, ca_file: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        except ValueError:  # of a port, or brackets
            scheme, host, port = "", "", None
        if scheme not in ("http", "https") or not host:
            raise ConfigError(f"{url!r} is no server URL: give http://host:port")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} has a path: give http://host:port alone")
        if "@" in parts.netloc:
            raise ConfigError(f"the URL of {host} has a user in it: give the key as admin_key")
        self.name = url.rstrip("/")
        self.host, self.port = host, port or (443 if scheme == "https" else 80)
        self._make: Callable[..., _Connection] = partial(_Connection, host, self.port)
        if scheme == "https":
            self._make = partial(_SecureConnection, host, self.port, context=ssl.create_default_context(cafile=ca_file))
        self._idle = deque[tuple[float, _Connection]]()  # since when
        self._closed = False

    def post(self, path: str, body: bytes, headers: dict[str, str], timeout_s: float) -> tuple[int, bytes]:
        """Status and body of the answer, as it came: nothing is decompressed.

        Raises: ServerUnreachableError: it was not all there within `timeout_s`, or the connection broke; PushError:
            there is more of it than `MAX_BODY_BYTES`.
        """
        deadline, response = time.monotonic() + timeout_s, None
        connection = self._open(timeout_s)
        try:
            connection.response_class = cast(Any, partial(_response, deadline=deadline))
            connection.request("POST", path, body, headers)
            connection.leave(deadline)
            response = connection.getresponse()
            answer = _whole(self.name, response)
        except TimeoutError as error:
            whole = " whole" if response is not None else ""
            raise ServerUnreachableError(f"{self.name} did not answer{whole} within {timeout_s:.0f} s") from error
        except (OSError, HTTPException, UnicodeError) as error:
            reason = str(error) or type(error).__name__
            raise ServerUnreachableError(f"{self.name} cannot be reached: {reason}") from error
        finally:  # one that another answer may still come on is not used again
            if response is None or not response.isclosed() or response.will_close or self._closed:
                connection.close()
            else:
                self._idle.append((time.monotonic(), connection))
        return response.status, answer

    def _open(self, timeout_s: float) -> _Connection:
        while True:
            try:
                since, connection = self._idle.pop()
            except IndexError:
                return self._make(timeout=timeout_s)
            is_fresh = time.monotonic() - since < _MOST_IDLE_S
            if is_fresh and connection.sock is not None and not _is_readable(connection.sock):
                return connection
            connection.close()  # the server has closed it, or may have, or said what nobody had asked

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        while self._idle:
            self._idle.pop()[1].close()


class _Connection(HTTPConnection):
    """Head and body of a request leave together: the other side is woken once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._parts: list[Any] = []

    def send(self, data: Any) -> None:
        """What `request` writes is kept for `leave`."""
        self._parts.append(data)

    def leave(self, deadline: float) -> None:
        """Connect if need be, and write. Raises: OSError: it did not leave; TimeoutError: not by `deadline`."""
        whole, self._parts = b"".join(self._parts), []
        self.timeout = max(0.001, deadline - time.monotonic())
        if self.sock is None:
            self.connect()
        self.sock.settimeout(max(0.001, deadline - time.monotonic()))
        super().send(whole)


class _SecureConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


def _is_readable(opened: socket) -> bool:
    poll = select.poll()  # unlike select, it takes files of any number
    poll.register(opened, select.POLLIN)
    return bool(poll.poll(0))


def _whole(name: str, response: HTTPResponse) -> bytes:
    answer = response.read(MAX_BODY_BYTES + 1)
    if len(answer) > MAX_BODY_BYTES:
        raise PushError(f"{name} answered with more than {MAX_BODY_BYTES} bytes")
    if response.length:  # what is missing; a read of so many bytes at most does not say so by itself
        raise IncompleteRead(answer, response.length)
    return answer


def _response(opened: socket, *args: Any, deadline: float, **options: Any) -> HTTPResponse:
    return HTTPResponse(cast(socket, _Until(opened, deadline)), *args, **options)


class _Until(io.RawIOBase):
    """What is read of a socket until `deadline`, all of it together: a socket's own time-out is that of one read."""

    def __init__(self, opened: socket, deadline: float) -> None:
        self._socket, self._deadline = opened, deadline
        self._file = opened.makefile("rb", buffering=0)  # keeps the socket open, though `http.client` closes it first

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client` asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()
