"""The data plane over plain sockets: the sender serves every bucket to every server rank, over one link each.

    sender => receivers   header | bucket                for every bucket, in order; the header is signed

How ranks join, and what a stranger meets: `shared/planes/links.py`. The bytes of a bucket are checked by their digest
before they are used (`Verify`); they are not encrypted.
"""

from __future__ import annotations

import time

import torch

from shared.planes.host import HostBuffer
from shared.planes.links import Link, Links
from shared.protocol import Rendezvous


class SocketSender:
    """Listens on `bind_host`. `timeout_s`: how long one bucket may take."""

    def __init__(self, bind_host: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.links = Links(bind_host)
        self.host, self.port = self.links.host, self.links.port
        self._host_buffer = HostBuffer()
        self._num_sent = 0

    def join(self, rendezvous: Rendezvous) -> None:
        """Raises: TransferError: not every server rank joined within `rendezvous.timeout_s`."""
        self.links.join(rendezvous)

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        data = _bytes_of(self._host_buffer.filled_from(bucket))
        header = self.links.signer.header(self._num_sent, bucket.numel(), digest)
        self._num_sent += 1
        self.links.tell(header, data, deadline=time.monotonic() + self._timeout_s)

    def flush(self) -> None:
        """Nothing is on its way when `send` returns."""

    def close(self) -> None:
        self.links.close()


class SocketReceiver:
    """Server rank `rank`: joins the sender and receives."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self.link = Link(rendezvous, rank)
        self._host_buffer = HostBuffer()
        self._num_received = 0

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        digest = self.link.receive_header(self._num_received, bucket.numel(), deadline)
        self._num_received += 1
        self._host_buffer.fill(bucket, lambda to: self.link.receive_into(_bytes_of(to), deadline))
        return digest

    def arrive(self, timeout_s: float) -> None:
        """`receive` has waited already."""

    def release(self, timeout_s: float) -> None:
        """Nobody else has it."""

    def interrupt(self) -> None:
        """Nothing of the device waits here."""

    def alive(self) -> bool:
        return self.link.is_open()

    def close(self) -> None:
        self.link.close()


def _bytes_of(host: torch.Tensor) -> memoryview:
    return memoryview(host.numpy())  # type: ignore[arg-type]
