"""Demands and versions on a real SGLang server with a tokenizer: every kind of request, across commits.

The tests run in the order of the file: the first sees the server as it started.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8BlockConfig, FP8Sender
from shared.launch import sglang_fp8_args
from shared.versions import Demand, Versions, end_of_stream
from tests.server_fixtures import ADMIN_KEY, CHANGES

pytestmark = pytest.mark.server

PROMPT = [11, 12, 13]
TEXT = "w11 w12 w13"
NUM_PUSHES = 10


@pytest.fixture(scope="module")
def server(server_logs: Path) -> Iterator[LocalServer]:
    folder = write_config(server_logs / "with_tokenizer", **CHANGES, max_position_embeddings=1024)
    words = {f"w{number}": number for number in range(hf_config(**CHANGES)["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    stock = [arg for arg in CPU_ARGS if arg != "--skip-tokenizer-init"]
    stock += ["--served-model-name", "m", "--admin-api-key", ADMIN_KEY]
    args = [*sglang_fp8_args(str(folder), FP8BlockConfig()), *stock]
    with LocalServer(args, server_logs / "versions.log", key=ADMIN_KEY) as made:
        yield made.wait()


@pytest.fixture(scope="module")
def sender(server: LocalServer) -> Iterator[FP8Sender]:
    with FP8Sender([server.url], admin_key=ADMIN_KEY, timeout_s=60.0) as made:
        yield made


def body(num_tokens: int = 6, **changes: Any) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True, **changes.pop("sampling", {})}
    return {"input_ids": PROMPT, "sampling_params": sampling, **changes}


def openai(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 6, "temperature": 0.0, "ignore_eos": True, **changes}


CHAT = {"model": "m", "max_tokens": 6, "messages": [{"role": "user", "content": TEXT}]}
RESPONSE = {"model": "m", "max_output_tokens": 6, "input": TEXT}
REQUESTS = {
    "plain": ("/generate", body()),
    "text": ("/generate", {"text": TEXT, "sampling_params": body()["sampling_params"]}),
    "batch": ("/generate", {**body(), "input_ids": [PROMPT, [100, 200], [5, 6, 7]]}),
    "samples": ("/generate", body(sampling={"n": 2})),
    "stream": ("/generate", body(stream=True)),
    "batch stream": ("/generate", {**body(stream=True), "input_ids": [PROMPT, [100, 200]]}),
    "completion": ("/v1/completions", openai(prompt=TEXT)),
    "completions": ("/v1/completions", openai(prompt=[TEXT, TEXT])),
    "completion stream": ("/v1/completions", openai(prompt=TEXT, stream=True)),
    "chat": ("/v1/chat/completions", CHAT),
    "chat stream": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "message": ("/v1/messages", CHAT),
    "message stream": ("/v1/messages", {**CHAT, "stream": True}),
    "response": ("/v1/responses", RESPONSE),
    "response stream": ("/v1/responses", {**RESPONSE, "stream": True}),
    "score": ("/v1/score", {"model": "m", "query": "w11", "items": ["w12", "w13"], "label_token_ids": [5, 6]}),
}
STREAMS = [name for name in REQUESTS if name.endswith("stream")]


def ask(server: LocalServer, name: str, demand: Demand | None = None) -> httpx.Response:
    path, what = REQUESTS[name]
    return server.http.post(path, json=what, headers=demand.headers() if demand else {})


def served(server: LocalServer) -> int:
    version: int = server.http.get("/fp8sync/info").json()["version"]
    return version


@pytest.mark.parametrize("name", REQUESTS)
def test_no_demand_opens_a_fenced_server(server: LocalServer, name: str) -> None:
    for demand in (None, Demand(minimum=0), Demand(exact=0), Demand(minimum=5)):
        response = ask(server, name, demand)
        assert response.status_code == 503 and response.json()["error"]["type"] == "ServerFenced"


def test_replies_before_and_after_a_push(server: LocalServer, sender: FP8Sender) -> None:
    assert sender.push(make_model(1, **CHANGES)).version == 1
    for name in REQUESTS:
        early = ask(server, name, Demand(minimum=2))
        assert early.status_code == 409 and early.json()["error"]["served"] == 1, name
        assert early.headers["retry-after"] == "1"
    assert sender.push(make_model(2, **CHANGES)).version == 2
    for name in REQUESTS:
        for demand in (Demand(minimum=2), Demand(exact=2)):
            check(name, ask(server, name, demand), 2)


def check(name: str, response: httpx.Response, version: int) -> None:
    assert response.status_code == 200, (name, response.text)
    end = version if name not in STREAMS else None
    assert Versions.from_headers(response.headers) == Versions(version, end), name
    if name in STREAMS:
        lines = [line for line in response.text.splitlines() if line]
        assert lines[-2].startswith("data: ") and end_of_stream(lines[-1]) == version, name
    for label in labels(response):
        assert label == str(version), (name, label)


def labels(response: httpx.Response) -> list[str]:
    """What SGLang's own replies say of their version."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        replies = response.json()
    else:
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        replies = [json.loads(event) for event in events if event != "[DONE]"]
    found = []
    for reply in replies if isinstance(replies, list) else [replies]:
        said = reply.get("meta_info") or reply.get("metadata") or {}
        found += [said["weight_version"]] if said else []
        found += [span["version"] for span in said.get("weight_versions", ())]
    return found


def test_sglangs_own_label_is_there(server: LocalServer) -> None:
    version = str(served(server))
    for name in ("plain", "batch", "samples", "stream", "completion"):
        found = labels(ask(server, name))
        assert found and set(found) == {version}, name
    assert labels(ask(server, "completion stream")) == []  # so that the comment at its end is all there is


@pytest.mark.parametrize(
    "headers",
    [
        {"x-fp8sync-min-version": "latest"},
        {"x-fp8sync-exact-version": "-1"},
        {"x-fp8sync-exact-version": "9" * 21},
        {"x-fp8sync-min-version": "4", "x-fp8sync-exact-version": "3"},
    ],
)
def test_malformed_demands(server: LocalServer, headers: dict[str, str]) -> None:
    for path, what in REQUESTS.values():
        response = server.http.post(path, json=what, headers=headers)
        assert response.status_code == 400 and response.json()["error"]["type"] == "BadRequest"


def test_the_label_cannot_be_changed(server: LocalServer) -> None:
    refused = server.post("/update_weight_version", {"new_version": "99"})
    assert refused.status_code == 409, refused.text
    assert set(labels(ask(server, "plain"))) == {str(served(server))}


def test_requests_behind_a_commit(server: LocalServer, sender: FP8Sender) -> None:
    """They pass the door while a commit waits for a long request to end, and leave for the model when it is over."""
    old, model = served(server), make_model(3, **CHANGES)
    with ThreadPoolExecutor(24) as pool:
        long = pool.submit(server.http.post, "/generate", json=body(num_tokens=700))
        time.sleep(0.5)
        push = pool.submit(sender.push, model)
        wait_until_staged(server)
        asked = {
            (name, demand): pool.submit(ask, server, name, demand)
            for demand in (Demand(minimum=old + 1), Demand(exact=old + 1), Demand(exact=old))
            for name in ("plain", "stream", "batch", "completion stream", "chat", "response stream")
        }
        too_new = pool.submit(ask, server, "plain", Demand(minimum=old + 2))
        assert too_new.result(30.0).status_code == 409
        time.sleep(0.3)
        assert not long.done() and not push.done() and not any(future.done() for future in asked.values())
        check("plain", long.result(60.0), old)
        assert push.result(60.0).version == old + 1
        for (name, demand), future in asked.items():
            response = future.result(60.0)
            if demand.fits(old):
                assert response.status_code == 409 and response.json()["error"]["served"] == old + 1, name
            else:
                check(name, response, old + 1)


def wait_until_staged(server: LocalServer) -> None:
    deadline = time.monotonic() + 20.0
    while server.http.get("/fp8sync/info").json()["state"] != "STAGED":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # the commit comes right after


class Asker:
    """Asks for the version that it saw last, exactly or at least, until it is stopped."""

    def __init__(self, server: LocalServer, name: str, exact: bool) -> None:
        self.name, self.exact = name, exact
        self.replies: list[tuple[int, httpx.Response]] = []
        self.refused = 0
        self._server = server

    def run(self, stop: threading.Event) -> None:
        version = served(self._server)
        while not stop.is_set():
            demand = Demand(exact=version) if self.exact else Demand(minimum=version)
            response = ask(self._server, self.name, demand)
            if response.status_code == 409:
                self.refused += 1
                version = response.json()["error"]["served"]
            else:
                response.raise_for_status()
                self.replies.append((version, response))


def test_an_exact_demand_across_pushes_is_met_or_refused(server: LocalServer, sender: FP8Sender) -> None:
    askers = [Asker(server, name, exact) for name in ("plain", "stream") for exact in (True, False)]
    stop, texts = threading.Event(), {served(server): text_of(ask(server, "plain"))}
    with ThreadPoolExecutor(len(askers)) as pool:
        running: list[Future[None]] = [pool.submit(asker.run, stop) for asker in askers]
        try:
            for seed in range(NUM_PUSHES):
                version = sender.push(make_model(seed % 3, **CHANGES)).version
                texts[version] = text_of(ask(server, "plain", Demand(exact=version)))
        finally:
            stop.set()
        for future in running:
            future.result(60.0)
    for asker in askers:
        assert asker.replies
        for wanted, response in asker.replies:
            start = Versions.from_headers(response.headers).start
            assert start is not None and (start == wanted if asker.exact else start >= wanted)
            check(asker.name, response, start)
            assert text_of(response) == texts[start], f"version {start} did not compute this reply alone"
    assert sum(asker.refused for asker in askers if asker.exact) > 0


def text_of(response: httpx.Response) -> str:
    if response.headers["content-type"].startswith("application/json"):
        return str(response.json()["text"])
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return str(json.loads(events[-1])["text"])


def test_a_server_that_is_fenced_later_says_so(server: LocalServer, sender: FP8Sender) -> None:
    server.post("/weights_checker", {"action": "reset_tensors"})
    assert ask(server, "plain", Demand(minimum=0)).status_code == 503
    version = sender.push(make_model(1, **CHANGES)).version
    check("plain", ask(server, "plain", Demand(exact=version)), version)
    assert "Exception in ASGI application" not in server.log.read_text()
