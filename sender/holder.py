"""What a trainer rank does with the buckets that it sends: quantizes and packs what has come to it, and sends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from sender.gather import Gathered
from sender.packer import Packer
from sender.plan import PushPlan
from sender.snapshot import Keeper
from shared.buckets import Bucket
from shared.config import FP8BlockConfig


class WayOut(Protocol):
    """Where its buckets go: on rank 0 `sender.fleet.Fleet`, which knows the servers; elsewhere a `SendingHalf`."""

    @property
    def checks_first(self) -> bool:
        """Whether a bucket must be known to be right before it is sent."""

    def room(self, num_bytes: int) -> torch.Tensor | None: ...

    def send(self, bucket: torch.Tensor, index: int, check: Callable[[], None] | None = None) -> None: ...

    def rehearse(self, bucket: torch.Tensor) -> None: ...


class AnyHolder(Protocol):
    """What the steps of a push need of one, whatever it makes of a bucket."""

    def forget(self) -> None: ...

    def check_finite(self) -> None: ...


class Holder:
    """Of trainer rank `rank`. `keeper`: of the snapshot of what was sent."""

    def __init__(self, way_out: WayOut, config: FP8BlockConfig, rank: int, keeper: Keeper) -> None:
        self._way_out, self._config, self._rank, self._keeper = way_out, config, rank, keeper
        self._packer: Packer | None = None
        self._packed_by: PushPlan | None = None

    def forget(self) -> None:
        """A new plan is made: the memory of the last one goes first."""
        self._packer = None

    def rehearse(self, plan: PushPlan, bucket: Bucket, gathered: Gathered) -> None:
        """A push without servers: memory is taken, kernels are compiled and their tables made."""
        self._way_out.rehearse(self._packed(plan, bucket, gathered))

    def pack(self, plan: PushPlan, bucket: Bucket, gathered: Gathered) -> torch.Tensor:
        return self._packed(plan, bucket, gathered, self._way_out.room(bucket.num_bytes))

    def pack_into(self, packed: list[torch.Tensor], plan: PushPlan, bucket: Bucket, gathered: Gathered) -> None:
        """Quantize into a buffer of its own."""
        found = self._packed(plan, bucket, gathered)
        packed.append(found if found.is_cuda else found.clone())

    def until_packed(self, packed: list[torch.Tensor]) -> None:
        """Return when these are complete: another thread reads them, on another stream, and training goes on."""
        for device in {each.device for each in packed if each.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def send(self, packed: torch.Tensor, index: int) -> None:
        check = None
        if self._way_out.checks_first and self._packer is not None:
            check = self._packer.begin_check()
        self._keeper.note(packed)
        self._way_out.send(packed, index, check)

    def check_finite(self) -> None:
        """Raises: NonFiniteWeightError: what was packed in this push had inf or NaN."""
        if self._packer is not None:
            self._packer.check_finite()

    def _packed(
        self, plan: PushPlan, bucket: Bucket, gathered: Gathered, room: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._packer is None or self._packed_by is not plan:
            self._packer, self._packed_by = None, plan  # its memory goes first
            mine = plan.buckets_of(self._rank)
            self._packer = Packer(plan.layout, self._config, gathered.device, plan.early, mine)
        if bucket.index < len(plan.senders):  # the first of this rank
            self._packer.begin()
        into = room if room is not None and room.device == gathered.device else None
        return self._packer.pack(bucket, gathered.weights, gathered.rows, into)
