"""The control connection to one server: a message goes out, a `Reply` comes back or an error of ours is raised."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from sender.connections import Connections
from shared.errors import (
    ConfigError,
    IncompatibleServerError,
    PushError,
    ServerUnreachableError,
    UnauthorizedError,
    error_from_wire,
)
from shared.protocol import CONTROL_PATH, Reply, decode_message


class ControlClient(Protocol):
    """One server. `name` stands in error messages."""

    name: str

    def call(self, message: BaseModel, timeout_s: float) -> Reply:
        """The server's answer. Raises: the error that the server reported, or that kept it from answering."""

    def local_host(self) -> str:
        """The address of this host as that server sees it."""

    def close(self) -> None: ...


class HttpControl:
    """A server by URL, `http://host:port`. `admin_key` is SGLang's `--admin-api-key` (or `--api-key` if only that)."""

    def __init__(self, url: str, admin_key: str | None = None, ca_file: str | None = None) -> None:
        if admin_key is not None and not (admin_key.isascii() and admin_key.isprintable()):
            raise ConfigError("admin_key has characters that no HTTP header can hold")
        self._connections = Connections(url, ca_file)
        self.name = self._connections.name
        self._headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}

    def __enter__(self) -> HttpControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, message: BaseModel, timeout_s: float) -> Reply:
        body = message.model_dump_json().encode()
        return _read(self.name, *self._connections.post(CONTROL_PATH, body, self._headers, timeout_s))

    def local_host(self) -> str:
        from shared.planes.distributed import local_address_toward

        try:
            return local_address_toward(self._connections.host, self._connections.port)
        except OSError as error:
            raise ServerUnreachableError(f"{self.name} cannot be resolved: {error}") from error

    def close(self) -> None:
        self._connections.close()


class InProcessControl:
    """A receiver in this process, reached through the same bytes as a server: for tests and for reading."""

    def __init__(self, name: str, handle: Callable[[Any], Reply]) -> None:
        self.name, self._handle = name, handle

    def call(self, message: BaseModel, timeout_s: float) -> Reply:
        reply = self._handle(decode_message(message.model_dump_json()))
        return checked(self.name, Reply.model_validate_json(reply.model_dump_json()))

    def local_host(self) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        """Nothing is held."""


def _read(name: str, status: int, answer: bytes) -> Reply:
    if status in (401, 403):
        raise UnauthorizedError(f"{name} refused the admin key: give FP8Sender(admin_key=...) its --admin-api-key")
    if status == 404:
        raise IncompatibleServerError(f"{name} has no fp8sync: start it with --load-plugin fp8sync")
    try:
        reply = Reply.model_validate_json(answer)
    except ValidationError as error:
        text = f"{name} answered HTTP {status} with no reply of ours: {answer[:200].decode(errors='replace')!r}"
        # A proxy's 502 says nothing of what the server did, or does yet.
        raise (ServerUnreachableError if status >= 500 else PushError)(text) from error
    return checked(name, reply)


def checked(name: str, reply: Reply) -> Reply:
    if reply.error is not None:
        raise error_from_wire(reply.error.kind, f"{name}: {reply.error.message}", reply.error.problems)
    return reply
