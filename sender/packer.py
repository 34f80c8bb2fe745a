"""Quantize and pack: gathered weights go straight into the flat bucket that is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from sender.quantize import backend_name, copy_into, quantize_into
from sender.rows import ReceivedRows
from shared.buckets import Bucket, Entry, Layout
from shared.config import FP8BlockConfig
from shared.errors import ConfigError, NonFiniteWeightError


class Packer:
    """Buckets on the device of the weights; on a GPU a few launches for each, elsewhere one for each tensor.

    A GPU packs one while others are on their way: each has memory of its own, which PyTorch keeps for the next push.

    Non-finite weights are noted on the device, without waiting for it, and raised by `check_finite` once a push.
    """

    def __init__(
        self,
        layout: Layout,
        config: FP8BlockConfig,
        device: torch.device,
        early: frozenset[str] = frozenset(),
        mine: Sequence[Bucket] | None = None,
        whole: bool = True,
    ) -> None:
        """`early`: those that come as rows, quantized or copied. `mine`: buckets that are packed here; None: all.
        `whole`: with what came as rows; else that is written by those who made it, and has no place here."""
        mine = layout.buckets if mine is None else mine
        self._config, self._whole = config, whole
        self._names = [tensor.name for tensor in layout.tensors]
        self._row = {name: row for row, name in enumerate(self._names)}
        self._device = device
        size = max((bucket.num_bytes for bucket in mine), default=0) if device.type != "cuda" else 0
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self._nonfinite = torch.zeros(len(self._names), dtype=torch.int32, device=device)
        self._gaps = {bucket.index: _gaps(bucket, device) for bucket in mine}
        late = [_without(bucket, early) for bucket in mine]
        self._late = {bucket.index: bucket.entries for bucket in late}
        self._grouped = None
        if backend_name(device) == "triton":
            from sender.grouped import GroupedBucket

            self._grouped = {bucket.index: GroupedBucket(bucket, self._row, config, self._pack_one) for bucket in late}

    def begin(self) -> None:
        self._nonfinite.zero_()

    def pack(
        self,
        bucket: Bucket,
        weights: Mapping[str, torch.Tensor],
        rows: ReceivedRows | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`weights` by name, `rows` of the early ones -> flat uint8 [bucket.num_bytes].

        `into`, if there is one; else on a GPU in memory of its own, elsewhere valid until the next call.
        """
        if into is not None and (into.device, into.shape) != (self._memory.device, (bucket.num_bytes,)):
            raise ConfigError(f"bucket {bucket.index} is packed into {bucket.num_bytes} bytes on {self._memory.device}")
        packed = into if into is not None else self._memory[: bucket.num_bytes]
        if into is None and self._device.type == "cuda":
            packed = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._device)
        if self._whole and rows is None and len(self._late[bucket.index]) != len(bucket.entries):
            raise ConfigError(
                f"bucket {bucket.index}: the tensors of which ranks were to send their rows have not come"
            )
        if rows is not None:
            rows.put_into(packed, self._nonfinite)
        if (gaps := self._gaps[bucket.index]) is not None:
            packed.index_fill_(0, gaps, 0)  # what the buffer held before
        if self._grouped is not None:
            self._grouped[bucket.index].pack(weights, packed, self._nonfinite)
            return packed
        for entry in self._late[bucket.index]:
            self._pack_one(entry, weights[entry.tensor.name], packed)
        return packed

    def note(self, rows: ReceivedRows) -> None:
        """That ranks found inf or NaN in what they made."""
        rows.note_in(self._nonfinite)

    def _pack_one(self, entry: Entry, weight: torch.Tensor, packed: torch.Tensor) -> None:
        row, values = self._row[entry.tensor.name], entry.values.view(packed)
        nonfinite = self._nonfinite[row : row + 1]
        if entry.scale is None:
            copy_into(weight, values, nonfinite)
            return
        quantize_into(
            weight,
            values,
            entry.scale.view(packed),
            nonfinite,
            scale_fmt=self._config.scale_fmt,
            zero_scale=self._config.zero_scale,
        )

    def begin_check(self) -> Callable[[], None]:
        """`check_finite` of what was packed so far, begun: the call waits for that, and for nothing that came later."""
        if self._device.type != "cuda":
            return self.check_finite
        found = torch.empty((), dtype=torch.bool, pin_memory=True)
        found.copy_(self._nonfinite.any(), non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))

        def check() -> None:
            done.synchronize()
            if found.item():
                self.check_finite()

        return check

    def check_finite(self) -> None:
        """Raises: NonFiniteWeightError: names every tensor with inf or NaN since `begin`."""
        rows = self._nonfinite.nonzero().flatten().tolist()
        if rows:
            raise NonFiniteWeightError(tuple(self._names[row] for row in rows))


def _without(bucket: Bucket, early: frozenset[str]) -> Bucket:
    return replace(bucket, entries=tuple(entry for entry in bucket.entries if entry.tensor.name not in early))


def _gaps(bucket: Bucket, device: torch.device) -> torch.Tensor | None:
    """Where in `bucket` the bytes lie that belong to no tensor; None if there are none."""
    ends = [slot.offset_bytes + slot.num_bytes for slot in bucket.slots]
    starts = [*(slot.offset_bytes for slot in bucket.slots[1:]), bucket.num_bytes]
    gaps = [torch.arange(end, start) for end, start in zip(ends, starts, strict=True) if end < start]
    return torch.cat(gaps).to(device) if gaps else None
