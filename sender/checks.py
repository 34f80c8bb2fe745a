"""Arguments of `FP8Sender`, checked before anything starts. Raises: ConfigError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from sender.control import ControlClient
from shared.errors import ConfigError
from shared.protocol import InFlight


def check_servers(servers: Sequence[str | ControlClient], quorum: int | None) -> None:
    if isinstance(servers, str) or not servers:
        raise ConfigError("servers is a list with at least one server URL")
    names = [server.rstrip("/") if isinstance(server, str) else server.name for server in servers]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"named twice in servers: {sorted(twice)}")
    if quorum is not None and not 1 <= quorum <= len(names):
        raise ConfigError(f"quorum={quorum}: it is a number from 1 to the {len(names)} server(s), or None")


def check_in_flight(in_flight: object) -> None:
    if in_flight not in get_args(InFlight):
        raise ConfigError(f"in_flight={in_flight!r}: it is one of {list(get_args(InFlight))}")


def check_version(version: object) -> None:
    if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
        raise ConfigError(f"version={version!r}: versions are whole numbers")
