"""Many pushes into a server that generates all the time: does anything grow?

    python -m benchmarks.soak [--pushes 500]

A real SGLang server on this machine's CPU, two clients that generate without a pause, and one trainer process that
pushes two models by turns. Looked at by the way, on the trainer and on every process of the server: memory, threads,
open files. A push has to leave every byte as the same model did the time before; no reply may carry a version that
was not served while it ran. Prints a table, then `soak ok` or what is wrong, and ends with code 1 then.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import make_model, write_config
from sender import FP8Sender
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args

OUT = Path("out/soak")
NUM_CLIENTS, NEW_TOKENS = 2, 16
WARM_PUSHES = 50  # allocators and caches have settled by then
CHECK_EVERY = 25
MOST_GROWTH = 0.03  # of resident memory, of the last quarter over the first one after the warm-up


@dataclass(frozen=True)
class Usage:
    """Of one process. `rss`: resident bytes."""

    rss: int
    threads: int
    files: int


def usage(pid: int) -> Usage:
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return Usage(
        rss=int(values["VmRSS"].split()[0]) << 10,
        threads=int(values["Threads"]),
        files=len(os.listdir(f"/proc/{pid}/fd")),
    )


def processes_of(server: LocalServer) -> dict[str, int]:
    """Name -> id of the server's processes: that of HTTP, its schedulers and its detokenizer."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            group = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[2])
            title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if group != server.process.pid or "resource_tracker" in (entry / "cmdline").read_text():
            continue
        name = "http" if int(entry.name) == server.process.pid else title.removeprefix("sglang::")
        found[name] = int(entry.name)
    return found


@dataclass
class Load:
    """What the clients saw."""

    served: list[int]  # the newest version that a push has returned for
    pushing: list[int]  # the newest one that was begun
    replies: int = 0
    wrong: list[str] = field(default_factory=list)

    def run(self, server: LocalServer, number: int, over: threading.Event) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            prompt = [3 + (7 * turn + 31 * number + at) % 990 for at in range(5 + turn % 20)]
            oldest = self.served[0]
            reply = server.generate([prompt], NEW_TOKENS)[0]
            version = int(reply["weight_version"])
            self.replies += 1
            if not oldest <= version <= self.pushing[0]:
                self.wrong.append(f"a reply of version {version}, served were {oldest} to {self.pushing[0]}")


@contextmanager
def clients(server: LocalServer, load: Load) -> Iterator[None]:
    over = threading.Event()
    threads = [threading.Thread(target=load.run, args=(server, number, over)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(60.0)


def soak(server: LocalServer, num_pushes: int) -> tuple[list[dict[str, Usage]], list[float], Load, list[str]]:
    """Per push: what every process uses after it, and its seconds; then what the clients saw and what went wrong."""
    models = [make_model(seed=seed) for seed in (1, 2)]
    wrong: list[str] = []
    usages, seconds = [], []
    with FP8Sender([server.url]) as sender:
        sender.push(models[1])
        prints = {1: server.probe()}
        sender.push(models[0])
        prints[0] = server.probe()
        if prints[0] == prints[1]:
            wrong.append("two models left the same bytes")
        pids = {"trainer": os.getpid(), **processes_of(server)}
        load = Load(served=[2], pushing=[2])
        with clients(server, load):
            for push in range(3, num_pushes + 3):
                load.pushing[0] = push
                report = sender.push(models[push % 2])
                load.served[0] = report.version
                seconds.append(report.seconds["total"])
                usages.append({name: usage(pid) for name, pid in pids.items()})
                if push % CHECK_EVERY == 0:
                    if server.probe() != prints[push % 2]:
                        wrong.append(f"push {push} left other bytes than this model did before")
                    print(f"  {push - 2} pushes, {load.replies} replies", flush=True)
    return usages, seconds, load, [*wrong, *load.wrong]


def judge(usages: list[dict[str, Usage]]) -> list[str]:
    """Prints what every process uses over time. What grew."""
    warm = usages[WARM_PUSHES:]
    quarter = max(1, len(warm) // 4)
    early, late = warm[:quarter], warm[-quarter:]
    grew = []
    print(f"\n{'process':24}{'memory, MB':>28}{'growth':>9}{'threads':>16}{'open files':>16}")
    for name in usages[0]:
        first, last = (statistics.median(use[name].rss for use in part) for part in (early, late))
        growth = last / first - 1
        cells = []
        for kind in ("threads", "files"):
            before, after = (int(statistics.median(getattr(use[name], kind) for use in part)) for part in (early, late))
            cells.append(f"{before} to {after}")
            if after > before:
                grew.append(f"{name}: {kind}, {before} to {after}")
        if growth > MOST_GROWTH:
            grew.append(f"{name}: memory, {growth:.1%}")
        print(f"{name:24}{f'{first / 1e6:.1f} to {last / 1e6:.1f}':>28}{growth:>9.2%}{cells[0]:>16}{cells[1]:>16}")
    return grew


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=500)
    num_pushes = parser.parse_args().pushes
    if num_pushes < WARM_PUSHES + 40:
        parser.error(f"at least {WARM_PUSHES + 40}: the first {WARM_PUSHES} do not count")
    torch.set_num_threads(1)
    args = sglang_fp8_args(str(write_config(OUT / "no_weights")), FP8BlockConfig(), user_args=[*CPU_ARGS])
    started = time.monotonic()
    with LocalServer(args, OUT / "server.log") as server:
        usages, seconds, load, wrong = soak(server.wait(), num_pushes)
        wrong += judge(usages)
    quick, slow = statistics.median(seconds), max(seconds)
    print(
        f"\n{num_pushes} pushes and {load.replies} replies in {time.monotonic() - started:.0f} s; "
        f"a push takes {quick:.3f} s (median), {slow:.3f} s at most"
    )
    for what in wrong[:20]:
        print(f"WRONG  {what}")
    print("soak ok" if not wrong else "soak FAILED")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
