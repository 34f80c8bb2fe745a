"""Copies of many tensors on a GPU in a launch or two, however many they are (`shared.triton_copy`).

    GroupedCopy(to, of)    once: all pairs of views as rectangles of bytes, in tables on the device
    run()                  every push: one launch for each kind of alignment among them, mostly one in all

A pair whose two sides differ in element type or shape is left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shared.rectangles import NUM_UNITS, Launch, Numbers, joined, launches, rectangles, split
from shared.triton_copy import NUM_WARPS, copy_rectangles, warm


class RectangleCopy:
    """Copies rectangles of bytes of one device, or of GPUs that it reaches. `found`: as of `shared.rectangles`; only
    addresses are kept. `relative`: sources count from the memory that `run` is given. `most_programs`: at a time."""

    def __init__(
        self,
        found: Numbers,
        device: torch.device,
        num_units: int = NUM_UNITS,
        num_warps: int = NUM_WARPS,
        relative: bool = False,
        most_programs: int | None = None,
    ) -> None:
        self._device, self._most = device, most_programs
        self._sizes = {"num_units": num_units, "num_warps": num_warps}
        self.launches = [launch.on(device) for launch in launches(split(joined(found)), num_units)]
        with self._current():
            for launch in self.launches:
                warm(device, launch.unit_bytes, relative)

    def run(self, source: Tensor | None = None) -> None:
        """On the current stream, without waiting for it. `source`: flat uint8, on 16 bytes."""
        with self._current():
            for unit_bytes, table, programs in self.launches:
                sizes = {**self._sizes, "unit_bytes": unit_bytes}
                copy_rectangles(table, programs, source=source, most_programs=self._most, **sizes)

    def _current(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, whatever device the tensors are on."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


class GroupedCopy:
    """Copies `of` to `to`, pair by pair; all on one device, and no two of `to` overlap.

    Only addresses are kept: the caller keeps the memory of both. `alone` (to, of) are the pairs that are left to torch.
    """

    def __init__(
        self, to: Sequence[Tensor], of: Sequence[Tensor], num_units: int = NUM_UNITS, num_warps: int = NUM_WARPS
    ) -> None:
        (device,) = {tensor.device for tensor in (*to, *of)}
        found, left = rectangles(to, of)
        self._copy = RectangleCopy(found, device, num_units, num_warps)
        self.alone = [to[number] for number in left], [of[number] for number in left]

    @property
    def launches(self) -> list[Launch]:
        return self._copy.launches

    def run(self) -> None:
        """On the current stream, without waiting for it."""
        self._copy.run()
        if self.alone[0]:
            torch._foreach_copy_(*self.alone)
