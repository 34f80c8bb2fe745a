"""What the NCCL plane carries, and what NCCL does with one large broadcast: `python -m benchmarks.wire`, two GPUs.

The plane sends the buckets of one push without anything else on either side. `CTAs` is how many multiprocessors a
transfer may occupy; every one of them is one that a server does not compute with meanwhile. GB/s: 10^9 bytes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from examples.local_server import free_port
from shared.planes import nccl, open_receiver
from shared.planes.signing import new_secret
from shared.protocol import Rendezvous

WAYS = ((8, 256), (16, 64), (16, 256), (16, 1024), (32, 256))  # CTAs, MiB of a bucket
ROUNDS = 5
TIMEOUT_S = 30.0


def broadcast(rank: int, port: str) -> float:
    """GB/s of 4 GiB through torch's group, between GPU 0 and GPU 1; the median."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    data, times = torch.ones(4 << 30, dtype=torch.uint8, device="cuda"), []
    for _ in range(ROUNDS + 2):
        torch.cuda.synchronize()
        began = time.monotonic()
        dist.broadcast(data, src=0)
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    dist.destroy_process_group()
    return data.nbytes / statistics.median(times[2:]) / 1e9


def receive(text: str, size: int, num: int) -> None:
    torch.cuda.set_device(1)
    half = open_receiver(Rendezvous.model_validate_json(text), 0)
    buffers = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    for number in range(num):
        if number > 1:
            half.arrive(TIMEOUT_S)
        half.receive(buffers[number % 2], TIMEOUT_S)
    half.arrive(TIMEOUT_S)
    half.arrive(TIMEOUT_S)
    print("done", flush=True)
    sys.stdin.readline()
    half.close()


def through_the_plane(ctas: int, megabytes: int, total_bytes: int) -> float:
    """GB/s of `total_bytes` in buckets; the median of some rounds."""
    nccl.MAX_CTAS = ctas
    plane = nccl.NcclSender("127.0.0.1", TIMEOUT_S)
    size = megabytes << 20
    num = max(2, total_bytes // size)
    meeting = Rendezvous(
        plane="nccl",
        host=plane.host,
        port=plane.port,
        key="wire",
        secret=new_secret(),
        world_size=2,
        first_rank=0,
        timeout_s=60.0,
    )
    command = [sys.executable, "-m", "benchmarks.wire", "--receive", meeting.model_dump_json(), str(ctas), str(size)]
    peer = subprocess.Popen([*command, str(num * (ROUNDS + 1))], stdin=subprocess.PIPE)
    try:
        plane.join(meeting)
        buffers, times = [torch.ones(size, dtype=torch.uint8, device="cuda:0") for _ in range(2)], []
        for _ in range(ROUNDS + 1):
            torch.cuda.synchronize()
            began = time.monotonic()
            for number in range(num):
                plane.send(buffers[number % 2], 0)
            plane.flush()
            times.append(time.monotonic() - began)
        return num * size / statistics.median(times[1:]) / 1e9
    finally:
        plane.close()
        peer.kill()
        peer.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of one push")
    parser.add_argument("--broadcast", nargs=1, help=argparse.SUPPRESS)
    parser.add_argument("--receive", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.broadcast:
        broadcast(1, *chosen.broadcast)
        return
    if chosen.receive:
        text, ctas, size, num = chosen.receive
        nccl.MAX_CTAS = int(ctas)
        receive(text, int(size), int(num))
        return
    port = str(free_port())
    peer = subprocess.Popen([sys.executable, "-m", "benchmarks.wire", "--broadcast", port])
    limit = broadcast(0, port)
    peer.wait(60)
    torch.cuda.set_device(0)
    rows = [f"| one broadcast of 4 GiB, NCCL's own choice | - | {limit:.0f} | 1.00 |"]
    for ctas, megabytes in WAYS:
        found = through_the_plane(ctas, megabytes, int(chosen.gigabytes * 1e9))
        rows.append(f"| the plane, buckets of {megabytes} MiB | {ctas} | {found:.0f} | {found / limit:.2f} |")
        print(rows[-1], flush=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}")
    print("| what | CTAs | GB/s | of the broadcast |\n|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
