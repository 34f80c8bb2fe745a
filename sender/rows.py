"""Quantize before the gather: every rank its rows, then what it made to one (`sender.rows_plan` has the layout).

    begin      once a push: one MAX all-reduce over the magnitudes of all blocks that cross ranks, if there are any
    quantize   every bucket: this rank's chunk
    gather     every bucket: one collective; the rank that packs it gets the chunks
    put_into   that rank: into the bucket and the flags of the push

On a GPU each of them is a few launches (`sender.grouped_rows`); elsewhere one call a tensor. None waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from sender.quantize import backend_name, copy_into, quantize_into
from sender.rows_plan import BucketRows, Part, RowsPlan
from sender.sharding import Sharding
from shared.buckets import Slot
from shared.config import FP8BlockConfig
from shared.numerics import amax_bits, quantize_rows_into, scale_shape

Rows = Sequence[torch.Tensor]


class RowsBackend(Protocol):
    """`rows`: what this rank holds of each parameter, [its rows, columns]."""

    def begin(self, rows: Rows, amax: torch.Tensor) -> None:
        """First in a push: the magnitudes of this rank's parts of blocks that cross ranks into `amax`, int32, all 0."""

    def quantize(self, index: int, rows: Rows, amax: torch.Tensor, chunk: torch.Tensor) -> None:
        """This rank's part of bucket `index` into `chunk`, flat uint8, whose flags are 0."""

    def unpack(self, index: int, chunks: torch.Tensor, packed: torch.Tensor) -> None:
        """The chunks of all ranks, one behind the other, into bucket `index`, which is packed here; flat uint8."""


class TorchRows:
    """`RowsBackend` on any device."""

    def __init__(self, plan: RowsPlan, config: FP8BlockConfig) -> None:
        self._buckets = plan.buckets
        parts = (part for bucket in plan.buckets if bucket is not None for part in bucket.parts)
        self._crossing = [(part, part.amax_at) for part in parts if part.amax_at is not None]
        self._options: Any = {"scale_fmt": config.scale_fmt, "zero_scale": config.zero_scale}

    def begin(self, rows: Rows, amax: torch.Tensor) -> None:
        for part, at in self._crossing:
            found = amax_bits(_rows_of(part, rows))
            amax[at : at + len(found)] = found

    def quantize(self, index: int, rows: Rows, amax: torch.Tensor, chunk: torch.Tensor) -> None:
        bucket = _used(self._buckets[index])
        flags = bucket.flags_of(chunk)
        for part in bucket.parts:
            mine, flag = _rows_of(part, rows), flags[part.flag : part.flag + 1]
            if part.copied_as is not None:
                copy_into(mine, Slot("", tuple(mine.shape), part.copied_as, part.codes_at).view(chunk), flag)
                continue
            shape = scale_shape(*mine.shape)
            codes = Slot("", tuple(mine.shape), torch.float8_e4m3fn, part.codes_at).view(chunk)
            scale = Slot("", shape, torch.float32, part.scale_at).view(chunk) if part.scale_at is not None else None
            if part.amax_at is not None:
                of_all_ranks = amax[part.amax_at : part.amax_at + shape[1]]
                quantize_rows_into(mine, of_all_ranks, codes, scale, flag, **self._options)
            else:
                assert scale is not None, "whole blocks begin where they lie"
                quantize_into(mine, codes, scale, flag, **self._options)

    def unpack(self, index: int, chunks: torch.Tensor, packed: torch.Tensor) -> None:
        for run in _used(self._buckets[index]).runs:
            packed[run.to_byte : run.to_byte + run.num_bytes] = chunks[run.from_byte : run.from_byte + run.num_bytes]


def _rows_of(part: Part, rows: Rows) -> torch.Tensor:
    return rows[part.parameter][part.first_row : part.first_row + part.num_rows]


def _used(bucket: BucketRows | None) -> BucketRows:
    assert bucket is not None, "all its tensors are gathered whole"
    return bucket


@dataclass(frozen=True)
class ReceivedRows:
    """The chunks of one bucket on the rank that packs it, valid until the next bucket is gathered."""

    index: int
    chunks: torch.Tensor
    flags: tuple[torch.Tensor, torch.Tensor]  # numbers of int32 in the chunks, and of the tensors that they belong to
    backend: RowsBackend

    def put_into(self, packed: torch.Tensor, nonfinite: torch.Tensor) -> None:
        """What ranks made of their rows into `packed`, flat uint8; bytes between tensors are not kept.

        nonfinite: int32, one for each tensor of the layout; more than 0 afterwards where a rank found inf or NaN.
        """
        self.backend.unpack(self.index, self.chunks, packed)
        self.note_in(nonfinite)

    def note_in(self, nonfinite: torch.Tensor) -> None:
        """As `put_into`, the flags alone."""
        places, tensors = self.flags
        nonfinite.index_add_(0, tensors, self.chunks.view(torch.int32)[places])


class RowsGather:
    """The buffers and tables of a plan, kept from push to push; buffers for chunks of `bucket_bytes` and a little more.
    An embedding that is a larger bucket takes memory of its own as it comes, and gives it back."""

    def __init__(self, plan: RowsPlan, config: FP8BlockConfig, device: torch.device, bucket_bytes: int) -> None:
        self.plan, self.device = plan, device
        buckets, most = [bucket for bucket in plan.buckets if bucket is not None], bucket_bytes + bucket_bytes // 8
        self._amax = torch.zeros(plan.num_amax, dtype=torch.int32, device=device)
        kept = [] if plan.stays and device.type == "cuda" else buckets
        self._chunk = _bytes(_largest((bucket.num_bytes for bucket in kept), most), device)
        gathered = [] if plan.stays else buckets
        self._chunks = _bytes(_largest((sum(bucket.chunk_bytes) for bucket in gathered), most), device)
        self._mine = self._chunk[:0]
        self._flags = [_flags(bucket, device) if bucket is not None else None for bucket in plan.buckets]
        self._backend: RowsBackend = _backend(plan, config, device)

    def begin(self, held: Sharding) -> None:
        """Collective. The largest magnitudes of all blocks that cross ranks, on every rank."""
        self._amax.zero_()
        self._backend.begin(held.locals, self._amax)
        if self.plan.num_amax:
            dist.all_reduce(self._amax, dist.ReduceOp.MAX, held.group)

    def quantize(self, index: int, held: Sharding) -> None:
        """This rank's chunk of bucket `index`, ahead of `gather`."""
        bucket = self.plan.buckets[index]
        if bucket is None:
            return
        self._mine = _first(self._chunk, bucket.num_bytes)
        if self.plan.stays and self.device.type == "cuda":  # it is written from there while the next one is made
            self._mine = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self.device)
        if bucket.parts:
            bucket.flags_of(self._mine).zero_()
            self._backend.quantize(index, held.locals, self._amax, self._mine)

    def gather(self, index: int, held: Sharding) -> ReceivedRows | None:
        """Collective, also for ranks that have nothing of the bucket. The chunks on the rank that packs it.

        Where chunks stay with those who made them: this rank's, and no collective.
        """
        bucket, flags = self.plan.buckets[index], self._flags[index]
        if bucket is None:
            return None
        if self.plan.stays and flags is not None:
            mine, self._mine = self._mine, self._chunk[:0]
            return ReceivedRows(index, mine, flags, self._backend)
        to = self.plan.goes_to(index)
        sent = [bucket.num_bytes if rank == to else 0 for rank in range(self.plan.num_ranks)]
        sizes = list(bucket.chunk_bytes) or [0] * self.plan.num_ranks
        mine, self._mine = self._mine, self._chunk[:0]
        chunks = _first(self._chunks, sum(sizes))
        # Not `gather`, which takes as many bytes of every rank: of experts, one rank may hold a whole bucket.
        dist.all_to_all_single(chunks, mine, sizes, sent, held.group)
        return ReceivedRows(index, chunks, flags, self._backend) if flags is not None and self.plan.rank == to else None


def _largest(sizes: Iterable[int], most: int) -> int:
    return max((size for size in sizes if size <= most), default=0)


def _first(kept: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """So many bytes of `kept`, or others if it has fewer."""
    return kept[:num_bytes] if num_bytes <= kept.numel() else kept.new_empty(num_bytes)


def _bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def _flags(bucket: BucketRows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    places, tensors = torch.tensor(bucket.flags, dtype=torch.int64).view(-1, 2).t().contiguous().to(device)
    return places, tensors


def _backend(plan: RowsPlan, config: FP8BlockConfig, device: torch.device) -> RowsBackend:
    if backend_name(device) == "triton":
        from sender.grouped_rows import GroupedRows

        return GroupedRows(plan, config)
    return TorchRows(plan, config)
