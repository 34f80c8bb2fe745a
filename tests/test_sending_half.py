"""`sender/sending.py`: when buckets leave a rank, as from a GPU and from a CPU."""

from __future__ import annotations

import pytest
import torch

from sender import sending
from sender.sending import SendingHalf
from shared.digest import digest
from shared.errors import SessionLostError
from shared.planes.memory import MemoryPlane


class Plane:
    def __init__(self) -> None:
        self.log: list[str] = []

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        self.log.append(f"send {int(bucket[0])}")

    def flush(self) -> None:
        self.log.append("flush")

    def close(self) -> None:
        self.log.append("close")


def bucket(number: int) -> torch.Tensor:
    return torch.full((128,), number, dtype=torch.uint8)


@pytest.fixture
def half() -> SendingHalf:
    made = SendingHalf("memory", 1.0, None, MemoryPlane)
    made.plane, made.secret = Plane(), "5e" * 32
    made.begin(7)
    return made


def log(half: SendingHalf) -> list[str]:
    assert isinstance(half.plane, Plane)
    return half.plane.log


def test_a_bucket_of_a_cpu_leaves_at_once(half: SendingHalf) -> None:
    for number in (1, 3):
        half.send(bucket(number), number)
    assert log(half) == ["send 1", "send 3"] and not half.is_ahead
    assert half.digests == {n: digest(bucket(n), secret=half.secret, version=7, bucket=n) for n in (1, 3)}


def test_a_bucket_of_a_gpu_leaves_with_the_next(half: SendingHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_leaves_later", lambda bucket: True)
    half.send(bucket(0), 0)
    assert log(half) == [] and half.is_ahead and half.room(128) is None
    half.send(bucket(2), 2)
    half.send(bucket(4), 4, waits=True)
    assert log(half) == ["send 0"] and set(half.digests) == {0}
    half.take_digests_ahead()
    assert set(half.digests) == {0, 2, 4}
    half.flush()
    assert log(half) == ["send 0", "send 2", "send 4", "flush"]
    half.begin(8)
    assert half.digests == {}


def test_a_bucket_has_arrived_where_others_wait_for_it(half: SendingHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_leaves_later", lambda bucket: True)
    half.settles = True
    for number in (0, 8):
        half.send(bucket(number), number)
    assert log(half) == ["send 0", "flush"]


class HostPlane(Plane):
    """One that knows the places of the next buckets, as many as `places` has."""

    def __init__(self, *places: int) -> None:
        super().__init__()
        self.places = [bucket(number) for number in places]

    def room(self, num_bytes: int, ahead: int = 0) -> torch.Tensor | None:
        self.log.append(f"room {ahead}")
        return self.places[ahead] if len(self.places) > ahead else None

    def knows_place(self, ahead: int) -> bool:
        return len(self.places) > ahead

    def made(self, ahead: int) -> None:
        self.log.append(f"made {ahead}")

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        super().send(bucket, digest)
        self.places.pop(0)


def made_there(half: SendingHalf, number: int) -> bool:
    """Send bucket `number`, made where there is room for it; whether there was."""
    room = half.room(128)
    half.send(room if room is not None else bucket(number), number)
    return room is not None


def test_what_is_made_where_it_goes_waits_for_the_next_if_that_has_its_place(
    half: SendingHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next one is being packed while the digest of this one is waited for."""
    monkeypatch.setattr(sending, "_leaves_later", lambda bucket: True)
    half.plane = HostPlane(0, 1, 2)
    assert all(made_there(half, number) for number in range(3)) and half.is_ahead is False
    made = ["room 0", "made 0", "room 1", "made 1", "send 0", "room 1", "made 1", "send 1", "send 2"]
    assert log(half) == made, "a server may have its memory back although they wait"
    assert half.digests == {n: digest(bucket(n), secret=half.secret, version=7, bucket=n) for n in range(3)}


def test_what_is_made_where_it_goes_does_not_wait_for_a_place(
    half: SendingHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says where the next one goes once it has this one."""
    monkeypatch.setattr(sending, "_leaves_later", lambda bucket: True)
    plane = half.plane = HostPlane(0)
    assert made_there(half, 0) and log(half) == ["room 0", "made 0", "send 0"]
    plane.places.append(bucket(1))
    assert made_there(half, 1) and log(half)[3:] == ["room 0", "made 0", "send 1"]
    assert not made_there(half, 2) and log(half)[6:] == ["room 0"] and half.is_ahead
    assert half.room(128) is None and log(half)[7:] == [], "that of the one that waits comes first"


def test_what_waits_is_forgotten_with_the_plane(half: SendingHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_leaves_later", lambda bucket: True)
    half.send(bucket(0), 0)
    told = log(half)
    half.close()
    half.close()
    assert told == ["close"] and not half.is_ahead
    with pytest.raises(SessionLostError, match="push again"):
        half.flush()
