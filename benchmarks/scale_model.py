"""A push past the machines at hand, by arithmetic: `python -m benchmarks.scale_model`, on a CPU.

Plans of large models from tensors without values, as a trainer makes them, for 16 to 1,024 trainer ranks (FSDP2 on one
mesh of all) and 1 to 256 servers of 8 ranks; then bytes on the links for each way to send (`benchmarks.scale_links`),
and the time that the busiest link takes. Nothing is sent. What two GPUs have measured is predicted the same way.

`--document FILE` puts it all into FILE, below its line that says so, in place of printing it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale_links import (
    WAYS,
    Server,
    Traffic,
    broadcast,
    rows_of,
    server_of,
    trainers_of,
)
from benchmarks.scale_slices import Served
from benchmarks.shapes import MODELS
from sender.hf_names import Cuts, checkpoint_cuts
from sender.rows_plan import plan_rows
from sender.sharding import ShardedRows, Sharding
from shared.buckets import Layout, make_layout
from shared.config import FP8BlockConfig
from shared.naming import should_quantize_param
from shared.protocol import ManifestTensor
from tests.zoo import Case

QWEN3_235B: dict[str, Any] = {
    **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "vocab_size": 151936},
    **{"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536},
}
DEEPSEEK_V3: dict[str, Any] = {
    **{"hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "vocab_size": 129280},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "tie_word_embeddings": False},
    **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
    **{"first_k_dense_replace": 3},
}
TP = 8
RANKS = (16, 64, 256, 1024)
SERVERS = (1, 4, 32, 256)
LIMIT_S = 600  # for one plan
LARGE = (
    (Case("Qwen3-235B-A22B", "Qwen3Moe", QWEN3_235B), Served(TP, 4, 128, 1536)),
    (Case("DeepSeek-V3", "DeepseekV3", DEEPSEEK_V3), Served(TP, 0, 256, 2048)),
)
MARK = "<!-- below: python -m benchmarks.scale_model -->\n"


@dataclass(frozen=True)
class Offered:
    """What a trainer of `case` offers, without values. `layout`: as a server that holds it in block FP8 wants it."""

    case: Case
    shapes: dict[str, tuple[int, ...]]
    cuts: Cuts
    layout: Layout
    layout_s: float

    @classmethod
    def of(cls, case: Case) -> Offered:
        with torch.device("meta"):
            model = case.model_class(case.make_config())
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        buffers = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in shapes}
        cuts = checkpoint_cuts(model, {**shapes, **buffers})
        began = time.process_time()
        wanted = (
            _wanted(cut.name, cut.shape, "float32" if owner in buffers else "bfloat16")
            for owner, found in cuts.items()
            for cut in found
        )
        layout = make_layout(list(wanted))
        return cls(case, shapes, cuts, layout, time.process_time() - began)

    def rows(self, num_ranks: int) -> tuple[ShardedRows, ...]:
        """Of all parameters, each sharded over `num_ranks`."""
        return tuple(rows_of(name, shape, num_ranks) for name, shape in self.shapes.items())

    def sharding(self, num_ranks: int) -> Sharding:
        """As `sender.sharding.sharding_of` finds it."""
        return Sharding(self.rows(num_ranks))

    @cached_property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def _wanted(name: str, shape: tuple[int, ...], dtype: str) -> ManifestTensor:
    quantized = should_quantize_param(name, shape, FP8BlockConfig())
    held = "float8_e4m3fn" if quantized else dtype
    return ManifestTensor.model_validate({"name": name, "shape": shape, "dtype": held, "quantized": quantized})


@dataclass(frozen=True)
class Planned:
    """`plan_rows` of one rank in a process of its own: seconds of processor and, if traced, the most memory it took.

    On rank 0 only: `chunk_bytes`, what every rank sends to rank 0 in a push, and `num_bytes`, codes and scales of that.
    `num_maxima`: values of the all-reduce ahead of a push.
    """

    seconds: float
    most_bytes: int
    chunk_bytes: tuple[int, ...]
    num_bytes: int
    num_maxima: int


def plan(offered: Offered, num_ranks: int, rank: int = 0, traced: bool = False) -> Planned:
    """Forked, so that tensors and names are there, and only the plan counts.

    Raises:
        TimeoutError: it is not made in `LIMIT_S`.
        EOFError: it could not be made; the process has printed why.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_plan, args=(offered, num_ranks, rank, traced, theirs))
    process.start()
    theirs.close()
    if not ours.poll(LIMIT_S):
        process.kill()
        raise TimeoutError(f"a plan for {num_ranks} ranks takes more than {LIMIT_S} s")
    found: Planned = ours.recv()
    process.join()
    return found


def _plan(offered: Offered, num_ranks: int, rank: int, traced: bool, answer: Connection) -> None:
    sharding = offered.sharding(num_ranks)
    if traced:
        tracemalloc.start()
    began = time.process_time()
    rows = plan_rows(offered.layout, sharding, offered.cuts, rank, num_ranks)
    seconds, most = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [0] * num_ranks if rank == 0 else []
    for bucket in rows.buckets:
        for number, size in enumerate(bucket.chunk_bytes if bucket is not None else ()):
            sizes[number] += size
    answer.send(Planned(seconds, most, tuple(sizes), rows.num_bytes if rank == 0 else 0, rows.num_amax))


_PLANNING = (
    "trainer ranks",
    "rank 0: s",
    "MB",
    "another: s",
    "most of another to rank 0, GB",
    "to the mean",
    "maxima, MB",
)
_TRAFFIC = (
    "way",
    "trainer ranks",
    "servers",
    "trainer out",
    "trainer in",
    "server out",
    "server in",
    "NVLink",
    "busiest",
    "s",
)


def planning_table(offered: Offered, planned: Sequence[int]) -> Iterator[str]:
    yield from _head(_PLANNING)
    for num_ranks in RANKS:
        if num_ranks not in planned:
            yield _line([f"{num_ranks:,}", "not run", *[""] * (len(_PLANNING) - 2)])
            continue
        leader, other = plan(offered, num_ranks), plan(offered, num_ranks, rank=1)
        most, mean = max(leader.chunk_bytes[1:]), sum(leader.chunk_bytes) / num_ranks
        times = (
            f"{leader.seconds:.1f}",
            f"{plan(offered, num_ranks, traced=True).most_bytes / 1e6:.0f}",
            f"{other.seconds:.1f}",
        )
        yield _line([f"{num_ranks:,}", *times, gb(most), f"{most / mean:.2f}", f"{4 * leader.num_maxima / 1e6:.2f}"])


def traffic_table(offered: Offered, served: Served) -> Iterator[str]:
    """Lines that differ in the number of servers alone are one line."""
    yield from _head(_TRAFFIC)
    server = server_of(offered.layout, served)
    trainers = {n: trainers_of(offered.layout, offered.rows(n), offered.cuts, n, served) for n in RANKS}
    for way in WAYS:
        for num_ranks in RANKS:
            alike: dict[Traffic, list[str]] = {}
            for num_servers in SERVERS:
                alike.setdefault(way(trainers[num_ranks], server, num_servers), []).append(str(num_servers))
            for traffic, numbers in alike.items():
                found = (gb(link.num_bytes) for link in traffic.links)
                ends = (traffic.busiest.name, f"{traffic.seconds:.2f}")
                yield _line([f"`{way.__name__}`", f"{num_ranks:,}", ", ".join(numbers), *found, *ends])


def _head(columns: Sequence[str]) -> Iterator[str]:
    yield _line(columns)
    yield "|---" * len(columns) + "|"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.0f}" if num_bytes >= 1e12 else f"{num_bytes / 1e9:.3g}"


WIRE_BYTES_PER_S = 365e9  # measured beside the pushes below: benchmarks/RESULTS.md, "A push between two GPUs"
SENT_MS = (28.3, 41.3)  # in place, and reserved
GATHERED_MS = 19.1  # the same file, "From FSDP2 shards to packed buckets"


def check(offered: Offered) -> Iterator[str]:
    """Against what two GPUs have measured with Qwen3-8B: one trainer and one server of one rank, and two trainers."""
    layout, alone = offered.layout, Served(num_ranks=1, num_kv_heads=8)
    trainers, server = trainers_of(layout, offered.rows(1), offered.cuts, 1, alone), server_of(layout, alone)
    sent = broadcast(trainers, server, 1).server_in
    gathered = plan(offered, 2).chunk_bytes[1]
    yield from _head(("what", "GB", "predicted at 365 GB/s, ms", "measured, ms", "to the prediction"))
    for what, num_bytes, measured in (
        ("one trainer to one server of TP 1: `send`", sent, SENT_MS),
        ("rank 1 of 2 to rank 0; measured with quantizing and packing", gathered, (GATHERED_MS,)),
    ):
        wire_ms = 1e3 * num_bytes / WIRE_BYTES_PER_S
        told = (" to ".join(str(ms) for ms in measured), " to ".join(f"{ms / wire_ms:.2f}" for ms in measured))
        yield _line([what, gb(num_bytes), f"{wire_ms:.1f}", *told])


def report(planned: Sequence[int]) -> Iterator[str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    yield f"Commit {commit.strip()}, one core of a CPU, torch {torch.__version__.partition('+')[0]}. GB are 10^9 bytes."
    for case, served in LARGE:
        offered = Offered.of(case)
        layout, server = offered.layout, server_of(offered.layout, served)
        where = "whole experts dealt out" if served.deals_out_experts else "experts cut in their intermediate dimension"
        yield f"\n## {case.name}\n"
        yield f"{offered.num_parameters / 1e9:.1f} billion parameters; {len(layout.tensors):,} tensors,"
        yield f"{gb(layout.num_bytes)} GB in {len(layout.buckets):,} buckets, laid out in {offered.layout_s:.1f} s."
        yield f"A server of TP {TP}: {where}; at most {gb(max(server.held))} GB on a rank, of which"
        yield f"{gb(max(_repeated(server)))} GB lie on a rank before it, too.\n"
        yield from planning_table(offered, planned)
        yield ""
        yield from traffic_table(offered, served)
    yield "\n## Against two GPUs: Qwen3-8B\n"
    yield from check(Offered.of(MODELS["qwen3-8b"]))


def _repeated(server: Server) -> list[int]:
    return [held - first for held, first in zip(server.held, server.first, strict=True)]


def into(document: str, text: str) -> str:
    """`document` with `text` in place of all that is below its mark.

    Raises:
        ValueError: it has no mark.
    """
    above, mark, _ = document.partition(MARK)
    if not mark:
        raise ValueError(f"there is no line {MARK.strip()}")
    return f"{above}{mark}\n{text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planned", type=int, nargs="*", default=RANKS, help="trainer ranks whose plans are made")
    parser.add_argument("--document", type=Path)
    given = parser.parse_args()
    text = "\n".join(report(given.planned)) + "\n"
    if given.document is None:
        print(text, end="")
    else:
        given.document.write_text(into(given.document.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
