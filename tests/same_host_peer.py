"""A server rank of the plane `same_host` in a process of its own, driven by its standard input.

    python -m tests.same_host_peer RENDEZVOUS DEVICE NUM_SLOTS SIZE...      DEVICE: cpu, or the number of a GPU

It receives buckets of these sizes into so many slots; each line that it reads lets it take one step, and it tells of
each bucket what was sent ahead of it and the SHA-256 of its bytes. When it is over it says why, and that it let go.
"""

from __future__ import annotations

import hashlib
import sys
import time

import torch

from shared.errors import TransferError
from shared.planes import open_receiver
from shared.planes.shared_memory import allocate
from shared.protocol import Rendezvous

TIMEOUT_S = 8.0


def say(*words: object) -> None:
    print(*words, flush=True)


def main(text: str, device: str, num_slots: int, sizes: list[int]) -> None:
    if device != "cpu":
        torch.cuda.set_device(int(device))
        torch.cuda.init()
    slot = max(sizes)
    memory = (
        allocate(num_slots * slot)
        if device == "cpu"
        else torch.zeros(num_slots * slot, dtype=torch.uint8, device="cuda")
    )
    half = open_receiver(Rendezvous.model_validate_json(text), 0)
    say("joined")
    coming: list[tuple[torch.Tensor, int]] = []

    def take() -> None:
        half.arrive(TIMEOUT_S)
        bucket, digest = coming.pop(0)
        say(digest, hashlib.sha256(bucket.cpu().numpy().tobytes()).hexdigest())

    try:
        for number, size in enumerate(sizes):
            sys.stdin.readline()
            if len(coming) == num_slots:
                take()
            first = number % num_slots * slot
            bucket = memory[first : first + size]
            coming.append((bucket, half.receive(bucket, TIMEOUT_S)))
        while coming:
            take()
        say("alive" if half.alive() else "gone")
        sys.stdin.readline()
        half.release(TIMEOUT_S)
        say("released")
        sys.stdin.readline()
    except TransferError as error:
        say("error", str(error).replace("\n", " "))
    started = time.monotonic()
    half.close()
    say("closed", f"{time.monotonic() - started:.1f}")
    if device != "cpu":
        torch.cuda.synchronize()
        say("synchronized", int(torch.ones(1000, device="cuda").sum()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(size) for size in sys.argv[4:]])
