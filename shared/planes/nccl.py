"""The data plane over NCCL: rank 0 broadcasts buckets from its GPU to those of all server ranks.

Ranks join over links (`shared/planes/links.py`), which stay: they carry NCCL's id, signed, the signed header of every
bucket, and the news that a peer is gone. A server posts its receive once the header has come, so that no kernel waits
on a busy GPU for a trainer that is not ready; and nobody waits without a deadline and an eye on his links.

    sender        header(i) | broadcast(i) on a stream of its own, broadcast(i-1) may still be at work
    receiver      header(i) | receive(i) posted; bucket i-1 is taken meanwhile

NCCL itself trusts whoever knows its id, and encrypts nothing: see docs/security.md.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from shared.errors import TransferError
from shared.planes.links import Link, Links
from shared.planes.nccl_library import ID_BYTES, Communicator, new_unique_id
from shared.planes.signing import TAG_BYTES
from shared.protocol import Rendezvous

MAX_CTAS = 16
_CUMEM = "NCCL_CUMEM_ENABLE"
_WARM_BYTES = 32 << 20
_POLL_S = 50e-6
_MOST_ON_ITS_WAY_S = 30.0  # of a bucket that was announced: its sender has it ready, and here a kernel waits for it
_LOOK_S = 0.01  # how often whoever waits looks at its links


class _Broadcasts:
    """A communicator, its stream, and the broadcasts on it that nobody has waited for yet.

    `check_links` raises TransferError where a peer is gone.
    """

    def __init__(
        self, unique_id: bytes, rank: int, size: int, check_links: Callable[[], None], deadline: float
    ) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._check_links = check_links
        self._under_way: deque[torch.cuda.Event] = deque()
        self._comm = Communicator(unique_id, rank, size, MAX_CTAS)
        with self._aborting():
            self._wait(self._comm.settled, deadline)
            self._stream = torch.cuda.Stream(self._device, priority=-1)
            # Connections are made and kernels loaded by the first use.
            warm = torch.zeros(_WARM_BYTES, dtype=torch.uint8, device=self._device)
            torch.cuda.current_stream(self._device).synchronize()
            self.start(warm, deadline)
            self.finish(deadline)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def start(self, data: torch.Tensor, deadline: float) -> None:
        """Broadcast `data` (flat uint8 on this device), which no stream writes to, or reads where it is received."""
        with self._aborting(), torch.cuda.device(self._device):
            data.record_stream(self._stream)
            self._comm.broadcast(data, self._stream)
            self._wait(self._comm.settled, deadline)
            event = torch.cuda.Event()
            event.record(self._stream)
            self._under_way.append(event)

    def finish(self, deadline: float) -> None:
        """Return when the oldest one under way has ended."""
        with self._aborting():
            self._wait(self._under_way.popleft().query, deadline)

    def abort(self) -> None:
        self._comm.abort()

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        look_at = time.monotonic() + _LOOK_S
        while not self._asked(done):
            time.sleep(_POLL_S)
            if (now := time.monotonic()) < look_at:
                continue
            look_at = now + _LOOK_S
            self._check_links()
            self._comm.settled()  # raises what NCCL has noticed
            if now > deadline:
                raise TransferError("the data plane was silent until its deadline passed")

    def _asked(self, done: Callable[[], bool]) -> bool:
        try:
            return done()
        except TransferError:
            self._check_links()  # they know who is gone
            raise

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        """On an error no kernel stays that waits for a peer: whoever synchronizes the device would wait with it."""
        try:
            yield
        except BaseException:
            self.abort()
            raise


class NcclSender:
    """Listens on `bind_host` for links; broadcasts from GPU `gpu`. `timeout_s`: for one bucket."""

    def __init__(self, bind_host: str, timeout_s: float, gpu: int = 0) -> None:
        self._timeout_s, self._gpu = timeout_s, gpu
        self._links = Links(bind_host)
        self.host, self.port = self._links.host, self._links.port
        self._broadcasts: _Broadcasts | None = None
        self._num_sent = 0

    def join(self, rendezvous: Rendezvous) -> None:
        """Raises: TransferError: not every server rank joined within `rendezvous.timeout_s`."""
        self._links.join(rendezvous)
        deadline, self._num_peers = time.monotonic() + rendezvous.timeout_s, rendezvous.world_size - 1
        unique_id = new_unique_id()  # NCCL listens from here on
        self._links.tell(unique_id + self._links.signer.tag("nccl", unique_id), deadline=deadline)
        try:
            with torch.cuda.device(self._gpu):
                self._broadcasts = _Broadcasts(unique_id, 0, rendezvous.world_size, self._check_links, deadline)
        except TransferError as error:
            if os.environ.get(_CUMEM) == "0":
                raise
            text = f"SGLang sets {_CUMEM}=0 in its processes, and both ends of NCCL have to agree: set it here as well"
            raise TransferError(f"{error} ({text})", error.ranks) from error

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        broadcasts = self._opened
        deadline = time.monotonic() + self._timeout_s
        header = self._links.signer.header(self._num_sent, bucket.numel(), digest)
        self._num_sent += 1
        if bucket.device != broadcasts.device:
            bucket = bucket.to(broadcasts.device)
            torch.cuda.current_stream(broadcasts.device).synchronize()
        try:
            self._links.tell(header, deadline=deadline)
        except TransferError as error:
            raise self._of(error.ranks, str(error)) from error
        broadcasts.start(bucket, deadline)
        if broadcasts.num_under_way > 1:
            broadcasts.finish(deadline)

    def flush(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while self._opened.num_under_way:
            self._opened.finish(deadline)

    def close(self) -> None:
        if self._broadcasts is not None:
            self._broadcasts.abort()
            self._broadcasts = None
        self._links.close()

    @property
    def _opened(self) -> _Broadcasts:
        if self._broadcasts is None:
            raise TransferError("the data plane is closed")
        return self._broadcasts

    def _check_links(self) -> None:
        if gone := self._links.gone():
            raise self._of(gone, f"server rank(s) {list(gone)} left the data plane")

    def _of(self, ranks: tuple[int, ...], text: str) -> TransferError:
        """A rank that sees another one die leaves as well: of several, who left first is not known here."""
        return TransferError(text, ranks if self._num_peers == 1 else ())


class NcclReceiver:
    """Server rank `rank`: joins the sender and receives on the current device."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        deadline = time.monotonic() + rendezvous.timeout_s
        self._link = Link(rendezvous, rank)
        self._num_received = 0
        try:
            found = self._link.receive_bytes(ID_BYTES + TAG_BYTES, deadline)
            unique_id, tag = found[:ID_BYTES], found[ID_BYTES:]
            if not self._link.signer.signs(tag, "nccl", unique_id):
                raise TransferError("NCCL's id came without the signature of this session's sender")
            self._broadcasts = _Broadcasts(unique_id, rank + 1, rendezvous.world_size, self._check_link, deadline)
        except BaseException:
            self._link.close()
            raise

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        digest = self._link.receive_header(self._num_received, bucket.numel(), deadline)
        self._num_received += 1
        self._broadcasts.start(bucket, min(deadline, time.monotonic() + _MOST_ON_ITS_WAY_S))
        return digest

    def arrive(self, timeout_s: float) -> None:
        self._broadcasts.finish(time.monotonic() + min(timeout_s, _MOST_ON_ITS_WAY_S))

    def release(self, timeout_s: float) -> None:
        """Nobody else has it."""

    def interrupt(self) -> None:
        self._link.shut()

    def alive(self) -> bool:
        return self._link.is_open()

    def close(self) -> None:
        self._broadcasts.abort()
        self._link.close()

    def _check_link(self) -> None:
        if not self._link.is_open():
            raise TransferError("the sender left the data plane")
