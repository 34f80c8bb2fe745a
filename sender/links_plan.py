"""Which trainer ranks are to send: what each choice puts on the links, by arithmetic, once for a plan.

Every GPU has a NIC of its own, and NVLink to those of its host; a link carries both directions at once; what stays on
one GPU is free. Where a process has no GPU, the same stands for what it has in their place. Counted are the bytes that
come to the senders, and those that go out to the ranks of all servers:

    nccl, gloo          from rank to rank: each passes on what it gets. It enters a host once, by another rank for
                        every sender
    tcp, same_host      from the sender to every rank
    holders             from every rank what it holds, to each server's ranks, as if these took equal parts

Rates are nominal (benchmarks/scale_links.py): the choice depends on how they compare, not on what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from shared.errors import ConfigError
from shared.protocol import Place, PlaneName

NIC_BYTES_PER_S = 50e9
NVLINK_BYTES_PER_S = 370e9  # one direction of a GPU
MOST_SENDERS = 8


class BusiestLink(BaseModel):
    """The link that takes longest in a push, and for how long at its nominal rate; `name` "" where all is free."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Links:
    """`trainers`, `servers`: where each rank is. `held`: bytes of the push that each trainer rank has for the senders.

    `buckets`: bytes of each, in the order in which they are sent. `shares`: what each server rank needs of them, from 0
    to 1. `on_one_host`: rank 0 knows a server by an address that ranks of other hosts do not.
    """

    plane: PlaneName
    trainers: Sequence[Place]
    servers: Sequence[Place]
    held: Sequence[int]
    buckets: Sequence[int]
    shares: Sequence[float] = ()
    on_one_host: bool = False

    def choose(self) -> tuple[int, ...]:
        """The ranks that send. Of choices that take as long: rank 0, and then the fewest.

        Raises: ConfigError: none can.
        """
        able = [senders for senders in self._candidates() if not self.obstacles(senders)]
        if not able:
            raise ConfigError(f"no trainer rank can send over plane={self.plane!r}: {self.obstacles((0,))}")
        return min(able, key=lambda senders: self.busiest(senders).seconds)

    def _candidates(self) -> list[tuple[int, ...]]:
        near = [rank for rank, place in enumerate(self.trainers) if rank == 0 or _same_host(place, self.trainers[0])]
        everybody = near if self.on_one_host else range(len(self.trainers))
        several = (tuple(ranks[:MOST_SENDERS]) for ranks in (near, everybody))
        found = [*((rank,) for rank in everybody), *(ranks for ranks in several if len(ranks) > 1)]
        return list(dict.fromkeys(found))

    def obstacles(self, senders: Sequence[int]) -> str:
        """Why these ranks cannot send; "" if they can."""
        found = [f"trainer rank {rank} {why}" for rank in senders if (why := self._obstacle(self.trainers[rank]))]
        return "; ".join(found)

    def _obstacle(self, sender: Place) -> str:
        if self.plane == "nccl" and not sender.gpu:
            return "has no GPU to send from"
        if self.plane == "nccl" and any(_same_gpu(sender, server) for server in self.servers):
            return "is on the GPU of a server, which NCCL refuses"
        if self.plane == "same_host" and not all(_same_host(sender, server) for server in self.servers):
            return "is on another host than a server"
        return ""

    def sent_bytes(self, senders: Sequence[int]) -> dict[int, int]:
        """By each of them."""
        return {rank: sum(self.buckets[number :: len(senders)]) for number, rank in enumerate(senders)}

    def busiest(self, senders: Sequence[int]) -> BusiestLink:
        traffic, total = _Traffic(), sum(self.buckets)
        trainers = [_Node(f"trainer rank {rank}", place) for rank, place in enumerate(self.trainers)]
        for number, (rank, num_bytes) in enumerate(self.sent_bytes(senders).items()):
            for other, held in enumerate(self.held):
                traffic.move(trainers[other], trainers[rank], held * num_bytes // total)
            if self.plane in ("nccl", "gloo"):
                self._pass_on(traffic, trainers[rank], number, num_bytes)
            else:
                for server in self._servers:
                    traffic.move(trainers[rank], server, num_bytes)
        return traffic.busiest()

    @property
    def holders_are_quicker(self) -> bool:
        """Whether all ranks should write what they hold, in place of those that `choose` gives: between GPUs, where
        that spares a tenth of the busiest link or more. On CPUs small pieces cost more than they save."""
        everybody = range(len(self.trainers))
        if self.plane != "same_host" or not all(place.gpu for place in (*self.trainers, *self.servers)):
            return False
        return not self.obstacles(everybody) and self.of_holders().seconds < 0.9 * self.busiest(self.choose()).seconds

    def of_holders(self) -> BusiestLink:
        """The busiest link where every rank writes what it holds, and all of them what is gathered whole."""
        traffic, left = _Traffic(), sum(self.buckets) - sum(self.held)
        for rank, place in enumerate(self.trainers):
            num_bytes = self.held[rank] + left // len(self.trainers)
            for server, share in zip(self._servers, self.shares, strict=True):
                traffic.move(_Node(f"trainer rank {rank}", place), server, round(num_bytes * share))
        return traffic.busiest()

    @cached_property
    def _servers(self) -> list[_Node]:
        return [_Node(f"server rank {rank}", place) for rank, place in enumerate(self.servers)]

    def _pass_on(self, traffic: _Traffic, sender: _Node, number: int, num_bytes: int) -> None:
        """From rank to rank, one host after the other, the sender's own first."""
        hosts: dict[str, list[_Node]] = {}
        for server in sorted(self._servers, key=lambda node: not _same_host(node.place, sender.place)):
            hosts.setdefault(server.place.host, []).append(server)
        last = sender
        for ranks in hosts.values():
            first = number % len(ranks)
            for node in (*ranks[first:], *ranks[:first]):
                traffic.move(last, node, num_bytes)
                last = node


@dataclass(frozen=True)
class _Node:
    name: str
    place: Place

    @property
    def gpu(self) -> str:
        """What has links of its own."""
        return self.place.gpu or self.name


class _Traffic:
    """Bytes by link, which is a kind, a direction, and a GPU."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, str], int] = {}

    def move(self, sender: _Node, receiver: _Node, num_bytes: int) -> None:
        if sender.gpu == receiver.gpu:
            return
        kind = "NVLink" if _same_host(sender.place, receiver.place) else "NIC"
        for link in ((f"{kind} out of", sender), (f"{kind} into", receiver)):
            key = (link[0], link[1].gpu)
            self._bytes[key] = self._bytes.get(key, 0) + num_bytes

    def busiest(self) -> BusiestLink:
        links = [
            BusiestLink(name=f"{kind} {gpu}", num_bytes=num_bytes, seconds=num_bytes / _rate(kind))
            for (kind, gpu), num_bytes in self._bytes.items()
        ]
        return max(links, key=lambda link: link.seconds, default=BusiestLink())


def _rate(kind: str) -> float:
    return NVLINK_BYTES_PER_S if kind.startswith("NVLink") else NIC_BYTES_PER_S


def _same_host(one: Place, other: Place) -> bool:
    return one.host == other.host != ""


def _same_gpu(one: Place, other: Place) -> bool:
    return one.gpu == other.gpu != ""
