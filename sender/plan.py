"""A push plan: made once, the same on every rank, executed every push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from pydantic import TypeAdapter

from sender.hf_names import Cuts
from sender.rows_plan import RowsPlan, plan_rows
from sender.sharding import Sharding
from shared.buckets import Bucket, Layout, make_layout
from shared.config import FP8BlockConfig
from shared.errors import PlanError
from shared.naming import should_quantize_param
from shared.protocol import ManifestTensor, TensorSpec

QuantizeWhen = Literal["before_gather", "after_gather"]
_MANIFEST = TypeAdapter(tuple[ManifestTensor, ...])


@dataclass(frozen=True)
class PushPlan:
    """What is sent, in which buckets, for the offer `offered`. `rows`: which of it comes as rows of every rank.

    `senders`: the trainer ranks that send; bucket i is packed and sent by the one that is number i modulo their number.
    `slices`: all of them write what they hold of every bucket; the one that packs it, what was gathered whole.
    """

    offered: tuple[TensorSpec, ...]
    layout: Layout
    rows: RowsPlan | None = field(default=None, compare=False, repr=False)
    senders: tuple[int, ...] = (0,)
    slices: bool = False

    def sender_of(self, bucket: Bucket) -> int:
        return self.senders[bucket.index % len(self.senders)]

    def buckets_of(self, rank: int) -> tuple[Bucket, ...]:
        """Those that `rank` sends."""
        return tuple(bucket for bucket in self.layout.buckets if self.sender_of(bucket) == rank)

    def sharded(self, sharding: Sharding, cuts: Cuts, rank: int, num_ranks: int) -> PushPlan:
        """For a model that is sharded so: this plan if it is one, else one of the same layout."""
        if self.rows is not None and self.rows.still_holds(sharding, cuts, self.senders):
            return self
        return replace(self, rows=plan_rows(self.layout, sharding, cuts, rank, num_ranks, self.senders, self.slices))

    @cached_property
    def early(self) -> frozenset[str]:
        """The tensors of which every rank quantizes, or copies, its rows before the gather."""
        return self.rows.names if self.rows is not None else frozenset()

    @cached_property
    def late(self) -> tuple[tuple[str, ...], ...]:
        """For each bucket its other tensors, which are gathered whole."""
        return tuple(tuple(name for name in bucket.names if name not in self.early) for bucket in self.layout.buckets)

    @cached_property
    def num_quantized_early(self) -> int:
        return sum(tensor.quantized and tensor.name in self.early for tensor in self.layout.tensors)

    @cached_property
    def num_quantized(self) -> int:
        return sum(tensor.quantized for tensor in self.layout.tensors)

    @cached_property
    def bf16_bytes(self) -> int:
        return sum(2 * prod(tensor.shape) for tensor in self.layout.tensors)

    def to_json(self) -> str:
        """For the other ranks."""
        return _MANIFEST.dump_json(self.layout.tensors).decode()

    @classmethod
    def from_json(cls, text: str, offered: tuple[TensorSpec, ...], bucket_bytes: int) -> PushPlan:
        return cls(offered, make_layout(_MANIFEST.validate_json(text), bucket_bytes))


def agree(
    offered: Sequence[TensorSpec], manifests: Mapping[str, Sequence[ManifestTensor]], config: FP8BlockConfig
) -> None:
    """Every server must want the same, and what this project's own rule for checkpoints says.

    `manifests`: the answer of each server, by its name.

    Raises:
        PlanError: servers that differ, or a server that differs from `should_quantize_param`; all tensors listed.
    """
    problems = []
    for server, manifest in manifests.items():
        if [(spec.name, spec.shape) for spec in offered] != [(tensor.name, tensor.shape) for tensor in manifest]:
            raise PlanError(f"{server} answered with other tensors than it was offered: install one fp8sync on both")
        for spec, tensor in zip(offered, manifest, strict=True):
            if tensor.dtype != ("float8_e4m3fn" if tensor.quantized else spec.dtype):
                problems.append(f"{spec.name}: {server} wants it as {tensor.dtype}, it is sent as {spec.dtype} or FP8")
            rule = should_quantize_param(spec.name, spec.shape, config)
            if tensor.quantized != rule:
                holds, means = ("FP8", "BF16") if tensor.quantized else ("BF16", "FP8")
                problems.append(f"{spec.name}: {server} holds it in {holds}, the configuration means {means}")
    if problems:
        raise PlanError(
            "server and FP8BlockConfig disagree; start the server with the arguments of shared.launch or list the "
            "modules in modules_to_not_convert",
            tuple(problems),
        )
