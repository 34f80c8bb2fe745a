"""Arguments of `FP8Sender`, checked before anything starts. Raises: ConfigError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from sender.control import ControlClient
from sender.plan import QuantizeWhen
from shared.errors import ConfigError
from shared.protocol import LONGEST_DEADLINE_S, InFlight, PlaneName, StagingChoice


def check_servers(servers: Sequence[str | ControlClient], quorum: int | None) -> None:
    if isinstance(servers, str) or not servers:
        raise ConfigError("servers is a list with at least one server URL")
    names = [server.rstrip("/") if isinstance(server, str) else server.name for server in servers]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"named twice in servers: {sorted(twice)}")
    if quorum is not None and not 1 <= quorum <= len(names):
        raise ConfigError(f"quorum={quorum}: it is a number from 1 to the {len(names)} server(s), or None")


def check_ways(in_flight: InFlight, strict: bool, staging: StagingChoice) -> StagingChoice:
    """The ways of staging that go with `in_flight`."""
    for argument, value, known in (("in_flight", in_flight, InFlight), ("staging", staging, StagingChoice)):
        if value not in get_args(known):
            raise ConfigError(f"{argument}={value!r}: it is one of {list(get_args(known))}")
    if in_flight != "keep":
        return staging
    if strict:
        text = "requests that go on meet the new version on each server as soon as that has committed"
        raise ConfigError(f"strict=True holds nothing with in_flight='keep': {text}")
    if staging not in ("auto", "reserved"):
        raise ConfigError(f"staging={staging!r} takes a server without requests; in_flight='keep' keeps them")
    return "reserved"


def check_plane(plane: object) -> None:
    if plane not in get_args(PlaneName):
        raise ConfigError(f"plane={plane!r}: it is one of {list(get_args(PlaneName))}")


def check_quantize(quantize: object) -> None:
    if quantize not in get_args(QuantizeWhen):
        raise ConfigError(f"quantize={quantize!r}: it is one of {list(get_args(QuantizeWhen))}")


def check_send_from(
    send_from: object, num_ranks: int, plane: PlaneName, quorum: int | None, keep_snapshot: bool
) -> None:
    if send_from in ("rank_0", (0,)):
        return
    if isinstance(send_from, tuple):
        wrong = not send_from or len(set(send_from)) < len(send_from)
        if wrong or not all(type(rank) is int and 0 <= rank < num_ranks for rank in send_from):
            raise ConfigError(f"send_from={send_from!r}: it names some of the {num_ranks} trainer ranks, each once")
    elif send_from not in ("auto", "holders"):
        raise ConfigError(f"send_from={send_from!r}: it is 'rank_0', 'auto', 'holders', or a tuple of trainer ranks")
    if send_from == "holders" and plane != "same_host":
        raise ConfigError("send_from='holders' writes to memory of servers of this host: it takes plane='same_host'")
    for what, is_meant in (("plane='memory'", plane == "memory"), ("quorum", quorum is not None)):
        if is_meant:
            raise ConfigError(f"send_from={send_from!r}: {what} takes rank 0 alone")
    if keep_snapshot:
        raise ConfigError(f"send_from={send_from!r}: keep_snapshot keeps what rank 0 sends alone")


def check_deadlines(**deadlines: float) -> None:
    for name, value in deadlines.items():
        if not isinstance(value, int | float) or not 0 < value <= LONGEST_DEADLINE_S:
            raise ConfigError(f"{name}={value!r}: it is more than 0 and at most {LONGEST_DEADLINE_S:.0f} seconds")


def check_version(version: object) -> None:
    if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
        raise ConfigError(f"version={version!r}: versions are whole numbers")
