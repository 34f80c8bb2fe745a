"""Servers hear of a push on a thread, while the trainer looks at its model and makes the first bucket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from receiver_plugin.probe import fingerprint
from sender import FP8Sender
from sender.fleet import Fleet
from sender.gather import Gathering
from shared import errors, protocol
from tests.test_push_memory import Server, expected
from tests.tiny_models import Trainer


@pytest.fixture
def servers() -> tuple[Server, Server]:
    return Server(name="first"), Server(name="second")


@pytest.fixture
def sender(servers: tuple[Server, Server]) -> Iterator[FP8Sender]:
    controls = [server.control for server in servers]
    with FP8Sender(controls, plane="tcp", timeout_s=5.0, bucket_bytes=64 << 10) as made:
        yield made


def assert_pushed(sender: FP8Sender, servers: tuple[Server, Server], seed: int) -> None:
    sender.push(Trainer(seed=seed))
    assert all(fingerprint(server.model) == expected(Trainer(seed=seed)) for server in servers)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers hear of a push when the trainer has long looked at its model."""
    begin = Fleet._begin

    def late(fleet: Fleet, version: int) -> None:
        time.sleep(0.3)
        begin(fleet, version)

    monkeypatch.setattr(Fleet, "_begin", late)


def test_a_plan_that_no_longer_holds_is_found_before_the_thread_has_begun(
    servers: tuple[Server, Server], sender: FP8Sender, late: None
) -> None:
    assert_pushed(sender, servers, 1)
    planned = sender._planned
    assert planned is not None
    sender._planned = replace(planned, offered=planned.offered[::-1])
    assert_pushed(sender, servers, 2)
    assert servers[0].version == 2


@pytest.mark.parametrize("staging", ["auto", "in_place"])
def test_a_server_that_has_begun_waits_no_longer_once_another_refuses(
    servers: tuple[Server, Server], staging: protocol.StagingChoice, monkeypatch: pytest.MonkeyPatch, late: None
) -> None:
    first, second = servers
    states, gather = list[str](), Gathering.gather

    def noting(gathering: Gathering, bucket: Any) -> Any:
        states.append(first.state() if bucket.index > 0 else "")
        return gather(gathering, bucket)

    controls = [server.control for server in servers]
    with FP8Sender(controls, plane="tcp", timeout_s=5.0, bucket_bytes=64 << 10, staging=staging) as sender:
        assert_pushed(sender, servers, 1)
        second.receiver.handle(protocol.Close(session=sender._fleet._session))
        monkeypatch.setattr(Gathering, "gather", noting)
        with pytest.raises(errors.SessionLostError):
            sender.push(Trainer(seed=2))
        assert len(states) > 2 and set(states[1:]) == {"SERVING"}
        assert_pushed(sender, servers, 3)


def test_an_invalid_version_is_refused_and_the_next_push_goes_on(
    servers: tuple[Server, Server], sender: FP8Sender
) -> None:
    assert_pushed(sender, servers, 1)
    with pytest.raises(errors.StaleVersionError, match="not newer than 1"):
        sender.push(Trainer(seed=2), version=1)
    assert [server.state() for server in servers] == ["SERVING"] * 2
    assert_pushed(sender, servers, 3)
