"""What a server rank tells trainer ranks that write into its memory: pieces of memory, and what of every bucket goes
where in them.

A bucket is then a numbering of the bytes of some tensors, and nothing that anybody has: each trainer rank cuts out of
these rectangles what it holds.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from shared.errors import TransferError
from shared.rectangles import DESTINATION, DESTINATION_STEP, ROWS, SOURCE, SOURCE_STEP, WIDTH, Numbers, num_bytes

MEMORY = 6
"""A column behind those of rectangles: in which memory, by its number. Sources count from the start of the bucket,
destinations from that of the memory."""

MOST_BYTES = 1 << 28  # of a whole map
_FIELDS = 7
_HEAD, _MEMORY = struct.Struct("<II"), struct.Struct("<4sQ128s")
_MOST = 1 << 46  # of any number: products and sums of a few of them fit into 64 bits


class Memory(NamedTuple):
    """`where`: how to open it, by the module of its `kind`."""

    kind: bytes
    num_bytes: int
    where: bytes


@dataclass(frozen=True)
class SliceMap:
    """`buckets`: [n, 7] int64 of each."""

    memories: tuple[Memory, ...]
    buckets: tuple[Numbers, ...]

    @cached_property
    def num_bytes(self) -> tuple[int, ...]:
        """What of each bucket goes to this rank."""
        return tuple(num_bytes(found) for found in self.buckets)

    def packed(self) -> bytes:
        counts = np.array([len(found) for found in self.buckets], dtype="<i8")
        numbers = np.concatenate([np.empty((0, _FIELDS), np.int64), *self.buckets]).astype("<i8")
        memories = b"".join(_MEMORY.pack(*memory) for memory in self.memories)
        return _HEAD.pack(len(self.memories), len(self.buckets)) + memories + counts.tobytes() + numbers.tobytes()

    @classmethod
    def read(cls, data: bytes, bucket_bytes: Sequence[int]) -> SliceMap:
        """`bucket_bytes`: of each bucket. Raises: TransferError: it is no map of such buckets, or reaches
        beyond one of them, or beyond its memories."""
        try:
            num_memories, num_buckets = _HEAD.unpack_from(data)
            at = _HEAD.size + num_memories * _MEMORY.size
            memories = tuple(Memory(*parts) for parts in _MEMORY.iter_unpack(data[_HEAD.size : at]))
            counts = np.frombuffer(data, "<i8", num_buckets, at)
            numbers = np.frombuffer(data, "<i8", -1, at + counts.nbytes).astype(np.int64).reshape(-1, _FIELDS)
        except (struct.error, ValueError) as error:
            raise TransferError(f"its map of slices cannot be read: {error}") from error
        if len(memories) != num_memories or num_buckets != len(bucket_bytes) or counts.sum() != len(numbers):
            raise TransferError(f"its map of slices is not one of {len(bucket_bytes)} buckets")
        if (counts < 0).any() or not _is_within(numbers, memories, np.repeat(np.array(bucket_bytes), counts)):
            raise TransferError("its map of slices reaches beyond its memory, or beyond a bucket")
        return cls(memories, tuple(np.split(numbers, np.cumsum(counts)[:-1])))


def _is_within(numbers: Numbers, memories: Sequence[Memory], bucket_bytes: Numbers) -> bool:
    if not len(numbers):
        return True
    if (numbers < 0).any() or (numbers > _MOST).any() or (numbers[:, [ROWS, WIDTH]] < 1).any():
        return False
    if (numbers[:, MEMORY] >= len(memories)).any():
        return False
    rows, width = numbers[:, ROWS], numbers[:, WIDTH]
    steps = [numbers[:, step] for step in (SOURCE_STEP, DESTINATION_STEP)]
    if ((rows > 1) & ((steps[1] < width) | ((steps[0] < width) & (steps[0] > 0)))).any():
        return False  # rows that lie across each other
    last = [(rows.astype(float) - 1) * step + width for step in steps]  # as floats they cannot overflow
    room = np.array([memory.num_bytes for memory in memories], dtype=float)[numbers[:, MEMORY]]
    return bool(
        (numbers[:, SOURCE] + last[0] <= bucket_bytes).all() and (numbers[:, DESTINATION] + last[1] <= room).all()
    )
