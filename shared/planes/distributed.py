"""The data plane over a torch process group: rank 0 broadcasts flat uint8 buckets, every server rank receives.

The group is fp8sync's own: built directly on a `TCPStore` of the sender, so that neither the trainer's nor SGLang's
default group, nor any `TORCHELASTIC_*` or rendezvous variable of a torchrun job, has a part in it. The store listens
on one interface only and the connections of the group are bound to the interface that faces the peer. What stands in
the store is signed, every rank proves after joining that it knows the secret of the session, and so does the sender
with the header that goes ahead of every bucket (`shared/planes/signing.py`).

Gloo itself trusts whoever connects to it: see docs/security.md, and `shared/planes/sockets.py` for the plane that does
not. It ends the whole process, here a server, where more bytes arrive than were expected; hence the size in the header.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shared.errors import TransferError
from shared.planes.host import HostBuffer
from shared.planes.signing import HEADER_BYTES, TAG_BYTES, SignedStore, Signer
from shared.protocol import Rendezvous


def local_address_toward(host: str, port: int) -> str:
    """The address of the local interface from which `host` is reached (no packet is sent)."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


class GroupSender:
    """Rank 0: hosts the store and broadcasts. `join` blocks until every server rank has joined.

    `bind_host`: the address to listen on. `timeout_s`: how long one bucket may take.
    """

    def __init__(self, bind_host: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        family = socket.AF_INET6 if ipaddress.ip_address(bind_host).version == 6 else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((bind_host, 0))
        self._listener.listen()
        self.host, self.port = bind_host, int(self._listener.getsockname()[1])
        self._store: dist.TCPStore | None = dist.TCPStore(
            bind_host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._listener.detach(),
            use_libuv=True,
        )
        self._group: Any = None
        self._host = HostBuffer()
        self._num_sent = 0

    def join(self, rendezvous: Rendezvous) -> None:
        """Raises: TransferError: not every server rank joined within `rendezvous.timeout_s`, or a stranger came."""
        self._signer = Signer(rendezvous.secret)
        self._group = _make_group(self._store, self._signer, rendezvous, rank=0, bind_host=self.host)

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        if self._group is None:
            raise TransferError("the data plane is closed")
        bucket = self._host.filled_from(bucket)
        header = torch.frombuffer(
            bytearray(self._signer.header(self._num_sent, bucket.numel(), digest)), dtype=torch.uint8
        )
        self._num_sent += 1
        _broadcast(self._group, header, self._timeout_s)
        _broadcast(self._group, bucket, self._timeout_s)

    def flush(self) -> None:
        """Nothing is on its way when `send` returns."""

    def close(self) -> None:
        self._group = None
        self._store = None


class GroupReceiver:
    """Server rank `rank`: joins the sender's group and receives."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        timeout = timedelta(seconds=rendezvous.timeout_s)
        try:
            self._store: dist.TCPStore | None = dist.TCPStore(
                rendezvous.host, rendezvous.port, is_master=False, timeout=timeout
            )
            bind_host = local_address_toward(rendezvous.host, rendezvous.port)
        except (RuntimeError, OSError) as error:
            raise TransferError(f"cannot reach the sender's store: {error}") from error
        self._signer = Signer(rendezvous.secret)
        self._group = _make_group(self._store, self._signer, rendezvous, rank=rank + 1, bind_host=bind_host)
        self._host = HostBuffer()
        self._num_received = 0

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        started, header = time.monotonic(), torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        _broadcast(self._group, header, timeout_s)
        size, digest = self._signer.read_header(bytes(header.numpy()), self._num_received)
        if size != bucket.numel():
            raise TransferError(f"a bucket of {size} bytes arrived, expected {bucket.numel()}")
        self._num_received += 1
        left_s = max(0.001, timeout_s - (time.monotonic() - started))
        self._host.fill(bucket, lambda arriving: _broadcast(self._group, arriving, left_s))
        return digest

    def arrive(self, timeout_s: float) -> None:
        """`receive` has waited already."""

    def release(self, timeout_s: float) -> None:
        """Nobody else has it."""

    def interrupt(self) -> None:
        """Nothing of the device waits here."""

    def alive(self) -> bool:
        """By a question to the sender's store; it blocks while that process is stopped, and while TCP tries again."""
        try:
            if self._store is not None:
                self._store.check(["alive"])
        except RuntimeError:
            return False
        return self._store is not None

    def close(self) -> None:
        self._group = None
        self._store = None


def _make_group(store: Any, signer: Signer, rendezvous: Rendezvous, rank: int, bind_host: str) -> Any:
    timeout = timedelta(seconds=rendezvous.timeout_s)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_host)]
    options._timeout = timeout
    try:
        signed = SignedStore(store, signer, f"{rendezvous.key}/")
        group = dist.ProcessGroupGloo(signed, rank, rendezvous.world_size, options)
        _prove(group, signer, rank, rendezvous.world_size, rendezvous.timeout_s)
    except RuntimeError as error:
        raise TransferError(f"the data plane did not come together in {rendezvous.timeout_s:.0f} s: {error}") from error
    return group


def _prove(group: Any, signer: Signer, rank: int, world_size: int, timeout_s: float) -> None:
    """Every rank shows every other that it knows the secret. A collective. Raises: TransferError: one does not."""
    challenge = torch.tensor(list(secrets.token_bytes(TAG_BYTES)), dtype=torch.uint8)
    _broadcast(group, challenge, timeout_s)
    asked = bytes(challenge.numpy())
    mine = torch.tensor(list(signer.tag("rank", asked, str(rank).encode())), dtype=torch.uint8)
    proofs = [torch.zeros(TAG_BYTES, dtype=torch.uint8) for _ in range(world_size)]
    group.allgather([proofs], [mine]).wait()  # within the group's own time-out
    for other, proof in enumerate(proofs):
        if not signer.signs(bytes(proof.numpy()), "rank", asked, str(other).encode()):
            raise TransferError(f"rank {other} of the data plane does not know the secret of this session")


def _broadcast(group: Any, data: torch.Tensor, timeout_s: float) -> None:
    if group is None:
        raise TransferError("the data plane is closed")
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    options.timeout = timedelta(seconds=timeout_s)
    try:
        group.broadcast([data], options).wait()
    except RuntimeError as error:
        raise TransferError(f"{data.nbytes} bytes of a bucket did not arrive: {error}") from error
