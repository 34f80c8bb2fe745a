"""A server rank of an NCCL plane in a process of its own, on GPU 1: `python -m tests.gpu.nccl_peer RENDEZVOUS`.

It receives buckets of random sizes for ever and says of each, on a line of its own, what it sums up to; then, when the
plane ends, why, and whether its GPU still works.
"""

from __future__ import annotations

import sys

import torch

from shared.errors import TransferError
from shared.planes import open_receiver
from shared.protocol import Rendezvous

TIMEOUT_S = 5.0


def main(text: str, sizes: list[int]) -> None:
    torch.cuda.set_device(1)
    half = open_receiver(Rendezvous.model_validate_json(text), 0)
    buffers = [torch.zeros(max(sizes), dtype=torch.uint8, device="cuda") for _ in range(2)]
    print("joined", flush=True)
    coming: list[tuple[torch.Tensor, int]] = []

    def take() -> None:
        half.arrive(TIMEOUT_S)
        bucket, digest = coming.pop(0)
        print(digest, int(bucket.long().sum()), flush=True)

    try:
        for number, size in enumerate(sizes):
            if len(coming) == len(buffers):
                take()
            bucket = buffers[number % 2][:size]
            coming.append((bucket, half.receive(bucket, TIMEOUT_S)))
        while coming:
            take()
        print("alive" if half.alive() else "gone", flush=True)
        sys.stdin.readline()
    except TransferError as error:
        print("error", str(error).replace("\n", " "), flush=True)
    half.close()
    torch.cuda.synchronize()
    print("synchronized", int(torch.ones(1000, device="cuda").sum()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(size) for size in sys.argv[2:]])
