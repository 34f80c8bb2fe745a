"""Quantizing before the gather with real ranks: real shards, real collectives, the same bytes as the simple way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement

from receiver_plugin.probe import fingerprint
from sender.fleet import Fleet
from sender.gather import Gatherer
from sender.packer import Packer
from sender.plan import PushPlan
from sender.report import PushReport
from sender.rows import RowsGather, TorchRows
from sender.source import ModuleSource
from shared.buckets import make_layout
from shared.config import FP8BlockConfig
from shared.errors import ConfigError, NonFiniteWeightError
from shared.naming import should_quantize_param
from shared.protocol import ManifestTensor
from tests.test_distributed import gathered, make_sender, make_sharded
from tests.test_push_memory import Server, expected
from tests.test_ranks import caught, run_on_ranks, tell, wait_for
from tests.tiny_models import Trainer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CONFIGS = (FP8BlockConfig(), FP8BlockConfig(scale_fmt="ue8m0", zero_scale="floor"))
EXPERTS, HIDDEN, INTER = 5, 96, 80  # by 8 ranks: experts on 5 of them; a gate begins and ends within blocks

# ---- bucket for bucket


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INTER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTER))


class Odd(nn.Module):
    """Shapes that no number of ranks divides, among tensors that stay in BF16; one with a whole block of zeros."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(30, 64)
        shapes = ((128, 128), (8, 256), (1, 200), (10, 130), (700, 77), (384, 128), (257, 129))
        self.projs = nn.ModuleList(nn.Linear(cols, rows, bias=rows == 10) for rows, cols in shapes)
        self.experts = Experts()
        self.norm = nn.RMSNorm(64)
        with torch.no_grad():
            self.projs[4].weight[100:300] = 0.0  # type: ignore[operator]
            self.projs[6].weight[3, 5] = 3.0e5 if dtype != FP16 else 6.0e4  # type: ignore[operator]
        self.to(dtype)


def plan_of(source: ModuleSource, config: FP8BlockConfig, rank: int, num_ranks: int) -> PushPlan:
    tensors = []
    for spec in source.tensors:
        quantized = should_quantize_param(spec.name, spec.shape, config)
        dtype = "float8_e4m3fn" if quantized else spec.dtype
        tensors.append(ManifestTensor(name=spec.name, shape=spec.shape, dtype=dtype, quantized=quantized))
    plan = PushPlan(source.tensors, make_layout(tensors, 30_000))
    return plan.sharded(source.sharding, source.cuts, rank, num_ranks)


def packed(model: nn.Module, rank: int, num_ranks: int, config: FP8BlockConfig) -> tuple[list[str], list[bytes]]:
    """The names of what was quantized early, and every bucket, on rank 0; both packed twice."""
    source = ModuleSource(model, num_ranks)
    plan, gatherer, found = plan_of(source, config, rank, num_ranks), Gatherer(config), list[bytes]()
    for _ in range(2):
        found, gathering = [], gatherer.begin(source, plan)
        packer = Packer(plan.layout, config, model.get_parameter("norm.weight").device, plan.early)
        packer.begin()
        for bucket in plan.layout.buckets:
            gathering.quantize(bucket)
            got = gathering.gather(bucket)
            if rank == 0:
                found.append(packer.pack(bucket, got.weights, got.rows).cpu().numpy().tobytes())
        packer.check_finite()
    return sorted(plan.early), found


def pack_both_ways(rank: int, size: int, device: str = "cpu") -> list[Any]:
    found, mesh = [], init_device_mesh(device, (size,))
    for dtype in (BF16, FP16, FP32):
        model = Odd(dtype).to(device)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
        before = [parameter.to_local().clone() for parameter in model.parameters() if isinstance(parameter, DTensor)]
        for config in CONFIGS:
            early, ours = packed(model, rank, size, config)
            none, wanted = packed(model, rank, 1, config)
            found.append((early, none, ours == wanted, len(ours)))
        after = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a weight was written"
    return found


@pytest.mark.parametrize("size", [3, 8])
def test_every_bucket_has_the_same_bytes(size: int) -> None:
    check_both_ways(run_on_ranks(pack_both_ways, size, size))


def check_both_ways(of_ranks: list[Any]) -> None:
    names = {"embed_tokens.weight", "norm.weight", "projs.3.bias"} | {f"projs.{i}.weight" for i in range(7)}
    names |= {f"experts.{e}.{part}_proj.weight" for e in range(EXPERTS) for part in ("gate", "up", "down")}
    for rank, found in enumerate(of_ranks):
        assert len(found) == 6
        for early, none, same, num_buckets in found:
            assert set(early) == names and none == [] and same
            assert num_buckets > 5 if rank == 0 else num_buckets == 0


# ---- whole pushes


@contextmanager
def sent(server: Server | None) -> Iterator[list[bytes]]:
    """All buckets that leave rank 0."""
    buckets, send = list[bytes](), Fleet.send

    def note(fleet: Fleet, bucket: torch.Tensor, index: int, check: Callable[[], None] | None = None) -> None:
        buckets.append(bucket.numpy().tobytes())
        send(fleet, bucket, index, check)

    with mock.patch.object(Fleet, "send", note):
        yield buckets


def push_in_both_ways(rank: int, size: int, dtype: torch.dtype) -> Any:
    server, model = Server(fence="nothing loaded") if rank == 0 else None, make_sharded(size, seed=4, dtype=dtype)
    with sent(server) as early, make_sender(server) as sender:
        plan = sender.prepare(model)
        sender.push(model)
        for parameter in model.parameters():
            parameter.to_local().detach().mul_(0.25)  # type: ignore[attr-defined]
        report = sender.push(model)  # of which nothing may remember the larger weights
        assert sender._planned is plan, "a plan was made again for the same model"
    whole = gathered(model)
    same = server is None or fingerprint(server.model) == expected(whole)
    with sent(server) as late, make_sender(server, quantize="after_gather") as sender:
        simple = sender.push(model)
    return same, early[len(early) // 2 :] == late, len(late), report, simple


def counts(report: PushReport) -> tuple[int, int, int]:
    return report.num_quantized, report.num_quantized_early, report.early_bytes


@pytest.mark.parametrize(("size", "dtype"), [(2, FP32), (8, BF16)])
def test_both_ways_send_the_same_bytes(size: int, dtype: torch.dtype) -> None:
    of_ranks = run_on_ranks(push_in_both_ways, size, size, dtype)
    num_elements = 2 * 192 * (5 * 256 + 2 * 128)
    for rank, (same, equal, num_sent, report, simple) in enumerate(of_ranks):
        assert same and equal and (num_sent > 3) is (rank == 0)
        assert counts(simple) == (14, 0, 0)
        assert counts(report)[:2] == (14, 14)
        assert num_elements < report.early_bytes < 1.01 * num_elements < report.wire_bytes


def push_asynchronously(rank: int) -> Any:
    server, model = Server() if rank == 0 else None, make_sharded(3, seed=6)
    whole = gathered(model)
    with make_sender(server) as sender:
        handle = sender.push_async(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        report = handle.wait()
    return report.num_quantized_early, server is None or fingerprint(server.model) == expected(whole)


def test_push_async_sends_the_weights_of_the_call() -> None:
    assert run_on_ranks(push_asynchronously, 3) == [(14, True)] * 3


NAMES = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight")


def push_nonfinite(rank: int, asynchronous: bool, in_place: bool) -> Any:
    """Rank 1 has NaN in the first tensor, rank 2 inf in its last row of the second."""
    server, model = Server() if rank == 0 else None, make_sharded(3)
    wrong = {1: (NAMES[0], float("nan"), 0), 2: (NAMES[1], float("-inf"), -1)}.get(rank)
    if wrong is not None:
        local(model, wrong[0])[wrong[2], 7] = wrong[1]
    before = fingerprint(server.model) if server is not None else None
    with make_sender(server, staging="in_place" if in_place else "auto") as sender:
        found = caught(lambda: sender.push_async(model).wait()) if asynchronous else caught(sender.push, model)
        kept = server is None or fingerprint(server.model) == before
        for name in NAMES:
            local(model, name).nan_to_num_(nan=0.5, neginf=0.5)
        sender.push(model)
    healed = gathered(model)
    return found, kept, server is None or fingerprint(server.model) == expected(healed)


def local(model: nn.Module, name: str) -> torch.Tensor:
    parameter = model.get_parameter(name)
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()


@pytest.mark.parametrize(("asynchronous", "in_place"), [(False, False), (True, False), (False, True)])
def test_nonfinite_weights_of_other_ranks_are_named(asynchronous: bool, in_place: bool) -> None:
    for found, kept, healed in run_on_ranks(push_nonfinite, 3, asynchronous, in_place):
        assert found["kind"] == NonFiniteWeightError.__name__ and healed
        assert set(found["problems"]) == set(NAMES[:1] if in_place else NAMES), "in place, the first bucket ends it"
        assert kept or in_place


def push_other_layouts(rank: int) -> list[Any]:
    """One sender, one offer, other shards each time: rows, columns, rows in other hands, none, rows."""
    server, mesh, found = Server() if rank == 0 else None, init_device_mesh("cpu", (2,)), []
    with make_sender(server) as sender:
        for seed, dim in enumerate((0, 1, 0, None, 0)):
            model = Trainer(seed)
            for name, parameter in list(model.named_parameters() if dim is not None else ()):
                owner, _, leaf = name.rpartition(".")
                placement = ShardPlacement(dim if parameter.dim() == 2 and "o_proj" not in name else 0)  # type: ignore[arg-type]
                sharded = nn.Parameter(distribute_tensor(parameter.data, mesh, [placement]))
                setattr(model.get_submodule(owner), leaf, sharded)
            report = sender.push(model)
            same = server is None or fingerprint(server.model) == expected(Trainer(seed))
            found.append((report.num_quantized_early, same))
    return found


def test_every_push_goes_by_how_its_model_is_sharded() -> None:
    assert run_on_ranks(push_other_layouts, 2) == [[(14, True), (2, True), (14, True), (0, True), (14, True)]] * 2


# ---- what goes wrong


def push_as_told(rank: int, wrong_way: str) -> Any:
    server, model = Server() if rank == 0 else None, make_sharded(2)
    with make_sender(server, quantize=wrong_way if rank == 1 else "before_gather") as sender:
        return caught(sender.push, model)


def test_ranks_that_were_given_different_ways_are_told() -> None:
    for found in run_on_ranks(push_as_told, 2, "after_gather"):
        assert found["kind"] == ConfigError.__name__ and found["seconds"] < 10.0
        assert "how the model is sharded is another one on rank(s) [1] than on rank 0" in found["text"]


def push_a_wrong_shard(rank: int) -> Any:
    server, model = Server() if rank == 0 else None, make_sharded(2)
    parameter: Any = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    if rank == 1:
        parameter._local_tensor = parameter._local_tensor[:100]
    with make_sender(server) as sender:
        return caught(sender.push, model)


def test_a_rank_that_holds_other_rows_than_its_own_is_named() -> None:
    for found in run_on_ranks(push_a_wrong_shard, 2):
        assert found["kind"] == ConfigError.__name__ and found["seconds"] < 10.0
        assert "rank 1 holds [100, 192], strides [192, 1], of [256, 192] of model.layers.0.mlp.up" in found["text"]
        assert "FP8Sender(quantize='after_gather')" in found["text"]


def push_and_lose_rank_1(rank: int, at: str) -> Any:
    server, model = Server() if rank == 0 else None, make_sharded(2)
    before = fingerprint(server.model) if server is not None else None

    def give_up(*args: Any) -> None:
        tell("rank 1 fails")
        raise RuntimeError("out of memory")

    if rank == 1:
        setattr(TorchRows, at, give_up)
    with make_sender(server) as sender:
        found = caught(sender.push, model)
        if rank == 1:
            assert found["text"] == "out of memory"
            os._exit(0)
        assert server is not None
        wait_for("rank 1 fails")
        return found, fingerprint(server.model) == before, server.receiver.state


@pytest.mark.parametrize("at", ["begin", "quantize"])
def test_a_rank_that_is_lost_before_its_part_of_a_gather(at: str) -> None:
    (found, same, state), gone = run_on_ranks(push_and_lose_rank_1, 2, at)
    assert gone == "died" and found["kind"] and found["seconds"] < 20.0
    assert same and state == "SERVING", "the server was told"


def push_while_rank_0_fails(rank: int) -> Any:
    """Rank 0 fails in its packing, and goes on with the gathers."""
    server, model = Server() if rank == 0 else None, make_sharded(2)
    pack: Callable[..., Any] = Packer.pack

    def fail(self: Packer, bucket: Any, *args: Any) -> torch.Tensor:
        if bucket.index == 2:
            raise RuntimeError("no memory")
        packed: torch.Tensor = pack(self, bucket, *args)
        return packed

    with make_sender(server) as sender:
        with mock.patch.object(Packer, "pack", fail):
            found = caught(sender.push, model)
        sender.push(model)
    whole = gathered(model)
    return found, server is None or fingerprint(server.model) == expected(whole)


def test_rank_0_fails_between_gathers() -> None:
    for found, healed in run_on_ranks(push_while_rank_0_fails, 2):
        assert "no memory" in found["text"] and found["seconds"] < 10.0 and healed


def test_the_way_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"quantize='early': it is one of \['before_gather', 'after_gather'\]"):
        make_sender(Server(), quantize="early")


def test_one_rank_has_nothing_to_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowsGather, "__init__", lambda *args: pytest.fail("it was used"))
    server = Server()
    with make_sender(server) as sender:
        assert sender.push(Trainer()).num_quantized_early == 0
