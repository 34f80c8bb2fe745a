"""`sender/checks.py`: what cannot work is an error before anything starts, and says what would."""

from __future__ import annotations

from typing import Any

import pytest

from sender import FP8Sender
from shared import errors, protocol
from tests.test_distributed import our_threads
from tests.test_many_servers import Watched
from tests.test_push_memory import Server
from tests.test_ways import Watched as Staging
from tests.test_ways import made
from tests.tiny_models import Trainer


def refused(match: str, **settings: Any) -> None:
    before, control = our_threads(), Watched(Server(), "server")
    with pytest.raises(errors.ConfigError, match=match):
        FP8Sender([control], **settings)
    assert our_threads() == before and control.kinds == []


@pytest.mark.parametrize("plane", ["ucx", "TCP", "", None, ("tcp",)])
def test_planes_are_those_that_there_are(plane: Any) -> None:
    refused(r"plane=.*one of \['tcp', 'gloo', 'nccl', 'same_host', 'memory'\]", plane=plane)


@pytest.mark.parametrize("plane", ["tcp", "gloo", "nccl", "same_host", "memory"])
def test_each_plane_is_taken(plane: Any) -> None:
    FP8Sender([Server().control], plane=plane).close()


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), protocol.LONGEST_DEADLINE_S + 1, "300", None])
@pytest.mark.parametrize("name", ["timeout_s", "meeting_timeout_s"])
def test_every_wait_has_a_deadline(name: str, seconds: Any) -> None:
    """One that servers take: beyond it they would refuse every message, or none would ever be answered in time."""
    refused(f"{name}=.*more than 0 and at most 86400 seconds", **{name: seconds})


def test_the_longest_deadline_goes_with_every_message() -> None:
    servers = Staging("kv_pool", "a"), Staging("reserved", "b")
    with made(*servers, strict=True, timeout_s=protocol.LONGEST_DEADLINE_S) as sender:
        sender.push(Trainer())
    assert [server.state() for server in servers] == ["SERVING"] * 2
