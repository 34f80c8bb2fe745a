"""Rectangles of bytes on a CPU, by address: what `shared.triton_copy` and `shared.triton_rectangles` do on a GPU.

Whoever gives an address keeps the memory there.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from shared.rectangles import DESTINATION, DESTINATION_STEP, ROWS, SOURCE, SOURCE_STEP, WIDTH, Numbers


def copy(found: Numbers, source: int = 0) -> None:
    """Copy these rectangles; `source`: an address that all those of sources count from."""
    for row in found.tolist():
        rows, width = row[ROWS], row[WIDTH]
        of = _bytes_at(source + row[SOURCE], rows, width, row[SOURCE_STEP])
        _bytes_at(row[DESTINATION], rows, width, row[DESTINATION_STEP])[:] = of


def collect(found: Numbers, source: int, num_bytes: int) -> list[NDArray[np.uint8]]:
    """The bytes of these rectangles, each at its destination in arrays of `num_bytes` that hold zeros elsewhere; in so
    many arrays that no two rectangles lie across each other in one."""
    found = _apart(found)
    last = found[:, DESTINATION] + (found[:, ROWS] - 1) * found[:, DESTINATION_STEP] + found[:, WIDTH]
    made, ends = list[NDArray[np.uint8]](), list[int]()
    for number in np.argsort(found[:, DESTINATION], kind="stable").tolist():
        row = found[number].tolist()
        place = next((place for place, end in enumerate(ends) if end <= row[DESTINATION]), len(ends))
        if place == len(ends):
            made.append(np.zeros(num_bytes, np.uint8))
            ends.append(0)
        ends[place] = int(last[number])
        rows, width, start = row[ROWS], row[WIDTH], row[DESTINATION]
        to = made[place][start : ends[place]]
        np.lib.stride_tricks.as_strided(to, (rows, width), (row[DESTINATION_STEP], 1))[:] = _bytes_at(
            source + row[SOURCE], rows, width, row[SOURCE_STEP]
        )
    return made


def _apart(found: Numbers) -> Numbers:
    """Rows that have one destination, each by itself."""
    alike = (found[:, ROWS] > 1) & (found[:, DESTINATION_STEP] == 0)
    single = np.repeat(found[alike], found[alike, ROWS], axis=0)
    if len(single):
        single[:, SOURCE] += np.concatenate([np.arange(rows) for rows in found[alike, ROWS]]) * single[:, SOURCE_STEP]
        single[:, ROWS] = 1
    return np.concatenate([found[~alike], single])


def _bytes_at(address: int, rows: int, width: int, step: int) -> NDArray[np.uint8]:
    span = (ctypes.c_uint8 * ((rows - 1) * step + width)).from_address(address)
    return np.ndarray((rows, width), np.uint8, buffer=memoryview(span), strides=(step, 1))
