"""Trainers in Ray actors, and the way from them to engines in Ray actors. Ray is imported here alone on this side.

    class Trainer(TrainerActor):
        def set_up(self) -> None:               # in every rank, with the process group open and its GPU chosen
            self.model = fully_sharded_model()

        def train_step(self) -> float: ...

`shared.ray_cluster.colocate` makes one actor of it on every GPU, lets them meet, and gives each its `FP8Sender`, whose
servers are engine actors. A control message goes to an engine as JSON, in a call of its method `control`, and its reply
comes back as JSON; weights go over the data plane, not through Ray.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from pydantic import BaseModel, ValidationError
from ray.exceptions import GetTimeoutError, RayError
from torch import nn

from sender.control import checked
from sender.sender import FP8Sender
from shared.errors import ConfigError, Fp8SyncError, PushError, RankMissingError, ServerUnreachableError
from shared.planes.distributed import local_address_toward
from shared.protocol import MAX_BODY_BYTES, Reply

logger = logging.getLogger(__name__)

_SLACK_S = 2.0  # between the deadline that an engine knows and ours
_ANY_PORT = 9  # no packet is sent there


class RayControl:
    """One engine actor, as `FP8Sender` knows servers (`sender.control.ControlClient`), on `node`, of that `address`."""

    def __init__(self, actor: Any, name: str, node: str, address: str) -> None:
        self.name, self._actor, self._node, self._address = name, actor, node, address

    def call(self, message: BaseModel, timeout_s: float) -> Reply:
        """Nothing that was sent is taken back, a commit least of all: nobody would know what it did.

        Raises: the error that the engine reported, or `ServerUnreachableError`: it is dead, starts again, or is silent.
        """
        asked = self._actor.control.remote(message.model_dump_json().encode(), timeout_s)
        try:
            answer = ray.get(asked, timeout=timeout_s + _SLACK_S)
        except GetTimeoutError as error:
            text = f"did not answer within {timeout_s:.0f} s; it may be starting again"
            raise ServerUnreachableError(f"{self.name} {text}") from error
        except RayError as error:  # also of a failure inside the actor that is none of ours
            text = " ".join(str(error).split("\n")[:3])[:500]
            raise ServerUnreachableError(f"{self.name} cannot be reached: {text}") from error
        if not isinstance(answer, bytes) or len(answer) > MAX_BODY_BYTES:
            raise PushError(f"{self.name} answered with no reply of ours")
        try:
            reply = Reply.model_validate_json(answer)
        except ValidationError as error:
            raise PushError(f"{self.name} answered with no reply of ours: {answer[:200]!r}") from error
        return checked(self.name, reply)

    def local_host(self) -> str:
        if self._node == ray.get_runtime_context().get_node_id():
            return "127.0.0.1"
        try:
            return local_address_toward(self._address, _ANY_PORT)
        except OSError as error:
            raise ServerUnreachableError(f"{self.name} cannot be resolved: {error}") from error

    def close(self) -> None:
        """The actor is its owner's to end."""


class Watch:
    """Brings the last version to engines that have started again, from a thread of rank 0, while training goes on.

    It leaves alone those whose memory of weights was released: who resumes it pushes.
    """

    def __init__(self, sender: FP8Sender, every_s: float) -> None:
        self._sender, self._every_s, self._over = sender, every_s, threading.Event()
        self._thread = threading.Thread(target=self._run, name="fp8sync-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """What is under way goes on to its end."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                if behind := self._sender.behind():
                    caught_up = self._sender.catch_up(behind)
                    logger.warning("fp8sync: caught up: %s", ", ".join(caught_up) or "nobody any more")
            except Fp8SyncError as error:
                logger.warning("fp8sync: catching up: %s", error)
            except Exception:
                logger.exception("fp8sync: catching up failed")


class TrainerActor:
    """A trainer rank; derive from it. `rank`, `size`, `device` and the process group are there in `set_up`."""

    rank: int
    size: int
    device: torch.device
    model: nn.Module
    sender: FP8Sender

    def set_up(self) -> None:
        """Make `self.model`, and whatever training needs."""
        raise NotImplementedError("a trainer makes its model in set_up")

    # What `shared.ray_cluster` calls, in this order

    def listen(self) -> tuple[str, int]:
        """On rank 0: where the others meet it."""
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, int(self._store.port)

    def join(self, rank: int, size: int, address: tuple[str, int], gpu: str, timeout_s: float) -> None:
        """Open the process group, then `set_up`. `timeout_s`: of the others to come, and of the group's collectives.

        The store is given explicitly: a torchrun job, or another Ray job, may have left its own in the environment.

        Raises: RankMissingError: not all ranks came.
        """
        self.rank, self.size, until = rank, size, timedelta(seconds=timeout_s)
        self.device = torch.device("cpu")
        if gpu:
            self.device = torch.device("cuda", ordinal_of(gpu))
            torch.cuda.set_device(self.device)
            torch.cuda.init()  # or a device mesh would choose the GPU by rank
        try:
            if rank != 0:
                self._store = dist.TCPStore(*address, is_master=False, timeout=until)
            backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=until)
        except RuntimeError as error:
            raise RankMissingError(f"rank {rank} of {size} met no others within {timeout_s:.0f} s: {error}") from error
        self.set_up()

    def connect(
        self, engines: Sequence[tuple[Any, str, str, str]], options: Mapping[str, Any], watch_every_s: float | None
    ) -> None:
        """Make the sender, on every rank. With `watch_every_s` it keeps a snapshot of the last push, for `Watch`."""
        more = {} if watch_every_s is None else {"keep_snapshot": True}
        self.sender = FP8Sender([RayControl(*engine) for engine in engines], **{**more, **options})
        self._watch = Watch(self.sender, watch_every_s) if watch_every_s is not None and self.rank == 0 else None

    # What the driver calls

    def push(self, version: int | None = None) -> dict[str, Any]:
        """Collective. The report as a dictionary, with the most GPU memory that this rank took for it."""
        on_gpu, before = self.device.type == "cuda", 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        report = self.sender.push(self.model, version=version).model_dump()
        peak = torch.cuda.max_memory_allocated(self.device) - before if on_gpu else None
        return {**report, "peak_extra_bytes": peak}

    def catch_up(self) -> tuple[str, ...]:
        """On rank 0; elsewhere nothing. The engines that it brought the last version to."""
        return self.sender.catch_up()

    def pid(self) -> int:
        return os.getpid()

    def leave(self) -> None:
        """End sender and process group; engines serve on."""
        if self._watch is not None:
            self._watch.close()
        self.sender.close()
        with suppress(Exception):  # a group whose other ranks are gone
            dist.destroy_process_group()


def ordinal_of(gpu: str) -> int:
    """The number that this process has for the GPU which CUDA_VISIBLE_DEVICES, or the driver, calls `gpu`.

    Raises: ConfigError: it does not see it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if gpu not in names:
        raise ConfigError(f"this actor does not see GPU {gpu}: CUDA_VISIBLE_DEVICES is {visible!r}")
    return names.index(gpu)
