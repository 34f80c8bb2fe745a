"""The plane of one host over CUDA IPC: on one GPU and between two, with peers that die or stop; then a real server."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from examples.local_server import LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8Sender, export_checkpoint
from shared.config import FP8BlockConfig
from shared.errors import TransferError
from shared.launch import sglang_fp8_args
from shared.planes.same_host import SameHostReceiver, SameHostSender
from shared.protocol import StagingWay
from tests.gpu.test_real_server import CHANGES, GPU_ARGS, PROMPTS, START_S
from tests.same_host_process import Peer
from tests.test_hostile import SECRET, rendezvous
from tests.test_ranks import PROCESSES

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
GPUS = pytest.mark.parametrize("gpu", ["0", pytest.param("1", marks=TWO)])
SIZES = [128, 64 << 20, 256, 300 << 20, 4096]
TIMEOUT_S = 6.0


@pytest.fixture
def plane() -> Iterator[SameHostSender]:
    torch.cuda.set_device(0)
    made = SameHostSender("127.0.0.1", TIMEOUT_S, gpu=0)
    yield made
    made.close()


def bucket(size: int) -> torch.Tensor:
    made = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    return made


def sha256(data: torch.Tensor) -> str:
    return hashlib.sha256(data.cpu().numpy().tobytes()).hexdigest()


@GPUS
@pytest.mark.parametrize("num_slots", [1, 2])
def test_buckets_arrive_bit_for_bit(plane: SameHostSender, gpu: str, num_slots: int) -> None:
    with Peer(plane, gpu, num_slots, SIZES) as peer:
        peer.step(len(SIZES))
        sent = [bucket(size) for size in SIZES]
        for number, data in enumerate(sent):
            plane.send(data, digest=(1 << 63) + number)
        plane.flush()
        assert [peer.line() for _ in SIZES] == [f"{(1 << 63) + n} {sha256(data)}" for n, data in enumerate(sent)]
        assert peer.line() == "alive"
        peer.step()
        assert peer.line() == "released"
        plane.close()
        peer.step()
        assert peer.line().startswith("closed") and peer.line() == "synchronized 1000"


@TWO
def test_a_rank_that_sees_its_own_gpu_only(plane: SameHostSender) -> None:
    """As the processes of a server do, to which `CUDA_VISIBLE_DEVICES` gives one."""
    with Peer(plane, "0", 2, SIZES[:3], CUDA_VISIBLE_DEVICES="1") as peer:
        peer.step(3)
        sent = [bucket(size) for size in SIZES[:3]]
        for data in sent:
            plane.send(data, 1)
        plane.flush()
        assert [peer.line() for _ in sent] == [f"1 {sha256(data)}" for data in sent]


@TWO
def test_a_gpu_that_the_sender_does_not_see_is_refused(plane: SameHostSender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TransferError, match="does not see: its CUDA_VISIBLE_DEVICES must name the GPUs of all"):
        Peer(plane, "1", 2, SIZES)


def test_memory_of_expandable_segments_is_refused(plane: SameHostSender) -> None:
    with pytest.raises(TransferError, match="without PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"):
        Peer(plane, "0", 2, SIZES, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")


def test_a_sender_without_a_gpu_is_refused(plane: SameHostSender) -> None:
    plane.gpu = None
    with pytest.raises(TransferError, match="this trainer rank has none"):
        Peer(plane, "0", 2, SIZES)


def test_buckets_of_the_host_reach_a_gpu(plane: SameHostSender) -> None:
    """As those of a snapshot, whose memory is used again on return."""
    with Peer(plane, "0", 2, SIZES) as peer:
        peer.step(len(SIZES))
        sums = []
        for size in SIZES:
            data = torch.randint(0, 256, (size,), dtype=torch.uint8).pin_memory()
            sums.append(f"1 {sha256(data)}")
            plane.send(data, 1)
            data.zero_()
        plane.flush()
        assert [peer.line() for _ in SIZES] == sums


def room_for(plane: SameHostSender, size: int) -> torch.Tensor:
    end = time.monotonic() + 10.0
    while (room := plane.room(size)) is None:
        assert time.monotonic() < end
    assert room.device == torch.device("cuda", 0) and room.shape == (size,)
    return room


def test_buckets_are_made_where_they_go_on_the_same_gpu(plane: SameHostSender) -> None:
    with Peer(plane, "0", 2, SIZES) as peer:
        peer.step(len(SIZES))
        lines = []
        for number, size in enumerate(SIZES):
            data, room = bucket(size), room_for(plane, size)
            room.copy_(data)
            torch.cuda.synchronize()
            plane.send(room, number)
            lines.append(f"{number} {sha256(data)}")
        plane.flush()
        assert [peer.line() for _ in SIZES] == lines


@TWO
def test_buckets_are_not_made_where_they_would_be_read_over_nvlink(plane: SameHostSender) -> None:
    with Peer(plane, "1", 2, SIZES) as peer:
        peer.step(1)
        plane.send(bucket(SIZES[0]), 1)
        plane.flush()
        assert peer.line().startswith("1 ")
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            assert plane.room(SIZES[1]) is None


def test_memory_that_is_lent_stays_until_it_comes_back(plane: SameHostSender) -> None:
    """A kernel that wrote to memory which is no longer there would end the use of the GPU."""
    with Peer(plane, "0", 1, SIZES) as peer:
        peer.step(1)
        room = room_for(plane, SIZES[0])
        peer.process.kill()
        peer.process.wait()
        time.sleep(1.0)
        room.fill_(1)
        torch.cuda.synchronize()
        with pytest.raises(TransferError, match="left the data plane"):
            plane.send(room, 1)
        plane.close()
    torch.cuda.synchronize()
    assert int(torch.ones(1000, device="cuda").sum()) == 1000


@GPUS
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_peer_that_dies_is_named_at_once(plane: SameHostSender, gpu: str, steps: int) -> None:
    with Peer(plane, gpu, 1, SIZES) as peer:
        peer.step(steps)
        if steps == 2:
            plane.send(bucket(SIZES[0]), 1)
            plane.flush()
            assert peer.line().startswith("1 ")
        data = [bucket(size) for size in SIZES[steps == 2 :]]
        peer.process.kill()
        started = time.monotonic()
        with pytest.raises(TransferError, match="left the data plane") as caught:
            for tensor in data:
                plane.send(tensor, 1)
            plane.flush()
        assert caught.value.ranks == (0,) and time.monotonic() - started < 2.0
        plane.close()
    torch.cuda.synchronize()
    assert int(torch.ones(1000, device="cuda").sum()) == 1000


def test_a_peer_that_stops_is_waited_for_until_the_deadline(plane: SameHostSender) -> None:
    with Peer(plane, "0", 2, SIZES) as peer:
        peer.step(len(SIZES))
        os.kill(peer.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(TransferError, match=r"\[0\] had no place"):
            for size in SIZES:
                plane.send(bucket(size), 1)
        assert TIMEOUT_S - 1.0 < time.monotonic() - started < TIMEOUT_S + 3.0
        torch.cuda.synchronize()
        plane.close()
        os.kill(peer.process.pid, signal.SIGCONT)


@GPUS
def test_a_server_outlives_a_sender_that_closes(plane: SameHostSender, gpu: str) -> None:
    with Peer(plane, gpu, 2, SIZES) as peer:
        peer.step(len(SIZES))
        for size in SIZES[:3]:
            plane.send(bucket(size), 1)
        plane.close()
        lines = [peer.line()]
        while not lines[-1].startswith("error"):
            lines.append(peer.line())
        closed = peer.line().split()
        assert closed[0] == "closed" and float(closed[1]) < 1.0, "the sender has said that it let go"
        assert peer.line() == "synchronized 1000"


def send_and_wait(pipe: Connection, secret: str, gpu: int) -> None:
    torch.cuda.set_device(gpu)
    plane = SameHostSender("127.0.0.1", timeout_s=TIMEOUT_S, gpu=gpu)
    pipe.send(plane.port)
    plane.join(rendezvous("same_host", plane.port, secret=secret, timeout_s=30.0))
    data = torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    plane.send(data, 7)
    plane.flush()
    pipe.send("sent")
    time.sleep(60.0)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("gpu", [0, pytest.param(1, marks=TWO)])
def test_a_server_outlives_a_sender_that_dies_or_stops(gpu: int, end: signal.Signals) -> None:
    torch.cuda.set_device(0)
    torch.cuda.init()
    mine, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=send_and_wait, args=(theirs, SECRET, gpu), daemon=True)
    process.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            assert mine.poll(60.0)
            half = SameHostReceiver(rendezvous("same_host", mine.recv(), timeout_s=30.0), 0)
            memory = torch.zeros(2 << 20, dtype=torch.uint8, device="cuda")
            to = memory[1 << 20 :]
            assert half.receive(to, 10.0) == 7
            half.arrive(10.0)
            assert bool(to.eq(7).all()) and not memory[: 1 << 20].any() and mine.poll(10.0)
            waiting = pool.submit(half.receive, to, 1.0)
            os.kill(process.pid or 0, end)
            assert isinstance(waiting.exception(5.0), TransferError)
            closing = pool.submit(half.close)
            if end == signal.SIGSTOP:
                time.sleep(2.0)
                assert not closing.done(), "it may write as soon as it goes on"
                os.kill(process.pid or 0, signal.SIGCONT)
            closing.result(5.0)
            torch.cuda.synchronize()
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module", params=["0", pytest.param("1", marks=TWO)])
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, LocalServer]]:
    """On one GPU, that of the trainer or another: one to push to, fenced, and one on the checkpoint of
    `make_model(2)`.
    """
    folder: Path = tmp_path_factory.mktemp(f"same_host_{request.param}")
    torch.cuda.set_device(0)
    export_checkpoint(make_model(seed=2, **CHANGES).cuda(), folder / "checkpoint", hf_config=hf_config(**CHANGES))
    bare = str(write_config(folder / "bare", **CHANGES))
    pushed = [*sglang_fp8_args(bare, FP8BlockConfig()), *GPU_ARGS, "--fp8sync-staging", "0.6"]
    loaded = ["--model-path", str(folder / "checkpoint"), *GPU_ARGS]
    env = {"CUDA_VISIBLE_DEVICES": request.param, "FP8SYNC_PROBE": "1"}
    with (
        LocalServer(pushed, folder / f"pushed-{request.param}.log", env=env) as first,
        LocalServer(loaded, folder / f"loaded-{request.param}.log", env=env) as second,
    ):
        yield {"pushed": first.wait(START_S), "loaded": second.wait(START_S)}
        print(f"== {first.log}\n{first.log_end(25)}")


@pytest.mark.parametrize("way", ["reserved", "in_place"])
def test_a_push_equals_a_checkpoint_load(way: StagingWay, servers: dict[str, LocalServer]) -> None:
    torch.cuda.set_device(0)
    pushed, loaded = servers["pushed"], servers["loaded"]
    with FP8Sender([pushed.url], plane="same_host", staging=way, bucket_bytes=1 << 20) as sender:
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
    torch.cuda.set_device(0)
    pushed, loaded, models = servers["pushed"], servers["loaded"], [make_model(s, **CHANGES).cuda() for s in (1, 2)]
    with (
        ThreadPoolExecutor(1) as pool,
        FP8Sender([pushed.url], plane="same_host", in_flight="retract", keep_snapshot=True) as sender,
    ):
        sender.push(models[0])
        for _ in range(3):
            replies = pool.submit(pushed.generate, PROMPTS)
            sender.push(models[0])
            sender.push_async(models[1]).wait()
            assert all(reply["tokens"] for reply in replies.result(timeout=60.0))
    assert pushed.probe() == loaded.probe()
