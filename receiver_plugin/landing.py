"""Where the bytes of a push land that trainer ranks write themselves, and what a rank does when they are there.

    slices      which bytes of every bucket go where: to the image of a rank, or to its parameters
    digests     of what lies there of every bucket
    settle()    convert what is held in another type than it is sent in

No bucket ever exists here. `Staging` resolves its copies from one that is never written to; this takes the rectangles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared import digest
from shared.errors import PlanError, TransferError
from shared.planes import shared_memory
from shared.rectangle_digest import Keys, RectangleDigest
from shared.rectangles import (
    DESTINATION,
    DESTINATION_STEP,
    ROWS,
    SOURCE,
    SOURCE_STEP,
    WIDTH,
    Numbers,
    num_bytes,
    rectangles,
)

Pairs = tuple[list[Tensor], list[Tensor]]  # to, of


class Digests:
    """Of all that lies here, bucket by bucket."""

    def __init__(self, found: Sequence[RectangleDigest], keys: Keys, device: torch.device) -> None:
        self._found, self._keys = found, keys
        self._sums = torch.zeros(len(found), 2, dtype=torch.int64, device=device)  # the first ones count

    def begin(self, index: int) -> None:
        """That of bucket `index`, on the current stream, without waiting for it."""
        self._found[index].add_to(self._sums[index, :1], self._keys, index)

    def read(self) -> list[int]:
        """All of them, once they are there."""
        return digest.read(self._sums[:, 0])()


class Landing:
    """`pairs`: for each of `buckets` what is copied from it, all of it to `device`.

    Raises: PlanError: something of it cannot be written from outside.
    """

    def __init__(self, pairs: Sequence[Pairs], buckets: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self._held: dict[int, Tensor] = {}  # memory that is written to, by its first address
        self._converted: list[tuple[Tensor, Tensor]] = []
        places = [self._place(*pair, bucket) for pair, bucket in zip(pairs, buckets, strict=True)]
        starts = np.array(sorted(self._held), dtype=np.int64)
        self.memories = [self._held[start] for start in starts.tolist()]
        self.slices = tuple(_in_memories(found, starts) for found in places)
        self.num_bytes = tuple(num_bytes(found) for found in places)
        self._bucket_bytes = [bucket.numel() for bucket in buckets]
        self._digests = [RectangleDigest(_seen_from_here(found), self.device) for found in places]

    def _place(self, to: list[Tensor], of: list[Tensor], bucket: Tensor) -> Numbers:
        """Rectangles from places in the bucket to addresses."""
        some = [(t, o) for t, o in zip(to, of, strict=True) if t.numel()]
        to = [self._settled_later(t, o) if t.dtype != o.dtype else t for t, o in some]
        for target in to:
            storage = target.untyped_storage()
            if storage.data_ptr() not in self._held:
                self._held[storage.data_ptr()] = target.new_empty(0, dtype=torch.uint8).set_(storage)
        found, left = rectangles(to, [source for _, source in some])
        if left:
            raise PlanError(f"{len(left)} tensors lie so that no trainer rank can write them: use another send_from")
        found[:, SOURCE] -= bucket.data_ptr()
        return found

    def _settled_later(self, target: Tensor, source: Tensor) -> Tensor:
        """Memory for what is sent of a parameter that is held in another type."""
        if self.device.type == "cpu":
            try:
                memory = shared_memory.allocate(source.numel() * source.itemsize)
            except TransferError as error:
                raise PlanError(str(error)) from error
        else:
            memory = torch.empty(source.numel() * source.itemsize, dtype=torch.uint8, device=self.device)
        held = memory.view(source.dtype).view(source.shape)
        self._converted.append((target, held))
        return held

    def digests(self, secret: str, version: int) -> Digests:
        """To be taken in one push."""
        return Digests(self._digests, Keys(secret, version, self._bucket_bytes, self.device), self.device)

    def settle(self) -> None:
        for target, held in self._converted:
            target.copy_(held)


def _in_memories(found: Numbers, starts: Numbers) -> Numbers:
    """[n, 7], as `shared.slices` has them; `starts`: addresses of the memories, ascending."""
    number = np.searchsorted(starts, found[:, DESTINATION], side="right") - 1
    made = np.column_stack([found, number])
    made[:, DESTINATION] -= starts[number]
    return made


def _seen_from_here(found: Numbers) -> Numbers:
    """For a digest: the bytes lie at the destination, and their places in the bucket are those of the source."""
    return found[:, [DESTINATION, SOURCE, ROWS, WIDTH, DESTINATION_STEP, SOURCE_STEP]]
