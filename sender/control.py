"""The control connection to one server: a message goes out, a `Reply` comes back or an error of ours is raised."""

from __future__ import annotations

import ssl
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
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url!r} is no server URL: give http://host:port")
        if parsed.path not in ("", "/"):
            raise ConfigError(f"{url!r} has a path: give http://host:port alone")
        self.name = url.rstrip("/")
        headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
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
        body = message.model_dump_json().encode()
        try:
            response = self._client.post(CONTROL_PATH, content=body, timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise ServerUnreachableError(f"{self.name} did not answer within {timeout_s:.0f} s") from error
        except httpx.HTTPError as error:
            raise ServerUnreachableError(f"{self.name} cannot be reached: {error}") from error
        return _read(self.name, response)

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
        return _checked(self.name, Reply.model_validate_json(reply.model_dump_json()))

    def local_host(self) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        """Nothing is held."""


def _read(name: str, response: httpx.Response) -> Reply:
    if response.status_code in (401, 403):
        raise UnauthorizedError(f"{name} refused the admin key: give FP8Sender(admin_key=...) its --admin-api-key")
    if response.status_code == 404:
        raise IncompatibleServerError(f"{name} has no fp8sync: start it with --load-plugin fp8sync")
    try:
        reply = Reply.model_validate_json(response.content)
    except ValidationError as error:
        text = response.text[:200]
        raise PushError(f"{name} answered HTTP {response.status_code} with no reply of ours: {text!r}") from error
    return _checked(name, reply)


def _checked(name: str, reply: Reply) -> Reply:
    if reply.error is not None:
        raise error_from_wire(reply.error.kind, f"{name}: {reply.error.message}", reply.error.problems)
    return reply
