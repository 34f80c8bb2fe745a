"""How weights come together on the rank that sends them, bucket by bucket: whole, or as what ranks made of their rows.

Which way a tensor goes stands in the plan (`sender.rows_plan`). The calls of all ranks are the same, in one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sender.plan import PushPlan
from sender.rows import ReceivedRows, RowsGather
from sender.source import WeightSource
from shared.buckets import Bucket
from shared.config import FP8BlockConfig


@dataclass(frozen=True)
class Gathered:
    """One bucket on the rank that sends it: tensors by name, whole, in wire precision; what came as rows.

    `names`: of the tensors in `weights`.
    """

    weights: Mapping[str, torch.Tensor]
    names: Sequence[str]
    rows: ReceivedRows | None = None

    @property
    def device(self) -> torch.device:
        if self.rows is not None:
            return self.rows.chunks.device
        return self.weights[self.names[0]].device


class Gathering:
    """One push of this rank."""

    def __init__(self, source: WeightSource, plan: PushPlan, rows: RowsGather | None) -> None:
        self._source, self._rows, self._plan = source, rows, plan

    def quantize(self, bucket: Bucket) -> None:
        """The rows of `bucket` that this rank holds."""
        if self._rows is not None:
            self._rows.quantize(bucket.index, self._source.sharding)

    def gather(self, bucket: Bucket) -> Gathered:
        """Collective. Valid on the rank that sends it, until the next bucket."""
        rows = self._rows.gather(bucket.index, self._source.sharding) if self._rows is not None else None
        late = self._plan.late[bucket.index]
        return Gathered(self._source.gather(late, self._plan.sender_of(bucket), self._plan.senders), late, rows)


class Gatherer:
    """Begins the `Gathering` of every push; keeps buffers as long as a plan holds."""

    def __init__(self, config: FP8BlockConfig) -> None:
        self._config = config
        self._rows: RowsGather | None = None

    def begin(self, source: WeightSource, plan: PushPlan) -> Gathering:
        """Collective, before the first bucket."""
        if not plan.early:
            self._rows = None
        elif self._rows is None or self._rows.plan is not plan.rows or self._rows.device != source.sharding.device:
            self._rows = None  # its memory goes first
            assert plan.rows is not None
            self._rows = RowsGather(plan.rows, self._config, source.sharding.device, plan.layout.bucket_bytes)
        if self._rows is not None:
            self._rows.begin(source.sharding)
        return Gathering(source, plan, self._rows)
