"""Pack one bucket on a GPU in a few launches, however many tensors it holds (`sender.triton_grouped`).

    sort     once, and again when a weight has moved: which launch each tensor belongs to, as tables on the device
    pack     every push: one launch for each kind of tensor in the bucket

A tensor that no launch can take (columns that are not next to each other, fp32 that stays so) is packed by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from sender.source import Weights
from sender.triton_grouped import COPY_ELEMENTS, copy_many, quantize_many
from shared.buckets import Bucket, Entry
from shared.config import FP8BlockConfig
from shared.errors import ConfigError
from shared.numerics import BLOCK, WEIGHT_DTYPES

_Places = list[list[Any]]
PackOne = Callable[[Entry, Tensor, Tensor], None]


@dataclass(frozen=True)
class _Kind:
    """What one launch has in common."""

    quantized: bool
    dtype: torch.dtype
    even: bool


@dataclass(frozen=True)
class _Launch:
    """`where` [tasks, 2], `tasks` [tasks, 7], both int64, `task_of_program` [programs] int32; all on the device."""

    kind: _Kind
    where: Tensor
    tasks: Tensor
    task_of_program: Tensor


class GroupedBucket:
    """`flag_rows`: the row of each tensor's non-finite flag. `pack_one` packs a tensor that no launch takes."""

    def __init__(self, bucket: Bucket, flag_rows: Mapping[str, int], config: FP8BlockConfig, pack_one: PackOne) -> None:
        self._entries = bucket.entries
        self._flag_rows, self._config, self._pack_one = flag_rows, config, pack_one
        self._names = bucket.names
        self._sorted_for: _Places | None = None
        self._sorted_from: weakref.ref[Any] | None = None
        self._launches: list[_Launch] = []
        self._alone: list[Entry] = []

    def pack(self, weights: Mapping[str, Tensor], packed: Tensor, nonfinite: Tensor) -> None:
        """`weights` by name into `packed` (flat uint8, zeroed), on the current stream, without waiting for it."""
        self._sort(weights, packed.device)
        with torch.cuda.device(packed.device):
            for launch in self._launches:
                kind, tables = launch.kind, (launch.where, launch.tasks, launch.task_of_program)
                if kind.quantized:
                    quantize_many(
                        *tables,
                        packed,
                        nonfinite,
                        dtype=kind.dtype,
                        even=kind.even,
                        scale_fmt=self._config.scale_fmt,
                        zero_scale=self._config.zero_scale,
                    )
                else:
                    copy_many(*tables, packed, nonfinite, dtype=kind.dtype, even=kind.even)
        for entry in self._alone:
            self._pack_one(entry, weights[entry.tensor.name], packed)

    def _sort(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        if self._sorted_from is not None and self._sorted_from() is weights:
            return
        found = [weights[name] for name in self._names]
        now = _places(found)  # a few passes in C
        if now != self._sorted_for:
            groups: dict[_Kind, list[tuple[Entry, Tensor]]] = {}
            alone = []
            for entry, weight in zip(self._entries, found, strict=True):
                kind = _kind(entry, weight, device)
                if kind is None:
                    alone.append(entry)
                else:
                    groups.setdefault(kind, []).append((entry, weight))
            self._launches = [self._launch(kind, members, device) for kind, members in groups.items()]
            self._alone, self._sorted_for = alone, now
        self._sorted_from = weakref.ref(weights) if isinstance(weights, Weights) else None

    def _launch(self, kind: _Kind, members: list[tuple[Entry, Tensor]], device: torch.device) -> _Launch:
        where, tasks, sizes, first = [], [], [], 0
        for entry, weight in members:
            rows, cols = weight.shape if kind.quantized else (1, weight.numel())
            block_cols = -(-cols // BLOCK)
            size = -(-rows // BLOCK) * block_cols if kind.quantized else -(-cols // COPY_ELEMENTS)
            scale_at = entry.scale.offset_bytes if entry.scale is not None else 0
            flag = self._flag_rows[entry.tensor.name]
            where.append((weight.data_ptr(), weight.stride(0) if kind.quantized else 0))
            tasks.append((first, block_cols, rows, cols, entry.values.offset_bytes, scale_at, flag))
            sizes.append(size)
            first += size
        numbers = torch.arange(len(members), dtype=torch.int32)
        return _Launch(
            kind,
            torch.tensor(where, dtype=torch.int64).to(device),
            torch.tensor(tasks, dtype=torch.int64).to(device),
            numbers.repeat_interleave(torch.tensor(sizes)).to(device),
        )


def _places(weights: list[Tensor]) -> _Places:
    """Where each weight lies and how; a source offers the same shapes as long as a plan holds."""
    facts = (Tensor.data_ptr, Tensor.numel, Tensor.stride, attrgetter("dtype"))
    return [list(map(fact, weights)) for fact in facts]


def _kind(entry: Entry, weight: Tensor, device: torch.device) -> _Kind | None:
    """The launch that `weight` can be part of, or None. Raises: ConfigError: it is not what the plan was made for."""
    if tuple(weight.shape) != entry.tensor.shape or weight.device != device:
        raise ConfigError(
            f"{entry.tensor.name} is {list(weight.shape)} on {weight.device}; "
            f"planned were {list(entry.tensor.shape)} on {device}"
        )
    if not prod(entry.tensor.shape):
        return None
    on_16_bytes = weight.data_ptr() % 16 == 0
    if entry.scale is None:
        wire = torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype
        fits = weight.dtype in WEIGHT_DTYPES and entry.values.dtype == wire and weight.is_contiguous()
        return _Kind(False, weight.dtype, on_16_bytes) if fits else None
    if weight.dtype not in WEIGHT_DTYPES or weight.stride(1) != 1:
        return None
    rows, cols = weight.shape
    whole = rows % BLOCK == 0 and cols % BLOCK == 0
    even = whole and on_16_bytes and weight.stride(0) % 8 == 0 and 0 < weight.stride(0) < 1 << 24
    return _Kind(True, weight.dtype, even)
