"""The in-process data plane: queues of buckets, for tests and for reading how a plane behaves.

`MemoryPlane` is the sender's half; the receivers find it by the key in the rendezvous. A test can corrupt or drop
buckets on their way with `on_send`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

import torch

from shared.errors import TransferError
from shared.protocol import Rendezvous

_planes: dict[str, MemoryPlane] = {}
_lock = threading.Lock()


class MemoryPlane:
    """The sending half. `on_send(index, bucket)` yields the buckets that really travel (default: the one given).

    The digest that goes ahead is that of the bucket that was given.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        on_send: Callable[[int, torch.Tensor], Iterable[torch.Tensor]] | None = None,
    ) -> None:
        self._key = rendezvous.key
        self._on_send = on_send
        self._num_sent = 0
        self.queues: list[queue.Queue[tuple[torch.Tensor, int] | None]] = [
            queue.Queue() for _ in range(rendezvous.world_size - 1)
        ]
        with _lock:
            _planes[self._key] = self

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        buckets = (bucket,) if self._on_send is None else tuple(self._on_send(self._num_sent, bucket.clone()))
        self._num_sent += 1
        for travelling in buckets:
            for receiver in self.queues:
                receiver.put((travelling.clone(), digest))

    def flush(self) -> None:
        """Queues take everything."""

    def close(self) -> None:
        with _lock:
            _planes.pop(self._key, None)
        for receiver in self.queues:
            receiver.put(None)


class MemoryReceiver:
    """The receiving half of rank `rank`."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        with _lock:
            plane = _planes.get(rendezvous.key)
        if plane is None:
            raise TransferError(f"no sender holds the in-memory plane {rendezvous.key}")
        self._key, self._queue = rendezvous.key, plane.queues[rank]

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            raise TransferError(f"no bucket arrived within {timeout_s:.1f} s") from None
        if item is None:
            raise TransferError("the sender closed the data plane")
        arrived, digest = item
        if arrived.numel() != bucket.numel():
            raise TransferError(f"a bucket of {arrived.numel()} bytes arrived, expected {bucket.numel()}")
        bucket.copy_(arrived)
        return digest

    def arrive(self, timeout_s: float) -> None:
        """`receive` has waited already."""

    def release(self, timeout_s: float) -> None:
        """Nobody else has it."""

    def interrupt(self) -> None:
        """Nothing of the device waits here."""

    def alive(self) -> bool:
        with _lock:
            return self._key in _planes

    def close(self) -> None:
        """Nothing is held."""
