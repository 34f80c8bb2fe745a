"""Ranks with a GPU each that send in turn, or one that is not rank 0: the bytes of a checkpoint load on a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from sender import FP8Sender
from sender.control import ControlClient, InProcessControl
from shared import protocol
from shared.place import place_of
from tests.test_push_memory import expected
from tests.test_ranks import caught, run_on_ranks
from tests.tiny_models import FakeEngine, Served, Trainer

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")


class GpuServer:
    """Of one rank, on GPU `gpu`, in this process; no requests run."""

    def __init__(self, gpu: int) -> None:
        self.model, self.engine = Served().to(f"cuda:{gpu}"), FakeEngine()
        self.engine.memory.reserved = torch.empty(8 << 20, dtype=torch.uint8, device=f"cuda:{gpu}")
        self.engine.on_synchronize = lambda: torch.cuda.synchronize(gpu)
        self.receiver = Receiver(self.model, self.engine, SingleRank())
        self.control = InProcessControl("server", self._handle)
        self._gpu = gpu

    def _handle(self, message: Any) -> protocol.Reply:
        with torch.cuda.device(self._gpu):
            reply = self.receiver.handle(message)
        if reply.info is not None:
            return reply.model_copy(update={"info": reply.info.model_copy(update={"device": "a GPU"})})
        return reply


def sharded(seed: int, size: int) -> Trainer:
    """Drawn on the CPU, so that it is the same as the one that is compared with."""
    model, mesh = Trainer(seed).cuda(), init_device_mesh("cuda", (size,))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def push(rank: int, size: int, plane: protocol.PlaneName, senders: Any, gpu: int) -> list[Any]:
    os.environ |= {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
    server, found = GpuServer(gpu) if rank == 0 else None, []
    urls: list[str | ControlClient] = [server.control if server else "http://127.0.0.1:9"]
    with FP8Sender(urls, plane=plane, send_from=senders, timeout_s=60.0, bucket_bytes=64 << 10) as sender:
        sender.prepare(sharded(0, size))
        for seed in (1, 2, 3):
            report = sender.push(sharded(seed, size))
            found.append(server is None or fingerprint(server.model) == expected(Trainer(seed)))
        bad = sharded(4, size)
        if rank == 1:
            next(bad.parameters()).to_local().detach().view(-1)[0] = float("nan")  # type: ignore[attr-defined]
        found.append(caught(sender.push, bad)["kind"] == "NonFiniteWeightError")
        report = sender.push(sharded(5, size))
    return [report.model_dump(), *found]


CASES = [
    (2, "same_host", (1,), 1),  # of one GPU with the server
    (2, "same_host", (1,), 0),
    (2, "nccl", (1,), 0),
    (2, "tcp", (0, 1), 1),
    (3, "same_host", (1, 2), 0),
    (3, "nccl", (1, 2), 0),
    (4, "nccl", (1, 2, 3), 0),
    (2, "same_host", "auto", 1),
]


@pytest.mark.parametrize(("size", "plane", "senders", "gpu"), CASES)
def test_the_bytes_are_those_of_a_checkpoint(size: int, plane: protocol.PlaneName, senders: Any, gpu: int) -> None:
    """The server is in the process of rank 0, which therefore never sends over CUDA IPC itself."""
    if size > NUM_GPUS:
        pytest.skip(f"needs {size} GPUs")
    for report, *found in run_on_ranks(push, size, size, plane, senders, gpu, timeout_s=240.0, backend="nccl"):
        assert all(found), found
        assert report["senders"] == ((1,) if senders == "auto" else senders)
        assert report["busiest_link"]["seconds"] <= report["busiest_link_of_rank_0"]["seconds"] or senders != "auto"


def where_it_is(rank: int) -> str:
    return place_of(torch.device("cuda", torch.cuda.current_device())).gpu


def test_every_gpu_has_a_name_of_its_own() -> None:
    names = run_on_ranks(where_it_is, 2, backend="nccl")
    assert len(set(names)) == 2 and all(len(name) == 36 for name in names)
