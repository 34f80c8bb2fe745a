"""The data planes of several trainer ranks, as one to a server rank: bucket i of a push comes over half i % n.

    sender 0    bucket 0            bucket 3            ...
    sender 1            bucket 1            bucket 4
    sender 2                    bucket 2

Where all write slices, each writes its part of every bucket. Each half is a plane of its own, with a sender of its own.
They end together: where one breaks, the rank leaves all, so that every sender learns of it at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from shared.errors import TransferError
from shared.planes import ReceiveHalf, TakesSlices, TellsPlaces, open_receiver
from shared.protocol import Rendezvous
from shared.rectangles import Numbers

Join = Callable[[Rendezvous, int], ReceiveHalf]


def open_receivers(
    meetings: Sequence[Rendezvous], rank: int, num_buckets: int, join: Join = open_receiver
) -> ReceiveHalf:
    """Join as receiver number `rank`, as `open_receiver` does, whoever sends. `num_buckets`: of every push."""
    return join(meetings[0], rank) if len(meetings) == 1 else SeveralReceivers(meetings, rank, num_buckets, join)


class SeveralReceivers:
    """Joins one sender after the other, in the same order on every server rank: joining is a collective of some planes.

    Raises: TransferError: one of them cannot be joined; those that were are left.
    """

    def __init__(self, meetings: Sequence[Rendezvous], rank: int, num_buckets: int, join: Join = open_receiver) -> None:
        self._num_buckets = num_buckets
        self._halves: list[ReceiveHalf] = []
        self._number = self._num_expected = 0  # of the next bucket in its push
        self._coming = deque[ReceiveHalf]()  # the halves of buckets that were not waited for yet
        try:
            for meeting in meetings:
                self._halves.append(join(meeting, rank))
        except BaseException:
            self.close()
            raise

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        half = self._halves[self._number % len(self._halves)]
        self._number = (self._number + 1) % self._num_buckets
        self._coming.append(half)
        return half.receive(bucket, timeout_s)

    def expect(self, bucket: torch.Tensor, timeout_s: float) -> None:
        half = self._halves[self._num_expected % len(self._halves)]
        self._num_expected = (self._num_expected + 1) % self._num_buckets
        if isinstance(half, TellsPlaces):
            half.expect(bucket, timeout_s)

    def arrive(self, timeout_s: float) -> None:
        self._coming.popleft().arrive(timeout_s)

    def land(self, memories: Sequence[torch.Tensor], slices: Sequence[Numbers], timeout_s: float) -> None:
        for half in self._landing:
            half.land(memories, slices, timeout_s)

    def written(self, timeout_s: float) -> tuple[int, int]:
        deadline = time.monotonic() + timeout_s
        told = [half.written(max(0.001, deadline - time.monotonic())) for half in self._landing]
        return sum(num_bytes for num_bytes, _ in told), sum(digest for _, digest in told) % (1 << 64)

    @property
    def _landing(self) -> list[TakesSlices]:
        halves: list[TakesSlices] = [half for half in self._halves if isinstance(half, TakesSlices)]
        if len(halves) < len(self._halves):
            raise TransferError("its senders cannot write to memory of this rank: they need plane='same_host'")
        return halves

    def release(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for half in self._halves:
            half.release(max(0.001, deadline - time.monotonic()))

    def interrupt(self) -> None:
        for half in self._halves:
            half.interrupt()

    def alive(self) -> bool:
        return all(half.alive() for half in self._halves)

    def close(self) -> None:
        """The first that is closed may wait for its sender to let go: no other one waits for that."""
        self.interrupt()
        closing = [threading.Thread(target=half.close, name="fp8sync-close", daemon=True) for half in self._halves]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
