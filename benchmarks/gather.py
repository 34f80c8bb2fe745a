"""From FSDP2 shards to packed buckets on rank 0: quantized before the gather, and after it.

    python -m benchmarks.gather              on all GPUs of this host, over NCCL
    python -m benchmarks.gather --ranks 4    on a CPU, over gloo, with small layers

Layers of Qwen3-8B and of Qwen3-30B-A3B (experts fused, as Transformers 5 keeps them), BF16, random. No server: what is
timed is all that a push does on the trainer's devices. Both ways are timed in one run, and every bucket is compared.
Prints a table; code 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sender.gather import Gatherer
from sender.packer import Packer
from sender.plan import PushPlan
from sender.source import ModuleSource
from shared.buckets import make_layout
from shared.config import FP8BlockConfig
from shared.digest import digest
from shared.protocol import ManifestTensor

REPEATS = 5
SECRET = "00" * 32  # the digests here only compare


class Layer(nn.Module):
    """Parameters named as in a checkpoint; `shapes` of 3 dimensions are fused experts."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: str) -> None:
        super().__init__()
        for path, shape in shapes.items():
            module: nn.Module = self
            *owners, leaf = path.split(".")
            for owner in owners:
                if not hasattr(module, owner):
                    module.add_module(owner, nn.Module())
                module = module.get_submodule(owner)
            values = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
            module.register_parameter(leaf, nn.Parameter(values))


def dense(hidden: int, inter: int, heads: int) -> dict[str, tuple[int, ...]]:
    return {
        "q_proj.weight": (hidden, hidden),
        "k_proj.weight": (heads, hidden),
        "v_proj.weight": (heads, hidden),
        "o_proj.weight": (hidden, hidden),
        "gate_proj.weight": (inter, hidden),
        "up_proj.weight": (inter, hidden),
        "down_proj.weight": (hidden, inter),
    }


def experts(num: int, hidden: int, inter: int, heads: int) -> dict[str, tuple[int, ...]]:
    return {
        "q_proj.weight": (2 * hidden, hidden),
        "k_proj.weight": (heads, hidden),
        "v_proj.weight": (heads, hidden),
        "o_proj.weight": (hidden, 2 * hidden),
        "experts.gate_up_proj": (num, 2 * inter, hidden),
        "experts.down_proj": (num, hidden, inter),
    }


@dataclass(frozen=True)
class Case:
    title: str
    shapes: dict[str, tuple[int, ...]]
    num_layers: int


def cases(device: str) -> tuple[Case, ...]:
    if device == "cpu":
        return Case("dense", dense(1024, 3072, 256), 4), Case("experts", experts(32, 512, 192, 128), 4)
    return (
        Case("Qwen3-8B, all layers", dense(4096, 12288, 1024), 36),
        Case("Qwen3-30B-A3B, 24 layers", experts(128, 2048, 768, 512), 24),
    )


def plan_of(source: ModuleSource, bucket_bytes: int) -> PushPlan:
    tensors = [
        ManifestTensor(name=s.name, shape=s.shape, dtype="float8_e4m3fn", quantized=True) for s in source.tensors
    ]
    plan = PushPlan(source.tensors, make_layout(tensors, bucket_bytes))
    return plan.sharded(source.sharding, source.cuts, dist.get_rank(), dist.get_world_size())


def one_way(model: nn.Module, num_ranks: int, device: str, bucket_bytes: int) -> tuple[float, list[int]]:
    """Median seconds of a push without its servers, from the first rank's start to the last one's end; all digests."""
    config, source = FP8BlockConfig(), ModuleSource(model, num_ranks)
    plan, gatherer = plan_of(source, bucket_bytes), Gatherer(FP8BlockConfig())
    packer = Packer(plan.layout, config, torch.device(device), plan.early)

    def push() -> Iterator[Tensor]:
        gathering = gatherer.begin(source, plan)
        packer.begin()
        for bucket in plan.layout.buckets:
            gathering.quantize(bucket)
            gathered = gathering.gather(bucket)
            if dist.get_rank() == 0:
                yield packer.pack(bucket, gathered.weights, gathered.rows)
        source.release()

    found = [digest(packed, secret=SECRET, version=0, bucket=index) for index, packed in enumerate(push())]
    packer.check_finite()
    times = sorted(_seconds(lambda: all(True for _ in push()), device) for _ in range(REPEATS))
    return times[len(times) // 2], found


def _seconds(step: Callable[[], object], device: str) -> float:
    dist.barrier()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - started


def measure(case: Case, device: str, bucket_bytes: int) -> bool:
    """Prints a row on rank 0; whether both ways gave the same bytes."""
    size = dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(case.num_layers):
        layer = Layer(case.shapes, device)
        fully_shard(layer, mesh=init_device_mesh(device, (size,)))  # as it is made: not all of it fits on one GPU
        model.layers.append(layer)
    num_bytes = sum(2 * parameter.numel() for parameter in model.parameters())
    before_s, before = one_way(model, size, device, bucket_bytes)
    after_s, after = one_way(model, 1, device, bucket_bytes)
    if dist.get_rank() == 0:
        numbers = f"{num_bytes / 1e9:.2f} | {1e3 * before_s:.1f} | {1e3 * after_s:.1f} | {after_s / before_s:.2f}"
        print(f"| {case.title} | {size} | {len(before)} | {numbers} |", flush=True)
    return before == after


def be_rank(rank: int, size: int, port: int, device: str, bucket_bytes: int) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    if rank == 0:
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(f"{where}, torch {torch.__version__}, buckets of {bucket_bytes >> 20} MiB\n")
        print("| weights | ranks | buckets | BF16 GB | before the gather, ms | after, ms | times as fast |")
        print("|---|---|---|---|---|---|---|", flush=True)
    same = [measure(case, device, bucket_bytes) for case in cases(device)]
    if rank == 0:
        print("\nevery bucket has the same bytes" if all(same) else "\nBUCKETS DIFFER")
    dist.destroy_process_group()
    sys.exit(0 if all(same) else 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--bucket-mib", type=int, default=256)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.device_count() >= given.ranks else "cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    arguments = (given.ranks, port, device, given.bucket_mib << 20)
    ranks = [context.Process(target=be_rank, args=(rank, *arguments)) for rank in range(given.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
