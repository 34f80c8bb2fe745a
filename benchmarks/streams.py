"""Streams of tokens that a server generates while weights are pushed: for how long does nothing come?

They are read in a process of their own, `python -m benchmarks.streams URL STREAMS NEW_TOKENS`, which says `ready` when
tokens come, and after the end of its input when each of them came, on the clock `time.monotonic` of this machine.
"""

from __future__ import annotations

import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType

import httpx

MARGIN_S = 2.0  # what lies so close to a push counts as its own
WARM_TOKENS, WARM_S = 50, 150.0  # the first tokens wait for kernels to be compiled
READ_TIMEOUT_S = 60.0
Span = tuple[float, float]


@dataclass(frozen=True)
class Gaps:
    """Seconds between tokens of one stream. `normal`: median far from pushes; `worst`: longest near each push."""

    normal: float
    worst: tuple[float, ...]


def gaps(arrivals: Sequence[float], pushes: Sequence[Span], margin_s: float = MARGIN_S) -> Gaps:
    """Of a stream whose tokens came at `arrivals`, around `pushes` (begin, end), in seconds of one clock.

    Raises: ValueError: it was not there from before the first push to after the last, or never undisturbed.
    """
    if len(arrivals) < 2 or not pushes or arrivals[0] > pushes[0][0] or arrivals[-1] < pushes[-1][1]:
        raise ValueError("a stream was not there from before the first push to after the last")
    spans = list(pairwise(arrivals))
    near = [
        [span for span in spans if span[1] > began - margin_s and span[0] < ended + margin_s] for began, ended in pushes
    ]
    disturbed = {span for found in near for span in found}
    far = [span[1] - span[0] for span in spans if span not in disturbed]
    if not far:
        raise ValueError("a stream was never farther than the margin from a push")
    return Gaps(statistics.median(far), tuple(max(end - start for start, end in found) for found in near))


class Streams:
    """`num_streams` requests that generate until this is left; `arrivals` then has when each stream's tokens came.

    Entering waits for the first tokens. Raises: RuntimeError: they did not come, or a stream broke.
    """

    def __init__(self, url: str, num_streams: int, new_tokens: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.streams", url, str(num_streams), str(new_tokens)]
        self.arrivals: list[list[float]] = []

    def __enter__(self) -> Streams:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._expect("ready", WARM_S)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                self.arrivals = json.loads(self._expect("[", READ_TIMEOUT_S))
        finally:
            self._kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put("the streams ended")

    def _expect(self, start: str, timeout_s: float) -> str:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            line = f"nothing within {timeout_s:.0f} s"
        if not line.startswith(start):
            raise RuntimeError(f"streams: {line}")
        return line

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()


def read(url: str, number: int, new_tokens: int, arrived: list[float], wrong: list[str]) -> None:
    """Requests of stream `number`, one after the other, for ever."""
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": [3 + number, 5, 7], "sampling_params": sampling, "stream": True}
    try:
        with httpx.Client(base_url=url, timeout=READ_TIMEOUT_S, trust_env=False) as client:
            while True:
                with client.stream("POST", "/generate", json=body) as reply:
                    if reply.status_code != 200:
                        raise RuntimeError(f"{reply.status_code} {reply.read().decode(errors='replace')[:200]}")
                    for line in reply.iter_lines():
                        if line.startswith('data: {"error"'):
                            raise RuntimeError(line[:200])
                        if line.startswith("data: {"):
                            arrived.append(time.monotonic())
    except Exception as error:
        wrong.append(f"stream {number}: {error!r}")


def main(url: str, num_streams: int, new_tokens: int) -> None:
    arrivals: list[list[float]] = [[] for _ in range(num_streams)]
    wrong: list[str] = []
    for number, arrived in enumerate(arrivals):
        threading.Thread(target=read, args=(url, number, new_tokens, arrived, wrong), daemon=True).start()
    while not wrong and any(len(arrived) < WARM_TOKENS for arrived in arrivals):
        time.sleep(0.02)
    if not wrong:
        print("ready", flush=True)
        sys.stdin.read()
    print(wrong[0] if wrong else json.dumps(arrivals), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
