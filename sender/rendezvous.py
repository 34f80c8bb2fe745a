"""Where the ranks of all servers meet the sender: the data plane of a session, as the sender opens it."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared import protocol as wire
from shared.errors import TransferError
from shared.planes import SendHalf
from shared.planes.distributed import GroupSender
from shared.planes.nccl import NcclSender
from shared.planes.same_host import SameHostSender
from shared.planes.sockets import SocketSender

JOIN_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Listening:
    """`rendezvous`: one for each server. `join` blocks until all have come. Raises: TransferError: some have not."""

    plane: SendHalf
    rendezvous: tuple[wire.Rendezvous, ...]
    join: Callable[[], None]


def _open(
    plane: wire.PlaneName, host: str, timeout_s: float, gpu: int | None
) -> SocketSender | GroupSender | NcclSender | SameHostSender | None:
    """None: the plane is not one that listens. Raises: TransferError: no GPU for a plane that needs one."""
    if plane == "memory":
        return None
    if plane == "nccl":
        if gpu is None:
            raise TransferError("plane='nccl' sends from a GPU, and there is none here")
        return NcclSender(host, timeout_s, gpu)
    if plane == "same_host":
        return SameHostSender(host, timeout_s, gpu)
    return (GroupSender if plane == "gloo" else SocketSender)(host, timeout_s)


def listen(
    plane: wire.PlaneName,
    hosts: Sequence[str],
    num_ranks: Sequence[int],
    secret: str,
    timeout_s: float,
    gpu: int | None,
    make_memory_plane: Callable[[wire.Rendezvous], SendHalf],
) -> Listening:
    """Let the ranks of servers come, `num_ranks` of each.

    `hosts`: by which address of this machine each server is reached. All of them are to come to one: the first that is
    no loopback, since a server on this machine reaches that, too.
    """
    host = next((h for h in hosts if not ipaddress.ip_address(h).is_loopback), hosts[0])
    # One bucket may take half of a push, so that a server that takes none does not fail the others.
    opened = _open(plane, host, timeout_s / 2, gpu)
    key = secrets.token_hex(8)
    rendezvous = tuple(
        wire.Rendezvous(
            plane=plane,
            host=host,
            port=opened.port if opened else 0,
            key=key,
            secret=secret,
            world_size=1 + sum(num_ranks),
            first_rank=sum(num_ranks[:index]),
            timeout_s=min(timeout_s, JOIN_TIMEOUT_S),
        )
        for index in range(len(num_ranks))
    )
    if opened is None:
        return Listening(make_memory_plane(rendezvous[0]), rendezvous, lambda: None)
    return Listening(opened, rendezvous, lambda: opened.join(rendezvous[0]))
