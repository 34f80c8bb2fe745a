"""The row of `benchmarks.push --fsdp`, and those of `benchmarks.layouts` and `.losses`: trainer ranks push, sharded by
FSDP2; gather and quantizing are part of it.

For the first, rank 0 is on one GPU, and rank 1 on the other one, beside the server. All are processes of their own,
`python -m benchmarks.fsdp RANK JOB`, that `Ranks` starts; the process that starts them holds no weights meanwhile. A
seed means the same weights as for `benchmarks.shapes.Trainer`, so what the servers have to hold is the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.shapes import MODELS, Trainer, draw, synchronize, with_experts, with_layers
from benchmarks.table import Row
from benchmarks.ways import Trains, Way, push_row
from examples.local_server import free_port
from shared.config import FP8BlockConfig
from tests.zoo import Case

RANKS_S = 300.0  # for all that the ranks do
MEETING_S = 120.0  # for one to wait for another


class Job(BaseModel):
    """What all ranks are told. `urls`: of the servers; `found`: the file for the row."""

    model: str
    layers: int | None
    experts: int | None
    way: Way
    urls: tuple[str, ...]
    num_pushes: int
    port: int
    found: Path
    num_ranks: int = 2

    @property
    def case(self) -> Case:
        return with_experts(with_layers(MODELS[self.model], self.layers), self.experts)


class ShardedTrainer:
    """This rank's part of a model of `case` in BF16: every layer and the rest are sharded over all ranks.

    No rank ever holds more than its own rows, and while weights are drawn one whole parameter.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        with torch.device("meta"):
            model: nn.Module = case.model_class(case.make_config())
        model = model.to(torch.bfloat16).requires_grad_(False)
        for layer in model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._device = device
        self.model = model.to_empty(device=device)

    def fill(self, seed: int) -> None:
        """Collective. The weights of `Trainer.fill(seed)`, in place, complete on all ranks on return."""
        generator = torch.Generator(self._device).manual_seed(seed)
        for parameter in self.model.parameters():
            assert isinstance(parameter, DTensor)
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device)
            draw(whole, generator)
            own = parameter.to_local()
            own.copy_(_rows_of(whole, dist.get_rank(), dist.get_world_size()))
        synchronize(self._device)
        dist.barrier()


def _rows_of(whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """As FSDP2 cuts: `torch.chunk`, and nothing where there are not so many."""
    parts = whole.chunk(size)
    return parts[rank] if rank < len(parts) else whole[:0]


class Ranks:
    """The processes of the trainer. `environments`: what is added to that of each; `log`: of each rank, in words;
    `program`: the module that takes the number of a rank and the job."""

    def __init__(
        self, job: Job, environments: Sequence[Mapping[str, str]], log: Path, program: str = "benchmarks.fsdp"
    ) -> None:
        self._job, self._logs = job, [log.with_name(f"{log.name}-rank-{rank}.log") for rank in range(job.num_ranks)]
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, environment in enumerate(environments):
            with self._logs[rank].open("wb") as output:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", program, str(rank), job.model_dump_json()],
                        env={**os.environ, **environment},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    @property
    def are_running(self) -> bool:
        """Whether none has ended."""
        return all(process.poll() is None for process in self._processes)

    def row(self) -> Row:
        """Raises: as `wait`."""
        self.wait()
        return Row.model_validate_json(self._job.found.read_bytes())

    def wait(self) -> None:
        """Raises: RuntimeError: a rank failed, or they took too long; with the end of its log."""
        deadline = time.monotonic() + RANKS_S
        while any(process.poll() is None for process in self._processes):
            if any(process.returncode for process in self._processes):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"the ranks were not done after {RANKS_S:.0f} s: {self._log_end(0)}")
            time.sleep(0.05)
        for rank, process in enumerate(self._processes):
            if process.returncode:
                raise RuntimeError(f"rank {rank} ended with code {process.returncode}: {self._log_end(rank)}")

    def _log_end(self, rank: int) -> str:
        return self._logs[rank].read_text(errors="replace")[-250:]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def job_of(chosen: argparse.Namespace, way: Way, urls: Sequence[str], at: Path, num_ranks: int = 2) -> Job:
    return Job(
        model=chosen.model,
        layers=chosen.layers,
        experts=chosen.experts,
        way=way,
        urls=tuple(urls),
        num_pushes=chosen.pushes,
        port=free_port(),
        found=at,
        num_ranks=num_ranks,
    )


def meet(rank: int, job: Job) -> tuple[Trains, torch.device]:
    """This rank's part of the model, once all ranks are there."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=MEETING_S)
    store = dist.TCPStore("127.0.0.1", job.port, job.num_ranks, rank == 0, timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None  # else a barrier guesses it from the rank
    dist.init_process_group(backend, store=store, rank=rank, world_size=job.num_ranks, timeout=timeout, device_id=bound)
    trainer: Trains = ShardedTrainer(job.case, device) if job.num_ranks > 1 else Trainer(job.case, device)
    trainer.fill(0)  # `prepare` reads the weights
    return trainer, device


def main(rank: int, job: Job) -> None:
    trainer, device = meet(rank, job)
    row = push_row(job.way, job.urls, trainer, FP8BlockConfig(), job.num_pushes, device)
    row.way = f"{row.way}, FSDP2 on {job.num_ranks} ranks" if job.num_ranks > 1 else row.way
    if rank == 0:
        job.found.write_text(row.model_dump_json())
    dist.barrier()
    if rank == 0:
        time.sleep(1.0)  # the other one may still be in the barrier, and in need of this end


if __name__ == "__main__":
    main(int(sys.argv[1]), Job.model_validate_json(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # as in benchmarks.push: communicators need not keep an interpreter from ending
