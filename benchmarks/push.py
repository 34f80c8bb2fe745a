"""A push between two GPUs beside what SGLang has on board and beside the wire: `benchmarks/push_on_host.sh`.

    python -m benchmarks.push --model qwen3-8b --out out/push          # trainer on the first GPU, server on the second
    python -m benchmarks.push --model tiny --plane tcp --out out/push  # the same without a GPU: proves the code

    limit       one large broadcast between the GPUs; one large copy within one
    push        `FP8Sender.push`, staged in reserved memory and in place
    push_async  the same until it returns (training stands still), and until `wait` has ended
    graph       no push, a proof: what is generated follows the weights of three pushes, in captured CUDA graphs
    under load  pushes while so many requests generate (`--load 1 8 64 --in-flight keep retract`); a second table has
                the gaps between tokens, the tokens that a push costs from 2 s before it to 2 s after it, and the rate
                until the commit; `wait` lets requests of `--load-tokens` end first
    flattened   the same bytes as one flattened tensor a bucket of 1 GiB, quantized by the kernels of a push
    one by one  FP8 tensors in buckets of 1 GiB, quantized and broadcast tensor by tensor, as the pull request has it
    BF16        the trainer's tensors one by one, to a server that serves BF16 (`--bf16`)
    FSDP2       two trainer ranks, one beside the server on its GPU; gather included, in place (`--fsdp`)

Flattened, one by one and BF16 go to `/update_weights_from_distributed` of a server with the same arguments, but for the
plugin. With `--colocated` the server is on the trainer's GPU: there is no wire, and what is flattened goes to
`/update_weights_from_tensor`, over CUDA IPC.

Two sets of weights take turns; the first push of a way stands apart. Then every byte that the server holds is compared
with the torch reference. A way that fails is a row that says so; the others run, and the exit status is 1. Memory is
what rank 0's device holds beside its model at most, from before `prepare` on.

How pushes grow: one run a size, into one folder, then `python -m benchmarks.scaling out/push/*.json`:

    --model qwen3-8b --only ours --layers 12                          (24, 36)
    --model qwen3-30b-a3b --only ours --layers 24 --experts 16        (32, 64, 128)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import torch

from benchmarks.expected import expected
from benchmarks.fsdp import Ranks, job_of
from benchmarks.limits import Limits, measure
from benchmarks.load import load_row
from benchmarks.proofs import GRAPH, check, graph_serves, has_graphs
from benchmarks.push_arguments import NCCL, arguments, server_args
from benchmarks.shapes import Trainer
from benchmarks.stock_route import Grouped, StockRoute, TensorRoute, buckets, quantized, staging_gb
from benchmarks.table import FLATTENED, Row, as_json, table
from benchmarks.ways import SEEDS, Way, async_rows, push_row, stock_row
from examples.local_server import LocalServer
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from shared.protocol import PlaneName

START_S = 240.0
ONE_BY_ONE, BF16 = "stock, FP8 tensors one by one", "stock, BF16 tensors one by one"
FEW_PUSHES = 3  # under load, and of push_async, after the first


class Run:
    """One run: what was asked, what was found, and the processes that are up."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.began = chosen, time.monotonic()
        self.rows: list[Row] = []
        self.limits: Limits | None = None
        self.running: list[LocalServer | Ranks] = []
        self.config = FP8BlockConfig()
        self.case = chosen.case
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")
        self.backend = "nccl" if self.on_gpu else "gloo"
        self.environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in chosen.gpus] if self.on_gpu else [{}, {}]
        self.num_peer_pushes = chosen.pushes if chosen.peer_pushes is None else chosen.peer_pushes
        self._ending, self._over = threading.Lock(), False

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {what}", flush=True)

    # Servers

    def start(self, name: str, args: Sequence[str]) -> LocalServer:
        """A server on the second GPU, not awaited. Raises: RuntimeError: the run has ended."""
        if self._over:
            raise RuntimeError("the run has ended")
        env = {"FP8SYNC_PROBE": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
        if self.on_gpu:
            env["CUDA_VISIBLE_DEVICES"] = self.chosen.gpus[1]
        log = self.chosen.out / "logs" / f"{self.chosen.label}-{name}.log"
        server = LocalServer([*args, *server_args(self.chosen, self.on_gpu)], log, env=env)
        self.running.append(server)
        self.say(f"{name}: starting, {log}")
        return server

    def up(self, server: LocalServer) -> bool:
        """Whether it came up; if not, that is a row."""
        try:
            server.wait(START_S)
        except RuntimeError as error:
            print(error, flush=True)
            lines = str(error).splitlines()
            self.rows.append(Row(way=f"server, {server.log.stem}", failed=f"{lines[0]} {lines[-1][:200]}"))
            return False
        self.say(f"{server.log.stem}: up, {'with' if has_graphs(server) else 'without'} CUDA graphs")
        return True

    # Rows

    def row(self, way: str, measured: Callable[[], Row | list[Row]], *proofs: Callable[[], str]) -> None:
        """Measure and prove; whatever goes wrong stands in the row."""
        rows = [Row(way=way)]
        self.say(f"{way}: ...")
        try:
            found = measured()
            rows = found if isinstance(found, list) else [found]
            for proof in proofs:
                rows[-1].note = "; ".join(filter(None, [rows[-1].note, proof()]))
        except Exception as error:
            traceback.print_exc()
            rows[-1].failed = f"{type(error).__name__}: {str(error)[:300]}"
        self.rows += rows
        for row in rows:
            self.say(str(row))

    # The end

    def end(self, why: str = "") -> int:
        """Write the figures, print the table, stop the servers; the exit status. Once: others wait for it."""
        with self._ending:
            if not self._over:
                self._over = True
                if why:
                    self.rows.append(Row(way="the run", failed=why))
                self._tell()
                for running in self.running:
                    running.stop()
        return int(any(row.failed for row in self.rows))

    def _tell(self) -> None:
        about = {
            "chosen": {name: str(value) for name, value in vars(self.chosen).items() if name != "case"},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "sglang", "transformers")},
            "num_layers": self.case.config["num_hidden_layers"],
            "num_experts": self.case.config.get("num_experts", 0),
            "seconds": time.monotonic() - self.began,
        }
        name = f"{self.chosen.label}-{self.chosen.only or 'all'}.json"
        (self.chosen.out / name).write_text(json.dumps(as_json(self.rows, self.limits, about), indent=1))
        device = "a CPU" if self.limits is None else self.limits.device
        size = f"{about['num_layers']} layers, {about['num_experts']} experts"
        gemm = f"FP8 linear layers by {self.chosen.fp8_gemm_backend}" if self.on_gpu else "no GPU"
        print(f"\n{self.case.name}, {size}, {device}, {gemm}, {about['versions']}; ms, GB = 10^9 bytes\n")
        print(table(self.rows, self.limits), flush=True)

    def watch(self) -> None:
        """End the process at the deadline with what there is, also where its main thread waits for a device."""

        def strike() -> None:
            self.end(f"not done after {self.chosen.deadline_s:.0f} s")
            os._exit(1)

        timer = threading.Timer(self.chosen.deadline_s, strike)
        timer.daemon = True
        timer.start()


def ours(run: Run, server: LocalServer, trainer: Trainer, wanted: dict[str, str]) -> None:
    chosen, proof = run.chosen, partial(check, server, wanted)
    alone = [send_from for send_from in chosen.send_from if send_from in ("rank_0", "holders")]
    for plane, staging, mib, send_from in product(chosen.plane, chosen.staging, chosen.bucket_mib, alone):
        if send_from == "holders" and plane != "same_host":
            continue
        way = Way(plane, staging, mib << 20, send_from=send_from)
        measured = partial(push_row, way, server.url, trainer, run.config, chosen.pushes, run.device)
        run.row(str(way), measured, proof)
    few, bucket_bytes = min(chosen.pushes, FEW_PUSHES), chosen.bucket_mib[0] << 20
    way = Way(chosen.plane[0], chosen.staging[0], bucket_bytes)
    both = partial(async_rows, way, server.url, trainer, run.config, few, run.device)
    run.row(f"push_async, {way}", both, proof)
    run.row(GRAPH, partial(Row, way=GRAPH), partial(graph_serves, way, server, trainer, run.config), proof)
    for num_streams, in_flight in product(chosen.load, chosen.in_flight):
        way = Way(chosen.plane[0], "reserved", bucket_bytes, in_flight)
        under_load = partial(load_row, way, server, trainer, run.config, few, num_streams, chosen.load_tokens)
        run.row(f"{way}, {in_flight}, {num_streams} streams", under_load, proof)


def fsdp(run: Run, server: LocalServer, trainer: Trainer, wanted: dict[str, str]) -> None:
    """The last of all: the trainer is gone afterwards."""
    trainer.free()
    chosen, bucket_bytes = run.chosen, run.chosen.bucket_mib[0] << 20
    for number, send_from in enumerate(chosen.send_from):
        plane: PlaneName = "same_host" if send_from == "holders" else chosen.plane[0]
        way = Way(plane, "in_place", bucket_bytes, send_from=send_from)
        name = f"{chosen.label}-fsdp-{number}" if number else f"{chosen.label}-fsdp"
        at = chosen.out / "logs" / f"{name}-row.json"
        job = job_of(chosen, way, [server.url], at)
        ranks = Ranks(job, _own_first(run), chosen.out / "logs" / name)
        run.running.append(ranks)
        run.row(f"{way}, FSDP2", ranks.row, partial(check, server, wanted))
        ranks.stop()


def _own_first(run: Run) -> list[dict[str, str]]:
    """Of each rank: its GPU, and the others, which the plane `same_host` writes to."""
    gpus = [environment.get("CUDA_VISIBLE_DEVICES") for environment in run.environments]
    seen = [",".join([gpu, *(other for other in gpus if other not in (gpu, None))]) if gpu else None for gpu in gpus]
    return [{"CUDA_VISIBLE_DEVICES": names} if names else {} for names in seen]


def peers(run: Run, server: LocalServer, trainer: Trainer, wanted: dict[str, str]) -> None:
    proof = partial(check, server, wanted)

    def flattened() -> Row:
        grouped = Grouped(trainer.weights, run.config)
        if run.chosen.colocated:
            connect, num_pushes = partial(TensorRoute, server), run.num_peer_pushes
            return stock_row(FLATTENED, connect, trainer, lambda r: r.push(grouped.buckets()), num_pushes, run.device)
        return _stock(run, FLATTENED, server, trainer, lambda route: route.push(grouped.buckets(), flattened=True))

    def one_by_one() -> Row:
        def push(route: StockRoute) -> int:
            return route.push(buckets(quantized(trainer.weights, run.config)), flattened=False)

        return _stock(run, ONE_BY_ONE, server, trainer, push)

    run.row(FLATTENED, flattened, proof)
    if run.chosen.colocated:
        return
    if run.backend == "gloo":
        run.rows.append(Row(way=ONE_BY_ONE, note="left out: gloo carries no FP8 tensors"))
    else:
        run.row(ONE_BY_ONE, one_by_one, proof)


def bf16(run: Run, server: LocalServer, trainer: Trainer) -> None:
    def push(route: StockRoute) -> int:
        return route.push(buckets(trainer.weights.items()), flattened=False)

    run.row(BF16, partial(_stock, run, BF16, server, trainer, push))


def _stock(run: Run, way: str, server: LocalServer, trainer: Trainer, push: Callable[[StockRoute], int]) -> Row:
    return stock_row(way, partial(StockRoute, server, run.backend), trainer, push, run.num_peer_pushes, run.device)


def measure_limits(run: Run) -> None:
    num_bytes = 1 << 30 if run.on_gpu else 16 << 20
    try:
        run.limits = measure(run.backend, num_bytes, run.environments[: 1 if run.chosen.colocated else 2])
        run.say(f"limits: {run.limits}")
    except Exception as error:
        traceback.print_exc()
        run.rows.append(Row(way="limits", failed=str(error)[:300]))


def main() -> int:
    chosen = arguments(__doc__)
    os.environ.update(NCCL, CUDA_VISIBLE_DEVICES=",".join(dict.fromkeys(chosen.gpus)))  # before anything asks for a GPU
    run = Run(chosen)
    (chosen.out / "logs").mkdir(parents=True, exist_ok=True)
    run.watch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            compare_all(run, Path(folder))
        except BaseException as error:  # also an interrupt: what was measured is not lost
            traceback.print_exc()
            return run.end(repr(error)[:300])
    return run.end()


def compare_all(run: Run, folder: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        measured = pool.submit(measure_limits, run)
        trainer = Trainer(run.case, run.device)
        measured.result()
    run.say(f"{trainer.num_bytes / 1e9:.2f} GB of BF16 in {len(trainer.weights)} tensors")
    model = run.case.write_config(folder / run.case.name)
    plain = sglang_fp8_args(str(model), run.config)
    stock = [word for word in plain if word not in ("--load-plugin", "fp8sync")]
    pushed = [*plain, "--fp8sync-staging", staging_gb(trainer.weights, run.config, run.chosen.bucket_mib)]
    jobs: dict[str, tuple[list[str], Callable[[LocalServer], None]]] = {
        "ours": (pushed, lambda server: ours(run, server, trainer, wanted)),
        "peers": (stock, lambda server: peers(run, server, trainer, wanted)),
        "bf16": (["--model-path", str(model), "--load-format", "dummy"], lambda server: bf16(run, server, trainer)),
        "fsdp": ([*plain, "--fp8sync-staging", "0"], lambda server: fsdp(run, server, trainer, wanted)),
    }
    names = run.chosen.ways
    started = [run.start(name, jobs[name][0]) for name in (names if run.chosen.together else names[:1])]
    trainer.fill(SEEDS[0])
    wanted = expected(trainer.weights, run.config)
    run.say(f"{len(wanted)} parameters expected")
    up = [run.up(server) for server in started]  # nothing is timed while a server starts
    for number, name in enumerate(names):
        if number == len(started):
            started.append(run.start(name, jobs[name][0]))
            up.append(run.up(started[-1]))
        if up[number]:
            jobs[name][1](started[number])
        started[number].stop()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # communicators whose other end is gone can keep an interpreter from ending
