"""A push between two GPUs beside what SGLang has on board and beside the wire: `benchmarks/push_on_host.sh`.

    python -m benchmarks.push --model qwen3-8b --out out/push          # trainer on the first GPU, server on the second
    python -m benchmarks.push --model tiny --plane tcp --out out/push  # the same without a GPU: proves the code

    limit      one large broadcast between the GPUs; one large copy within one
    push       `FP8Sender.push`, staged in reserved memory and in place
    flattened  the same bytes as one flattened tensor a bucket of 1 GiB, quantized by the kernels of a push
    one by one FP8 tensors in buckets of 1 GiB, quantized and broadcast tensor by tensor, as the pull request has it
    BF16       the trainer's tensors one by one, to a server that serves BF16 (`--bf16`)

The last three go to `/update_weights_from_distributed` of a server with the same arguments, but for the plugin. Two
sets of weights take turns; the first push of a way stands apart. Then every byte that the server holds is compared with
the torch reference. A way that fails is a row that says so; the others run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
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
from benchmarks.limits import Limits, measure
from benchmarks.push_arguments import GPU_ARGS, NCCL, arguments
from benchmarks.shapes import MODELS, Trainer, with_layers
from benchmarks.stock_route import Grouped, StockRoute, buckets, quantized, staging_gb
from benchmarks.table import FLATTENED, Row, as_json, table
from benchmarks.ways import SEEDS, Way, answers, check, load_row, push_row, stock_row
from examples.local_server import CPU_ARGS, LocalServer
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args

START_S = 240.0
ONE_BY_ONE, BF16 = "stock, FP8 tensors one by one", "stock, BF16 tensors one by one"
LOAD_PUSHES, MOST_NEW_TOKENS = 3, 2000


class Run:
    """One run: what was asked, what was found, and the servers that are up."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.began = chosen, time.monotonic()
        self.rows: list[Row] = []
        self.limits: Limits | None = None
        self.servers: list[LocalServer] = []
        self.config = FP8BlockConfig()
        self.case = with_layers(MODELS[chosen.model], chosen.layers)
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")
        self.backend = "nccl" if self.on_gpu else "gloo"
        self.num_peer_pushes = chosen.pushes if chosen.peer_pushes is None else chosen.peer_pushes
        self._ending, self._over = threading.Lock(), False

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {what}", flush=True)

    # Servers

    def start(self, name: str, args: Sequence[str]) -> LocalServer:
        """A server on the second GPU, not awaited. Raises: RuntimeError: the run has ended."""
        if self._over:
            raise RuntimeError("the run has ended")
        more = [*GPU_ARGS, "--mem-fraction-static", self.chosen.mem_fraction_static] if self.on_gpu else [*CPU_ARGS]
        env = {"FP8SYNC_PROBE": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
        if self.on_gpu:
            env["CUDA_VISIBLE_DEVICES"] = self.chosen.gpus[1]
        log = self.chosen.out / "logs" / f"{self.chosen.label}-{name}.log"
        self.servers.append(LocalServer([*args, *more, *self.chosen.server_arg], log, env=env))
        self.say(f"{name}: starting, {log}")
        return self.servers[-1]

    def up(self, server: LocalServer) -> bool:
        """Whether it came up; if not, that is a row."""
        try:
            server.wait(START_S)
        except RuntimeError as error:
            print(error, flush=True)
            lines = str(error).splitlines()
            self.rows.append(Row(way=f"server, {server.log.stem}", failed=f"{lines[0]} {lines[-1][:200]}"))
            return False
        self.say(f"{server.log.stem}: up, {'with' if _has_graphs(server) else 'without'} CUDA graphs")
        return True

    # Rows

    def row(self, way: str, measured: Callable[[], Row], *proofs: Callable[[], str]) -> None:
        """Measure and prove; whatever goes wrong stands in the row."""
        row = Row(way=way)
        self.say(f"{way}: ...")
        try:
            row = measured()
            for proof in proofs:
                row.note = "; ".join(filter(None, [row.note, proof()]))
        except Exception as error:
            traceback.print_exc()
            row.failed = f"{type(error).__name__}: {str(error)[:300]}"
        self.rows.append(row)
        later = "" if row.later_s is None else f"{1e3 * row.later_s:.1f} ms, first {1e3 * row.pushes[0].total_s:.1f} ms"
        self.say(f"{row.way}: {row.failed or f'{later}; {row.note}'}")

    # The end

    def end(self, why: str = "") -> int:
        """Write the figures, print the table, stop the servers; the exit status. Once: others wait for it."""
        with self._ending:
            if not self._over:
                self._over = True
                if why:
                    self.rows.append(Row(way="the run", failed=why))
                self._tell()
                for server in self.servers:
                    server.stop()
        return int(any(row.failed for row in self.rows))

    def _tell(self) -> None:
        about = {
            "chosen": {name: str(value) for name, value in vars(self.chosen).items()},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "sglang", "transformers")},
            "num_layers": self.case.config["num_hidden_layers"],
            "seconds": time.monotonic() - self.began,
        }
        name = f"{self.chosen.label}-{self.chosen.only or 'all'}.json"
        (self.chosen.out / name).write_text(json.dumps(as_json(self.rows, self.limits, about), indent=1))
        device = "a CPU" if self.limits is None else self.limits.device
        print(f"\n{self.case.name}, {about['num_layers']} layers, {device}, {about['versions']}; ms, GB = 10^9 bytes\n")
        print(table(self.rows, self.limits), flush=True)

    def watch(self) -> None:
        """End the process at the deadline with what there is, also where its main thread waits for a device."""

        def strike() -> None:
            self.end(f"not done after {self.chosen.deadline_s:.0f} s")
            os._exit(1)

        timer = threading.Timer(self.chosen.deadline_s, strike)
        timer.daemon = True
        timer.start()


def _has_graphs(server: LocalServer) -> bool:
    return re.search(r"capture .*cuda graph end", server.log.read_text(errors="replace").lower()) is not None


def ours(run: Run, server: LocalServer, trainer: Trainer, wanted: dict[str, str]) -> None:
    chosen, proof = run.chosen, partial(check, server, wanted)
    for staging, mib in product(chosen.staging, chosen.bucket_mib):
        way = Way(chosen.plane, staging, mib << 20)
        measured = partial(push_row, way, server, trainer, run.config, chosen.pushes, run.device)
        run.row(str(way), measured, proof)
    run.row("after these pushes", partial(Row, way="after these pushes"), partial(answers, server))
    new_tokens = min(MOST_NEW_TOKENS, run.case.config["max_position_embeddings"] - 100)
    for in_flight in chosen.in_flight if chosen.load else ():
        way = Way(chosen.plane, "reserved", chosen.bucket_mib[0] << 20, in_flight)
        num_pushes = min(chosen.pushes, LOAD_PUSHES)
        measured = partial(load_row, way, server, trainer, run.config, num_pushes, chosen.load, new_tokens)
        run.row(f"{way}, {in_flight}, under load", measured, proof)


def peers(run: Run, server: LocalServer, trainer: Trainer, wanted: dict[str, str]) -> None:
    proof = partial(check, server, wanted)

    def flattened() -> Row:
        grouped = Grouped(trainer.weights, run.config)
        return _stock(run, FLATTENED, server, trainer, lambda route: route.push(grouped.buckets(), flattened=True))

    def one_by_one() -> Row:
        def push(route: StockRoute) -> int:
            return route.push(buckets(quantized(trainer.weights, run.config)), flattened=False)

        return _stock(run, ONE_BY_ONE, server, trainer, push)

    run.row(FLATTENED, flattened, proof)
    if run.backend == "gloo":
        run.rows.append(Row(way=ONE_BY_ONE, note="left out: gloo carries no FP8 tensors"))
    else:
        run.row(ONE_BY_ONE, one_by_one, proof)


def bf16(run: Run, server: LocalServer, trainer: Trainer) -> None:
    def push(route: StockRoute) -> int:
        return route.push(buckets(trainer.weights.items()), flattened=False)

    run.row(BF16, partial(_stock, run, BF16, server, trainer, push))


def _stock(run: Run, way: str, server: LocalServer, trainer: Trainer, push: Callable[[StockRoute], int]) -> Row:
    return stock_row(way, server, run.backend, trainer, push, run.num_peer_pushes, run.device)


def measure_limits(run: Run) -> None:
    num_bytes = 1 << 30 if run.on_gpu else 16 << 20
    environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in run.chosen.gpus] if run.on_gpu else [{}, {}]
    try:
        run.limits = measure(run.backend, num_bytes, environments)
        run.say(f"limits: {run.limits}")
    except Exception as error:
        traceback.print_exc()
        run.rows.append(Row(way="limits", failed=str(error)[:300]))


def main() -> int:
    chosen = arguments(__doc__)
    os.environ.update(NCCL, CUDA_VISIBLE_DEVICES=chosen.gpus[0])  # before anything asks for a GPU
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
    jobs: list[tuple[str, list[str], Callable[[LocalServer], None]]] = []
    if run.chosen.only != "peers":
        jobs.append(("push", pushed, lambda server: ours(run, server, trainer, wanted)))
    if run.chosen.only != "ours":
        jobs.append(("stock", stock, lambda server: peers(run, server, trainer, wanted)))
    if run.chosen.bf16:
        served = ["--model-path", str(model), "--load-format", "dummy"]
        jobs.append(("bf16", served, lambda server: bf16(run, server, trainer)))
    started = [run.start(name, args) for name, args, _ in (jobs if run.chosen.together else jobs[:1])]
    trainer.fill(SEEDS[0])
    wanted = expected(trainer.weights, run.config)
    run.say(f"{len(wanted)} parameters expected")
    up = [run.up(server) for server in started]  # nothing is timed while a server starts
    for number, (name, args, measure_it) in enumerate(jobs):
        if number == len(started):
            started.append(run.start(name, args))
            up.append(run.up(started[-1]))
        if up[number]:
            measure_it(started[number])
        started[number].stop()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # communicators whose other end is gone can keep an interpreter from ending
