"""Faults against real SGLang servers over HTTP and sockets: `make faults`.

After each: both servers serve exactly one version, byte for byte, or refuse requests and say so; nothing hangs past its
deadline; the next push reaches both.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from examples.tiny_qwen3 import hf_config
from sender import export_checkpoint
from shared import errors
from tests.faults.case import BETWEEN, SENDING
from tests.faults.kinds_peers import arms_of
from tests.faults.leaks import held, left_behind
from tests.faults.real import Pair, RealServer, model_of, sender_process, watched
from tests.faults.tripwire import Place
from tests.server_fixtures import CHANGES
from tests.test_ranks import PROCESSES, caught

pytestmark = [pytest.mark.server, pytest.mark.faults]

SHORT_S, PATIENT_S, SLACK_S, STARTING_S = 8.0, 60.0, 8.0, 120.0
TP = ["--tp-size", "2"]
# One entry per rank; a CUDA build of torch ships an NCCL that SGLang would otherwise try on the CPU.
TP_ENV = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "none"}
Action = Callable[[], object]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    process = PROCESSES.Process(target=int)  # starts the server that forks all others
    process.start()
    process.join(60.0)
    made = Pair(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_left(pair: Pair, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing of a sender is left in this process, and the next push succeeds."""
    caplog.set_level("CRITICAL")  # a logged error is kept by pytest, and with it the frames and sockets it came from
    pair.hang_up()
    before, num_starts = held(), pair.num_starts
    yield
    pair.heal()
    pair.hang_up()
    left = left_behind(before, SHORT_S)
    assert pair.num_starts > num_starts or not left, (
        left
    )  # a server that starts again is a child, and a file for its log


def push_while(
    pair: Pair, moment: str, action: Action, victim: int = 0, timeout_s: float = PATIENT_S
) -> dict[str, Any]:
    """Push the other weights; `action` at a moment of it. What the push ended with."""
    sender, struck = pair.watched(timeout_s), []

    def strike(data: torch.Tensor | None) -> None:
        struck.append(action())

    try:
        model = model_of(pair.other)
        sender.inner.prepare(model)
        pair.expect(pair.other)
        if moment == "receiving":
            sender.watch_plane()
            sender.tripwire.arm(Place("send", nth=3), strike)
        elif moment == "staged":
            sender.tripwire.arm(Place("ask commit", victim), strike)
        else:
            strike(None)
        found = caught(lambda: sender.inner.push(model))
        assert struck, "the fault never struck"
        return found
    finally:
        sender.close()


# ---- the sender


@pytest.mark.parametrize("stage", SENDING)
def test_a_sender_is_killed(pair: Pair, stage: str) -> None:
    sender = sender_process(pair, SHORT_S, arms_of(stage, 0, 2, 3, "kill"))
    try:
        assert sender.killed(STARTING_S) and sender.outcome(1.0) is None
    finally:
        sender.close()
    check_ends_of_a_lost_sender(pair.ends(2 * SHORT_S + SLACK_S), stage)


@pytest.mark.parametrize("stage", SENDING)
def test_a_sender_is_frozen_past_its_deadline(pair: Pair, stage: str) -> None:
    sender = sender_process(pair, SHORT_S, arms_of(stage, 0, 2, 3, "stop"))
    try:
        sender.wait_until_frozen(STARTING_S)
        time.sleep(SHORT_S + 1.0)
        sender.resume()
        found = sender.outcome(SHORT_S + SLACK_S)
    finally:
        sender.close()
    assert found is not None
    ends = pair.ends(2 * SHORT_S + SLACK_S)
    if not found["kind"]:
        assert stage not in ("send", "ask verify") and ends == ["new", "new"]  # no deadline of it had passed
        return
    check_ends_of_a_lost_sender(ends, stage)


def check_ends_of_a_lost_sender(ends: list[str], stage: str) -> None:
    """It was lost at its question to the first server. Who has promised, and hears nothing, is fenced."""
    first, second = ends
    if stage == BETWEEN:
        assert first == "new" and second in ("new", "fenced")
    elif stage == "ask commit":
        assert first == "fenced" and second in ("new", "fenced")
    elif stage == "ask prepare":
        assert first == "old" and second in ("old", "fenced")
    else:
        assert ends == ["old", "old"]


@pytest.mark.parametrize("moment", ["receiving", "staged"])
def test_a_second_sender_is_refused(pair: Pair, moment: str) -> None:
    refused = []

    def push_too() -> None:
        """To the one whose commit is held back; the other may have committed."""
        second = watched(pair.urls[:1], PATIENT_S)
        refused.append(caught(lambda: second.inner.push(model_of(9)))["kind"])
        second.close()

    found = push_while(pair, moment, push_too)
    assert refused == ["ServerBusyError"] and found["kind"] == ""
    assert pair.ends(SLACK_S) == ["new", "new"]


def test_a_second_push_of_one_sender_is_refused(pair: Pair) -> None:
    pair.expect(pair.other)
    with pair.sender() as sender:
        handle = sender.push_async(model_of(pair.other))
        with pytest.raises(errors.ConfigError, match="under way"):
            sender.push(model_of(9))
        handle.wait()
    assert pair.ends(SLACK_S) == ["new", "new"]


# ---- the bytes


@pytest.mark.parametrize("fault", ["flipped", "short", "repeated", "dropped"])
def test_a_bucket_that_is_not_as_it_was_sent(pair: Pair, fault: str) -> None:
    sender = pair.watched(SHORT_S)

    def on_send(index: int, bucket: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if index != 2:
            return (bucket,)
        changed = bucket.clone()
        changed[1000] ^= 1
        return {"flipped": (changed,), "short": (bucket[:-128],), "repeated": (bucket, bucket), "dropped": ()}[fault]

    try:
        sender.inner.prepare(model_of(pair.other))
        sender.watch_plane().on_send = on_send
        pair.expect(pair.other)
        found = caught(lambda: sender.inner.push(model_of(pair.other)))
    finally:
        sender.close()
    assert found["kind"] == "TransferError" and found["seconds"] < SHORT_S + SLACK_S
    assert pair.ends(SLACK_S) == ["old", "old"]


# ---- the servers' other routes


@pytest.mark.parametrize("moment", ["between", "receiving", "staged"])
def test_a_stock_update(pair: Pair, moment: str, tmp_path: Path) -> None:
    export_checkpoint(model_of(50), tmp_path / "stock", hf_config=hf_config(**CHANGES))
    body = {"model_path": str(tmp_path / "stock"), "load_format": "safetensors"}
    found = push_while(pair, moment, lambda: pair.servers[0].inner.post("/update_weights_from_disk", body))
    first, second = pair.ends(SLACK_S)
    if moment == "between":
        assert found["kind"] == "" and (first, second) == ("new", "new")
    else:
        assert found["kind"] and first == "fenced" and second in ("old", "new")


@pytest.mark.parametrize("moment", ["receiving", "staged"])
def test_the_weights_are_overwritten_by_a_route(pair: Pair, moment: str) -> None:
    """In place of a release of memory, on which stock SGLang ends itself where there is no CUDA driver."""
    reset = {"action": "reset_tensors"}
    found = push_while(pair, moment, lambda: pair.servers[0].inner.post("/weights_checker", reset))
    first, second = pair.ends(SLACK_S)
    assert found["kind"] and first == "fenced" and second in ("old", "new")


@pytest.mark.parametrize("with_requests", [False, True])
def test_a_push_while_generation_is_paused(pair: Pair, with_requests: bool) -> None:
    """Requests under way do not end while it is paused: it cannot keep its promise, and the other has committed."""
    server = pair.servers[0].inner
    with httpx.Client(base_url=server.url, timeout=120.0, trust_env=False) as client:
        sampling = {"max_new_tokens": 100 if with_requests else 1, "ignore_eos": True}
        thread = start(lambda: client.post("/generate", json={"input_ids": [5, 6], "sampling_params": sampling}))
        if with_requests:
            time.sleep(0.3)
        else:
            thread.join(60.0)
        server.post("/pause_generation", {"mode": "in_place"})
        found = push_while(pair, "between", lambda: None)
        server.post("/continue_generation")
        server.post("/abort_request", {"abort_all": True})
        thread.join(120.0)
    assert found["seconds"] < PATIENT_S
    first, second = pair.ends(SLACK_S)
    if found["kind"]:
        assert found["kind"] == "CommitError" and (first, second) == ("fenced", "new")
    else:
        assert not with_requests and (first, second) == ("new", "new")


def start(call: Action) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


# ---- servers that end


def test_a_server_starts_again_between_pushes(pair: Pair) -> None:
    def restart() -> None:
        pair.servers[1].kill()
        pair.servers[1].start()
        pair.servers[1].wait()

    found = push_while(pair, "between", restart)
    assert found["kind"] == "" and pair.ends(SLACK_S) == ["new", "new"]


def test_a_server_starts_again_while_staged(pair: Pair) -> None:
    def restart() -> None:
        pair.servers[1].kill()
        pair.servers[1].start()
        pair.servers[1].wait()

    found = push_while(pair, "staged", restart, victim=1, timeout_s=600.0)
    assert found["kind"] == "CommitError"
    first, second = pair.ends(SLACK_S)
    assert first in ("old", "new") and second == "fenced"


@pytest.mark.parametrize("moment", ["receiving", "staged"])
def test_a_server_is_killed(pair: Pair, moment: str) -> None:
    found = push_while(pair, moment, pair.servers[1].kill, victim=1)
    assert found["kind"] in ("TransferError", "ServerUnreachableError", "CommitError")
    assert found["seconds"] < PATIENT_S
    first, second = pair.ends(SLACK_S)
    assert second == "gone" and (first == "old" or (first == "new" and moment == "staged"))


def test_a_rank_is_killed_while_it_receives(pair: Pair, tmp_path: Path) -> None:
    """SGLang ends a server that has lost a scheduler; until it is gone, it serves nothing that the others computed."""
    server = RealServer(tmp_path, "tp", TP, TP_ENV)
    try:
        server.wait()
        sender = watched([server.url], SHORT_S)
        sender.inner.push(model_of(1))
        sender.watch_plane()
        scheduler = child_named(server.inner.process.pid, "scheduler_TP1")
        sender.tripwire.arm(Place("send", nth=3), lambda data: os.kill(scheduler, signal.SIGKILL))
        found = caught(lambda: sender.inner.push(model_of(2)))
        assert found["kind"] and found["seconds"] < SHORT_S + SLACK_S
        deadline = time.monotonic() + 60.0
        while (seen := server.look()).status == 0 and seen.state != "GONE" and time.monotonic() < deadline:
            time.sleep(0.2)
        assert seen.state == "GONE" or seen.status == 503
        sender.close()
    finally:
        server.inner.stop()


def child_named(parent: int, name: str) -> int:
    """The process below `parent` with `name` in its command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
            if group == parent and name in (folder / "cmdline").read_text():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no process {name}")
