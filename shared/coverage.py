"""Which part of a tensor a strided view touches, and whether a set of such parts covers the whole.

A box is a tuple of (start, stop) per dimension. Views that are no boxes (overlapping, diagonal) are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod

import numpy as np

Box = tuple[tuple[int, int], ...]


@lru_cache(maxsize=16384)  # layers are alike: most of a plan asks what it has asked before
def box_of(shape: tuple[int, ...], offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Box | None:
    """The box of a contiguous tensor of `shape` that the view (offset, size, stride; in elements) touches.

    Returns None where the view is not a box of that tensor. A transposed view is a box: its dimensions are matched
    to those of the tensor by stride.
    """
    if 0 in size:  # touches nothing, wherever it lies: the padding of a vocabulary that needs none
        return ((0, 0),) * len(shape)
    strides, extent = _extent(shape, size, stride)
    if extent is None:
        return None
    box, left = [], offset
    for full, step, length in zip(shape, strides, extent, strict=True):
        start, left = divmod(left, step) if step else (0, left)
        if start + length > full:
            return None
        box.append((start, start + length))
    return tuple(box)


@lru_cache(maxsize=4096)
def _extent(
    shape: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The strides of a contiguous tensor of `shape`, and how far the view reaches in each of its dimensions."""
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    extent = [1] * len(shape)
    for length, step in zip(size, stride, strict=True):
        if length == 1:
            continue
        dims = [d for d, s in enumerate(strides) if s == step and 1 != shape[d] >= length and extent[d] == 1]
        if dims:
            extent[dims[0]] = length
            continue
        split = _split_merged(shape, strides, extent, length, step)
        if split is None:
            return strides, None
        for dim, part in split:
            extent[dim] = part
    return strides, tuple(extent) if prod(extent) == prod(size) else None


def _split_merged(
    shape: Sequence[int], strides: Sequence[int], extent: Sequence[int], length: int, step: int
) -> list[tuple[int, int]] | None:
    """A flattened view walks over several whole trailing dimensions with the stride of the innermost one."""
    inner = [d for d, s in enumerate(strides) if s == step and shape[d] != 1]
    if not inner:
        return None
    parts: list[tuple[int, int]] = []
    for dim in range(inner[0], -1, -1):
        if length <= shape[dim]:
            return [*parts, (dim, length)] if extent[dim] == 1 else None
        if length % shape[dim] or extent[dim] != 1:
            return None
        parts.append((dim, shape[dim]))
        length //= shape[dim]
    return None


def uncovered(shape: Sequence[int], boxes: Iterable[Box]) -> Box | None:
    """A box of `shape` that none of `boxes` touches, or None where they cover it all."""
    boxes = list(boxes)
    if whole(tuple(shape)) in boxes:
        return None
    counts, cuts = _grid(shape, boxes)
    return None if counts.all() else _cell(cuts, np.argwhere(counts == 0))


def overlapped(shape: Sequence[int], boxes: Iterable[Box]) -> Box | None:
    """A box of `shape` that two of `boxes` touch, or None where they are disjoint."""
    boxes = list(boxes)
    if len(boxes) < 2:
        return None
    counts, cuts = _grid(shape, boxes)
    return _cell(cuts, np.argwhere(counts > 1)) if counts.max(initial=0) > 1 else None


@lru_cache(maxsize=1024)
def tiles(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> bool:
    """Whether `boxes` cover all of `shape`, each part once."""
    if len(boxes) == 1:
        return boxes[0] == whole(shape)
    counts, _ = _grid(shape, boxes)
    return bool((counts == 1).all())


@lru_cache(maxsize=4096)
def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor of `shape`."""
    return tuple((0, full) for full in shape)


def _grid(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[np.ndarray, list[list[int]]]:
    """How many boxes touch each cell of the grid that all their borders cut."""
    cuts = [sorted({0, full, *(edge for box in boxes for edge in box[dim])}) for dim, full in enumerate(shape)]
    index = [dict(zip(edges, range(len(edges)), strict=True)) for edges in cuts]
    counts = np.zeros([len(edges) - 1 for edges in cuts], dtype=np.int32)
    for box in boxes:
        counts[tuple(slice(index[dim][start], index[dim][stop]) for dim, (start, stop) in enumerate(box))] += 1
    return counts, cuts


def _cell(cuts: list[list[int]], cells: np.ndarray) -> Box:
    return tuple((cuts[dim][int(i)], cuts[dim][int(i) + 1]) for dim, i in enumerate(cells[0]))
