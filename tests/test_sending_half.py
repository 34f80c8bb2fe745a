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


def test_what_waits_is_forgotten_with_the_plane(half: SendingHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_leaves_later", lambda bucket: True)
    half.send(bucket(0), 0)
    told = log(half)
    half.close()
    half.close()
    assert told == ["close"] and not half.is_ahead
    with pytest.raises(SessionLostError, match="push again"):
        half.flush()
