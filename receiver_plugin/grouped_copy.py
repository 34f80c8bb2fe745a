"""Copies of many tensors on a GPU in a launch or two, however many they are (`receiver_plugin.triton_copy`).

    GroupedCopy(to, of)    once: all pairs of views as rectangles of bytes, in tables on the device
    run()                  every push: one launch for each kind of alignment among them, mostly one in all

A pair whose two sides differ in element type or shape is left to torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from receiver_plugin.triton_copy import NUM_UNITS, NUM_WARPS, UNITS, copy_rectangles, warm

Numbers = NDArray[np.int64]

SOURCE, DESTINATION, ROWS, WIDTH, SOURCE_STEP, DESTINATION_STEP = range(6)
"""Columns of rectangles, [n, 6] int64: addresses of both sides, a count of rows, and, in bytes, the length of a row and
the way from one to the next on both sides, 0 where there is one row."""

_MOST_OF_A_PAIR = 4096  # rectangles; a pair of more is left to torch


_WIDEST = max(UNITS)


class Launch(NamedTuple):
    """`table` [rectangles, 7] int64 and `rectangle_of_program` [programs] int32, as `receiver_plugin.triton_copy` has
    them, in units of `unit_bytes`."""

    unit_bytes: int
    table: Tensor
    rectangle_of_program: Tensor


class GroupedCopy:
    """Copies `of` to `to`, pair by pair; all on one device, and no two of `to` overlap.

    Only addresses are kept: the caller keeps the memory of both. `alone` (to, of) are the pairs that are left to torch.
    """

    def __init__(
        self, to: Sequence[Tensor], of: Sequence[Tensor], num_units: int = NUM_UNITS, num_warps: int = NUM_WARPS
    ) -> None:
        (self._device,) = {tensor.device for tensor in (*to, *of)}
        self._sizes = {"num_units": num_units, "num_warps": num_warps}
        found, left = rectangles(to, of)
        self.launches = [
            Launch(launch.unit_bytes, *(table.to(self._device) for table in launch[1:]))
            for launch in launches(split(joined(found)), num_units)
        ]
        self.alone = [to[number] for number in left], [of[number] for number in left]
        with self._current():
            for launch in self.launches:
                warm(self._device, launch.unit_bytes)

    def run(self) -> None:
        """On the current stream, without waiting for it."""
        with self._current():
            for unit_bytes, table, rectangle_of_program in self.launches:
                copy_rectangles(table, rectangle_of_program, unit_bytes=unit_bytes, **self._sizes)
        if self.alone[0]:
            torch._foreach_copy_(*self.alone)

    def _current(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, whatever device the tensors are on."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def rectangles(to: Sequence[Tensor], of: Sequence[Tensor]) -> tuple[Numbers, list[int]]:
    """The rectangles that copy `of` to `to`, in their order, and the numbers of the pairs that have none."""
    kinds: dict[tuple[object, ...], list[int]] = {}  # layers are alike: few kinds, and Python does the least for a pair
    for number, (target, source) in enumerate(zip(to, of, strict=True)):
        kind = (target.dtype, target.shape, target.stride(), source.dtype, source.shape, source.stride())
        kinds.setdefault(kind, []).append(number)
    addresses = np.array([[tensor.data_ptr() for tensor in side] for side in (of, to)], dtype=np.int64).T
    parts, numbers, left = [np.empty((0, 6), np.int64)], [np.empty(0, np.int64)], []
    for members in kinds.values():
        target, source = to[members[0]], of[members[0]]
        pattern = None
        if target.dtype == source.dtype and target.shape == source.shape:
            pattern = _pattern(target.shape, target.stride(), source.stride(), target.itemsize)
        if pattern is None:
            left += members
            continue
        placed = np.tile(pattern, (len(members), 1, 1))
        placed[:, :, : DESTINATION + 1] += addresses[members][:, None]
        parts.append(placed.reshape(-1, 6))
        numbers.append(np.repeat(np.array(members), len(pattern)))
    order = np.argsort(np.concatenate(numbers), kind="stable")
    return np.concatenate(parts)[order], sorted(left)


@lru_cache(maxsize=16384)
def _pattern(
    size: tuple[int, ...], target_stride: tuple[int, ...], source_stride: tuple[int, ...], itemsize: int
) -> Numbers | None:
    """The rectangles of one pair, both sides at address 0; None if they are too many, or torch would refuse them."""
    if 0 in size:
        return np.empty((0, 6), np.int64)
    dims: list[
        tuple[int, int, int]
    ] = []  # innermost first, and neighbours joined: destination step, source step, count
    for target, source, count in sorted(zip(target_stride, source_stride, size, strict=True)):
        if dims and (target, source) == (dims[-1][0] * dims[-1][2], dims[-1][1] * dims[-1][2]):
            dims[-1] = (*dims[-1][:2], dims[-1][2] * count)
        elif count > 1:
            dims.append((target, source, count))
    if any(target == 0 for target, _, _ in dims):
        return None  # several elements go to one place
    width = dims.pop(0)[2] if dims and dims[0][:2] == (1, 1) else 1
    dims.sort(key=lambda dim: dim[2])  # the longest one are the rows
    target_step, source_step, rows = dims.pop() if dims else (0, 0, 1)
    offsets = np.zeros((1, 2), np.int64)
    for target, source, count in dims:
        if len(offsets) * count > _MOST_OF_A_PAIR:
            return None
        steps = np.arange(count)[:, None] * np.array((source, target))
        offsets = (offsets[:, None] + steps).reshape(-1, 2)
    found = np.empty((len(offsets), 6), np.int64)
    found[:, : DESTINATION + 1] = offsets
    found[:, ROWS:] = (rows, width, source_step, target_step)
    found[:, [column for column in range(6) if column != ROWS]] *= itemsize
    return found


def joined(found: Numbers) -> Numbers:
    """`found`, where single rows that follow one another without a gap, on both sides, are one row."""
    single, ends = found[:, ROWS] == 1, found[:, : DESTINATION + 1] + found[:, WIDTH, None]
    goes_on = single[1:] & single[:-1] & (found[1:, : DESTINATION + 1] == ends[:-1]).all(axis=1)
    first = np.flatnonzero(np.concatenate([np.ones(min(1, len(found)), bool), ~goes_on]))
    made = found[first]
    if len(found):
        made[:, WIDTH] = np.where(made[:, ROWS] == 1, np.add.reduceat(found[:, WIDTH], first), made[:, WIDTH])
    return made


def split(found: Numbers) -> Numbers:
    """`found`, where what single rows on 16 bytes have beyond a multiple of 16 bytes is a row of its own."""
    ends = found[:, WIDTH] % _WIDEST
    uneven = (found[:, ROWS] == 1) & (ends > 0) & (found[:, WIDTH] > _WIDEST)
    uneven &= (found[:, SOURCE] | found[:, DESTINATION]) % _WIDEST == 0
    whole, rest = found.copy(), found[uneven]
    whole[uneven, WIDTH] -= ends[uneven]
    rest[:, : DESTINATION + 1] += whole[uneven, WIDTH, None]
    rest[:, WIDTH] = ends[uneven]
    return np.concatenate([whole, rest])


def launches(found: Numbers, num_units: int = NUM_UNITS) -> Iterator[Launch]:
    """The tables of all rectangles, on the host: for each, the largest unit that divides its addresses and lengths."""
    apart = np.bitwise_or.reduce(np.delete(found, ROWS, axis=1), axis=1)
    left = np.ones(len(found), bool)
    for unit_bytes in UNITS:
        mine = left & (apart % unit_bytes == 0)
        left &= ~mine
        if not mine.any():
            continue
        table = np.empty((int(mine.sum()), 7), np.int64)
        table[:, 1:] = found[mine]
        table[:, 1 + WIDTH :] //= unit_bytes
        programs = -(-table[:, 1 + ROWS] * table[:, 1 + WIDTH] // num_units)
        table[:, 0] = np.cumsum(programs) - programs
        numbers = np.repeat(np.arange(len(table), dtype=np.int32), programs)
        yield Launch(unit_bytes, torch.from_numpy(table), torch.from_numpy(numbers))
