"""`shared/coverage.py` against brute force: every element of small tensors is looked at."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from shared.coverage import Box, box_of, overlapped, uncovered

SHAPES = [(7,), (1,), (4, 6), (1, 5), (5, 1), (2, 3, 4), (3, 1, 4), (2, 1, 1, 3), (2, 2, 2, 2), (4, 4)]


def elements(shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(count).reshape(shape)


def box(tensor: torch.Tensor, view: torch.Tensor) -> Box | None:
    return box_of(tensor.shape, int(view.storage_offset()), tuple(view.shape), view.stride())


def cut(tensor: torch.Tensor, found: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in found)]


def covers(tensor: torch.Tensor, found: Box, view: torch.Tensor) -> bool:
    """Whether the view touches each element of the box once and nothing else."""
    return sorted(view.flatten().tolist()) == sorted(cut(tensor, found).flatten().tolist())


def some_view(tensor: torch.Tensor, choose: random.Random) -> torch.Tensor:
    """Narrowed, selected, permuted, squeezed, unsqueezed, and merged where torch can merge without a copy."""
    view = tensor
    for _ in range(choose.randrange(1, 6)):
        step = choose.choice(["narrow", "select", "permute", "unsqueeze", "squeeze", "flatten"])
        if step == "unsqueeze":
            view = view.unsqueeze(choose.randrange(view.dim() + 1))
        if view.dim() == 0:
            continue
        dim = choose.randrange(view.dim())
        if step == "narrow":
            start = choose.randrange(view.shape[dim])
            view = view.narrow(dim, start, choose.randrange(1, view.shape[dim] - start + 1))
        elif step == "select":
            view = view.select(dim, choose.randrange(view.shape[dim]))
        elif step == "permute":
            view = view.permute(choose.sample(range(view.dim()), view.dim()))
        elif step == "squeeze":
            view = view.squeeze(dim)
        elif step == "flatten" and view.is_contiguous():
            view = view.view(-1)
    return view


def merges_only_whole_dims(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether the touched elements are a box at all: their bounding box holds nothing else."""
    touched = torch.zeros(tensor.numel(), dtype=torch.bool)
    touched[view.flatten()] = True
    where = touched.view(tensor.shape).nonzero()
    extent = where.amax(0) - where.amin(0) + 1
    return int(extent.prod()) == int(touched.sum()) == view.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_views_of_loaders_have_exactly_the_box_that_they_touch(shape: tuple[int, ...]) -> None:
    tensor, choose, num_boxes = elements(shape), random.Random(str(shape)), 0
    for _ in range(400):
        view = some_view(tensor, choose)
        found = box(tensor, view)
        assert (found is not None) == merges_only_whole_dims(tensor, view), (view.shape, view.stride(), found)
        if found is not None:
            assert covers(tensor, found, view), (view.shape, view.stride(), found)
            num_boxes += 1
    assert num_boxes > 100


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_strided_window_at_all_has_a_wrong_box(shape: tuple[int, ...]) -> None:
    """Sizes and strides that no loader makes: None is always allowed, a wrong box never."""
    tensor, choose = elements(shape), random.Random(str(shape))
    for _ in range(3000):
        num_dims = choose.randrange(1, 4)
        size = [choose.randrange(1, 6) for _ in range(num_dims)]
        stride = [choose.randrange(0, 13) for _ in range(num_dims)]
        last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if last >= tensor.numel():
            continue
        view = tensor.as_strided(size, stride, choose.randrange(tensor.numel() - last))
        found = box(tensor, view)
        assert found is None or covers(tensor, found, view), (size, stride, view.storage_offset(), found)


def test_flattened_views() -> None:
    tensor = elements((2, 3, 4))
    whole = ((0, 2), (0, 3), (0, 4))
    assert box(tensor, tensor.view(-1)) == box(tensor, tensor.view(6, 4)) == box(tensor, tensor.view(2, 12)) == whole
    assert box(tensor, tensor[1].view(-1)) == ((1, 2), (0, 3), (0, 4))
    assert box(tensor, tensor[:, 1:].flatten(1)) is not None
    assert box(tensor, tensor.view(-1)[4:12]) == ((0, 1), (1, 3), (0, 4))
    assert box(tensor, tensor.view(-1)[4:10]) is None
    assert box(tensor, tensor.view(-1)[2:6]) is None


def test_what_is_no_box() -> None:
    tensor = elements((4, 4))
    for view in (tensor[::2], tensor[:, ::2], tensor.diagonal(), tensor[:1].expand(3, 4), tensor[0, 0].expand(2, 2)):
        assert box(tensor, view) is None, (view.shape, view.stride())
    assert box(tensor, tensor.view(-1)[1::4]) == ((0, 4), (1, 2))  # a column, however it was made
    assert box_of((4, 4), 16, (1,), (1,)) is None
    assert box_of((4, 4), 12, (2, 4), (4, 1)) is None


def test_scalars_and_empty_views() -> None:
    assert box_of((), 0, (), ()) == ()
    assert box_of((1,), 0, (), ()) == ((0, 1),)
    tensor = elements((4, 4))
    for view in (tensor[2:2], tensor[4:], tensor[:, 4:], tensor[1:, 1:1]):
        found = box(tensor, view)
        assert found is not None and cut(tensor, found).numel() == 0
        assert uncovered((4, 4), [found]) == ((0, 4), (0, 4))
        assert overlapped((4, 4), [found, found, ((0, 4), (0, 4))]) is None


def random_boxes(shape: tuple[int, ...], choose: random.Random) -> list[Box]:
    def edge(full: int) -> tuple[int, int]:
        start = choose.randrange(full)
        return start, choose.randrange(start + 1, full + 1)

    return [tuple(edge(full) for full in shape) for _ in range(choose.randrange(5))]


@pytest.mark.parametrize("shape", [(6,), (4, 5), (3, 2, 4)], ids=str)
def test_holes_and_overlaps_against_counting(shape: tuple[int, ...]) -> None:
    choose = random.Random(str(shape))
    for _ in range(300):
        boxes, counts = random_boxes(shape, choose), torch.zeros(shape, dtype=torch.int32)
        for one in boxes:
            cut(counts, one).add_(1)
        hole, twice = uncovered(shape, boxes), overlapped(shape, boxes)
        assert (hole is None) == bool((counts > 0).all())
        assert (twice is None) == bool((counts <= 1).all())
        assert hole is None or (cut(counts, hole).numel() > 0 and not cut(counts, hole).any())
        assert twice is None or (cut(counts, twice).numel() > 0 and bool((cut(counts, twice) > 1).all()))


def test_tiles_cover_without_overlap() -> None:
    tiles: list[Box] = [((a, a + 2), (b, b + 3)) for a, b in itertools.product((0, 2), (0, 3))]
    assert uncovered((4, 6), tiles) is None and overlapped((4, 6), tiles) is None
    assert uncovered((4, 6), tiles[1:]) == ((0, 2), (0, 3))
    assert uncovered((4, 6), []) == ((0, 4), (0, 6))
    assert overlapped((4, 6), [*tiles, tiles[2]]) == ((2, 4), (0, 3))
