"""Streams of tokens that a server generates, read by processes of their own, in rounds.

    with Streams(url, num_streams, new_tokens) as streams:     # warm: what has to be compiled is
        began = streams.begin()                                # all streams generate
        ...
        arrivals = streams.end()                               # of each stream, when its tokens came

A process, `python -m benchmarks.streams URL FIRST STREAMS NEW_TOKENS`, reads a few streams. On `begin TOKENS` it says
`ready` once so many tokens of each stream came, and on `end` when they all came, on the clock `time.monotonic` of this
machine. A request that ends within a round is followed by the next one.
"""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
import time
from types import TracebackType

import httpx

STREAMS_A_PROCESS = 8
WARM_TOKENS, WARM_S = 50, 150.0  # the first tokens wait for kernels to be compiled
READY_TOKENS, READY_S = 5, 60.0
READ_TIMEOUT_S = 60.0
_COUNT = re.compile(r'"completion_tokens": ?(\d+)')


class Streams:
    """`num_streams` requests at a time, of `new_tokens` each.

    Raises, from each of its steps: RuntimeError: tokens did not come, or a stream broke.
    """

    def __init__(self, url: str, num_streams: int, new_tokens: int) -> None:
        self._url, self._new_tokens = url, new_tokens
        self._shares = {
            first: min(STREAMS_A_PROCESS, num_streams - first) for first in range(0, num_streams, STREAMS_A_PROCESS)
        }
        self._readers: list[_Reader] = []

    def __enter__(self) -> Streams:
        try:
            for first, num in self._shares.items():
                self._readers.append(_Reader(self._url, first, num, self._new_tokens))
            self.begin(WARM_TOKENS, WARM_S)
            self.end()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.kill()

    def begin(self, num_tokens: int = READY_TOKENS, timeout_s: float = READY_S) -> float:
        """Start all streams; when all of them had `num_tokens`."""
        for reader in self._readers:
            reader.tell(f"begin {num_tokens}")
        for reader in self._readers:
            reader.expect("ready", timeout_s)
        return time.monotonic()

    def end(self) -> list[list[float]]:
        """Stop all streams; when the tokens of each came."""
        for reader in self._readers:
            reader.tell("end")
        # Those that wait for a token hear of it, and the next round finds the server idle.
        httpx.post(f"{self._url}/abort_request", json={"abort_all": True}, trust_env=False).raise_for_status()
        return [times for reader in self._readers for times in json.loads(reader.expect("[", 2 * READ_TIMEOUT_S))]


class _Reader:
    """The process of a few streams."""

    def __init__(self, url: str, first: int, num: int, new_tokens: int) -> None:
        command = [sys.executable, "-m", "benchmarks.streams", url, str(first), str(num), str(new_tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except OSError as error:
            raise RuntimeError(f"streams: {self._lines.get(timeout=1.0)}") from error

    def expect(self, start: str, timeout_s: float) -> str:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            line = f"nothing within {timeout_s:.0f} s"
        if not line.startswith(start):
            raise RuntimeError(f"streams: {line}")
        return line

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put("the streams ended")


def completed(line: str) -> int:
    """How many tokens a request has had with the chunk `line`: one chunk may bring several.

    Raises: RuntimeError: it is an error, or does not say.
    """
    found = None if line.startswith('data: {"error"') else _COUNT.search(line)
    if found is None:
        raise RuntimeError(line[:200])
    return int(found[1])


def read(url: str, body: dict[str, object], arrived: list[float], over: threading.Event, wrong: list[str]) -> None:
    """One request after the other, until the round is over."""
    try:
        with httpx.Client(base_url=url, timeout=READ_TIMEOUT_S, trust_env=False) as client:
            while not over.is_set():
                num_tokens = 0
                with client.stream("POST", "/generate", json=body) as reply:
                    if reply.status_code != 200:
                        raise RuntimeError(f"{reply.status_code} {reply.read().decode(errors='replace')[:200]}")
                    for line in reply.iter_lines():
                        if over.is_set():
                            break
                        if line.startswith("data: {"):
                            now, before, num_tokens = time.monotonic(), num_tokens, completed(line)
                            arrived.extend([now] * (num_tokens - before))
    except Exception as error:
        if not over.is_set():
            wrong.append(f"stream {body['input_ids']}: {error!r}")


def main(url: str, first: int, num_streams: int, new_tokens: int) -> None:
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    bodies: list[dict[str, object]] = [
        {"input_ids": [3 + number, 5, 7], "sampling_params": sampling, "stream": True}
        for number in range(first, first + num_streams)
    ]
    for line in sys.stdin:
        ready_tokens = int(line.removeprefix("begin "))
        arrivals: list[list[float]] = [[] for _ in bodies]
        wrong, over = list[str](), threading.Event()
        threads = [
            threading.Thread(target=read, args=(url, body, arrived, over, wrong), daemon=True)
            for body, arrived in zip(bodies, arrivals, strict=True)
        ]
        for thread in threads:
            thread.start()
        while not wrong and any(len(arrived) < ready_tokens for arrived in arrivals):
            time.sleep(0.005)
        if not wrong:
            print("ready", flush=True)
            sys.stdin.readline()
        over.set()
        for thread in threads:
            thread.join()
        print(wrong[0] if wrong else json.dumps(arrivals), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
