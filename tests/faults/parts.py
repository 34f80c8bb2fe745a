"""The parts of a rank with a place for faults: its collectives, engine, staging, and half of the data plane."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from receiver_plugin.binding import BindingPlan, NothingDerived
from receiver_plugin.recorder import Call
from receiver_plugin.rooms import Room
from receiver_plugin.staging import Staging
from shared import protocol
from shared.buckets import Layout
from shared.planes import open_receiver
from tests.faults.tripwire import Tripwire
from tests.tiny_models import FakeEngine

COLLECTIVE_TIMEOUT_S = 30.0  # longer than any process is stopped: a collective does not end because time has passed


class RankLost(BaseException):
    """Takes a rank's thread down, as a signal takes a process down: nothing of ours catches it."""


class Ranks:
    """The ranks of one server, on threads. A rank that is lost breaks the collectives of the others."""

    def __init__(self, index: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.index, self.size, self.barrier, self._table = index, size, barrier, table
        self.lost = False

    @classmethod
    def of(cls, size: int) -> list[Ranks]:
        barrier, table = threading.Barrier(size), [None] * size
        return [cls(index, size, barrier, table) for index in range(size)]

    def gather(self, item: Any) -> list[Any]:
        if self.lost:
            raise RankLost
        self._table[self.index] = item
        self.barrier.wait(COLLECTIVE_TIMEOUT_S)
        found = list(self._table)
        self.barrier.wait(COLLECTIVE_TIMEOUT_S)
        return found

    def lose(self) -> None:
        self.lost = True
        self.barrier.abort()
        raise RankLost


class FaultyEngine(FakeEngine):
    """`doing` is the kind of message that its rank answers just now."""

    def __init__(self, tripwire: Tripwire, server: int, rank: int, num_ranks: int) -> None:
        super().__init__()
        self._tripwire, self._place, self._num_ranks = tripwire, (server, rank), num_ranks
        self.derived = FaultyDerived(tripwire, server, rank)
        self.doing, self._copied = "", False

    def info(self, incarnation: str) -> protocol.ServerInfo:
        return super().info(incarnation).model_copy(update={"num_ranks": self._num_ranks})

    def unsafe(self) -> list[str]:
        if self.doing in ("begin", "commit"):
            self._tripwire.at("begin" if self.doing == "begin" else "check", *self._place)
            self._copied = False
        return super().unsafe()

    def flush_cache(self) -> bool:
        self._tripwire.at("flush", *self._place)
        return super().flush_cache()

    def synchronize(self) -> None:
        self._tripwire.at("settle" if self._copied else "drain", *self._place)
        self._copied = True

    def publish(self, version: int) -> None:
        self._tripwire.at("publish", *self._place)
        super().publish(version)


class FaultyDerived(NothingDerived):
    def __init__(self, tripwire: Tripwire, server: int, rank: int) -> None:
        self._tripwire, self._place = tripwire, (server, rank)

    def refresh(self, calls: Iterable[Call]) -> None:
        self._tripwire.at("refresh", *self._place)


class FaultyStaging(Staging):
    def __init__(
        self,
        tripwire: Tripwire,
        server: int,
        rank: int,
        model: nn.Module,
        plan: BindingPlan,
        layout: Layout,
        room: Room,
    ) -> None:
        self._tripwire, self._place = tripwire, (server, rank)
        super().__init__(model, plan, layout, room)

    def scatter(self, index: int) -> None:
        self._tripwire.at("scatter", *self._place)
        super().scatter(index)

    def commit(self) -> None:
        """A fault in the copy strikes when half of it is done."""
        to, of = self._staged()
        if half := len(to) // 2:
            torch._foreach_copy_(to[:half], of[:half])
        self._tripwire.at("copy", *self._place)
        super().commit()


class FaultyHalf:
    """The receiving half of a data plane."""

    def __init__(self, tripwire: Tripwire, server: int, rank: int, rendezvous: protocol.Rendezvous, number: int):
        self._tripwire, self._place = tripwire, (server, rank)
        self._inner = open_receiver(rendezvous, number)

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        self._tripwire.at("receive", *self._place)
        sent = self._inner.receive(bucket, timeout_s)
        self._tripwire.at("received", *self._place, bucket)
        return sent

    def arrive(self, timeout_s: float) -> None:
        self._inner.arrive(timeout_s)

    def release(self, timeout_s: float) -> None:
        self._inner.release(timeout_s)

    def interrupt(self) -> None:
        self._inner.interrupt()

    def alive(self) -> bool:
        return self._inner.alive()

    def close(self) -> None:
        self._inner.close()
