"""What no push between two devices can beat, measured with two processes that do nothing else; or within one device.

    wire    bytes a second of one large broadcast from the first device to the second; None within one
    copy    bytes a second, read and written, of one large copy within the first device

`measure` starts the processes; each of them runs `python -m benchmarks.limits RANK RANKS PORT BACKEND BYTES`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from pydantic import BaseModel

from examples.local_server import free_port

REPEATS, IN_A_ROW = 7, 4
TIMEOUT_S = 90.0


class Limits(BaseModel):
    """Bytes a second."""

    device: str
    wire: float | None
    copied: float

    def wire_s(self, num_bytes: int) -> float | None:
        return None if self.wire is None else num_bytes / self.wire

    def commit_s(self, num_bytes: int) -> float:
        """To copy an image of so many bytes over the parameters: each is read and written."""
        return 2 * num_bytes / self.copied


def measure(backend: str, num_bytes: int, environments: Sequence[Mapping[str, str]]) -> Limits:
    """Of the one or two devices that `environments` show. Raises: RuntimeError: a process failed, or took too long."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.limits", *map(str, (rank, len(environments), port, backend, num_bytes))],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, environment in enumerate(environments)
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in started]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the limits were not measured within {TIMEOUT_S:.0f} s") from error
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode for process in started):
        raise RuntimeError(f"the limits were not measured: {' '.join(errors[-500:] for _, errors in said)}")
    return Limits.model_validate_json(said[0][0].splitlines()[-1])


def _median_s(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one of `IN_A_ROW` steps, which the device does without a pause."""
    times = []
    for repeat in range(REPEATS + 2):
        began = time.perf_counter()
        for _ in range(IN_A_ROW):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= 2:
            times.append((time.perf_counter() - began) / IN_A_ROW)
    return statistics.median(times)


def main(rank: int, num_ranks: int, port: int, backend: str, num_bytes: int) -> None:
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    buffer = torch.full((num_bytes,), rank, dtype=torch.uint8, device=device)
    wire_s = None
    if num_ranks > 1:
        timeout = timedelta(seconds=TIMEOUT_S)
        store = dist.TCPStore("127.0.0.1", port, num_ranks, rank == 0, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        wire_s = _median_s(lambda: dist.broadcast(buffer, src=0), device)
        if int(buffer[-1]) != 0:
            raise RuntimeError("the broadcast did not arrive")
    if rank == 0:
        target = torch.empty_like(buffer)
        copy_s = _median_s(lambda: target.copy_(buffer), device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        wire = None if wire_s is None else num_bytes / wire_s
        print(json.dumps({"device": name, "wire": wire, "copied": 2 * num_bytes / copy_s}), flush=True)
    if wire_s is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
