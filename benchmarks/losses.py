"""A server that is killed in the middle of a push, and one that joins later: what that costs, and what is served.

    python -m benchmarks.losses --trainers 0 1 --servers 2 3 --plane nccl --out out/losses    # four GPUs
    python -m benchmarks.losses --model tiny --servers 2 3 --plane tcp gloo --out out/losses  # the same without a GPU

Arguments are those of `benchmarks.layouts`, with two servers or more. The trainer may go on without one of them
(`quorum`). For each plane:

    all        pushes to all servers
    killed     half of such a push after its beginning, every process of the last server is killed; the push ends when
               the others serve
    left       pushes to the servers that are left
    joined     another server has started in its place: `add_server`, and the push that all serve after
    all again  pushes to all servers

After each but the first, every byte that each server holds is compared with the torch reference, and the exit status
is 1 if one differs, or if anything took longer than its deadline.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import torch.distributed as dist
from pydantic import BaseModel

from benchmarks.expected import compare
from benchmarks.fsdp import Job, Ranks, job_of, meet
from benchmarks.layouts import START_S, Run, arguments, references, words_of_servers
from benchmarks.ways import PUSH_TIMEOUT_S, SEEDS, Trains, Way
from examples.local_server import LocalServer, free_port
from sender import FP8Sender
from sender.report import PushReport

JOINS_S = 300.0  # for a server to take the place of the one that was killed
WANTED, OTHER = SEEDS  # of the weights that are compared, and of those between


class Losses(Job):
    """`victim`: the process group of the last of `urls`. `joins`: the server that takes its place, when `is_up` is
    there. `wanted`: a file with what the ranks of each server have to hold of `WANTED`."""

    victim: int
    joins: str
    is_up: Path
    wanted: Path


class Step(BaseModel):
    """Seconds of each push; the servers of the last one, and those that it went on without."""

    name: str
    seconds: list[float] = []
    servers: int = 0
    left_out: dict[str, str] = {}
    note: str = ""

    def __str__(self) -> str:
        took = f"{1e3 * statistics.median(self.seconds):.1f}" if self.seconds else ""
        span = f" ({1e3 * min(self.seconds):.1f}, {1e3 * max(self.seconds):.1f})" if len(self.seconds) > 1 else ""
        left_out = "; ".join(why.splitlines()[0][:120] for why in self.left_out.values())
        return f"{self.name} | {took}{span} | {self.servers} | {left_out} | {self.note} |"


# One trainer rank


class Steps:
    """Collective. On rank 0 `found` is what came of them."""

    def __init__(self, rank: int, job: Losses, trainer: Trains, sender: FP8Sender) -> None:
        self._rank, self._job, self._trainer, self._sender = rank, job, trainer, sender
        self._wanted: dict[str, list[dict[str, str]]] = json.loads(job.wanted.read_text())
        self.found: list[Step] = []

    def take(self, name: str, seeds: Sequence[int], beside: Callable[[], None] = lambda: None) -> Step:
        """A push of each of `seeds`; `beside`: what happens as the last one begins."""
        step = Step(name=name)
        self.found.append(step)
        for number, seed in enumerate(seeds):
            self._trainer.fill(seed)
            dist.barrier()
            if number == len(seeds) - 1:
                beside()
            began = time.perf_counter()
            report = self._sender.push(self._trainer.model)
            step.seconds.append(time.perf_counter() - began)
        step.servers, step.left_out = len(report.servers), report.left_out
        if self._rank == 0 and seeds[-1] == WANTED:
            step.note = self._check(report)
        return step

    def _check(self, report: PushReport) -> str:
        """Raises: AssertionError: a server holds another byte, or another version."""
        num = 0
        for url in report.servers:
            reply = httpx.post(f"{url}/fp8sync/control", json={"kind": "probe"}, timeout=60.0, trust_env=False).json()
            if (reply["version"], reply["state"]) != (report.version, "SERVING"):
                raise AssertionError(f"{url} is {reply['state']} with version {reply['version']}")
            for held, wanted in zip(reply["probe"], self._wanted[str(len(reply["probe"]))], strict=True):
                if wrong := compare(held, wanted)[0]:
                    raise AssertionError(f"{url}: {len(wrong)} tensors differ from the reference: {wrong[:3]}")
                num += len(wanted)
        return f"{num} tensors are bit for bit the reference's"


def rank_main(rank: int, job: Losses) -> None:
    trainer, _ = meet(rank, job)
    seeds = [OTHER, WANTED] * ((job.num_pushes + 1) // 2)
    with FP8Sender(
        job.urls,
        plane=job.way.plane,
        staging=job.way.staging,
        bucket_bytes=job.way.bucket_bytes,
        quorum=len(job.urls) - 1,
        timeout_s=PUSH_TIMEOUT_S,
    ) as sender:
        sender.prepare(trainer.model)
        steps = Steps(rank, job, trainer, sender)
        half_s = statistics.median(steps.take("all", [WANTED, *seeds, OTHER]).seconds[1:]) / 2

        def kill() -> None:
            if rank == 0:
                threading.Timer(half_s, os.killpg, (job.victim, signal.SIGKILL)).start()

        steps.take("killed", [WANTED], kill)
        sender.remove_server(job.urls[-1])
        steps.take("left", seeds)
        deadline = time.monotonic() + JOINS_S
        while not job.is_up.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no server took the place of the other for {JOINS_S:.0f} s")
            time.sleep(0.1)
        sender.add_server(job.joins)
        steps.take("joined", [WANTED])
        steps.take("all again", seeds)
    if rank == 0:
        job.found.write_text(json.dumps([step.model_dump() for step in steps.found]))
    dist.barrier()


# All processes


def lose(run: Run, way: Way, servers: list[LocalServer], args: list[str], wanted: Path) -> list[Step]:
    """In `servers` the one that joined takes the place of the one that was killed."""
    at = run.chosen.out / "logs" / f"{run.name}-losses-{way.plane}.json"
    is_up, port = at.with_suffix(".up"), free_port()
    for old in (at, is_up):
        old.unlink(missing_ok=True)
    job = job_of(run.chosen, way, [server.url for server in servers], at, len(run.chosen.trainers))
    losses = Losses(
        **job.model_dump(),
        victim=servers[-1].process.pid,
        joins=f"http://127.0.0.1:{port}",
        is_up=is_up,
        wanted=wanted,
    )
    ranks = Ranks(
        losses, [run.environment([gpu]) for gpu in run.chosen.trainers], at.with_suffix(""), "benchmarks.losses"
    )
    run.running.append(ranks)
    try:
        while servers[-1].process.poll() is None and ranks.are_running:
            time.sleep(0.05)
        servers[-1] = run.start(len(servers) - 1, args, f"joins-over-{way.plane}", port)
        servers[-1].wait(START_S)
        is_up.touch()
        ranks.wait()
    finally:
        ranks.stop()
    return [Step.model_validate(step) for step in json.loads(at.read_text())]


def main() -> int:
    chosen = arguments(__doc__)
    if len(chosen.servers) < 2:
        sys.exit("--servers: two or more, of which one is killed")
    run, rows = Run(chosen), list[str]()

    def tell(why: str) -> int:
        print(f"\n| plane, step | ms (least, most) | servers | went on without | {why} |\n{'|---' * 5}|")
        print("\n".join(rows), flush=True)
        run.stop()
        return int(bool(why))

    timer = threading.Timer(chosen.deadline_s, lambda: os._exit(tell(f"not done after {chosen.deadline_s:.0f} s")))
    timer.daemon = True
    timer.start()
    with tempfile.TemporaryDirectory() as folder:
        try:
            args = words_of_servers(run, Path(folder))
            servers = [run.start(number, args) for number in range(len(chosen.servers))]
            wanted = Path(folder) / "wanted.json"
            wanted.write_text(json.dumps(references(run)))
            for server in servers:
                server.wait(START_S)
            run.say("all servers are up")
            for plane in chosen.plane:
                way = Way(plane, chosen.staging[0], chosen.bucket_mib << 20)
                rows += [f"| {plane}, {step}" for step in lose(run, way, servers, args, wanted)]
        except BaseException as error:  # no server stays
            traceback.print_exc()
            return tell(f"failed: {type(error).__name__}: {str(error)[:300]}")
        return tell("")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():
        rank_main(int(sys.argv[1]), Losses.model_validate_json(sys.argv[2]))
        status = 0
    else:
        status = main()
    sys.stdout.flush()
    os._exit(status)
