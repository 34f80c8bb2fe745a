"""Two GPUs: the NCCL plane by itself, with peers that die or stop; then pushes to a real server."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest
import torch

from examples.local_server import LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8Sender, export_checkpoint
from shared.config import FP8BlockConfig
from shared.errors import TransferError
from shared.launch import sglang_fp8_args
from shared.planes.nccl import NcclSender
from shared.planes.signing import new_secret
from shared.protocol import Rendezvous, StagingWay
from tests.gpu.test_real_server import CHANGES, GPU_ARGS, PROMPTS, START_S

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SIZES = [128, 64 << 20, 256, 300 << 20, 4096]
TIMEOUT_S = 6.0


class Peer:
    """A process with the receiving half; what it said so far stands in `lines`."""

    def __init__(self, plane: NcclSender, sizes: list[int]) -> None:
        self.meeting = Rendezvous(
            plane="nccl",
            host=plane.host,
            port=plane.port,
            key="k",
            secret=new_secret(),
            world_size=2,
            first_rank=0,
            timeout_s=60.0,
        )
        command = [sys.executable, "-m", "tests.gpu.nccl_peer", self.meeting.model_dump_json(), *map(str, sizes)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        out: IO[str] = self.process.stdout
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(out.readline).result(timeout=30.0).strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def plane() -> Iterator[NcclSender]:
    torch.cuda.set_device(0)
    made = NcclSender("127.0.0.1", TIMEOUT_S)
    yield made
    made.close()


@pytest.fixture
def peer(plane: NcclSender) -> Iterator[Peer]:
    made = Peer(plane, SIZES)
    try:
        plane.join(made.meeting)
        assert made.line() == "joined"
        yield made
    finally:
        made.close()


def bucket(size: int) -> torch.Tensor:
    made = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    return made


def test_buckets_arrive_as_they_are(plane: NcclSender, peer: Peer) -> None:
    sent = [bucket(size) for size in SIZES]
    for number, data in enumerate(sent):
        plane.send(data, digest=secrets.randbelow(1 << 60) if number else 0)
    plane.flush()
    sums = [int(peer.line().split()[1]) for _ in SIZES]
    assert sums == [int(data.long().sum()) for data in sent]
    assert peer.line() == "alive"
    plane.close()
    peer.process.stdin.write("\n")  # type: ignore[union-attr]
    peer.process.stdin.flush()  # type: ignore[union-attr]
    assert peer.line() == "synchronized 1000"


def test_a_peer_that_dies_is_named_at_once(plane: NcclSender, peer: Peer) -> None:
    first, *others = [bucket(size) for size in SIZES]  # before: to make one synchronizes the device
    plane.send(first, 1)
    peer.process.kill()
    started = time.monotonic()
    with pytest.raises(TransferError) as caught:
        for data in others:
            plane.send(data, 1)
        plane.flush()
    assert caught.value.ranks == (0,)
    assert time.monotonic() - started < 2.0
    torch.cuda.synchronize()  # nothing spins


def test_a_peer_that_stops_is_waited_for_until_the_deadline(plane: NcclSender, peer: Peer) -> None:
    buckets = [bucket(size) for size in SIZES]
    os.kill(peer.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    try:
        with pytest.raises(TransferError, match="deadline"):
            for data in buckets:
                plane.send(data, 1)
            plane.flush()
        assert TIMEOUT_S - 1.0 < time.monotonic() - started < TIMEOUT_S + 3.0
        torch.cuda.synchronize()
    finally:
        os.kill(peer.process.pid, signal.SIGCONT)


def test_a_server_outlives_its_sender(plane: NcclSender, peer: Peer) -> None:
    for size in SIZES[:2]:
        plane.send(bucket(size), 1)
    plane.flush()
    assert peer.line().startswith("1 ")  # it took the first one before it asked for a third
    plane.close()
    assert peer.line().startswith("error")
    assert peer.line() == "synchronized 1000"
    assert peer.process.wait(30) == 0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LocalServer]]:
    """On GPU 1: one to push to, fenced, and one on the checkpoint of `make_model(2)`."""
    folder: Path = tmp_path_factory.mktemp("nccl")
    export_checkpoint(make_model(seed=2, **CHANGES).cuda(), folder / "checkpoint", hf_config=hf_config(**CHANGES))
    bare = str(write_config(folder / "bare", **CHANGES))
    pushed = [*sglang_fp8_args(bare, FP8BlockConfig()), *GPU_ARGS, "--fp8sync-staging", "0.6"]
    loaded = ["--model-path", str(folder / "checkpoint"), *GPU_ARGS]
    env = {"CUDA_VISIBLE_DEVICES": "1", "FP8SYNC_PROBE": "1"}
    with (
        LocalServer(pushed, folder / "pushed.log", env=env) as first,
        LocalServer(loaded, folder / "loaded.log", env=env) as second,
    ):
        yield {"pushed": first.wait(START_S), "loaded": second.wait(START_S)}
        print(f"== {first.log}\n{first.log_end(25)}")


@pytest.mark.parametrize("way", ["reserved", "in_place"])
def test_a_push_equals_a_checkpoint_load(way: StagingWay, servers: dict[str, LocalServer]) -> None:
    torch.cuda.set_device(0)
    pushed, loaded = servers["pushed"], servers["loaded"]
    with FP8Sender([pushed.url], plane="nccl", staging=way, bucket_bytes=1 << 20) as sender:
        sender.push(make_model(seed=1, **CHANGES).cuda())
        assert pushed.probe() != loaded.probe()
        report = sender.push(make_model(seed=2, **CHANGES).cuda())
        print(report)
        assert report.num_buckets > 3 and set(report.staging.values()) == {way}
    assert pushed.probe() == loaded.probe()
    tokens, wanted = pushed.generate(PROMPTS), loaded.generate(PROMPTS)
    assert [reply["tokens"] for reply in tokens] == [reply["tokens"] for reply in wanted]
    assert [reply["logprobs"] for reply in tokens] == [reply["logprobs"] for reply in wanted]


def test_requests_run_while_a_push_arrives(servers: dict[str, LocalServer]) -> None:
    """A server that generates all the time takes several pushes, and ends on the last one's bytes."""
    torch.cuda.set_device(0)
    pushed, loaded, models = servers["pushed"], servers["loaded"], [make_model(s, **CHANGES).cuda() for s in (1, 2)]
    with ThreadPoolExecutor(1) as pool, FP8Sender([pushed.url], plane="nccl", in_flight="retract") as sender:
        sender.push(models[0])
        for _ in range(3):
            replies = pool.submit(pushed.generate, PROMPTS)
            for model in models:
                sender.push(model)
            assert all(reply["tokens"] for reply in replies.result(timeout=60.0))
    assert pushed.probe() == loaded.probe()
