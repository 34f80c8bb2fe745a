"""Planes that work ahead: a bucket is on its way while the one before it is taken."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from receiver_plugin import rooms, staging
from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from sender import FP8Sender
from sender.control import InProcessControl
from shared import protocol
from shared.errors import IncompatibleServerError, TransferError
from shared.planes import ReceiveHalf, open_receiver
from shared.planes.nccl_library import new_unique_id
from tests.test_push_memory import Server, expected
from tests.tiny_models import FakeEngine, Served, Trainer


class Ahead:
    """Half of a plane that fills a bucket when it is waited for, at the latest, and spoils it until then."""

    def __init__(self, inner: ReceiveHalf) -> None:
        self._inner = inner
        self._coming = deque[tuple[torch.Tensor, torch.Tensor]]()
        self.most = 0

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        arrived = torch.empty_like(bucket)
        sent = self._inner.receive(arrived, timeout_s)
        bucket.fill_(255)
        self._coming.append((bucket, arrived))
        self.most = max(self.most, len(self._coming))
        return sent

    def arrive(self, timeout_s: float) -> None:
        bucket, arrived = self._coming.popleft()
        bucket.copy_(arrived)

    def release(self, timeout_s: float) -> None:
        self._inner.release(timeout_s)

    def interrupt(self) -> None:
        self._inner.interrupt()

    def alive(self) -> bool:
        return self._inner.alive()

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("num_at_once", [1, 2, 3])
@pytest.mark.parametrize("way", ["reserved", "in_place"])
def test_a_bucket_is_taken_where_it_arrived(
    num_at_once: int, way: protocol.StagingWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rooms, staging):
        monkeypatch.setattr(module, "num_at_once", lambda device: num_at_once)
    halves: list[Ahead] = []

    def join(meeting: protocol.Rendezvous, rank: int) -> ReceiveHalf:
        halves.append(Ahead(open_receiver(meeting, rank)))
        return halves[-1]

    served = Served()
    receiver = Receiver(served, FakeEngine(), SingleRank(), join=join)
    server = InProcessControl("server", receiver.handle)
    with FP8Sender([server], plane="memory", staging=way, bucket_bytes=16 << 10) as sender:
        for seed in (1, 2):
            model = Trainer(seed)
            assert sender.push(model).num_buckets > 3
            assert fingerprint(served) == expected(model)
    assert [half.most for half in halves] == [num_at_once]


def test_a_server_without_a_gpu_is_refused() -> None:
    with (
        FP8Sender([Server().control], plane="nccl") as sender,
        pytest.raises(IncompatibleServerError, match="has no GPU"),
    ):
        sender.prepare(Trainer())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_nccl() -> None:
    with pytest.raises(TransferError, match="needs a GPU"):
        new_unique_id()
