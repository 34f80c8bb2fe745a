"""Pushes between several GPUs: trainer ranks (FSDP2) to servers of one or more ranks, on one host.

    python -m benchmarks.layouts --trainers 0 1 --servers 2,3 --model qwen3-8b --out out/layouts
    python -m benchmarks.layouts --trainers 0 --servers 1 2 3 --plane nccl ...      # and of one server, for the ratio
    python -m benchmarks.layouts --trainers 0 1 --servers 0,1 --plane same_host --send-from holders ...  # colocated

`--trainers`: the GPU of each rank; `--servers`: the GPUs of each server, whose tensor parallelism they are. Each plane,
way of staging and choice of senders is a row: the first push after `prepare`, and the median of those that follow. Then
every byte that every rank of every server holds is compared with the torch reference, and the exit status is 1 if one
differs. Without a GPU their names mean nothing, and two ranks of a server take a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import torch

from benchmarks.expected import Rank, expected
from benchmarks.fsdp import Ranks, job_of
from benchmarks.proofs import check
from benchmarks.push_arguments import NCCL, ranks_of, server_args
from benchmarks.shapes import MODELS, Trainer, with_experts, with_layers
from benchmarks.stock_route import staging_gb
from benchmarks.table import Row, as_json, table
from benchmarks.ways import SEEDS, Way
from examples.local_server import LocalServer
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from shared.protocol import PlaneName
from tests.zoo import Case

START_S = 240.0
_TP_ON_CPU = {"SGLANG_NCCL_SO_PATH": "/nonexistent"}  # else torch's NCCL is taken, which needs a GPU


def arguments(description: str | None) -> argparse.Namespace:
    """Raises: SystemExit. Nothing may have asked for a GPU before: it says which there are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", default=["0", "1"], metavar="GPU")
    parser.add_argument("--servers", nargs="+", default=["2,3"], metavar="GPUS")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--whole-experts", action="store_true", help="servers have --ep-size of their ranks")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures (JSON) and logs")
    parser.add_argument("--plane", nargs="+", choices=get_args(PlaneName), default=["nccl"], help="a row for each")
    parser.add_argument("--staging", nargs="+", choices=["reserved", "in_place"], default=["reserved"])
    parser.add_argument("--send-from", nargs="+", type=ranks_of, default=["rank_0"], metavar="RANKS")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--pushes", type=int, default=5, help="after the first")
    parser.add_argument("--mem-fraction-static", default="0.6", help="of the servers, on a GPU")
    parser.add_argument("--fp8-gemm-backend", choices=["triton", "deep_gemm"], default="triton", help="on a GPU")
    parser.add_argument("--server-arg", action="append", default=[], metavar="WORD", help="more for every server")
    parser.add_argument("--deadline-s", type=float, default=540.0, help="the table is printed then, whatever runs")
    chosen = parser.parse_args()
    chosen.case = with_experts(with_layers(MODELS[chosen.model], chosen.layers), chosen.experts)
    chosen.servers = [words.split(",") for words in chosen.servers]
    chosen.load, chosen.load_tokens = [], 64  # as `server_args` wants it
    visible = [chosen.trainers[0], *chosen.trainers, *(gpu for names in chosen.servers for gpu in names)]
    os.environ.update(NCCL, CUDA_VISIBLE_DEVICES=",".join(dict.fromkeys(visible)))
    return chosen


class Run:
    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.began, self.rows = chosen, time.monotonic(), list[Row]()
        self.running: list[LocalServer | Ranks] = []
        self.on_gpu, self.config = torch.cuda.is_available(), FP8BlockConfig()
        self.name = f"{len(chosen.trainers)}-to-{'+'.join(str(len(gpus)) for gpus in chosen.servers)}"

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {what}", flush=True)

    def environment(self, gpus: list[str]) -> dict[str, str]:
        """These first, and then all others, which `same_host` writes to."""
        if not self.on_gpu:
            return {}
        named = dict.fromkeys([*gpus, *self.chosen.trainers, *(gpu for names in self.chosen.servers for gpu in names)])
        return {"CUDA_VISIBLE_DEVICES": ",".join(named)}

    def start(self, number: int, args: list[str], name: str = "server", port: int | None = None) -> LocalServer:
        """A server on the GPUs of server `number`, not awaited."""
        gpus = self.chosen.servers[number]
        words = [*args, *server_args(self.chosen, self.on_gpu)]
        env = {"FP8SYNC_PROBE": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
        if len(gpus) > 1:
            words += ["--tp-size", str(len(gpus)), "--disable-custom-all-reduce"]
            words += ["--ep-size", str(len(gpus))] if self.chosen.whole_experts else []
            cores = "|".join(str(core % (os.cpu_count() or 1)) for core in range(len(gpus)))
            env |= {} if self.on_gpu else {**_TP_ON_CPU, "SGLANG_CPU_OMP_THREADS_BIND": cores}
        if self.on_gpu:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        log = self.chosen.out / "logs" / f"{self.name}-{name}-{number}.log"
        server = LocalServer(words, log, env=env, port=port)
        self.running.append(server)
        return server

    def row(self, way: Way, servers: list[LocalServer], wanted: dict[int, list[dict[str, str]]], at: Path) -> None:
        row = Row(way=str(way))
        self.say(f"{way}: ...")
        job = job_of(self.chosen, way, [server.url for server in servers], at, len(self.chosen.trainers))
        ranks = Ranks(job, [self.environment([gpu]) for gpu in self.chosen.trainers], at.with_suffix(""))
        self.running.append(ranks)
        try:
            row = ranks.row()
            proofs = [
                check(server, *wanted[len(gpus)]) for server, gpus in zip(servers, self.chosen.servers, strict=True)
            ]
            row.note = "; ".join([row.note, *proofs])
        except Exception as error:
            traceback.print_exc()
            row.failed = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            ranks.stop()
        self.rows.append(row)
        self.say(str(row))

    def tell(self) -> int:
        about = {name: str(value) for name, value in vars(self.chosen).items() if name != "case"}
        self.chosen.out.mkdir(parents=True, exist_ok=True)
        figures = json.dumps(as_json(self.rows, None, {"chosen": about}), indent=1)
        (self.chosen.out / f"{self.name}-{self.chosen.model}.json").write_text(figures)
        print(f"\n{self.chosen.case.name}, trainers {self.chosen.trainers}, servers {self.chosen.servers}\n")
        print(table(self.rows, None), flush=True)
        self.stop()
        return int(not self.rows or any(row.failed for row in self.rows))

    def stop(self) -> None:
        for running in self.running:
            running.stop()


def reference(case: Case, sizes: set[int], whole_experts: bool) -> dict[int, list[dict[str, str]]]:
    """What each rank of a server of so many ranks has to hold. In a process of its own no memory stays taken."""
    trainer = Trainer(case, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    trainer.fill(SEEDS[0])
    ranks = {size: [Rank(index, size, whole_experts) for index in range(size)] for size in sizes}
    config = FP8BlockConfig()
    return {size: [expected(trainer.weights, config, rank) for rank in of_size] for size, of_size in ranks.items()}


def words_of_servers(run: Run, folder: Path) -> list[str]:
    """`folder`: for the configuration of the model."""
    chosen = run.chosen
    weights = Trainer(chosen.case, torch.device("cpu")).weights  # of shapes: nothing is ever written there
    model = chosen.case.write_config(folder / chosen.case.name)
    reserved = staging_gb(weights, run.config, [chosen.bucket_mib]) if "reserved" in chosen.staging else "0"
    return [*sglang_fp8_args(str(model), run.config), "--fp8sync-staging", reserved]


def references(run: Run) -> dict[int, list[dict[str, str]]]:
    """`reference` of servers of the sizes that there are."""
    sizes = {len(gpus) for gpus in run.chosen.servers}
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(reference, run.chosen.case, sizes, run.chosen.whole_experts).result()


def measure(run: Run, folder: Path) -> None:
    chosen, args = run.chosen, words_of_servers(run, folder)
    shared = set(chosen.trainers) & {gpu for gpus in chosen.servers for gpu in gpus}
    servers = [] if shared else [run.start(number, args) for number in range(len(chosen.servers))]
    wanted = references(run)
    if shared:  # the whole model and a server might not fit on one GPU
        servers = [run.start(number, args) for number in range(len(chosen.servers))]
    for server in servers:
        server.wait(START_S)
    run.say("all servers are up")
    (chosen.out / "logs").mkdir(parents=True, exist_ok=True)
    ways = product(chosen.plane, chosen.staging, chosen.send_from)
    for number, (plane, staging, send_from) in enumerate(ways):
        way = Way(plane, staging, chosen.bucket_mib << 20, send_from=send_from)
        run.row(way, servers, wanted, chosen.out / "logs" / f"{run.name}-row-{number}.json")


def main() -> int:
    chosen = arguments(__doc__)
    run = Run(chosen)

    def strike() -> None:
        run.rows.append(Row(way="the run", failed=f"not done after {chosen.deadline_s:.0f} s"))
        os._exit(run.tell())

    timer = threading.Timer(chosen.deadline_s, strike)
    timer.daemon = True
    timer.start()
    with tempfile.TemporaryDirectory() as folder:
        try:
            measure(run, Path(folder))
        except BaseException as error:  # what was measured is not lost, and no server stays
            traceback.print_exc()
            run.rows.append(Row(way="the run", failed=f"{type(error).__name__}: {str(error)[:300]}"))
        return run.tell()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
