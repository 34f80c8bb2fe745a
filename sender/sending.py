"""The sending half of one trainer rank: its own data plane to the ranks of all servers, and what went out over it.

Rank 0 has one, and every other rank that sends (`sender.sending_ranks`). On a GPU a bucket leaves with the next call,
so that nobody waits for what was only just begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sender.rendezvous import Listening, listen
from shared import protocol as wire
from shared.digest import begin_digest
from shared.errors import SessionLostError
from shared.planes import HasRoom, SendHalf


def _leaves_later(bucket: torch.Tensor) -> bool:
    return bucket.is_cuda


class _Waiting(NamedTuple):
    """A bucket, its number, what waits for its digest, and what raises if it must not leave."""

    bucket: torch.Tensor
    number: int
    digest: Callable[[], int]
    check: Callable[[], None] | None


class SendingHalf:
    """`gpu`: from which the planes `nccl` and `same_host` send. `digests`: of what was sent in this push, by the number
    of the bucket. `checks_first`: whether a bucket must be known to be right before it is sent. `settles`: whether a
    bucket has arrived before the next step: others' buckets may wait for it, and this rank for them.
    """

    def __init__(
        self,
        plane: wire.PlaneName,
        timeout_s: float,
        gpu: int | None,
        make_memory_plane: Callable[[wire.Rendezvous], SendHalf],
    ) -> None:
        self._name, self._timeout_s, self._gpu, self._make_memory_plane = plane, timeout_s, gpu, make_memory_plane
        self._listening: Listening | None = None
        self.plane: SendHalf | None = None
        self.secret = ""
        self.version = 0
        self.checks_first = self.settles = False
        self.digests: dict[int, int] = {}
        self._room: torch.Tensor | None = None  # where a bucket may be made
        self._waiting = deque[_Waiting]()
        self._puts = deque[Callable[[], None]]()
        self._writes = False  # slices, since the last flush

    # Once

    def listen(self, hosts: Sequence[str], num_ranks: Sequence[int], secret: str) -> tuple[wire.Rendezvous, ...]:
        """Where the ranks of each server are to come, `num_ranks` of each. `hosts`: as of `sender.rendezvous.listen`.

        Raises: TransferError, OSError: there is nowhere to listen.
        """
        self.close()
        self.secret = secret
        self._listening = listen(
            self._name, hosts, num_ranks, secret, self._timeout_s, self._gpu, self._make_memory_plane
        )
        self.plane = self._listening.plane
        return self._listening.rendezvous

    def join(self) -> None:
        """Return when all have come. Raises: TransferError: some have not."""
        assert self._listening is not None
        self._listening.join()

    # Every push

    def begin(self, version: int) -> None:
        self.version, self.digests = version, {}
        self.forget()

    def send(
        self, bucket: torch.Tensor, index: int, check: Callable[[], None] | None = None, waits: bool = False
    ) -> None:
        """Send flat uint8 `bucket`. From a GPU it leaves with the next call of this, or of `flush`, and if it `waits`
        the one before does, too; elsewhere its memory may be used again on return.

        `check`: raises if it must not leave. Raises: TransferError: it did not go out.
        """
        found = begin_digest(bucket, secret=self.secret, version=self.version, bucket=index)
        plane: object = self.plane
        is_there, self._room = bucket is self._room, None  # kept no longer: it is memory of a server
        if is_there and isinstance(plane, HasRoom):
            plane.made(ahead=len(self._waiting))
        self._waiting.append(_Waiting(bucket, index, found, check))
        if not _leaves_later(bucket) or (is_there and not self._knows_place(ahead=len(self._waiting))):
            self._send_waiting()
        elif not waits:
            self._send_waiting(but=1)

    def _send_waiting(self, but: int = 0) -> None:
        while len(self._waiting) > but:
            next_one = self._waiting.popleft()
            if next_one.check is not None:
                next_one.check()
            self.digests[next_one.number] = next_one.digest()
            self._opened.send(next_one.bucket, self.digests[next_one.number])
            if self.settles:
                self._opened.flush()

    def put(self, step: Callable[[], None], later: bool) -> None:
        """`step` begins to write slices of a bucket; `later`: with the next call, or with `put_all`."""
        self._puts.append(step)
        while len(self._puts) > later:
            self._puts.popleft()()
        self._writes = later

    def put_all(self) -> None:
        while self._puts:
            self._puts.popleft()()

    @property
    def is_ahead(self) -> bool:
        """Whether buckets wait for the next call, or slices are still being written."""
        return bool(self._waiting) or self._writes

    def take_digests_ahead(self) -> None:
        """Of the buckets that wait, too."""
        self.digests |= {waiting.number: waiting.digest() for waiting in self._waiting}

    def room(self, num_bytes: int) -> torch.Tensor | None:
        """Where the bucket that comes next may be made, on whatever device that is; or None."""
        plane: object = self.plane
        ahead = len(self._waiting)
        made_there = isinstance(plane, HasRoom) and (not ahead or self._knows_place(ahead))
        self._room = plane.room(num_bytes, ahead) if isinstance(plane, HasRoom) and made_there else None
        return self._room

    def _knows_place(self, ahead: int) -> bool:
        """Whether the bucket that comes after so many others can be made where it goes, while they wait."""
        plane: object = self.plane
        return isinstance(plane, HasRoom) and plane.knows_place(ahead)

    def rehearse(self, bucket: torch.Tensor) -> None:
        """What `send` does on the device, to no effect."""
        begin_digest(bucket, secret=self.secret, version=0, bucket=0)()

    def flush(self) -> None:
        """Return when all has left. Raises: TransferError."""
        self._send_waiting()
        self.put_all()
        self._opened.flush()
        self._writes = False

    @property
    def _opened(self) -> SendHalf:
        if self.plane is None:
            raise SessionLostError("the data plane is closed: push again")
        return self.plane

    # At the end

    def forget(self) -> None:
        """Buckets that wait are not sent any more."""
        self._waiting.clear()
        self._puts.clear()
        self._writes = False

    def close(self) -> None:
        """Leave the plane; whoever waits for something from here hears that it is over. Idempotent."""
        self.forget()
        self._listening = self._room = None
        plane, self.plane = self.plane, None
        if plane is not None:
            plane.close()
