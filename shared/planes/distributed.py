"""The data plane over a torch process group: rank 0 broadcasts flat uint8 buckets, every server rank receives.

The group is fp8sync's own: built directly on a `TCPStore` of the sender, so that neither the trainer's nor SGLang's
default group, nor any `TORCHELASTIC_*` or rendezvous variable of a torchrun job, has a part in it. The store listens
on one interface only and the connections of the group are bound to the interface that faces the peer.

Gloo moves host memory and knows no float8, so buckets travel as uint8 and are staged through a host buffer where they
live on a GPU. Size and digest of a bucket go ahead of it: gloo ends the whole process, here a server, where more bytes
arrive than were expected, and bytes that go straight into a live model are checked before they are written.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shared.errors import TransferError
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
        self._host_buffer = torch.empty(0, dtype=torch.uint8)

    def join(self, rendezvous: Rendezvous) -> None:
        """Raises: TransferError: not every server rank joined within `rendezvous.timeout_s`."""
        self._group = _make_group(self._store, rendezvous, rank=0, bind_host=self.host)

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        if bucket.device.type != "cpu":
            if self._host_buffer.numel() < bucket.numel():
                self._host_buffer = torch.empty(bucket.numel(), dtype=torch.uint8, pin_memory=True)
            bucket = self._host_buffer[: bucket.numel()].copy_(bucket)
        _broadcast(self._group, _header(bucket.numel(), digest), self._timeout_s)
        _broadcast(self._group, bucket, self._timeout_s)

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
        self._group = _make_group(self._store, rendezvous, rank=rank + 1, bind_host=bind_host)
        self._host_buffer = torch.empty(0, dtype=torch.uint8)

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        started, header = time.monotonic(), _header(0, 0)
        _broadcast(self._group, header, timeout_s)
        size, digest = int(header[0]), int(header[1]) % (1 << 64)
        if size != bucket.numel():
            raise TransferError(f"a bucket of {size} bytes arrived, expected {bucket.numel()}")
        timeout_s = max(0.001, timeout_s - (time.monotonic() - started))
        if bucket.device.type == "cpu":
            _broadcast(self._group, bucket, timeout_s)
            return digest
        if self._host_buffer.numel() < bucket.numel():
            self._host_buffer = torch.empty(bucket.numel(), dtype=torch.uint8, pin_memory=True)
        host = self._host_buffer[: bucket.numel()]
        _broadcast(self._group, host, timeout_s)
        bucket.copy_(host)
        return digest

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


def _make_group(store: Any, rendezvous: Rendezvous, rank: int, bind_host: str) -> Any:
    timeout = timedelta(seconds=rendezvous.timeout_s)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_host)]
    options._timeout = timeout
    try:
        prefixed = dist.PrefixStore(rendezvous.key, store)
        prefixed.set_timeout(timeout)
        return dist.ProcessGroupGloo(prefixed, rank, rendezvous.world_size, options)
    except RuntimeError as error:
        raise TransferError(f"the data plane did not come together in {rendezvous.timeout_s:.0f} s: {error}") from error


def _header(num_bytes: int, digest: int) -> torch.Tensor:
    """[2] int64: what goes ahead of a bucket. The digest is one of 64 bits without a sign."""
    return torch.tensor([num_bytes, digest - (1 << 64) if digest >= 1 << 63 else digest])


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
