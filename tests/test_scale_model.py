"""`benchmarks/scale_model.py`: small cases worked out by hand, and real shapes with few layers against real plans."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scale_links import (
    Server,
    Traffic,
    Trainers,
    broadcast,
    broadcast_by_eight,
    broadcast_to_hosts,
    relayed,
    rows_of,
    server_of,
    straight,
    trainers_of,
)
from benchmarks.scale_model import LARGE, MARK, Offered, check, gb, into, plan, traffic_table
from benchmarks.scale_slices import Served, slice_bytes, slices
from benchmarks.shapes import MODELS, with_layers
from sender.hf_names import Cut, Cuts
from sender.rows_plan import plan_rows
from sender.sharding import ShardedRows
from shared.buckets import Entry, make_layout
from shared.coverage import overlapped, uncovered
from shared.errors import PlanError
from shared.protocol import ManifestTensor
from tests.zoo import Case

ROOT = Path(__file__).parents[1]
FEW = [pytest.param(with_layers(case, 4), served, id=case.name) for case, served in LARGE]  # 3 of DeepSeek-V3 are dense


def fp8(name: str, rows: int, cols: int) -> ManifestTensor:
    return ManifestTensor(name=name, shape=(rows, cols), dtype="float8_e4m3fn", quantized=True)


def bf16(name: str, *shape: int) -> ManifestTensor:
    return ManifestTensor(name=name, shape=shape, dtype="bfloat16", quantized=False)


def entry(tensor: ManifestTensor) -> Entry:
    return make_layout([tensor]).buckets[0].entries[0]


# ---- links: 10 trainer ranks on two hosts hold 100 bytes and one more each, server ranks hold 600, 600 of 1045

TRAINERS = Trainers(1100, tuple(range(100, 110)), tuple(range(110, 120)))
SERVER = Server(held=(600, 600), first=(600, 445))


@pytest.mark.parametrize("num_servers", [1, 3])
def test_a_broadcast_takes_the_whole_model_through_every_nic(num_servers: int) -> None:
    found = broadcast(TRAINERS, SERVER, num_servers)
    near = 101 + 102 + 103 + 104 + 105 + 106 + 107
    assert found == Traffic(trainer_out=1100, trainer_in=108 + 109, server_in=1100, server_out=1100, nvlink=near)


def test_the_only_server_rank_passes_nothing_on() -> None:
    alone = Trainers(1100, (1045,), (1045,))
    assert broadcast(alone, Server((1045,), (1045,)), 1) == Traffic(1100, 0, 1100, 0, 0)
    assert broadcast_to_hosts(alone, Server((1045,), (1045,)), 1) == Traffic(1100, 0, 1100, 0, 0)


@pytest.mark.parametrize(("num_servers", "passed_on"), [(1, 0), (3, 1100)])
def test_a_broadcast_to_hosts_goes_on_by_nvlink(num_servers: int, passed_on: int) -> None:
    found = broadcast_to_hosts(TRAINERS, SERVER, num_servers)
    assert found == Traffic(1100, 108 + 109, server_in=1100, server_out=passed_on, nvlink=1100)


@pytest.mark.parametrize(("num_servers", "passed_on"), [(1, 0), (3, 550)])
def test_a_broadcast_by_eight_leaves_by_eight_nics(num_servers: int, passed_on: int) -> None:
    """138 of 1100 bytes by each; they enter a server of two ranks by two NICs, and each of its GPUs lacks a half.

    217 bytes of ranks on the other host are gathered by eight (28 each).
    """
    found = broadcast_by_eight(TRAINERS, SERVER, num_servers)
    assert found == Traffic(138, 28, server_in=550, server_out=passed_on, nvlink=550)
    alone = broadcast_by_eight(Trainers(1100, (1045,), (1045,)), Server((1045,), (1045,)), 1)
    assert alone == Traffic(1100, 0, 1100, 0, 0)


def test_eight_gather_by_nvlink_what_their_host_holds() -> None:
    """The rank that holds 100 lacks an eighth of the 728 of the others."""
    found = broadcast_by_eight(TRAINERS, Server((1045,), (1045,)), 1)
    assert found == Traffic(138, 28, server_in=1100, server_out=0, nvlink=91)


@pytest.mark.parametrize(("num_servers", "out"), [(1, 119), (3, 357)])
def test_straight_sends_more_for_every_server(num_servers: int, out: int) -> None:
    assert straight(TRAINERS, SERVER, num_servers) == Traffic(out, 0, server_in=600, server_out=0, nvlink=0)


@pytest.mark.parametrize(("num_servers", "passed_on"), [(1, 0), (3, 600)])
def test_relayed_sends_everything_once(num_servers: int, passed_on: int) -> None:
    found = relayed(TRAINERS, SERVER, num_servers)
    assert found == Traffic(109, 0, server_in=600, server_out=passed_on, nvlink=600 - 445)


def test_seconds_are_those_of_the_busiest_link() -> None:
    slow_nic = Traffic(trainer_out=0, trainer_in=100_000_000_000, server_in=5, server_out=1, nvlink=370_000_000_000)
    assert (slow_nic.busiest.name, slow_nic.seconds) == ("trainer in", 2.0)
    slow_nvlink = Traffic(trainer_out=50_000_000_000, trainer_in=0, server_in=0, server_out=0, nvlink=740_000_000_000)
    assert (slow_nvlink.busiest.name, slow_nvlink.seconds) == ("NVLink", 2.0)


# ---- what trainer and server ranks hold


def test_what_two_trainer_ranks_hold() -> None:
    """Rows 150 of 300 end within a block, whose scale is the first rank's; 3 experts are 2 and 1; 5 values 3 and 2."""
    served = Served(num_ranks=2, num_kv_heads=1, num_experts=3, expert_size=256)
    shapes = {"k_proj.weight": (300, 256), "m.experts.down_proj": (3, 128, 256), "norm.weight": (5,)}
    experts = tuple(
        Cut(f"m.experts.{number}.down_proj.weight", (128, 256), (256, 1), number * 128 * 256) for number in range(3)
    )
    cuts: Cuts = {
        "k_proj.weight": (Cut("k_proj.weight", (300, 256), (256, 1)),),
        "m.experts.down_proj": experts,
        "norm.weight": (Cut("norm.weight", (5,), (1,)),),
    }
    tensors = [fp8("k_proj.weight", 300, 256), *(fp8(cut.name, 128, 256) for cut in experts), bf16("norm.weight", 5)]
    layout = make_layout([*tensors, bf16("m.gate.e_score_correction_bias", 4)])
    rows = [rows_of(name, shape, 2) for name, shape in shapes.items()]
    found = trainers_of(layout, rows, cuts, 2, served)
    k_proj = (150 * 256 + 2 * 2 * 4, 150 * 256 + 1 * 2 * 4)
    expert, norm, buffer = 128 * 256 + 2 * 4, (3 * 2, 2 * 2), 4 * 2
    assert found.num_bytes == layout.num_bytes
    assert found.held == (k_proj[0] + 2 * expert + norm[0] + buffer, k_proj[1] + expert + norm[1])
    twice = (2 * k_proj[0] + 2 * norm[0] + 2 * buffer, 2 * k_proj[1] + 2 * norm[1])  # both server ranks hold these
    assert found.wanted == (twice[0] + 2 * expert, twice[1] + expert)
    # columns 0 to 127 of each expert are one server rank's, the others are the other's
    everything = 300 * 256 + 3 * 2 * 4 + 10 + 8
    assert server_of(layout, served) == Server(
        held=(everything + 3 * (128 * 128 + 4),) * 2, first=(everything + 3 * (128 * 128 + 4), 3 * (128 * 128 + 4))
    )


def test_a_tensor_that_is_no_run_of_rows_is_refused() -> None:
    layout = make_layout([fp8("k_proj.weight", 128, 256)])
    cuts: Cuts = {"k_proj.weight": (Cut("k_proj.weight", (128, 256), (1, 128)),)}
    with pytest.raises(PlanError, match="no run of whole rows"):
        trainers_of(layout, [rows_of("k_proj.weight", (128, 256), 2)], cuts, 2, Served(1, 1))


def test_slices_of_qwen3() -> None:
    """4 heads of keys on 8 ranks; experts of 1536 would be cut within a block, so they are dealt out."""
    served = LARGE[0][1]
    heads = slices("model.layers.0.self_attn.k_proj.weight", (512, 4096), served)
    assert heads == tuple(((128 * (rank // 2), 128 * (rank // 2) + 128), (0, 4096)) for rank in range(8))
    down = slices("model.layers.0.mlp.experts.37.down_proj.weight", (4096, 1536), served)
    assert down == (None, None, ((0, 4096), (0, 1536)), *[None] * 5)
    assert slices("model.norm.weight", (4096,), served) == (((0, 4096),),) * 8
    assert slices("lm_head.weight", (151936, 4096), served)[7] == ((132944, 151936), (0, 4096))


def test_slices_of_deepseek() -> None:
    served = LARGE[1][1]
    assert slices("m.experts.255.up_proj.weight", (2048, 7168), served)[1] == ((256, 512), (0, 7168))
    assert slices("m.experts.255.down_proj.weight", (7168, 2048), served)[1] == ((0, 7168), (256, 512))
    assert slices("m.kv_a_proj_with_mqa.weight", (576, 7168), served) == (((0, 576), (0, 7168)),) * 8
    assert slices("m.o_proj.weight", (7168, 16384), served)[2] == ((0, 7168), (4096, 6144))


def test_bytes_of_a_slice_are_codes_and_the_scales_of_its_blocks() -> None:
    ragged = entry(fp8("a.kv_a_proj_with_mqa.weight", 576, 256))
    assert slice_bytes(ragged, ((0, 576), (0, 256))) == 576 * 256 + 5 * 2 * 4
    assert slice_bytes(ragged, ((512, 576), (128, 256))) == 64 * 128 + 4
    assert slice_bytes(entry(bf16("lm_head.weight", 6, 4)), ((3, 6), (0, 4))) == 24


@pytest.mark.parametrize("box", [((64, 128), (0, 256)), ((0, 64), (0, 256)), ((0, 576), (0, 100))])
def test_a_slice_within_a_block_is_refused(box: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(PlanError, match="within a block"):
        slice_bytes(entry(fp8("a.q_proj.weight", 576, 256)), box)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("a.q_proj.bias", (256,)),
        ("a.strange.weight", (256, 256)),
        ("a.q_proj.weight", (250, 256)),
        ("a.o_proj.weight", (256, 250)),
        ("a.norm.weight", (2, 2)),
    ],
)
def test_what_is_not_known_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError):
        slices(name, shape, Served(8, 8))


@pytest.mark.parametrize(("case", "served"), FEW)
def test_the_slices_of_all_ranks_are_the_whole_tensors(case: Case, served: Served) -> None:
    """Every byte lies on a rank, none twice but in whole copies; what lies on an earlier rank is what is repeated."""
    layout = Offered.of(case).layout
    expected, times = [0] * served.num_ranks, 0
    for bucket in layout.buckets:
        for found in bucket.entries:
            boxes = [box for box in slices(found.tensor.name, found.values.shape, served) if box is not None]
            different = set(boxes)
            assert uncovered(found.values.shape, different) is None
            assert overlapped(found.values.shape, list(different)) is None
            copies = len(boxes) // len(different)
            assert all(boxes.count(box) == copies for box in different)
            size = found.values.num_bytes + (found.scale.num_bytes if found.scale else 0)
            assert sum(slice_bytes(found, box) for box in boxes) == copies * size
            times += copies * size
            expected[0] += size
    server = server_of(layout, served)
    assert sum(server.held) == times
    assert sum(server.first) == expected[0]


@pytest.mark.parametrize(("case", "served"), FEW)
@pytest.mark.parametrize("num_ranks", [2, 48])
def test_trainers_hold_what_the_real_plans_say(case: Case, served: Served, num_ranks: int) -> None:
    """What every rank makes of its parts: codes and scales, and what it copies; and all tensors, once."""
    offered = Offered.of(case)
    rows, sharding = offered.rows(num_ranks), offered.sharding(num_ranks)
    every = trainers_of(offered.layout, rows, offered.cuts, num_ranks, served)
    quantized = [tensor.quantized for tensor in offered.layout.tensors]
    assert any(quantized) and not all(quantized)
    early = make_layout([tensor for tensor in offered.layout.tensors if tensor.quantized or tensor.dtype == "bfloat16"])
    names = {tensor.name for tensor in early.tensors}
    cuts = {name: tuple(cut for cut in found if cut.name in names) for name, found in offered.cuts.items()}
    held = trainers_of(early, rows, cuts, num_ranks, served).held
    for rank in (0, 1, num_ranks - 1):
        made = plan_rows(offered.layout, sharding, offered.cuts, rank, num_ranks)
        assert made.names == names
        assert held[rank] == sum(
            part.num_rows * part.num_cols * (2 if part.copied_as is not None else 1)
            + (0 if part.scale_at is None else _scale_bytes(part.num_rows, part.num_cols))
            for bucket in made.buckets
            if bucket is not None
            for part in bucket.parts
        )
    copied = [entry.values.num_bytes for b in early.buckets for entry in b.entries if entry.scale is None]
    assert plan_rows(offered.layout, sharding, offered.cuts, 0, num_ranks).num_bytes == sum(held) - sum(copied)
    slots = [slot.num_bytes for bucket in offered.layout.buckets for slot in bucket.slots]
    assert sum(every.held) == sum(slots)


def _scale_bytes(rows: int, cols: int) -> int:
    return 4 * -(-rows // 128) * -(-cols // 128)


def test_a_plan_in_a_process_of_its_own() -> None:
    offered = Offered.of(with_layers(MODELS["qwen3-8b"], 1))
    found, other = plan(offered, 16), plan(offered, 16, rank=1)
    made = plan_rows(offered.layout, offered.sharding(16), offered.cuts, 0, 16)
    assert found.num_bytes == made.num_bytes and found.num_maxima == other.num_maxima == made.num_amax
    copied = sum(e.values.num_bytes for b in offered.layout.buckets for e in b.entries if e.scale is None)
    assert found.num_bytes + copied <= sum(found.chunk_bytes) < found.num_bytes + copied + 16 * 1024
    assert len(found.chunk_bytes) == 16 and other.chunk_bytes == ()


# ---- as FSDP2 shards, and as the document says

FSDP = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from sender.sharding import sharding_of
dist.init_process_group("fake", rank=3, world_size=16, store=FakeStore())
mesh = init_device_mesh("cpu", (16,))
shapes = {"a": (300, 256), "experts": (40, 6, 4), "few": (5, 8), "vector": (64,)}
whole = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
found = sharding_of(((name, distribute_tensor(each, mesh, [Shard(0)])) for name, each in whole.items()), 16)
assert not found.problem, found.problem
print(*found.parameters, sep=chr(10))
"""


def test_rows_are_those_of_sharded_tensors() -> None:
    """16 ranks that are none: `sharding_of` of real sharded tensors on one of them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", FSDP], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    shapes = {"a": (300, 256), "experts": (40, 6, 4), "few": (5, 8), "vector": (64,)}
    wanted = [rows_of(name, shape, 16) for name, shape in shapes.items()]
    assert wanted[1] == ShardedRows("experts", "torch.bfloat16", 240, 4, 18)
    assert ran.stdout.splitlines() == [str(rows) for rows in wanted]


def test_qwen3_8b_is_in_the_document_as_predicted() -> None:
    lines = list(check(Offered.of(MODELS["qwen3-8b"])))
    assert len(lines) == 4 and "| 9.44 | 25.9 | 28.3 to 41.3 | 1.09 to 1.60 |" in lines[2]
    assert "\n".join(lines) in (ROOT / "docs/scale.md").read_text(encoding="utf-8")


def test_lines_that_are_alike_are_one() -> None:
    case, served = LARGE[1]
    lines = list(traffic_table(Offered.of(with_layers(case, 1)), served))
    assert sum(line.startswith("| `broadcast` |") for line in lines) == 4
    assert sum(line.startswith("| `straight` |") for line in lines) == 16
    assert any(line.startswith("| `relayed` | 1,024 | 4, 32, 256 |") for line in lines)


def test_a_document_keeps_what_is_above_its_mark() -> None:
    assert into(f"# Title\n{MARK}old\n", "new\n") == f"# Title\n{MARK}\nnew\n"
    with pytest.raises(ValueError, match="no line"):
        into("# Title\n", "new\n")


def test_gigabytes_have_three_digits() -> None:
    assert [gb(1_234_000_000), gb(235e9), gb(3.801e12)] == ["1.23", "235", "3,801"]
