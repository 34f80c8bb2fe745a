"""Two real SGLang servers, what they serve before and after a fault, and senders in processes that can be killed.

What a version has to be, byte for byte, is not computed here: a clean push of the same weights has put it there before,
and tests/test_server.py holds such a push against a server that loaded them from a checkpoint.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from torch import nn

from examples.local_server import CPU_ARGS, LocalServer, free_port
from examples.tiny_qwen3 import make_model, write_config
from sender import FP8BlockConfig, FP8Sender
from sender.control import HttpControl
from shared.launch import sglang_fp8_args
from tests.faults.processes import Arms, SenderProcess, push_and_tell
from tests.faults.sending import WatchedSender
from tests.server_fixtures import ADMIN_KEY, CHANGES

Prints = list[dict[str, str]]
SEEDS = (31, 32)  # pushed in turn: what is served is one, what the struck push brings is the other
BUCKET_BYTES = 256 << 10
START_TIMEOUT_S = 400.0
PROMPT = [11, 12, 13, 14]


def model_of(seed: int) -> nn.Module:
    return make_model(seed, **CHANGES)


@dataclass(frozen=True)
class Seen:
    """`status` and `version` are those of a request; `prints` are None where nobody answers."""

    state: str
    status: int
    version: str
    reason: str
    prints: Prints | None


class RealServer:
    """One SGLang server with an address of its own, which it keeps when it is started again."""

    def __init__(self, folder: Path, name: str, args: Sequence[str] = (), env: dict[str, str] | None = None) -> None:
        self._folder, self._name, self._args, self._env = folder, name, args, env
        self._port, self.num_starts = free_port(), 0
        self.start()

    def start(self) -> None:
        model = write_config(self._folder / "no_weights", **CHANGES)
        args = [*sglang_fp8_args(str(model), FP8BlockConfig()), *CPU_ARGS, "--admin-api-key", ADMIN_KEY, *self._args]
        self.num_starts += 1
        log = self._folder / f"{self._name}.{self.num_starts}.log"
        self.inner = LocalServer(args, log, env=self._env, key=ADMIN_KEY, port=self._port)

    def wait(self) -> RealServer:
        self.inner.wait(START_TIMEOUT_S)
        return self

    @property
    def url(self) -> str:
        return self.inner.url

    def hang_up(self) -> None:
        """Close the connections that this process keeps to it; the next request makes one."""
        http = self.inner.http
        http.close()
        self.inner.http = httpx.Client(base_url=self.url, timeout=120.0, trust_env=False, headers=http.headers)

    def kill(self) -> None:
        """All of its processes at once, and nobody is told."""
        os.killpg(self.inner.process.pid, signal.SIGKILL)
        self.inner.process.wait(20.0)
        self.inner.stop()

    def alive(self) -> bool:
        return self.inner.process.poll() is None

    def state(self) -> str:
        return str(self.inner.http.get("/fp8sync/info").json()["state"])

    def look(self) -> Seen:
        if not self.alive():
            return Seen("GONE", 0, "", "its process has ended", None)
        try:
            state = self.state()
            sampling = {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True}
            answer = self.inner.post("/generate", {"input_ids": PROMPT, "sampling_params": sampling})
            served = answer.status_code == 200
            version = str(answer.json()["meta_info"]["weight_version"]) if served else ""
            return Seen(state, answer.status_code, version, answer.text, self.inner.probe())
        except httpx.TransportError as error:
            return Seen("GONE", 0, "", str(error), None)


class Pair:
    """Both servers, the weights that every version stands for, and the clean pushes before and after a fault."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self.servers = [RealServer(folder, name) for name in ("a", "b")]
        for server in self.servers:
            self._stack.callback(lambda server=server: server.inner.stop())  # type: ignore[misc]
        for server in self.servers:
            server.wait()
        self.golden: dict[int, Prints] = {}
        self.seeds: dict[str, int] = {}
        self.served = SEEDS[0]
        for seed in SEEDS:
            self.push(seed)
            first, second = (server.inner.probe() for server in self.servers)
            assert first == second
            self.golden[seed] = first
        assert self.golden[SEEDS[0]] != self.golden[SEEDS[1]]

    @property
    def other(self) -> int:
        """The weights that are not served just now."""
        return SEEDS[1] if self.served == SEEDS[0] else SEEDS[0]

    @property
    def num_starts(self) -> int:
        return sum(server.num_starts for server in self.servers)

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def sender(self, timeout_s: float = 60.0) -> FP8Sender:
        return FP8Sender(self.urls, admin_key=ADMIN_KEY, timeout_s=timeout_s, bucket_bytes=BUCKET_BYTES)

    def watched(self, timeout_s: float = 60.0) -> WatchedSender:
        return watched(self.urls, timeout_s)

    def next_version(self) -> str:
        newest = [server.inner.http.get("/fp8sync/info").json()["version"] for server in self.servers]
        return str(1 + max(newest))

    def expect(self, seed: int) -> None:
        """The next push brings `seed`."""
        self.seeds[self.next_version()] = seed

    def push(self, seed: int) -> None:
        """A push without a fault: it reaches both servers, with one version newer than all that were served."""
        self.expect(seed)
        with self.sender() as sender:
            report = sender.push(model_of(seed))
        assert self.seeds[str(report.version)] == seed
        for server in self.servers:
            seen = server.look()
            assert (seen.status, seen.version, seen.state) == (200, str(report.version), "SERVING"), seen.reason
            assert self.golden.get(seed) in (None, seen.prints), "not what a clean push of these weights put there"
        self.served = seed

    def end_of(self, server: RealServer) -> str:
        """OLD, NEW, FENCED or GONE; an assertion fails on anything in between."""
        seen = server.look()
        if seen.prints is None:
            return "gone"
        if seen.status != 200:
            assert seen.status == 503 and "fenced" in seen.reason and seen.state == "FENCED", seen.reason
            return "fenced"
        assert seen.state == "SERVING", seen.state
        assert seen.prints == self.golden[self.seeds[seen.version]], (
            f"{server.url}: other weights than of {seen.version}"
        )
        return "old" if self.seeds[seen.version] == self.served else "new"

    def settle(self, timeout_s: float) -> None:
        """Wait until no server holds anything of a push."""
        deadline = time.monotonic() + timeout_s
        for server in self.servers:
            while server.alive() and (state := server.state()) in ("RECEIVING", "STAGED", "PROMISED"):
                assert time.monotonic() < deadline, f"{server.url} is still {state}"
                time.sleep(0.05)

    def ends(self, timeout_s: float) -> list[str]:
        self.settle(timeout_s)
        return [self.end_of(server) for server in self.servers]

    def heal(self) -> None:
        for server in self.servers:
            if not server.alive():
                server.inner.stop()
                server.start()
        for server in self.servers:
            server.wait()
        self.push(self.other)

    def hang_up(self) -> None:
        for server in self.servers:
            server.hang_up()

    def close(self) -> None:
        self._stack.close()


def watched(urls: Sequence[str], timeout_s: float) -> WatchedSender:
    controls = [HttpControl(url, ADMIN_KEY) for url in urls]
    calls: list[tuple[str, Callable[..., Any]]] = [(control.name, control.call) for control in controls]
    sender = WatchedSender(calls, "tcp", timeout_s, BUCKET_BYTES)
    sender.on_close += [control.close for control in controls]
    return sender


def push_real(result: Connection, urls: Sequence[str], seed: int, timeout_s: float, arms: Arms) -> None:
    push_and_tell(result, watched(urls, timeout_s), model_of(seed), arms)


def sender_process(pair: Pair, timeout_s: float, arms: Arms) -> SenderProcess:
    pair.expect(pair.other)
    return SenderProcess(push_real, (pair.urls, pair.other, timeout_s, arms))
