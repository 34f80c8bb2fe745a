"""Ray actors around a receiver and a trainer, small enough to be killed often."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from receiver_plugin.engine import EngineControl
from receiver_plugin.gate import FencedError
from receiver_plugin.http import Control
from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.ray_engine import EngineActor, was_restarted
from receiver_plugin.receiver import Receiver
from sender.ray_trainer import TrainerActor
from sender.transaction import Transaction
from shared import protocol
from shared.errors import ServerFencedError
from shared.ray_cluster import EngineAt
from tests.server_fixtures import CHANGES
from tests.tiny_models import FakeEngine, Served, Trainer

Stage = Literal["receiving", "promised", "committed"]
_STARTS_S = 240.0


def answered(ask: Callable[[], Any], timeout_s: float = _STARTS_S) -> Any:
    """What `ask` gets from an actor that may be starting again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(ask(), timeout=deadline - time.monotonic())
        except RayActorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def health(engine: EngineAt) -> dict[str, Any]:
    found: dict[str, Any] = answered(lambda: engine.actor.health.remote())
    return found


class _OneReceiver:
    """The channel to it."""

    num_replicas, busy = 1, False

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    async def ask(self, message: Any) -> tuple[protocol.Reply, ...]:
        return (self._receiver.handle(message),)

    @asynccontextmanager
    async def drained(self, in_flight: protocol.Drain) -> AsyncIterator[None]:
        yield

    def abort_all(self) -> None:
        pass

    def publish(self, version: int) -> None:
        pass


class SmallEngine(EngineActor):
    """Without SGLang: a receiver around `Served`; what it generates is the fingerprint of its weights."""

    def __init__(self, args: Sequence[str], gpus: Sequence[str] = (), environment: Mapping[str, str] | None = None):
        torch.set_num_threads(1)
        self._model, self._restarted = Served(), was_restarted()
        receiver = Receiver(self._model, FakeEngine(), SingleRank(), "started without weights")
        self._control = Control(_OneReceiver(receiver))
        self._engine = EngineControl.__new__(EngineControl)
        self._engine.name, self._engine._control, self._engine._released = "small", self._control, set()
        self._engine._loop = asyncio.get_running_loop

    async def generate(
        self, request: dict[str, Any], minimum: int | None = None, exact: int | None = None
    ) -> dict[str, Any]:
        try:
            await self._control.fence()
            self._control.refuse_if_fenced()
        except FencedError as error:
            raise ServerFencedError(error.detail) from error
        return {"version": self._control.version, "weights": fingerprint(self._model)}


class Strikes(TrainerActor):
    """A trainer in whose pushes somebody dies."""

    def strike(self, stage: Stage, pid: int) -> None:
        """In the next push, once it has come to `stage`, kill process `pid`; 0 is this rank."""
        if self.rank != 0:
            return
        fleet: Any = self.sender._fleet
        holder, name = {
            "receiving": (fleet, "send"),
            "promised": (Transaction, "_publish"),
            "committed": (fleet, "commit"),
        }[stage]
        original = getattr(holder, name)

        def struck(*args: Any) -> Any:
            result = None if stage == "promised" else original(*args)
            if stage != "receiving" or args[1] == 1:
                setattr(holder, name, original)
                kill(pid or os.getpid())
            return original(*args) if stage == "promised" else result

        setattr(holder, name, struck)


class SmallTrainer(Strikes):
    """`Trainer(seed)`, sharded over all ranks."""

    def set_up(self) -> None:
        torch.set_num_threads(1)
        self.load(0)

    def load(self, seed: int) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model = Trainer(seed)
        fully_shard(self.model, mesh=mesh)


class TinyTrainer(Strikes):
    """The tiny Qwen3 of the servers of the tests, sharded by layers, and an optimizer."""

    def set_up(self) -> None:
        from examples.tiny_qwen3 import make_model

        torch.set_num_threads(1)
        self.model = make_model(7, **CHANGES)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self._optimizer, self._step = torch.optim.AdamW(self.model.parameters(), lr=3e-3), 0

    def train_step(self) -> float:
        from examples.demo_trainer import train_step

        self._step += 1
        return train_step(self.model, self._optimizer, self._step)

    def export(self, folder: str) -> None:
        """Collective. A Hugging Face FP8 checkpoint."""
        from examples.tiny_qwen3 import hf_config
        from sender import export_checkpoint

        export_checkpoint(self.model, Path(folder), hf_config=hf_config(**CHANGES))


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
