"""The digest of `shared.digest` of a bucket of which one process holds parts, wherever they lie.

A digest of a whole is the sum, modulo 2^64, of those of its parts. So what trainer ranks have written adds up to what a
server rank finds in its memory, though no process has the bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared import digest as digests
from shared import raw
from shared.rectangles import DESTINATION, DESTINATION_STEP, ROWS, WIDTH, Numbers, joined, launches, split

_WORD_BYTES = 4


class Keys:
    """What the digests of one push are made with; `sizes`: bytes of each bucket."""

    def __init__(self, secret: str, version: int, sizes: Sequence[int], device: torch.device) -> None:
        self.secret, self.version = secret, version
        if device.type == "cuda":
            self.table, self.pages = digests.multipliers(sizes, device, secret=secret, version=version)


class RectangleDigest:
    """Of `found` (`shared.rectangles`): sources are addresses on `device`, destinations are places in the bucket, in
    bytes. Only addresses are kept. `relative`: they count from the memory that `add_to` is given."""

    def __init__(self, found: Numbers, device: torch.device, relative: bool = False) -> None:
        self._device, self._found = device, found
        ends = found[:, DESTINATION] + (found[:, ROWS] - 1) * found[:, DESTINATION_STEP] + found[:, WIDTH]
        self._num_bytes = -(-int(ends.max(initial=0)) // _WORD_BYTES) * _WORD_BYTES
        self._launches = []
        if device.type == "cuda":
            from shared.triton_rectangles import warm

            self._launches = [launch.on(device) for launch in launches(split(joined(found)))]
            with torch.cuda.device(device):
                for launch in self._launches:
                    warm(device, launch.unit_bytes, digests.PAGE_WORDS, relative)

    def add_to(self, out: Tensor, keys: Keys, bucket: int, source: Tensor | None = None) -> None:
        """Add to `out`, int64 of one element on the device (on 16 bytes: a kernel is compiled for that, and for others
        again), on the current stream, without waiting for it. `source`: flat uint8, on 16 bytes."""
        if self._device.type != "cuda":
            first = 0 if source is None else source.data_ptr()
            for part in raw.collect(self._found, first, self._num_bytes):
                data = torch.from_numpy(part)
                out += digests.start_digest(data, secret=keys.secret, version=keys.version, bucket=bucket)
            return
        from shared.triton_rectangles import digest_rectangles

        with torch.cuda.device(self._device):
            for unit_bytes, rectangles, programs in self._launches:
                tables = rectangles, programs, keys.table, keys.pages[bucket]
                digest_rectangles(*tables, out, unit_bytes=unit_bytes, source=source)
