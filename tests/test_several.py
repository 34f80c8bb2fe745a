"""`shared/planes/several.py`: buckets of several senders in turn; where one half ends, all do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from receiver_plugin.replicas import for_replica
from shared import protocol
from shared.errors import ConfigError, TransferError
from shared.planes.several import SeveralReceivers, open_receivers
from shared.protocol import decode_message
from tests.messages import RENDEZVOUS


class Half:
    """One that notes what it was asked, as `log`."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.is_alive = name, log, True

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        self.log.append(f"{self.name} receives {bucket.numel()}")
        return bucket.numel()

    def arrive(self, timeout_s: float) -> None:
        self.log.append(f"{self.name} arrives")

    def release(self, timeout_s: float) -> None:
        self.log.append(f"{self.name} releases")

    def interrupt(self) -> None:
        self.log.append(f"{self.name} interrupts")

    def alive(self) -> bool:
        return self.is_alive

    def close(self) -> None:
        self.log.append(f"{self.name} closes")


def joining(log: list[str], broken: str = "") -> Callable[[protocol.Rendezvous, int], Any]:
    def join(meeting: protocol.Rendezvous, rank: int) -> Half:
        if meeting.key == broken:
            raise TransferError("nobody is there")
        log.append(f"{meeting.key} is joined as {rank}")
        return Half(meeting.key, log)

    return join


def meetings(*names: str) -> tuple[protocol.Rendezvous, ...]:
    return tuple(RENDEZVOUS.model_copy(update={"key": name}) for name in names)


def test_buckets_come_in_turn_and_every_push_begins_anew() -> None:
    log = list[str]()
    plane = SeveralReceivers(meetings("a", "b"), 3, num_buckets=3, join=joining(log))
    for _ in range(2):  # a window of two
        plane.receive(torch.empty(1), 1.0)
        plane.receive(torch.empty(2), 1.0)
        plane.arrive(1.0)
        assert plane.receive(torch.empty(3), 1.0) == 3
        plane.arrive(1.0)
        plane.arrive(1.0)
    push = ["a receives 1", "b receives 2", "a arrives", "a receives 3", "b arrives", "a arrives"]
    assert log == ["a is joined as 3", "b is joined as 3", *push, *push]


def test_places_are_told_to_those_who_write_there() -> None:
    log = list[str]()

    class Told(Half):
        def expect(self, bucket: torch.Tensor, timeout_s: float) -> None:
            self.log.append(f"{self.name} expects {bucket.numel()}")

    plane = SeveralReceivers(meetings("a", "b"), 0, 3, lambda meeting, rank: Told(meeting.key, log))
    for _ in range(2):  # every push anew
        for size in (1, 2, 3):
            plane.expect(torch.empty(size), 1.0)
    assert log == ["a expects 1", "b expects 2", "a expects 3"] * 2
    other = SeveralReceivers(meetings("a", "b"), 0, 3, joining(log))
    log.clear()
    other.expect(torch.empty(1), 1.0)
    assert log == [], "these have places of their own"


def test_all_halves_are_given_back_and_end_together() -> None:
    log = list[str]()
    plane = SeveralReceivers(meetings("a", "b"), 0, num_buckets=3, join=joining(log))
    log.clear()
    plane.release(1.0)
    assert log == ["a releases", "b releases"] and plane.alive()
    plane._halves[1].is_alive = False  # type: ignore[attr-defined]
    assert not plane.alive()
    log.clear()
    plane.close()
    assert log == ["a interrupts", "b interrupts", "a closes", "b closes"]


def test_a_half_that_cannot_be_joined_leaves_none_open() -> None:
    log = list[str]()
    with pytest.raises(TransferError, match="nobody is there"):
        open_receivers(meetings("a", "b", "c"), 0, 3, joining(log, broken="b"))
    assert log == ["a is joined as 0", "a interrupts", "a closes"]


def test_one_sender_needs_no_several() -> None:
    log = list[str]()
    assert isinstance(open_receivers(meetings("a"), 0, 3, joining(log)), Half)


OPENED: dict[str, Any] = {"sender": "s", "session": "s", "incarnation": "a+b", "plan_hash": "p", "bucket_bytes": 1}


def test_replicas_join_every_sender() -> None:
    message = protocol.Open(**OPENED, rendezvous=meetings("a", "b"))
    mine = for_replica(message, 1, 2)
    assert [(met.key, met.first_rank) for met in mine.rendezvous] == [("a", 2), ("b", 2)] and mine.first_rank == 2


@pytest.mark.parametrize(
    "changed", [{"plane": "tcp"}, {"secret": "11" * 32}, {"world_size": 3}, {"first_rank": 1}, None]
)
def test_planes_of_different_sessions_are_refused(changed: dict[str, Any] | None) -> None:
    one = RENDEZVOUS.model_dump()
    both = [] if changed is None else [one, {**one, **changed}]
    message = protocol.Open.model_construct(**OPENED, rendezvous=both)
    with pytest.raises(ConfigError, match="rendezvous" if changed is None else "data planes differ") as found:
        decode_message(message.model_dump_json(warnings=False))
    assert "11" * 32 not in str(found.value) and one["secret"] not in str(found.value)
