"""Rectangles of bytes: what is clipped, copied and digested, against the same done byte by byte."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from shared import digest, raw
from shared.rectangle_digest import Keys, RectangleDigest
from shared.rectangles import DESTINATION, ROWS, SOURCE, Numbers, clip, joined, launches, num_bytes, split

SECRET = "ab" * 32


def keys(version: int) -> Keys:
    return Keys(SECRET, version, [], torch.device("cpu"))


def drawn(seed: int, size: int, num: int = 12) -> Numbers:
    """Rectangles in `size` bytes of a source; they may overlap there, not at their destinations."""
    chance, found, to = random.Random(seed), [], 0
    for _ in range(num):
        unit = chance.choice([1, 2, 4, 16])
        rows, width = chance.choice([1, 1, 2, 5, 9]), unit * chance.randint(1, 6)
        step = chance.choice([width, width + unit, width + 3 * unit, 0]) if rows > 1 else 0
        there = width + unit * chance.randint(0, 2) if rows > 1 else 0
        span = (rows - 1) * step + width
        first = unit * chance.randint(0, (size - span) // unit)
        to = -(-to // unit) * unit + unit * chance.randint(0, 3)
        found.append((first, to, rows, width, step, there))
        to += (rows - 1) * there + width
    return np.array(found, dtype=np.int64)


def moved(found: Numbers) -> dict[int, int]:
    """Where each byte of the destination comes from."""
    made: dict[int, int] = {}
    for source, to, rows, width, step, there in found.tolist():
        for row in range(rows):
            for column in range(width):
                assert to + row * there + column not in made, "two rectangles write one byte"
                made[to + row * there + column] = source + row * step + column
    return made


@pytest.mark.parametrize("seed", range(30))
def test_clip_keeps_what_is_inside(seed: int) -> None:
    found = drawn(seed, 4000)
    chance = random.Random(seed)
    for _ in range(20):
        start, stop = sorted((chance.randint(0, 4000), chance.randint(0, 4000)))
        cut = clip(found, start, stop)
        assert moved(cut) == {to: of for to, of in moved(found).items() if start <= of < stop}
        assert num_bytes(cut) == len(moved(cut)) and (cut[:, ROWS] > 0).all()


@pytest.mark.parametrize("seed", range(10))
def test_parts_make_the_whole(seed: int) -> None:
    """Wherever it is cut, what is copied part by part is what is copied at once, and so are the digests."""
    found, chance = drawn(seed, 4000), random.Random(seed)
    source = torch.randint(0, 256, (4016,), dtype=torch.uint8)
    size = max(moved(found)) + 1
    bounds = [0, *sorted(chance.sample(range(1, 4000), 3)), 4000]
    whole, parts = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    raw.copy(at(found, DESTINATION, whole), source.data_ptr())
    sums = torch.zeros(2, dtype=torch.int64)
    for start, stop in itertools.pairwise(bounds):
        cut = clip(found, start, stop)
        raw.copy(at(cut, DESTINATION, parts), source.data_ptr())
        sent = np.column_stack([cut[:, SOURCE], cut[:, SOURCE], cut[:, 2:5], cut[:, 4]])
        RectangleDigest(sent, torch.device("cpu"), relative=True).add_to(sums[:1], keys(3), 5, source)
    wanted = torch.tensor([moved(found).get(place, -1) for place in range(size)])
    assert torch.equal(whole, torch.where(wanted < 0, 0, source[wanted.clamp_min(0)]))
    assert torch.equal(parts, whole)
    arrived = np.column_stack([at(found, DESTINATION, whole)[:, DESTINATION], found[:, SOURCE], *found[:, 2:4].T])
    arrived = np.column_stack([arrived, found[:, 5], found[:, 4]])
    RectangleDigest(arrived, torch.device("cpu")).add_to(sums[1:], keys(3), 5)
    assert sums[0] == sums[1] != 0


def at(found: Numbers, column: int, memory: torch.Tensor) -> Numbers:
    made = found.copy()
    made[:, column] += memory.data_ptr()
    return made


def test_the_digest_of_all_is_that_of_the_bucket() -> None:
    data = torch.randint(0, 256, (4 * 300,), dtype=torch.uint8)
    rows = np.array([(first, first, 1, 100, 0, 0) for first in range(0, 1200, 100)], dtype=np.int64)
    found = torch.zeros(1, dtype=torch.int64)
    RectangleDigest(rows, torch.device("cpu"), relative=True).add_to(found, keys(1), 2, data)
    wanted = digest.digest(data, secret=SECRET, version=1, bucket=2)
    assert digest.read(found)() == [wanted]


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_the_kernels_do_the_same(seed: int, relative: bool) -> None:
    """Whatever the alignment, whatever the program that a rectangle is cut over."""
    pytest.importorskip("triton")
    from shared.triton_copy import copy_rectangles
    from shared.triton_rectangles import digest_rectangles

    found, page = drawn(seed, 4000), 64
    source = torch.randint(0, 256, (4016,), dtype=torch.uint8)
    size = max(moved(found)) + 1
    wanted, copied = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    raw.copy(at(found, DESTINATION, wanted), source.data_ptr())
    there, chance = source.to(DEVICE), random.Random(seed)
    multipliers = torch.randint(-(1 << 62), 1 << 62, (-(-size // (4 * page)) * page,)).view(-1, page)[:, :1] * 2 + 1
    table = torch.randint(-(1 << 62), 1 << 62, (page,)) * 2 + 1
    out, num_units = torch.zeros(1, dtype=torch.int64, device=DEVICE), chance.choice([4, 16])
    base = 0 if relative else there.data_ptr()
    for launch in launches(split(joined(found)), num_units):
        numbers = launch.table.clone()
        numbers[:, 1] += base
        digest_rectangles(
            numbers.to(DEVICE),
            launch.rectangle_of_program.to(DEVICE),
            table.to(DEVICE),
            multipliers.flatten().to(DEVICE),
            out,
            unit_bytes=launch.unit_bytes,
            source=there if relative else None,
            num_units=num_units,
        )
        numbers[:, 2] += copied.data_ptr()
        copy_rectangles(
            numbers.to(DEVICE),
            launch.rectangle_of_program.to(DEVICE),
            unit_bytes=launch.unit_bytes,
            source=there if relative else None,
            num_units=num_units,
        )
    assert torch.equal(copied.cpu(), wanted)
    data = torch.zeros(-(-size // 4) * 4, dtype=torch.uint8)
    data[:size] = wanted
    places = torch.arange(data.numel() // 4)
    words = data.view(torch.int32).to(torch.int64)
    assert out.item() == (words * table[places % page] * multipliers.flatten()[places // page]).sum().item()
