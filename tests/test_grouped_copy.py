"""Many copies in a launch or two, against torch's own copy of the same pairs, byte for byte."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from receiver_plugin import staging
from shared import rectangles as rectangles_module
from shared.grouped_copy import GroupedCopy
from shared.rectangles import NUM_UNITS, joined, launches, rectangles, split
from shared.triton_copy import copy_rectangles
from tests import test_rooms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Pairs = list[tuple[Tensor, Tensor]]


def noise(num_bytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).to(DEVICE)


def check(memory: Tensor, pairs: Pairs) -> GroupedCopy:
    """Copy `pairs`, the first ones of which are views of `memory`, both ways; every byte of `memory` is compared."""
    to, of = [to for to, _ in pairs], [of for _, of in pairs]
    before = memory.clone()
    for target, source in pairs:
        target.copy_(source)
    wanted = memory.clone()
    memory.copy_(before)
    ours = GroupedCopy(to, of)
    ours.run()
    assert torch.equal(memory, wanted)
    memory.copy_(before)
    ours.run()
    assert torch.equal(memory, wanted)
    return ours


def units(ours: GroupedCopy) -> list[int]:
    return [launch.unit_bytes for launch in ours.launches]


def numbers(ours: GroupedCopy) -> list[list[int]]:
    return [row for launch in ours.launches for row in launch.table.tolist()]


@pytest.mark.parametrize("unit_bytes", [16, 4, 2, 1])
def test_a_rectangle_as_the_kernel_describes_it(unit_bytes: int) -> None:
    source, wanted = noise(16 * unit_bytes), torch.zeros(16 * unit_bytes, dtype=torch.uint8, device=DEVICE)
    target = wanted.clone()
    row = (0, source.data_ptr(), target.data_ptr(), 2, 3, 5, 4)
    table = torch.tensor([row], dtype=torch.int64, device=DEVICE)
    copy_rectangles(table, torch.zeros(1, dtype=torch.int32, device=DEVICE), unit_bytes=unit_bytes)
    wanted[: 3 * unit_bytes] = source[: 3 * unit_bytes]
    wanted[4 * unit_bytes : 7 * unit_bytes] = source[5 * unit_bytes : 8 * unit_bytes]
    assert torch.equal(target, wanted)


@pytest.mark.parametrize("num_bytes", [1, 2, 15, 16, 17, 48, 16 * NUM_UNITS - 1, 16 * NUM_UNITS, 40 * NUM_UNITS + 6])
def test_contiguous_bytes(num_bytes: int) -> None:
    memory = noise(num_bytes + 128, seed=1)
    ours = check(memory, [(memory[:num_bytes], noise(num_bytes))])
    tail = num_bytes % 16
    assert units(ours)[0] == (16 if num_bytes >= 16 else {1: 1, 2: 2, 15: 1}[num_bytes])
    assert sum(row[3] * row[4] for row in numbers(ours)[1:]) * units(ours)[-1] == (tail if num_bytes > 16 else 0)


@pytest.mark.parametrize("start", [1, 2, 4, 6, 8, 12])
def test_odd_addresses(start: int) -> None:
    memory, source = noise(3000, seed=1), noise(3000)
    for to_start, of_start in ((start, 0), (0, start), (start, start)):
        ours = check(memory, [(memory[to_start : to_start + 2000], source[of_start : of_start + 2000])])
        assert units(ours) == [min(start & -start, 4)]


@pytest.mark.parametrize("cols", [1, 3, 4, 48, 128, 192, 1000, 2048, 20_000])
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_a_slice_of_columns(rows: int, cols: int) -> None:
    """As a rank of tensor parallelism takes of a row-parallel weight: rows of a piece of those that were sent."""
    memory, source = noise(rows * cols, seed=1), noise(rows * (2 * cols + 64)).view(rows, -1)
    check(memory, [(memory.view(rows, cols), source[:, cols : 2 * cols])])


def test_rows_into_a_slice_of_columns() -> None:
    memory, source = noise(64 * 640, seed=1).view(64, 640), noise(64 * 128).view(64, 128)
    ours = check(memory, [(memory[:, 256:384], source)])
    assert units(ours) == [16] and len(numbers(ours)) == 1


def test_a_bucket_of_all_kinds() -> None:
    memory, source = noise(1 << 18, seed=1), noise(1 << 18)
    whole, scales = source[: 256 * 384].view(256, 384), source[100_000:106_144].view(torch.float32).view(32, 48)
    cube = source[: 8 * 40 * 64].view(8, 40, 64)
    pairs: Pairs = [
        (memory[: 128 * 384].view(128, 384), whole[128:]),
        (memory[49_152 : 49_152 + 256 * 96].view(256, 96), whole[:, 96:192]),
        (memory[73_728 : 73_728 + 32 * 3 * 4].view(torch.float32).view(32, 3), scales[:, 5:8]),
        (memory[80_000 : 80_000 + 7].view(7), source[3:10]),
        (memory[81_000 : 81_000 + 400].view(torch.bfloat16), source[200:600].view(torch.bfloat16)),
        (memory[90_000 : 90_000 + 4 * 20 * 32].view(4, 20, 32), cube[::2, :20, 16:48]),
        (memory[100_000 : 100_000 + 40 * 64].view(64, 40), cube[3].t()),
        (memory[110_000:110_000], source[:0]),
        (memory[110_016 : 110_016 + 48].view(4, 12), source[:12].expand(4, 12)),
        (memory[120_000:120_004].view(torch.float32).view(()), source[4:8].view(torch.float32).view(())),
        (memory[130_000 : 130_000 + 64].view(torch.uint8), source[5:6].expand(64)),
    ]
    ours = check(memory, pairs)
    assert not ours.alone[0]
    assert units(ours) == [16, 4, 2, 1] or units(ours) == [16, 4, 1]


def test_what_is_converted_is_left_to_torch() -> None:
    memory = noise(4096, seed=1)
    norm = torch.randn(64, device=DEVICE).to(torch.bfloat16)
    pairs = [
        (memory[:256].view(torch.float32), norm),
        (memory[256:320], noise(64)),
        (memory[512:640].view(torch.bfloat16), norm),
        (memory[640:768].view(2, 64), noise(64)),  # broadcast
    ]
    ours = check(memory, pairs)
    assert [tensor.data_ptr() - memory.data_ptr() for tensor in ours.alone[0]] == [0, 640]


def test_only_what_is_converted() -> None:
    memory = noise(256, seed=1)
    assert check(memory, [(memory.view(torch.float32), torch.ones(64, dtype=torch.bfloat16).to(DEVICE))]).launches == []


def test_neighbours_on_both_sides_are_one_rectangle() -> None:
    memory, source = noise(4096, seed=1), noise(4096)
    pairs = [(memory[a:b].view(-1, 16), source[a:b].view(-1, 16)) for a, b in ((0, 512), (512, 1024), (1024, 1056))]
    pairs.append((memory[1056:1062], source[1056:1062]))  # its odd end costs the others nothing
    pairs.append((memory[2048:3072], source[2080:3104]))
    ours = check(memory, pairs)
    assert [(launch.unit_bytes, len(launch.table)) for launch in ours.launches] == [(16, 2), (2, 1)]
    assert [row[3:5] for row in numbers(ours)] == [[1, 66], [1, 64], [1, 3]]


def test_neighbours_on_one_side_stay_apart() -> None:
    memory, source = noise(4096, seed=1), noise(4096)
    kinds = [(memory[:64], source[:64]), (memory[64:80], source[128:144]), (memory[128:192], source[144:208])]
    assert len(numbers(check(memory, kinds))) == 3
    wide = source[1024:2048].view(16, 64)  # goes on where the row before it ends, with rows of its own
    pairs = [(memory[1024:1088], source[960:1024]), (memory[1088:1344].view(16, 16), wide[:, :16])]
    assert [row[3] for row in numbers(check(memory, pairs))] == [1, 16]


def test_what_follows_one_another_may_be_of_other_shapes() -> None:
    memory, source = noise(4096, seed=1), noise(4096)
    cuts = [(0, 64, (64,)), (64, 128, (4, 16)), (128, 192, (64,)), (192, 256, (4, 16))]
    ours = check(memory, [(memory[a:b].view(shape), source[a:b].view(shape)) for a, b, shape in cuts])
    assert [row[3:5] for row in numbers(ours)] == [[1, 16]]


def test_the_order_of_dimensions_does_not_matter() -> None:
    memory, source = noise(4096, seed=1).view(64, 64), noise(64 * 128).view(64, 128)
    assert [row[3:5] for row in numbers(check(memory, [(memory.t(), source[:, 32:96].t())]))] == [[64, 4]]


@pytest.mark.parametrize("seed", range(20))
def test_any_views(seed: int) -> None:
    """Drawn at random: windows of matrices and cubes, transposed and stepped, of all widths of element."""
    dice = random.Random(seed)
    memory, source = noise(40_000, seed=seed), noise(40_000, seed=seed + 1)
    pairs: Pairs = []
    at = 0
    while len(pairs) < 12:
        dtype = dice.choice([torch.uint8, torch.bfloat16, torch.float32, torch.int64])
        shape = [dice.randint(1, dice.choice([3, 9, 20])) for _ in range(dice.randint(1, 3))]
        steps = [dice.choice([1, 1, 2]) for _ in shape]
        outer = [count * step + dice.randint(0, 2) for count, step in zip(shape, steps, strict=True)]
        views = []
        for side, start in ((memory, at), (source, dice.randrange(0, 4096, 8))):
            size = dtype.itemsize
            for length in outer:
                size *= length
            if start + size > 40_000:
                break
            view = side[start : start + size].view(dtype).view(outer)
            for dim, (count, step) in enumerate(zip(shape, steps, strict=True)):
                view = view.narrow(dim, 0, count * step)
                view = view[(slice(None),) * dim + (slice(None, None, step),)]
            views.append(view)
        if len(views) < 2:
            break
        order = dice.sample(range(len(shape)), len(shape)) if dice.random() < 0.3 else range(len(shape))
        pairs.append((views[0].permute(*order), views[1].permute(*order)))
        at += size + dice.choice([0, 8, 16, 24])
        at += -at % 8
    assert check(memory, pairs).alone[0] == []


def test_a_pair_of_too_many_rectangles_is_left_to_torch() -> None:
    memory, source = noise(70 * 66 * 70 * 2, seed=1), noise(140 * 132 * 140 * 4)
    strided = source.view(140, 132, 140, -1)[::2, ::2, ::2, :2]
    assert strided.shape == (70, 66, 70, 2)
    assert len(check(memory, [(memory.view(70, 66, 70, 2), strided)]).alone[0]) == 1


def test_where_several_elements_would_go_to_one_place_torch_refuses() -> None:
    ours = GroupedCopy([noise(1).expand(4)], [noise(4)])
    with pytest.raises(RuntimeError, match="single memory location"):
        ours.run()


def test_two_devices_are_a_mistake() -> None:
    with pytest.raises(ValueError):
        GroupedCopy([noise(4)], [torch.empty(4, dtype=torch.uint8, device="meta")])


@pytest.mark.parametrize("size", [128 * 77, 1 << 20])
def test_an_image_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Staging` with the tables in place of torch: what it commits is what a loader loads."""
    made: list[GroupedCopy] = []

    def grouped(to: list[Tensor], of: list[Tensor]) -> object:
        made.append(GroupedCopy(to, of))
        return made[-1].run

    monkeypatch.setattr(staging, "copier", grouped)
    test_rooms.test_an_image_in_pieces_commits_the_same_bytes(size)
    assert sum(len(copy.launches) for copy in made) > 3


def test_a_long_row_has_more_units_than_int32() -> None:
    """In numbers only: nothing of this size is copied."""
    rows = 5
    found = torch.tensor([[0, 1 << 40, rows, 3 << 31, 4 << 31, 3 << 31]]).numpy()
    (launch,) = launches(split(joined(found)))
    assert launch.table.tolist() == [[0, 0, 1 << 40, rows, (3 << 31) // 16, (4 << 31) // 16, (3 << 31) // 16]]
    assert launch.rectangle_of_program.numel() == -(-rows * (3 << 31) // 16 // NUM_UNITS)


def test_tables_of_a_large_mixture_of_experts_are_quick() -> None:
    """36,864 tensors: 48 layers of 128 experts, three weights and their scales each."""
    period = 1024 + 128
    memory, source = (torch.empty(48 * 384 * period + 1024, dtype=torch.uint8) for _ in range(2))
    to, of = [], []
    for number in range(48 * 384):
        for start, size, dtype, shape in ((0, 1024, torch.uint8, (16, 64)), (1024, 96, torch.float32, (6, 4))):
            at = number * period + start
            of.append(source[at : at + size].view(dtype).view(shape))
            to.append(memory[at + 512 : at + 512 + size].view(dtype).view(shape))
    took_s = []
    for _ in range(5):
        rectangles_module._pattern.cache_clear()
        began = time.process_time()
        found, left = rectangles(to, of)
        made = list(launches(split(joined(found))))
        took_s.append(time.process_time() - began)
    assert not left and len(found) == 36_864 and [launch.unit_bytes for launch in made] == [16]
    assert min(took_s) < 0.5, took_s


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shared.triton_copy import NUM_UNITS, _copy_kernel

for unit_bytes, wide in ((16, "v2.b64"), (4, "b32"), (2, "b16"), (1, "b8")):
    constants = {"RELATIVE": True, "UNIT_BYTES": unit_bytes, "NUM_UNITS": NUM_UNITS}
    types = {"rectangles_ptr": "*i64", "rectangle_of_program_ptr": "*i32", "base_ptr": "*u8"}
    types["num_programs"] = "i32"
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(argument,): [["tt.divisibility", 16]] for argument in range(2)}
    source = ASTSource(_copy_kernel, types, constants, aligned)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    both = 2 * NUM_UNITS // 128  # of a thread, where rows are long and where they are short
    assert text.count("st.global") == text.count(f"st.global.{wide}") == both, unit_bytes
    assert text.count(f"ld.global.{wide}") == both + (unit_bytes == 4), unit_bytes  # and the number of a rectangle
"""


def test_compiles_into_wide_instructions(tmp_path: Path) -> None:
    """Needs no GPU: what the interpreter cannot see."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
