"""The control connection to one server: a message goes out, a `Reply` comes back or an error of ours is raised."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import httpx
from pydantic import BaseModel, ValidationError

from shared.errors import (
    ConfigError,
    IncompatibleServerError,
    PushError,
    ServerUnreachableError,
    UnauthorizedError,
    error_from_wire,
)
from shared.protocol import CONTROL_PATH, MAX_BODY_BYTES, Reply, decode_message


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
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url!r} is no server URL: give http://host:port")
        if parsed.path not in ("", "/"):
            raise ConfigError(f"{url!r} has a path: give http://host:port alone")
        self.name = url.rstrip("/")
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {admin_key}"} if admin_key else {})}
        self._host, self._port = parsed.host, parsed.port or (443 if parsed.scheme == "https" else 80)
        verify = ssl.create_default_context(cafile=ca_file) if parsed.scheme == "https" else True
        self._client = httpx.Client(base_url=self.name, headers=headers, trust_env=False, verify=verify)

    def __enter__(self) -> HttpControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, message: BaseModel, timeout_s: float) -> Reply:
        body, deadline = message.model_dump_json().encode(), time.monotonic() + timeout_s
        try:
            with self._client.stream("POST", CONTROL_PATH, content=body, timeout=timeout_s) as response:
                answer = _body(self.name, response, deadline, timeout_s)
        except httpx.TimeoutException as error:
            raise ServerUnreachableError(f"{self.name} did not answer within {timeout_s:.0f} s") from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, UnicodeError) as error:
            raise ServerUnreachableError(f"{self.name} cannot be reached: {error}") from error
        return _read(self.name, response.status_code, answer)

    def local_host(self) -> str:
        from shared.planes.distributed import local_address_toward

        try:
            return local_address_toward(self._host, self._port)
        except OSError as error:
            raise ServerUnreachableError(f"{self.name} cannot be resolved: {error}") from error

    def close(self) -> None:
        self._client.close()


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


def _body(name: str, response: httpx.Response, deadline: float, timeout_s: float) -> bytes:
    """As it came, not decompressed; httpx itself bounds neither its size nor the time that all of it takes."""
    answer = bytearray()
    for part in response.iter_raw():
        answer += part
        if len(answer) > MAX_BODY_BYTES:
            raise PushError(f"{name} answered with more than {MAX_BODY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise ServerUnreachableError(f"{name} did not answer whole within {timeout_s:.0f} s")
    return bytes(answer)


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
