"""`in_flight="keep"` on a real server: requests go on across commits, and no later one begins on their KV cache."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import make_model, write_config
from sender import FP8BlockConfig, FP8Sender
from shared import errors
from shared.launch import sglang_fp8_args
from shared.protocol import InFlight
from tests.server_fixtures import ADMIN_KEY, CHANGES, REFERENCE_SEED

pytestmark = pytest.mark.server

PROMPT = [11, 12, 13]
SHARED = [(7 * n) % 900 + 3 for n in range(100)]  # a prompt whose KV cache is there when the weights change
LONG = [(11 * n) % 900 + 5 for n in range(1200)]  # prefilled in many parts
NUM_TOKENS = 600
SMALL_PARTS = ("--chunked-prefill-size", "16", "--max-total-tokens", "8192", "--max-running-requests", "4")
# Every process of the server reads this first. While the file is there, a copy fails when half of it is done.
FAILING_COPY = """
import os
import torch
from receiver_plugin.staging import Staging

copy = Staging.commit

def commit(self):
    if os.path.exists(os.environ["COPY_FAILS"]):
        to, of = self._staged()
        torch._foreach_copy_(to[: len(to) // 2], of[: len(of) // 2])
        raise RuntimeError("injected into the copy")
    copy(self)

Staging.commit = commit
"""


@pytest.fixture(scope="module")
def copy_fails(server_logs: Path) -> Path:
    return server_logs / "copy_fails"


@pytest.fixture(scope="module")
def server(server_logs: Path, copy_fails: Path) -> Iterator[LocalServer]:
    injected = server_logs / "injected"
    injected.mkdir()
    (injected / "sitecustomize.py").write_text(FAILING_COPY)
    folder = write_config(server_logs / "keep", **CHANGES, max_position_embeddings=2000)
    args = [*sglang_fp8_args(str(folder), FP8BlockConfig()), *CPU_ARGS, *SMALL_PARTS, "--admin-api-key", ADMIN_KEY]
    path = os.pathsep.join([str(injected), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "COPY_FAILS": str(copy_fails)}
    with LocalServer(args, server_logs / "keep.log", env=env, key=ADMIN_KEY) as started:
        yield started.wait()


@dataclass
class Stream:
    """A reply as it comes. `seen`: when each part was there, and how many tokens there were then."""

    seen: list[tuple[float, int]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        found: list[int] = self.last["output_ids"]
        return found

    @property
    def spans(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.last["meta_info"]["weight_versions"]
        return found

    def until(self, number: int) -> None:
        """Return when `number` tokens more are there."""
        deadline, wanted = time.monotonic() + 30.0, number + (self.seen[-1][1] if self.seen else 0)
        while not self.seen or self.seen[-1][1] < wanted:
            assert time.monotonic() < deadline, "no tokens came"
            time.sleep(0.005)

    def gaps(self) -> list[float]:
        """Seconds between one part and the next."""
        times = [when for when, _ in self.seen]
        return [after - before for before, after in itertools.pairwise(times)]


class Asking:
    """Requests to one server; up to eight at a time."""

    def __init__(self, server: LocalServer) -> None:
        self._pool = ThreadPoolExecutor(8)
        self._web = httpx.Client(base_url=server.url, timeout=120.0, trust_env=False)

    def stream(self, prompt: list[int], num_tokens: int = NUM_TOKENS, **more: Any) -> tuple[Stream, Future[None]]:
        stream, body = Stream(), {**_body(prompt, num_tokens), "stream": True, **more}

        def read() -> None:
            with self._web.stream("POST", "/generate", json=body) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        part = json.loads(line.removeprefix("data: "))
                        stream.last = part
                        stream.seen.append((time.monotonic(), part["meta_info"]["completion_tokens"]))

        return stream, self._pool.submit(read)

    def later(self, prompt: list[int], num_tokens: int = 8, **more: Any) -> Future[dict[str, Any]]:
        return self._pool.submit(self.now, prompt, num_tokens, **more)

    def now(self, prompt: list[int], num_tokens: int = 8, **more: Any) -> dict[str, Any]:
        headers = more.pop("headers", {})
        response = self._web.post("/generate", json={**_body(prompt, num_tokens), **more}, headers=headers)
        reply: dict[str, Any] = {"status": response.status_code, "headers": response.headers, **response.json()}
        return reply

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._web.close()


def _body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling}


@pytest.fixture
def ask(server: LocalServer) -> Iterator[Asking]:
    asking = Asking(server)
    yield asking
    asking.close()


def push(server: LocalServer, model: nn.Module | int, in_flight: InFlight = "keep") -> int:
    with FP8Sender([server.url], admin_key=ADMIN_KEY, in_flight=in_flight, timeout_s=60.0) as sender:
        return sender.push(make_model(model, **CHANGES) if isinstance(model, int) else model).version


def without_attention(seed: int) -> nn.Module:
    """Its next token depends on the last one alone, whatever KV cache there is."""
    model = make_model(seed, **CHANGES)
    with torch.no_grad():
        for layer in model.get_submodule("model.layers").children():
            layer.get_submodule("self_attn.o_proj").get_parameter("weight").zero_()
    return model


def cached(reply: dict[str, Any]) -> int:
    number: int = reply["meta_info"]["cached_tokens"]
    return number


def test_overlap_scheduling_is_on(server: LocalServer) -> None:
    """Else these tests would say nothing of the batch in flight."""
    push(server, 41, "wait")
    assert server.http.get("/server_info").json()["disable_overlap_schedule"] is False


def test_a_stream_goes_on_across_two_commits(
    server: LocalServer, ask: Asking, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = [push(server, 41, "wait")]
    old = ask.now(PROMPT, NUM_TOKENS)["output_ids"]
    stream, done = ask.stream(PROMPT)
    stream.until(60)
    chain = without_attention(42)
    versions.append(push(server, chain))
    stream.until(60)
    versions.append(push(server, 43))
    assert not done.done(), "the pushes waited for it"
    done.result()
    tokens, spans = stream.tokens, stream.spans
    assert len(tokens) == NUM_TOKENS and stream.last["meta_info"]["finish_reason"]["type"] == "length"
    assert [span["version"] for span in spans] == [str(version) for version in versions]
    (_, first), (_, second) = [(span["start"], span["end"]) for span in spans[:2]]
    assert tokens[:first] == old[:first]
    assert tokens[first : first + 8] != old[first : first + 8]
    recomputed = ask.now(PROMPT + tokens[:second], NUM_TOKENS - second)["output_ids"]
    assert tokens[second:] != recomputed, "it did not keep its KV cache"
    push(server, chain, "wait")
    expected = ask.now([tokens[first - 1]], second - first)["output_ids"]
    assert tokens[first:second] == expected, "a token has the label of other weights"
    gaps = sorted(stream.gaps())
    with capsys.disabled():
        middle = gaps[len(gaps) // 2]
        print(f"\nbetween tokens: {1e3 * middle:.1f} ms in the middle, {1e3 * gaps[-1]:.1f} ms at most", end=" ")


def test_new_requests_begin_on_no_old_cache(server: LocalServer, loaded_server: LocalServer, ask: Asking) -> None:
    push(server, 44, "wait")
    for key in (None, "a"):
        assert [cached(ask.now(SHARED, extra_key=key)) > 0 for _ in range(2)] == [False, True]
    stream, done = ask.stream(PROMPT)
    stream.until(20)
    push(server, REFERENCE_SEED)
    (right,) = loaded_server.generate([SHARED], 8)
    for key in (None, "a", "b"):
        first, second = ask.now(SHARED, extra_key=key), ask.now(SHARED, extra_key=key)
        assert cached(first) == 0 and cached(second) > 90
        assert first["output_ids"] == second["output_ids"] == right["tokens"]
    done.result()
    assert len(stream.spans) == 2
    own = (PROMPT + stream.tokens)[:400]
    after = ask.now(own)
    assert server.post("/flush_cache").status_code == 200
    fresh = ask.now(own)  # by the same server: another one computes a prompt in other parts, and rounds otherwise
    assert cached(after) == cached(fresh) == 0
    assert after["output_ids"] == fresh["output_ids"], "it began on KV cache of two versions"


def test_requests_that_wait_begin_with_the_new_weights(
    server: LocalServer, loaded_server: LocalServer, ask: Asking
) -> None:
    push(server, 45, "wait")
    ask.now(SHARED)
    streams = [ask.stream([*PROMPT, n]) for n in range(4)]  # as many as may run
    for stream, _ in streams:
        stream.until(5)
    waiting = ask.later(SHARED)
    time.sleep(0.2)
    version = push(server, REFERENCE_SEED)
    reply = waiting.result()
    (right,) = loaded_server.generate([SHARED], 8)
    assert cached(reply) == 0 and reply["output_ids"] == right["tokens"]
    assert [span["version"] for span in reply["meta_info"]["weight_versions"]] == [str(version)]
    assert reply["headers"]["x-fp8sync-version-end"] == str(version)
    for stream, done in streams:
        done.result()
        assert len(stream.tokens) == NUM_TOKENS


def test_a_prompt_that_is_computed_in_parts_leaves_nothing(server: LocalServer, ask: Asking) -> None:
    """The commit finds it prefilled in part, and paused there, so that it surely does."""
    push(server, 46, "wait")
    mixed = ask.later(LONG)
    time.sleep(0.15)
    assert server.post("/pause_generation", {"mode": "in_place"}).status_code == 200
    time.sleep(0.2)
    version = push(server, 47)
    assert not mixed.done()
    assert server.post("/continue_generation").status_code == 200
    reply = mixed.result()
    assert [span["version"] for span in reply["meta_info"]["weight_versions"]] == [str(version)]
    assert reply["headers"]["x-fp8sync-version-start"] == str(version - 1)
    after, again = ask.now(LONG), ask.now(LONG)
    assert cached(after) == 0 and cached(again) > 1000
    assert server.post("/flush_cache").status_code == 200
    fresh = ask.now(LONG)
    assert cached(fresh) == 0 and after["output_ids"] == again["output_ids"] == fresh["output_ids"]
    assert reply["output_ids"] != fresh["output_ids"], "the commit came before or after its prompt, not in between"


def test_demands_and_headers(server: LocalServer, ask: Asking) -> None:
    version = push(server, 48, "wait")
    replies = {
        demand: ask.later(PROMPT, NUM_TOKENS, headers={f"x-fp8sync-{demand}-version": str(version)})
        for demand in ("min", "exact")
    }
    stream, done = ask.stream(PROMPT)
    stream.until(20)
    assert push(server, 49) == version + 1
    kept, overtaken = (replies[demand].result() for demand in ("min", "exact"))
    assert kept["status"] == 200 and overtaken["status"] == 409
    said = [kept["headers"][f"x-fp8sync-version-{which}"] for which in ("start", "end")]
    assert said == [str(version), str(version + 1)]
    assert overtaken["error"]["served"] == version + 1
    done.result()


def test_a_copy_that_fails_ends_requests(server: LocalServer, ask: Asking, copy_fails: Path) -> None:
    version = push(server, 50, "wait")
    old = ask.now(PROMPT, NUM_TOKENS)["output_ids"]
    streams = [ask.stream(PROMPT) for _ in range(4)]
    for stream, _ in streams:
        stream.until(20)
    waiting = ask.later(SHARED)
    copy_fails.touch()
    with pytest.raises(errors.CommitError, match=r"fenced.*injected into the copy"):
        push(server, 51)
    copy_fails.unlink()
    for stream, done in streams:
        done.result()
        assert stream.last["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(stream.tokens) < NUM_TOKENS and stream.tokens == old[: len(stream.tokens)], "of mixed weights"
    ended = waiting.result()
    assert ended["status"] == 503 or ended["meta_info"]["finish_reason"]["type"] == "abort"
    assert ask.now(PROMPT)["status"] == 503
    assert push(server, 52) == version + 1
    assert ask.now(PROMPT)["status"] == 200


MEANWHILE: dict[str, Callable[[LocalServer], object]] = {
    "nothing": lambda server: None,
    "a pause with requests put back": lambda server: server.post("/pause_generation", {"mode": "retract"}),
}


@pytest.mark.parametrize("meanwhile", list(MEANWHILE))
def test_many_commits_leave_no_cache_behind(server: LocalServer, ask: Asking, meanwhile: str) -> None:
    """SGLang counts its memory when it is idle, and ends itself where some is lost."""
    push(server, 53, "wait")
    streams = [ask.stream([*PROMPT, n], 200) for n in range(3)]
    for stream, _ in streams:
        stream.until(5)
    MEANWHILE[meanwhile](server)
    version = 0
    for seed in (54, 55, 56):
        version = push(server, seed)
        if meanwhile == "nothing":
            ask.now(SHARED)
    server.post("/continue_generation")
    for stream, done in streams:
        done.result()
        assert stream.spans[-1]["version"] == str(version) and len(stream.tokens) == 200
    time.sleep(1.0)
    version = push(server, 57)
    loads = server.http.get("/v1/loads").json()["loads"]
    assert sum(load["num_used_tokens"] for load in loads) == 0
    assert ask.now(SHARED)["meta_info"]["weight_version"] == str(version)
    assert "memory leak" not in server.log.read_text(errors="replace")
