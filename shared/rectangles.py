"""Copies of views as rectangles of bytes: numbers, in tables, and no tensor.

rectangles(to, of)   all pairs of views, as rectangles
clip(found, a, b)    what of them lies between two bytes of the source
launches(found)      the tables of `shared.triton_copy` and `shared.triton_rectangles`, by alignment
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.int64]

SOURCE, DESTINATION, ROWS, WIDTH, SOURCE_STEP, DESTINATION_STEP = range(6)
"""Columns of rectangles, [n, 6] int64: addresses of both sides, a count of rows, and, in bytes, the length of a row and
the way from one to the next on both sides, 0 where there is one row."""

UNITS = (16, 4, 2, 1)
NUM_UNITS = 1024
"""Units that a program takes: 16 KiB where rectangles are on 16 bytes."""
FIELDS = 7

_MOST_OF_A_PAIR = 4096  # rectangles; a pair of more is left to torch
_WIDEST = max(UNITS)


class Launch(NamedTuple):
    """`table` [rectangles, 7] int64 and `rectangle_of_program` [programs] int32, in units of `unit_bytes`. A row:

    first program, source, destination, rows, units a row, units from one row of the source to the next, units from one
    row of the destination to the next. Source and destination are in bytes.
    """

    unit_bytes: int
    table: Tensor
    rectangle_of_program: Tensor

    def on(self, device: torch.device) -> Launch:
        return Launch(self.unit_bytes, self.table.to(device), self.rectangle_of_program.to(device))


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


def clip(found: Numbers, start: int, stop: int) -> Numbers:
    """What of `found` lies in bytes `start` to `stop` of the source; rows that do in part are rectangles of their own.

    Rows of one rectangle do not overlap in the source, but for one row that is taken several times (a step of 0).
    """
    first, rows, width, step = found[:, SOURCE], found[:, ROWS], found[:, WIDTH], found[:, SOURCE_STEP]
    last = first + (rows - 1) * step + width
    found = found[(first < stop) & (last > start)]
    inside = (found[:, SOURCE] >= start) & (
        found[:, SOURCE] + (found[:, ROWS] - 1) * found[:, SOURCE_STEP] + found[:, WIDTH] <= stop
    )
    return np.concatenate([found[inside], *_cut_rows(found[~inside], start, stop)])


def _cut_rows(found: Numbers, start: int, stop: int) -> Iterator[Numbers]:
    first, rows, width, step = found[:, SOURCE], found[:, ROWS], found[:, WIDTH], found[:, SOURCE_STEP]
    alike = (rows == 1) | (step == 0)
    yield _cut_columns(found[alike], start, stop)
    found, first, rows, width, step = found[~alike], first[~alike], rows[~alike], width[~alike], step[~alike]
    # Rows from `begin` to before `end` have bytes inside; those from `whole` to before `whole_end` have all of theirs.
    begin = np.maximum(-((first + width - 1 - start) // step), 0)
    end = np.minimum(-((first - stop) // step), rows)
    whole = np.maximum(-((first - start) // step), 0)
    whole_end = np.minimum((stop - first - width) // step + 1, rows)
    yield _rows_of(found, whole, whole_end)
    yield _cut_columns(_rows_of(found, begin, np.minimum(whole, end)), start, stop)
    yield _cut_columns(_rows_of(found, np.maximum(np.maximum(whole_end, whole), begin), end), start, stop)


def _rows_of(found: Numbers, begin: Numbers, end: Numbers) -> Numbers:
    made = found.copy()
    made[:, SOURCE] += begin * found[:, SOURCE_STEP]
    made[:, DESTINATION] += begin * found[:, DESTINATION_STEP]
    made[:, ROWS] = end - begin
    return made[end > begin]


def _cut_columns(found: Numbers, start: int, stop: int) -> Numbers:
    """Of rectangles of one row, or of one that is taken several times."""
    made = found.copy()
    made[:, SOURCE] = np.maximum(found[:, SOURCE], start)
    made[:, DESTINATION] += made[:, SOURCE] - found[:, SOURCE]
    made[:, WIDTH] = np.minimum(found[:, SOURCE] + found[:, WIDTH], stop) - made[:, SOURCE]
    return made[made[:, WIDTH] > 0]


def num_bytes(found: Numbers) -> int:
    return int((found[:, ROWS] * found[:, WIDTH]).sum())


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
