"""How tensors lie in flat uint8 buckets: deterministic, aligned, a weight and its scale never apart.

Both sides compute the same `Layout` from the manifest, so no offsets travel; `plan_hash` proves that they agree.
A quantized tensor takes two slots in the same bucket: codes (1 byte an element), then `weight_scale_inv` (fp32).
A tensor larger than `bucket_bytes` gets a bucket of its own size.

Nothing is on the wire while the first bucket is made, nor while the last one is taken in, so both are small, and
buckets of one large tensor come behind full ones.

    bytes   1/4 | 1 | large | 1 | 1 | large | 1 | 1 | ... | 1 | rest | 1/4        of `bucket_bytes`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch

from shared.errors import ConfigError
from shared.naming import scale_name
from shared.numerics import scale_shape
from shared.protocol import PROTOCOL_VERSION, ManifestTensor

ALIGNMENT_BYTES = 128
DEFAULT_BUCKET_BYTES = 512 << 20

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """One tensor inside a bucket. `offset_bytes` counts from the start of the bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, bucket: torch.Tensor) -> torch.Tensor:
        """The typed view of this slot, `shape`, in `bucket` (flat uint8)."""
        return bucket[self.offset_bytes : self.offset_bytes + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Entry:
    """What one tensor of the manifest puts into its bucket: its values, and its scale if it is quantized."""

    tensor: ManifestTensor
    values: Slot
    scale: Slot | None


@dataclass(frozen=True)
class Bucket:
    index: int
    entries: tuple[Entry, ...]
    num_bytes: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.tensor.name for entry in self.entries)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(slot for entry in self.entries for slot in (entry.values, entry.scale) if slot is not None)


@dataclass(frozen=True)
class Layout:
    """All buckets of a push, in the order in which they are sent."""

    tensors: tuple[ManifestTensor, ...]
    bucket_bytes: int
    buckets: tuple[Bucket, ...]

    @cached_property
    def num_bytes(self) -> int:
        return sum(bucket.num_bytes for bucket in self.buckets)

    @cached_property
    def largest_bucket_bytes(self) -> int:
        return max(bucket.num_bytes for bucket in self.buckets)

    def window_bytes(self, num_at_once: int) -> int:
        """Memory for the buckets of a push, of which so many, one behind the other, are there at a time."""
        return sum(self._window_sizes(num_at_once))

    def windows(self, memory: torch.Tensor, num_at_once: int) -> list[torch.Tensor]:
        """Each bucket in `memory` (flat uint8, `window_bytes`), whose parts they take in turns."""
        starts = list(accumulate(self._window_sizes(num_at_once), initial=0))
        placed = [(starts[bucket.index % num_at_once], bucket.num_bytes) for bucket in self.buckets]
        return [memory[start : start + size] for start, size in placed]

    def _window_sizes(self, num_at_once: int) -> list[int]:
        sizes = [0] * num_at_once
        for bucket in self.buckets:
            part = bucket.index % num_at_once
            sizes[part] = max(sizes[part], bucket.num_bytes)
        return sizes

    @cached_property
    def plan_hash(self) -> str:
        """SHA-256, hex, over protocol version, manifest and bucket rule: equal on both sides or nothing is sent."""
        body = [PROTOCOL_VERSION, ALIGNMENT_BYTES, self.bucket_bytes, [t.model_dump(mode="json") for t in self.tensors]]
        return hashlib.sha256(json.dumps(body, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def make_layout(tensors: Sequence[ManifestTensor], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Layout:
    """Lay `tensors` out in buckets of at most `bucket_bytes` (larger tensors alone). It has them in the order in
    which they are sent; of that order the same layout is made again.

    Raises:
        ConfigError: no tensors, two of one name, or a bucket smaller than the alignment.
    """
    if bucket_bytes < ALIGNMENT_BYTES:
        raise ConfigError(f"bucket_bytes={bucket_bytes} is smaller than the alignment of {ALIGNMENT_BYTES}")
    if not tensors:
        raise ConfigError("nothing to send: the model has no tensors")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ConfigError("two tensors have the same name")
    sized = [(tensor, _place(tensor, 0)[1]) for tensor in tensors]
    small = _in_buckets([(tensor, size) for tensor, size in sized if size <= bucket_bytes], bucket_bytes)
    buckets = [
        _bucket(index, members)
        for index, members in enumerate(_between(small, [[tensor] for tensor, size in sized if size > bucket_bytes]))
    ]
    ordered = tuple(entry.tensor for bucket in buckets for entry in bucket.entries)
    return Layout(ordered, bucket_bytes, tuple(buckets))


def _in_buckets(sized: Sequence[tuple[ManifestTensor, int]], bucket_bytes: int) -> list[list[ManifestTensor]]:
    """`sized`: tensors and their bytes, none of more than `bucket_bytes`."""
    found: list[list[ManifestTensor]] = []
    left, room, least = sum(size for _, size in sized), 0, bucket_bytes // 4
    for tensor, size in sized:
        if size > room:
            room = min(bucket_bytes, left - least) if found and left > 2 * least else max(least, size)
            room = max(room, size)
            found.append([])
        found[-1].append(tensor)
        left, room = left - size, room - size
    return found


def _between(small: list[list[ManifestTensor]], large: list[list[ManifestTensor]]) -> list[list[ManifestTensor]]:
    """Of three buckets that are there at a time one is large: the third. If there are more, they come late."""
    found, left, last = list[list[ManifestTensor]](), list(large), small[1:][-1:]
    for members in small[: len(small) - len(last)]:
        found.append(members)
        if len(found) % 3 == 2:
            found += left[:1]
            left = left[1:]
    return [*found, *left, *last]


def _bucket(index: int, tensors: Sequence[ManifestTensor]) -> Bucket:
    entries: list[Entry] = []
    end = 0
    for tensor in tensors:
        entry, end = _place(tensor, end)
        entries.append(entry)
    return Bucket(index, tuple(entries), end)


def _place(tensor: ManifestTensor, offset_bytes: int) -> tuple[Entry, int]:
    values = Slot(tensor.name, tensor.shape, DTYPES[tensor.dtype], offset_bytes)
    end = _aligned(values.offset_bytes + values.num_bytes)
    if not tensor.quantized:
        return Entry(tensor, values, None), end
    rows, cols = tensor.shape
    scale = Slot(scale_name(tensor.name), scale_shape(rows, cols), torch.float32, end)
    return Entry(tensor, values, scale), _aligned(scale.offset_bytes + scale.num_bytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
