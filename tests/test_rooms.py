"""Where the bytes of a push lie: which way is taken, and an image that is cut into pieces of memory."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest
import torch

from receiver_plugin.manifest import expected_in_fp8, manifest_of, plan_rank
from receiver_plugin.probe import fingerprint
from receiver_plugin.rooms import CannotLendError, Need, Room, choose, enter, free_of, obstacles
from receiver_plugin.staging import Staging, cut
from receiver_plugin.windows import View
from sender.packer import Packer
from sender.source import ModuleSource
from shared.buckets import make_layout
from shared.config import FP8BlockConfig
from shared.errors import PlanError
from shared.planes import shared_memory
from tests.test_push_memory import expected
from tests.tiny_models import FakeMemory, Served, Trainer

NEED = Need({"a": 1000, "b": 24}, 256, torch.device("cpu"))  # an image of 1152 bytes


def memory(reserved: int = 0, *pool: int, refusal: str = "") -> FakeMemory:
    made = FakeMemory()
    made.reserved = torch.full((reserved,), 255, dtype=torch.uint8) if reserved else None
    made.pool, made.refusal = [torch.full((size,), 255, dtype=torch.uint8) for size in pool], refusal
    return made


def test_an_image_is_aligned() -> None:
    assert NEED.image_bytes == 1024 + 128


@pytest.mark.parametrize(
    ("lent", "way"),
    [
        (memory(1152 + 256), "reserved"),
        (memory(1152 + 255, 4096), "kv_pool"),
        (memory(0, 512, 512, 512), "kv_pool"),
        (memory(0, 100, 100), "in_place"),
        (memory(), "in_place"),
        (memory(0, 4096, refusal="it is away"), "in_place"),
    ],
)
def test_the_best_way_that_there_is_memory_for(lent: FakeMemory, way: str) -> None:
    assert choose("auto", [obstacles(NEED, lent, "auto")]) == way


def test_the_weakest_rank_decides() -> None:
    found = [obstacles(NEED, lent, "auto") for lent in (memory(4096, 4096), memory(0, 4096), memory(4096, 4096))]
    assert choose("auto", found) == "kv_pool"
    found.append(obstacles(NEED, memory(4096), "auto"))
    assert choose("auto", found) == "in_place"


@pytest.mark.parametrize("way", ["reserved", "kv_pool", "in_place"])
def test_a_way_can_be_forced(way: Any) -> None:
    assert choose(way, [obstacles(NEED, memory(4096, 4096), way)]) == way


@pytest.mark.parametrize(
    ("way", "lent", "helps"),
    [
        ("reserved", memory(), r"rank 1: reserved: 0\.00 GB are reserved of 0\.00 GB.*--fp8sync-staging 0\.01"),
        ("kv_pool", memory(4096, 100), r"rank 1: kv_pool: the KV cache has 0\.00 GB.*--mem-fraction-static"),
        ("kv_pool", memory(4096, 9999, refusal="resume it first"), "rank 1: kv_pool: resume it first"),
    ],
)
def test_what_cannot_be_forced_says_what_helps(way: Any, lent: FakeMemory, helps: str) -> None:
    with pytest.raises(PlanError, match=helps):
        choose(way, [{}, obstacles(NEED, lent, way)])


def test_no_memory_for_a_bucket_is_no_memory_at_all() -> None:
    huge = Need({"a": 1000}, 1 << 60, torch.device("cpu"))
    with pytest.raises(PlanError, match=r"in_place: no memory for .*smaller bucket_bytes"):
        choose("auto", [obstacles(huge, memory(0, 4096), "auto")])


def test_a_bucket_that_is_not_needed_is_not_tried() -> None:
    huge, plenty = Need({"a": 1000}, 1 << 60, torch.device("cpu")), memory(0, 4096)
    plenty.reserved = torch.empty(1 << 61, dtype=torch.uint8, device="meta")
    assert obstacles(huge, plenty, "auto") == obstacles(huge, plenty, "reserved") == {}
    assert obstacles(huge, plenty, "in_place").keys() == {"kv_pool", "in_place"}


def test_the_kv_cache_is_zero_before_and_after() -> None:
    lent = memory(0, 512, 1024)
    room = enter("kv_pool", NEED, lent)
    assert sum(buffer.numel() for buffer in room.buffers) == NEED.image_bytes
    assert not any(buffer.any() for buffer in room.buffers)
    for buffer in room.buffers:
        buffer.fill_(255)
    room.leave()
    assert not any(buffer.any() for buffer in room.buffers)


def test_a_kv_cache_that_is_gone_is_an_error_of_the_push() -> None:
    lent = memory(0, 4096)
    lent.refusal = "its memory is released"
    with pytest.raises(PlanError, match="its memory is released"):
        enter("kv_pool", NEED, lent)
    with pytest.raises(PlanError, match="smaller than it was"):
        enter("kv_pool", NEED, memory(0, 1024))
    with pytest.raises(CannotLendError):
        lent.kv_pool()


def is_inside(part: torch.Tensor, lent: FakeMemory) -> bool:
    assert lent.reserved is not None
    return 0 <= part.data_ptr() - lent.reserved.data_ptr() <= lent.reserved.numel() - part.numel()


def test_a_reserved_bucket_that_is_taken_is_left_alone() -> None:
    lent = memory(4096)
    mine = enter("reserved", NEED, lent)
    own = enter("reserved", NEED, lent, free_of(lent, [mine.bucket.data_ptr()]))
    assert is_inside(mine.bucket, lent) and not is_inside(own.bucket, lent)
    assert mine.buffers[0].data_ptr() == own.buffers[0].data_ptr()


# ---- whole buckets in reserved memory

WHOLE = replace(NEED, whole_bytes=1280, num_buckets=5)


def test_a_rank_that_needs_all_keeps_whole_buckets() -> None:
    lent = memory(1280)
    assert "reserved" not in obstacles(WHOLE, lent, "reserved"), "an image and a bucket would take more"
    room = enter("reserved", WHOLE, lent)
    assert (room.whole, room.buffers, room.bucket.numel(), room.num_at_once) == (True, [], 1280, 5)
    assert is_inside(room.bucket, lent)
    short = memory(1279)
    assert "0.00 GB are reserved of 0.00 GB" in obstacles(WHOLE, short, "reserved")["reserved"]


def test_a_rank_that_needs_a_slice_keeps_an_image() -> None:
    room = enter("reserved", replace(WHOLE, whole_bytes=2 * 1152), memory(1152 + 256))
    assert (room.whole, room.buffers[0].numel(), room.bucket.numel()) == (False, 1152, 256)


def test_whole_buckets_to_which_an_earlier_sender_may_write_are_left_alone() -> None:
    """It may write to all of them: there is nothing beside them to stage in."""
    lent = memory(4096, 4096)
    free = free_of(lent, [enter("reserved", WHOLE, lent).bucket.data_ptr()])
    assert free is not None and free.numel() == 0
    found = obstacles(WHOLE, lent, "auto", free)
    assert "an earlier sender may still write" in found["reserved"] and choose("auto", [found]) == "kv_pool"
    with pytest.raises(PlanError, match="an earlier sender may still write"):
        choose("reserved", [obstacles(WHOLE, lent, "reserved", free)])
    with pytest.raises(PlanError, match="an earlier sender may still write"):
        enter("reserved", WHOLE, lent, free)


def test_beside_an_image_whose_bucket_is_taken_whole_buckets_have_no_room() -> None:
    lent = memory(4096)
    free = free_of(lent, [enter("reserved", NEED, lent).bucket.data_ptr()])
    assert "reserved" not in obstacles(WHOLE, lent, "reserved", free)
    room = enter("reserved", WHOLE, lent, free)
    assert not room.whole and room.buffers[0].numel() == 1152 and not is_inside(room.bucket, lent)


def test_memory_that_no_other_process_can_open_keeps_no_buckets_that_one_writes() -> None:
    exported = replace(WHOLE, exported=True)
    room = enter("reserved", exported, memory(4096))
    assert not room.whole and shared_memory.holds(room.bucket)
    lent = memory()
    lent.reserved = shared_memory.allocate(4096)
    room = enter("reserved", exported, lent)
    assert room.whole and shared_memory.holds(room.bucket) and is_inside(room.bucket, lent)


# ---- cutting


def test_boxes_make_up_a_view_and_cross_no_bound() -> None:
    dice = random.Random(3)
    for _ in range(300):
        shape = [dice.randint(1, 6) for _ in range(dice.randint(1, 4))]
        whole = torch.arange(prod(shape)).view(shape)
        view = whole[tuple(slice(dice.randint(0, n - 1), None) for n in shape)]
        if dice.random() < 0.5 and view.dim() > 1:
            view = view.transpose(0, -1)
        window = View(int(view.storage_offset()), tuple(view.shape), tuple(view.stride()))
        bounds = sorted(dice.sample(range(1, whole.numel() + 1), dice.randint(0, min(5, whole.numel()))))
        seen: list[int] = []
        for box in cut(window, bounds):
            numbers = [int(view[index]) for index in product(*(range(a, b) for a, b in box))]
            assert len({sum(bound <= number for bound in bounds) for number in numbers}) == 1
            seen += numbers
        assert sorted(seen) == sorted(view.flatten().tolist())


def test_a_view_of_nothing_has_no_boxes() -> None:
    assert list(cut(View(0, (3, 0), (1, 1)), [1])) == []
    assert list(cut(View(7, (), ()), [1, 9])) == [()]


@pytest.mark.parametrize("size", [128, 384, 128 * 77, 1 << 20])
def test_an_image_in_pieces_commits_the_same_bytes(size: int) -> None:
    """Pieces end inside of rows, of slices of rows, and of the constants of a padded vocabulary."""
    served, trainer = Served(), Trainer(seed=4)
    source = ModuleSource(trainer)
    manifest = manifest_of(source.tensors, expected_in_fp8(source.tensors, FP8BlockConfig()))
    plan, _ = plan_rank(served, manifest)
    layout = make_layout(manifest, 64 << 10)
    need = Need.of(served, plan, layout)
    buffers = [torch.full((size,), 255, dtype=torch.uint8) for _ in range(-(-need.image_bytes // size))]
    staging = Staging(served, plan, layout, Room("kv_pool", buffers, torch.empty(need.bucket_bytes, dtype=torch.uint8)))
    packer = Packer(layout, FP8BlockConfig(), torch.device("cpu"))
    for bucket in layout.buckets:
        staging.bucket(bucket.index)[:] = packer.pack(bucket, source.gather(bucket.names))
        staging.accept(bucket.index, sent=0, begin=lambda data, index: lambda: 1)
    assert not staging.touched
    staging.commit()
    assert fingerprint(served) == expected(trainer)
