"""A real SGLang server stages in each of the three ways: bytes and tokens are those of a checkpoint load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from examples.local_server import LocalServer
from examples.tiny_qwen3 import make_model
from sender import FP8Sender
from shared import errors
from shared.protocol import StagingChoice
from tests.server_fixtures import ADMIN_KEY, CHANGES, REFERENCE_SEED
from tests.test_server import DYING_SENDER, PROMPTS, ROOT, info

pytestmark = pytest.mark.server


def made(server: LocalServer, staging: StagingChoice, **options: Any) -> FP8Sender:
    options = {"timeout_s": 60.0, "bucket_bytes": 256 << 10, **options}
    return FP8Sender([server.url], admin_key=ADMIN_KEY, staging=staging, **options)


def test_what_was_reserved_is_in_the_log(pushed_server: LocalServer) -> None:
    log = pushed_server.log.read_text()
    assert "GB reserved for staging (the weights once more" in log and "--max-total-tokens 2048 holds if" in log


@pytest.mark.parametrize("way", ["reserved", "kv_pool", "in_place"])
def test_each_way_equals_a_checkpoint_load(
    pushed_server: LocalServer, loaded_server: LocalServer, way: StagingChoice
) -> None:
    with made(pushed_server, way) as sender:
        sender.push(make_model(1, **CHANGES))
        others = pushed_server.generate(PROMPTS)
        report = sender.push(make_model(REFERENCE_SEED, **CHANGES))
    print(report)
    assert report.staging == {pushed_server.url: way}
    assert pushed_server.probe() == loaded_server.probe()
    replies, wanted = pushed_server.generate(PROMPTS), loaded_server.generate(PROMPTS)
    assert [reply["tokens"] for reply in replies] == [reply["tokens"] for reply in wanted]
    assert [reply["logprobs"] for reply in replies] == [reply["logprobs"] for reply in wanted]
    assert {reply["weight_version"] for reply in replies} == {str(report.version)}
    assert [reply["logprobs"] for reply in others] != [reply["logprobs"] for reply in replies]


@pytest.mark.parametrize("in_flight", ["wait", "retract", "abort"])
@pytest.mark.parametrize("way", ["kv_pool", "in_place"])
def test_requests_wait_while_a_push_arrives(pushed_server: LocalServer, way: StagingChoice, in_flight: Any) -> None:
    with made(pushed_server, way, in_flight=in_flight) as sender, ThreadPoolExecutor(1) as pool:
        sender.push(make_model(1, **CHANGES))
        send, shut = sender._fleet.send, threading.Event()
        early: list[bool] = []

        def slowly(bucket: torch.Tensor, index: int, check: Callable[[], None] | None = None) -> None:
            send(bucket, index, check)
            if index == 1:
                shut.set()
                time.sleep(1.0)
                early.append(waiting.done())
                refused = pushed_server.post("/continue_generation")
                assert refused.status_code == 409, refused.text

        def ask() -> list[dict[str, Any]]:
            assert shut.wait(30.0)
            return pushed_server.generate(PROMPTS[:1], 4)

        waiting = pool.submit(ask)
        sender._fleet.send = slowly  # type: ignore[method-assign]
        report = sender.push(make_model(2, **CHANGES))
        assert early == [False] and report.stood_still_s[pushed_server.url] > 1.0
        assert {reply["weight_version"] for reply in waiting.result(30.0)} == {str(report.version)}


def test_requests_run_while_reserved_memory_fills(pushed_server: LocalServer) -> None:
    with made(pushed_server, "reserved") as sender:
        first = sender.push(make_model(1, **CHANGES))
        send, served = sender._fleet.send, list[dict[str, Any]]()

        def and_ask(bucket: torch.Tensor, index: int, check: Callable[[], None] | None = None) -> None:
            send(bucket, index, check)
            if index == 1:
                served.extend(pushed_server.generate(PROMPTS[:1], 4))

        sender._fleet.send = and_ask  # type: ignore[method-assign]
        sender.push(make_model(2, **CHANGES))
    assert {reply["weight_version"] for reply in served} == {str(first.version)}


def test_in_place_a_push_that_ends_on_the_way_fences(pushed_server: LocalServer, loaded_server: LocalServer) -> None:
    model = make_model(3, **CHANGES)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[100, 200] = float("nan")
    with made(pushed_server, "in_place", bucket_bytes=64 << 10) as sender:
        with pytest.raises(errors.NonFiniteWeightError, match=r"layers\.1\.mlp\.up_proj"):
            sender.push(model)
        assert info(pushed_server)["state"] == "FENCED"
        response = pushed_server.post("/generate", {"input_ids": [1, 2, 3]})
        assert response.status_code == 503 and "written in part" in response.json()["error"]["message"]
        assert pushed_server.http.get("/health").status_code == 503
        sender.push(make_model(REFERENCE_SEED, **CHANGES))
    assert info(pushed_server)["state"] == "SERVING" and pushed_server.probe() == loaded_server.probe()


@pytest.mark.parametrize(("way", "state"), [("kv_pool", "SERVING"), ("in_place", "FENCED")])
def test_a_sender_killed_on_the_way(
    pushed_server: LocalServer, loaded_server: LocalServer, way: StagingChoice, state: str
) -> None:
    """The door opens by itself; a fence holds."""
    with made(pushed_server, way) as sender:
        sender.push(make_model(REFERENCE_SEED, **CHANGES))
    program = DYING_SENDER.replace("bucket_bytes=64 << 10", f"bucket_bytes=64 << 10, staging={way!r}")
    command = [sys.executable, "-c", program, pushed_server.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout is not None and dying.stdout.readline() == "ready\n"
        assert info(pushed_server)["exclusive"]
        os.kill(dying.pid, signal.SIGKILL)
    started = time.monotonic()
    response = pushed_server.post("/generate", {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1}})
    assert response.status_code == (200 if state == "SERVING" else 503) and time.monotonic() - started < 10.0
    assert info(pushed_server)["state"] == state
    with made(pushed_server, "auto") as sender:
        report = sender.push(make_model(REFERENCE_SEED, **CHANGES))
    assert report.staging == {pushed_server.url: "reserved"}
    assert pushed_server.probe() == loaded_server.probe()


def test_the_log_holds_no_traceback(pushed_server: LocalServer) -> None:
    assert "Traceback" not in pushed_server.log.read_text()
