"""A real SGLang server over HTTP and gloo: equality with a checkpoint load, and what bad input leaves behind.

The tests run in the order of the file: the first sees the server as it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from examples.local_server import LocalServer
from examples.tiny_qwen3 import make_model
from sender import FP8BlockConfig, FP8Sender
from shared import errors
from tests.server_fixtures import ADMIN_KEY, CHANGES, REFERENCE_SEED

pytestmark = pytest.mark.server

PROMPTS = [[11, 12, 13], [100, 200, 300, 400, 500], list(range(3, 40)), [999, 3, 999]]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sender(pushed_server: LocalServer) -> Iterator[FP8Sender]:
    with FP8Sender([pushed_server.url], admin_key=ADMIN_KEY, timeout_s=60.0) as made:
        yield made


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make_model(REFERENCE_SEED, **CHANGES)


def info(server: LocalServer) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/fp8sync/info").json()
    return found


def test_it_starts_fenced(pushed_server: LocalServer) -> None:
    assert info(pushed_server)["state"] == "FENCED"
    for path, body in (("/generate", {"input_ids": [1, 2]}), ("/v1/completions", {"model": "m", "prompt": "x"})):
        response = pushed_server.post(path, body)
        assert response.status_code == 503
        assert "--load-format dummy" in response.json()["error"]["message"]
    assert pushed_server.http.get("/health").status_code == 503
    assert pushed_server.http.get("/model_info").status_code == 200


def test_a_push_equals_a_checkpoint_load(
    pushed_server: LocalServer, loaded_server: LocalServer, sender: FP8Sender, model: torch.nn.Module
) -> None:
    assert sender.push(make_model(1, **CHANGES)).version == 1
    before = pushed_server.generate(PROMPTS)
    report = sender.push(model)
    assert report.version == 2 and info(pushed_server)["version"] == 2
    assert pushed_server.probe() == loaded_server.probe()
    replies, wanted = pushed_server.generate(PROMPTS), loaded_server.generate(PROMPTS)
    assert [reply["tokens"] for reply in replies] == [reply["tokens"] for reply in wanted]
    assert [reply["logprobs"] for reply in replies] == [reply["logprobs"] for reply in wanted]
    assert {reply["weight_version"] for reply in before} == {"1"}
    assert {reply["weight_version"] for reply in replies} == {"2"}
    assert {reply["weight_version"] for reply in wanted} == {"default"}
    assert [reply["logprobs"] for reply in before] != [reply["logprobs"] for reply in replies]
    health = pushed_server.http.get("/health")
    assert (health.status_code, health.headers["x-fp8sync-state"], health.headers["x-fp8sync-version"]) == (
        200,
        "SERVING",
        "2",
    )
    assert info(pushed_server)["state"] == "SERVING"


def test_sglangs_own_checksums_agree(pushed_server: LocalServer, loaded_server: LocalServer) -> None:
    mine, other = pushed_server.checksums(), loaded_server.checksums()
    assert mine["success"], mine["message"]
    assert mine == other


def test_the_server_without_the_flag_is_stock(loaded_server: LocalServer) -> None:
    assert loaded_server.http.get("/fp8sync/info").json()["error"]["kind"] == "IncompatibleServerError"
    stock_log = loaded_server.log.read_text()
    assert "fp8sync: " not in stock_log and "FENCED" not in stock_log


def test_keys(pushed_server: LocalServer, model: torch.nn.Module) -> None:
    for key in (None, "a wrong key"):
        with (
            FP8Sender([pushed_server.url], admin_key=key) as stranger,
            pytest.raises(errors.UnauthorizedError, match="admin-api-key"),
        ):
            stranger.push(model)
    assert httpx.post(f"{pushed_server.url}/fp8sync/control", json={"kind": "probe"}).status_code == 401
    assert httpx.get(f"{pushed_server.url}/fp8sync/info").status_code == 401


def test_a_server_without_the_plugin(loaded_server: LocalServer, model: torch.nn.Module) -> None:
    with (
        FP8Sender([loaded_server.url]) as lost,
        pytest.raises(errors.IncompatibleServerError, match="--load-plugin fp8sync"),
    ):
        lost.push(model)


@pytest.mark.parametrize("body", ["", "{}", "[]", '{"kind": "commit"}', '{"kind": "explode"}', "\x00\xff", "1" * 4096])
def test_malformed_messages_change_nothing(pushed_server: LocalServer, body: str) -> None:
    before = info(pushed_server)
    response = pushed_server.http.post("/fp8sync/control", content=body.encode("latin-1"))
    assert response.status_code == 400 and response.json()["error"]["kind"] == "ConfigError"
    assert info(pushed_server) == before


class Unchanged:
    """Bytes, version and tokens of a server are the same after the block as before it."""

    def __init__(self, server: LocalServer) -> None:
        self._server = server

    def __enter__(self) -> None:
        self._before = self._look()

    def __exit__(self, *exception: object) -> None:
        assert self._look() == self._before
        assert info(self._server)["state"] == "SERVING"

    def _look(self) -> tuple[object, ...]:
        return self._server.probe(), info(self._server)["version"], self._server.generate(PROMPTS[:1])


def test_nan_is_named(pushed_server: LocalServer, sender: FP8Sender) -> None:
    bad = make_model(7, **CHANGES)
    with torch.no_grad():
        bad.get_parameter("model.layers.1.mlp.up_proj.weight")[100, 200] = float("nan")
        bad.get_parameter("model.norm.weight")[3] = float("inf")
    with Unchanged(pushed_server), pytest.raises(errors.NonFiniteWeightError) as caught:
        sender.push(bad)
    assert set(caught.value.names) == {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}


def test_models_that_do_not_fit(pushed_server: LocalServer, sender: FP8Sender) -> None:
    wider = make_model(7, **{**CHANGES, "intermediate_size": 640})
    with Unchanged(pushed_server), pytest.raises(errors.PlanError, match=r"mlp\.down_proj"):
        sender.push(wider)
    deeper = make_model(7, **CHANGES, num_hidden_layers=3)
    with Unchanged(pushed_server), pytest.raises(errors.PlanError, match=r"layers\.2\..*no place"):
        sender.push(deeper)
    shallower = make_model(7, **CHANGES, num_hidden_layers=1)
    with Unchanged(pushed_server), pytest.raises(errors.PlanError, match=r"layers\.1\..*got nothing for it"):
        sender.push(shallower)


def test_a_configuration_that_differs(pushed_server: LocalServer, model: torch.nn.Module) -> None:
    config = FP8BlockConfig(modules_to_not_convert=("model.layers.0",))
    with (
        Unchanged(pushed_server),
        FP8Sender([pushed_server.url], admin_key=ADMIN_KEY, config=config) as other,
        pytest.raises(errors.PlanError, match="the configuration means BF16"),
    ):
        other.push(model)


def test_two_senders_at_once(pushed_server: LocalServer, sender: FP8Sender, model: torch.nn.Module) -> None:
    sender.prepare(model)
    version = info(pushed_server)["version"] + 1
    sender._fleet.begin(version)  # the first sender is in the middle of its push
    with (
        FP8Sender([pushed_server.url], admin_key=ADMIN_KEY) as second,
        pytest.raises(errors.ServerBusyError, match="in the middle of a push"),
    ):
        second.push(model)
    assert info(pushed_server)["state"] == "RECEIVING"
    sender._fleet.fail(RuntimeError("the first sender gives up"))
    assert sender.push(model).version == version


def test_a_stale_version(pushed_server: LocalServer, sender: FP8Sender, model: torch.nn.Module) -> None:
    with Unchanged(pushed_server), pytest.raises(errors.StaleVersionError):
        sender.push(model, version=1)
    sender.push(model)


DYING_SENDER = """
import sys, time
from examples.tiny_qwen3 import make_model
from sender import FP8Sender
from tests.server_fixtures import ADMIN_KEY, CHANGES
sender = FP8Sender([sys.argv[1]], admin_key=ADMIN_KEY, bucket_bytes=64 << 10)
plan = sender.prepare(make_model(9, **CHANGES))
_, newest = sender._fleet.survey()
sender._fleet.begin(newest + 1)
import torch
for bucket in plan.layout.buckets[:3]:
    sender._fleet.send(torch.ones(bucket.num_bytes, dtype=torch.uint8), bucket.index)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_sender_killed_in_mid_push(pushed_server: LocalServer, sender: FP8Sender, model: torch.nn.Module) -> None:
    sender.push(model)  # this sender holds the session that the other one takes
    before = pushed_server.probe()
    command = [sys.executable, "-c", DYING_SENDER, pushed_server.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout is not None and dying.stdout.readline() == "ready\n"
        assert info(pushed_server)["state"] == "RECEIVING"
        os.kill(dying.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while info(pushed_server)["state"] != "SERVING" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert info(pushed_server)["state"] == "SERVING"
    assert pushed_server.probe() == before
    with pytest.raises(errors.SessionLostError):
        sender.push(model)  # the dead sender had taken the session; this one is told so, once
    sender.push(model)


def test_pushes_under_load_drain_first(pushed_server: LocalServer, sender: FP8Sender, model: torch.nn.Module) -> None:
    """Requests that run when a push commits end on the old version; those after it run on the new; none fails."""
    replies: list[dict[str, Any]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=pushed_server.url, timeout=60.0, trust_env=False) as client:
            while not stop.is_set():
                sampling = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
                body = {"input_ids": PROMPTS[1], "sampling_params": sampling}
                response = client.post("/generate", json=body)
                replies.append({"status": response.status_code, **response.json()})

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    versions = []
    tokens = {}
    for seed in (21, 22, 23):
        report = sender.push(make_model(seed, **CHANGES))
        versions.append(str(report.version))
        tokens[str(report.version)] = pushed_server.generate([PROMPTS[1]], 24)[0]["tokens"]
    stop.set()
    for asker in askers:
        asker.join(60.0)
    assert {reply["status"] for reply in replies} == {200}
    assert len({reply["meta_info"]["weight_version"] for reply in replies} & set(versions)) >= 2
    for reply in replies:
        version = reply["meta_info"]["weight_version"]
        if version in tokens:
            assert reply["output_ids"] == tokens[version], f"version {version} did not compute this reply alone"


def test_a_stock_update_fences_until_the_next_push(
    pushed_server: LocalServer, loaded_server: LocalServer, server_logs: Path, sender: FP8Sender, model: torch.nn.Module
) -> None:
    """Weights that came by another route are no version of a push, whatever `weight_version` said before."""
    stock = {"model_path": str(server_logs / "checkpoint"), "load_format": "safetensors"}
    response = pushed_server.post("/update_weights_from_disk", stock)
    assert response.json()["success"], response.text
    assert info(pushed_server)["state"] == "FENCED"
    refused = pushed_server.post("/generate", {"input_ids": [1, 2, 3]})
    assert refused.status_code == 503 and "UpdateWeightFromDisk" in refused.json()["error"]["message"]
    sender.push(model)
    assert info(pushed_server)["state"] == "SERVING"
    assert pushed_server.probe() == loaded_server.probe()


def test_the_log_holds_no_traceback(pushed_server: LocalServer) -> None:
    assert "Traceback" not in pushed_server.log.read_text()


STRICT = [
    (["--load-plugin", "nothing"], "unknown plugin"),
    (["--load-plugin", "fp8sync", "--pp-size", "2"], "cannot be combined with --pp-size > 1 .*--tp-size"),
    (["--load-plugin", "fp8sync", "--tokenizer-worker-num", "2"], "tokenizer-worker-num"),
]


@pytest.mark.parametrize(("args", "reason"), STRICT)
def test_a_plugin_that_cannot_load_ends_the_start(server_logs: Path, args: list[str], reason: str) -> None:
    server = LocalServer(["--model-path", str(server_logs / "no_weights"), *args], server_logs / "strict.log")
    try:
        with pytest.raises(RuntimeError, match=reason):
            server.wait(120.0)
        assert server.process.returncode not in (0, None)
    finally:
        server.stop()
