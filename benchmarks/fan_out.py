"""How long a push takes for every server more: `python -m benchmarks.fan_out`, on a CPU, over the plane `tcp`.

First receivers without SGLang, each a process of its own, that hold `--megabytes` of BF16 weights in FP8; then real
SGLang servers of a tiny model (`--servers 0` leaves them out), started with `--sleep-on-idle`. Every line is the median
of `--pushes` pushes after the first, and what the last server more has cost. It says what the machine did beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import make_model, write_config
from receiver_plugin.binding import Derived, NothingDerived
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from sender import FP8Sender
from sender.report import PHASES, PushReport
from shared import protocol
from shared.config import FP8BlockConfig
from shared.errors import ServerUnreachableError, error_from_wire
from shared.launch import sglang_fp8_args
from shared.numerics import scale_shape

SIDE = 1024  # weights of [SIDE, SIDE]


class Trainer(nn.Module):
    """`num_layers` BF16 weights of 2 MiB each."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.layers: list[Any] = []
        for _ in range(num_layers):
            layer = nn.Module()
            layer.mlp = nn.Module()
            layer.mlp.up_proj = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16)
            self.layers.append(layer)
        self.model.layers = nn.ModuleList(self.layers)


class Served(Trainer):
    """The same in FP8, with scales."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        for layer in self.layers:
            codes = torch.zeros(SIDE, SIDE).to(torch.float8_e4m3fn)
            layer.mlp.up_proj.weight = nn.Parameter(codes, requires_grad=False)
            scales = torch.zeros(scale_shape(SIDE, SIDE))
            layer.mlp.up_proj.weight_scale_inv = nn.Parameter(scales, requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            parameters[name].data.copy_(weight)


class Memory:
    """As `--fp8sync-staging` reserves it; the KV cache is empty."""

    def __init__(self, num_bytes: int) -> None:
        self.reserved = torch.empty(num_bytes, dtype=torch.uint8)

    @property
    def released(self) -> tuple[str, ...]:
        return ()

    def kv_pool(self) -> list[torch.Tensor]:
        return []


class Engine:
    """An engine that never has a request."""

    derived: Derived = NothingDerived()
    makeup: object = None

    def __init__(self, num_layers: int) -> None:
        self.memory = Memory(4 * num_layers * SIDE * SIDE)  # an image, a bucket, and more

    def info(self, incarnation: str) -> protocol.ServerInfo:
        return protocol.ServerInfo(
            protocol=protocol.PROTOCOL_VERSION,
            sglang_version=protocol.MIN_SGLANG_VERSION,
            incarnation=incarnation,
            num_ranks=1,
            block_size=(128, 128),
            scale_fmt="fp32",
            device="cpu",
            compute_capability="",
            gemm_backend="none",
            moe_backend="none",
        )

    def unsafe(self) -> list[str]:
        return []

    def flush_cache(self) -> bool:
        return True

    def cannot_keep(self) -> list[str]:
        return []

    def renew_cache(self, name: str) -> None:
        """There is none."""

    def end_requests(self) -> None:
        """There are none."""

    def synchronize(self) -> None:
        """A CPU is never behind."""

    def publish(self, version: int) -> None:
        """Nobody is served."""


def receive(pipe: Connection, num_layers: int) -> None:
    torch.set_num_threads(1)
    receiver = Receiver(Served(num_layers), Engine(num_layers), SingleRank(), "no weights yet")
    pipe.send_bytes(b"ready")
    while message := pipe.recv_bytes():
        pipe.send_bytes(receiver.handle(protocol.decode_message(message)).model_dump_json().encode())


class ReceiverProcess:
    """A `ControlClient` to a receiver in a process of its own."""

    def __init__(self, number: int, num_layers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = f"receiver {number}"
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=receive, args=(theirs, num_layers), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> ReceiverProcess:
        if not self._pipe.poll(120.0) or self._pipe.recv_bytes() != b"ready":
            raise ServerUnreachableError(f"{self.name} did not start")
        return self

    def call(self, message: BaseModel, timeout_s: float) -> protocol.Reply:
        self._pipe.send_bytes(message.model_dump_json().encode())
        if not self._pipe.poll(timeout_s):
            raise ServerUnreachableError(f"{self.name} did not answer")
        reply = protocol.Reply.model_validate_json(self._pipe.recv_bytes())
        if reply.error is not None:
            raise error_from_wire(reply.error.kind, f"{self.name}: {reply.error.message}", reply.error.problems)
        return reply

    def local_host(self) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        """The process outlives a sender: `stop` ends it."""

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def measure(servers: Sequence[Any], model: nn.Module, num_pushes: int) -> list[PushReport]:
    """The first push plans and is left out."""
    with FP8Sender(servers) as sender:
        return [sender.push(model) for _ in range(1 + num_pushes)][1:]


def line(what: str, number: int, reports: Sequence[PushReport], before: float | None) -> float:
    total = statistics.median(report.seconds["total"] for report in reports)
    phases = [f"{1e3 * statistics.median(r.seconds[phase] for r in reports):.0f}" for phase in PHASES]
    skew = 1e3 * statistics.median(report.skew_s for report in reports)
    more = "-" if before is None else f"{1e3 * (total - before):.0f}"
    megabytes = f"{reports[0].wire_bytes / 1e6:.1f}"
    print(
        f"| {' | '.join([what, str(number), megabytes, f'{1e3 * total:.0f}', more, *phases, f'{skew:.0f}'])} |",
        flush=True,
    )
    return total


def without_sglang(most: int, num_layers: int, num_pushes: int) -> None:
    receivers = [ReceiverProcess(number, num_layers) for number in range(most)]
    try:
        for receiver in receivers:
            receiver.wait()
        model, before = Trainer(num_layers), None
        for number in range(1, most + 1):
            before = line("receivers", number, measure(receivers[:number], model, num_pushes), before)
    finally:
        for receiver in receivers:
            receiver.stop()


def real_servers(most: int, num_pushes: int) -> None:
    model, before = make_model(1), None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        config = str(write_config(Path(folder) / "model"))
        args = [*sglang_fp8_args(config, FP8BlockConfig()), *CPU_ARGS, "--sleep-on-idle"]
        servers = [
            running.enter_context(LocalServer(args, Path(folder) / f"server-{number}.log")) for number in range(most)
        ]
        urls = [server.wait().url for server in servers]
        for number in range(1, most + 1):
            before = line("SGLang servers", number, measure(urls[:number], model, num_pushes), before)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fan_out", description=__doc__)
    parser.add_argument("--receivers", type=int, default=8)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=64, help="BF16 weights of the receivers without SGLang")
    parser.add_argument("--pushes", type=int, default=7)
    words = parser.parse_args()
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {load:.1f} before this started, torch {torch.__version__}; milliseconds\n")
    print(f"| what | number | MB sent to each | push | one more | {' | '.join(PHASES)} | skew |")
    print("|---" * (6 + len(PHASES)) + "|")
    if words.receivers:
        without_sglang(words.receivers, max(1, words.megabytes // 2), words.pushes)
    if words.servers:
        real_servers(words.servers, words.pushes)


if __name__ == "__main__":
    main()
