"""Data planes: how flat uint8 buckets get from the sender to every receiver rank. One file each, both halves.

A plane is opened from a `Rendezvous`, on the sender by `sender/fleet.py`, on each receiver rank by `open_receiver`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from shared.protocol import Rendezvous
from shared.rectangles import Numbers


class SendHalf(Protocol):
    def send(self, bucket: torch.Tensor, digest: int) -> None:
        """Send `bucket` (flat uint8, whole by now) to every receiver, its digest ahead.

        It may still be read on return, until the next `send` or `flush` returns.
        """

    def flush(self) -> None:
        """Return when all that was sent has left."""

    def close(self) -> None:
        """Leave the plane; a receiver that still waits gets an error. Idempotent."""


@runtime_checkable
class HasRoom(Protocol):
    """A send half that knows where a bucket will lie."""

    def room(self, num_bytes: int, ahead: int = 0) -> torch.Tensor | None:
        """Where the bucket may be made (flat uint8) that comes when `ahead` others have been sent, so that `send` of
        that very tensor copies less; or None."""

    def knows_place(self, ahead: int) -> bool:
        """Whether it is known where that bucket will lie."""

    def made(self, ahead: int) -> None:
        """All that makes that bucket, where there was room for it, was asked of the device: nothing more will be."""


@runtime_checkable
class PutsSlices(Protocol):
    """A send half that writes parts of buckets where each receiver has told that they go."""

    def targets(self, bucket_bytes: Sequence[int], device: torch.device, timeout_s: float) -> list[list[Numbers]]:
        """For each receiver, for each bucket of so many bytes: rectangles (`shared.rectangles`) from places in it to
        addresses that `device` can write to, until the plane is closed.

        Raises: TransferError: it has not told in time, what it told is wrong, or `device` does not reach its memory.
        """

    def put(
        self, num_bytes: Sequence[int], write: Callable[[], Callable[[], bool]], digests: Callable[[], Sequence[int]]
    ) -> None:
        """`write` begins to write so many bytes of the next bucket to each receiver; what it returns says whether that
        has ended. Then each is told so, with the digest of its bytes. `write` is kept until then, and with it what is
        read. Waits while much is under way. Raises: TransferError: a receiver is gone; nothing is written."""


class ReceiveHalf(Protocol):
    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        """Begin to fill `bucket` (flat uint8, of the size that was sent), which nothing reads any more.

        Returns the digest that was sent ahead of it.
        """

    def arrive(self, timeout_s: float) -> None:
        """Return when the oldest bucket that was not waited for yet is full. Not every plane works ahead."""

    def release(self, timeout_s: float) -> None:
        """Return when nobody else has the memory of buckets, which is about to be freed, between two pushes."""

    def interrupt(self) -> None:
        """From any thread: a wait for what the device does ends with an error, and so does what it waits for."""

    def alive(self) -> bool:
        """Whether the sender is still there, between two pushes."""

    def close(self) -> None:
        """Leave the plane; on return nobody writes to the memory of buckets. Idempotent."""


@runtime_checkable
class TellsPlaces(Protocol):
    """A receive half whose sender writes where it is told to."""

    def expect(self, bucket: torch.Tensor, timeout_s: float) -> None:
        """Tell the sender now where the first bucket will lie that it does not know of; `receive` waits for it."""


@runtime_checkable
class TakesSlices(Protocol):
    """A receive half whose senders write parts of buckets, each by itself."""

    def land(self, memories: Sequence[torch.Tensor], slices: Sequence[Numbers], timeout_s: float) -> None:
        """Tell the senders where the bytes of every bucket go (`shared.slices`): once, after joining. `memories` may be
        written to until this is closed."""

    def written(self, timeout_s: float) -> tuple[int, int]:
        """Return when all have written their parts of the next bucket: how many bytes, and their digest."""


def open_receiver(rendezvous: Rendezvous, rank: int) -> ReceiveHalf:
    """Join as receiver number `rank` (0 is the first rank of the first server); may block until all have joined."""
    if rendezvous.plane == "memory":
        from shared.planes.memory import MemoryReceiver

        return MemoryReceiver(rendezvous, rank)
    if rendezvous.plane == "tcp":
        from shared.planes.sockets import SocketReceiver

        return SocketReceiver(rendezvous, rank)
    if rendezvous.plane == "nccl":
        from shared.planes.nccl import NcclReceiver

        return NcclReceiver(rendezvous, rank)
    if rendezvous.plane == "same_host":
        from shared.planes.same_host import SameHostReceiver

        return SameHostReceiver(rendezvous, rank)
    from shared.planes.distributed import GroupReceiver

    return GroupReceiver(rendezvous, rank)
