"""What a commit does to requests under way, on a real server: they end first, start over on the new weights, or end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from examples.local_server import LocalServer
from examples.tiny_qwen3 import make_model
from sender import FP8Sender
from sender.transaction import Transaction
from shared.protocol import InFlight
from tests.server_fixtures import ADMIN_KEY, CHANGES

pytestmark = pytest.mark.server

PROMPTS = [[11, 12, 13], [100, 200, 300, 400, 500]]
NUM_TOKENS = 500
Ask = Callable[[list[int], int], "Future[dict[str, Any]]"]


@pytest.fixture
def ask(pushed_server: LocalServer) -> Iterator[Ask]:
    """Starts a request and gives its reply; two can run at a time."""
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=pushed_server.url, timeout=300.0, trust_env=False) as web:

        def generate(prompt: list[int], num_tokens: int) -> dict[str, Any]:
            sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
            response = web.post("/generate", json={"input_ids": prompt, "sampling_params": sampling})
            reply: dict[str, Any] = {"status": response.status_code, **response.json()}
            return reply

        yield lambda prompt, num_tokens: pool.submit(generate, prompt, num_tokens)


def push(server: LocalServer, seed: int, in_flight: InFlight, strict: bool = False) -> float:
    with FP8Sender([server.url], admin_key=ADMIN_KEY, in_flight=in_flight, strict=strict, timeout_s=90.0) as sender:
        return sender.push(make_model(seed, **CHANGES)).seconds["commit"]


def until_running(server: LocalServer, number: int) -> None:
    """Return when `number` requests have made tokens."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        state = server.http.get("/v1/loads").json()
        if sum(load["num_running_reqs"] for load in state["loads"]) >= number:
            return
        time.sleep(0.02)
    raise AssertionError("no request came to run")


@pytest.mark.parametrize("strict", [False, True])
def test_requests_that_are_put_back_go_on_with_the_new_weights(
    pushed_server: LocalServer, ask: Ask, strict: bool
) -> None:
    push(pushed_server, 31, "wait")
    old = [ask(prompt, NUM_TOKENS).result()["output_ids"] for prompt in PROMPTS]
    running = [ask(prompt, NUM_TOKENS) for prompt in PROMPTS]
    until_running(pushed_server, len(PROMPTS))
    took_s = push(pushed_server, 32, "retract", strict)
    assert not any(future.done() for future in running), f"the commit waited for them ({took_s:.1f} s)"
    version = str(pushed_server.http.get("/fp8sync/info").json()["version"])
    for prompt, alone, future in zip(PROMPTS, old, running, strict=True):
        reply = future.result()
        tokens, spans = reply["output_ids"], reply["meta_info"]["weight_versions"]
        switched = spans[-1]["start"]
        assert reply["status"] == 200 and len(tokens) == NUM_TOKENS and len(spans) == 2
        assert spans[-1]["version"] == version and 0 < switched < NUM_TOKENS
        assert tokens[:switched] == alone[:switched]
        new = ask(prompt + tokens[:switched], NUM_TOKENS - switched).result()["output_ids"]
        assert tokens[switched:] == new, "computed with KV cache of the old weights"


def test_requests_may_be_ended(pushed_server: LocalServer, ask: Ask) -> None:
    running = [ask(prompt, NUM_TOKENS) for prompt in PROMPTS]
    until_running(pushed_server, len(PROMPTS))
    push(pushed_server, 33, "abort")
    for future in running:
        reply = future.result()
        assert reply["meta_info"]["finish_reason"]["type"] == "abort" and len(reply["output_ids"]) < NUM_TOKENS
    assert ask(PROMPTS[0], 8).result()["status"] == 200


def test_a_pause_of_others_goes_on_after_a_push(pushed_server: LocalServer, ask: Ask) -> None:
    running = ask(PROMPTS[0], NUM_TOKENS)
    until_running(pushed_server, 1)
    assert pushed_server.post("/pause_generation", {"mode": "retract"}).status_code == 200
    push(pushed_server, 34, "retract")
    version = str(pushed_server.http.get("/fp8sync/info").json()["version"])
    time.sleep(0.5)
    assert not running.done()
    assert pushed_server.post("/continue_generation").status_code == 200
    reply = running.result()
    assert len(reply["output_ids"]) == NUM_TOKENS and reply["meta_info"]["weight_versions"][-1]["version"] == version


def test_strict_admits_nothing_between_hold_and_release(
    pushed_server: LocalServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FP8Sender([pushed_server.url], admin_key=ADMIN_KEY, strict=True, timeout_s=30.0) as sender:
        sender.push(make_model(35, **CHANGES))
        released = threading.Event()
        late: list[bool] = []
        commit = Transaction._publish

        def slowly(transaction: Transaction, digests: tuple[int, ...] | None, opens: bool) -> float:
            future = ask(PROMPTS[0], 4)
            skew = commit(transaction, digests, opens)
            time.sleep(1.0)
            late.append(future.done() or released.is_set())
            waiting.append(future)
            return skew

        waiting: list[Future[dict[str, Any]]] = []
        monkeypatch.setattr(Transaction, "_publish", slowly)
        report = sender.push(make_model(36, **CHANGES))
    assert late == [False], "a request was admitted before the last server had committed"
    assert waiting[0].result()["meta_info"]["weight_version"] == str(report.version)
