"""Requests that go on across a commit: keys of SGLang's prefix cache, labels of tokens, their end on a failed copy."""

from __future__ import annotations

import importlib
from array import array
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from sglang.version import __version__ as SGLANG_VERSION

from receiver_plugin import sglang_adapter
from receiver_plugin.probe import fingerprint
from receiver_plugin.sglang_keep import _KEYED, RunningRequests
from sender import FP8Sender
from shared import errors
from tests.test_push_memory import Server, expected
from tests.tiny_models import Trainer

OPTIONS_OFF: dict[str, Any] = {
    "dllm_algorithm": None,
    **dict.fromkeys(("enable_hierarchical_cache", "enable_hisparse"), False),
    **dict.fromkeys(("enable_session_radix_cache", "enable_streaming_session"), False),
}


class Scheduler:
    """SGLang's, as far as `sglang_keep` knows it; `done` is what it was made to do."""

    def __init__(self) -> None:
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.server_args = SimpleNamespace(**OPTIONS_OFF)
        allocator = mock.MagicMock(device=torch.device("cpu"))
        self.tree_cache: Any = RadixCache.create_simulated(mock_allocator=allocator)
        self.max_total_num_tokens = 1000
        self.waiting_queue: list[Any] = []
        self.result_queue: deque[Any] = deque()
        self.done: list[str] = []
        self._engine_paused = False

    def record_weight_version_change(self, new_version: str) -> None:
        self.done.append(f"label {new_version}")

    def process_batch_result(self, batch: Any, result: Any) -> None:
        self.done.append(f"processed {batch}")

    def pause_generation(self, request: Any) -> None:
        self._engine_paused = True
        self.done.append(f"pause ({request.mode})")

    def abort_request(self, request: Any) -> None:
        self.done.append("abort all" if request.abort_all else f"abort {request.rid}")

    def continue_generation(self, request: Any) -> None:
        self._engine_paused = False
        self.done.append("continue")

    def _add_request_to_queue(self, request: Any, is_retracted: bool = False) -> None:
        self.waiting_queue.append(request)

    # The event loop of overlap scheduling, by one iteration

    def iterate(self, launched: str) -> None:
        self.result_queue.append((launched, None))
        if len(self.result_queue) > 1:
            self.process_batch_result(*self.result_queue.popleft())


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def requests(scheduler: Scheduler) -> RunningRequests:
    return RunningRequests(scheduler)


def request(key: str | None = None, rid: str = "r") -> Any:
    return SimpleNamespace(extra_key=key, rid=rid)


# Keys


@pytest.mark.parametrize("key", [None, "", "user"])
def test_before_the_first_such_commit_keys_are_as_they_came(requests: RunningRequests, key: str | None) -> None:
    entering = request(key)
    requests.enter(entering)
    assert entering.extra_key == key


def test_a_request_gets_the_key_of_the_version_that_it_begins_with(
    scheduler: Scheduler, requests: RunningRequests
) -> None:
    waiting, running = request("user"), request("user")
    for each in (waiting, running):
        requests.enter(each)
    scheduler.waiting_queue = [waiting]
    requests.renew_cache("abc/7")
    assert waiting.extra_key == "fp8sync abc/7 user" and running.extra_key == "user"
    later, without = request("user"), request()
    for each in (later, without):
        requests.enter(each)
    assert later.extra_key == waiting.extra_key != without.extra_key == "fp8sync abc/7 "
    requests.renew_cache("abc/8")
    requests.enter(running)  # it was put back, and computes its prompt anew
    assert running.extra_key == "fp8sync abc/8 user" == waiting.extra_key and later.extra_key == "fp8sync abc/7 user"


def test_what_is_cached_and_not_in_use_is_evicted(scheduler: Scheduler, requests: RunningRequests) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    cache = scheduler.tree_cache
    for tokens in ([1, 2, 3], [1, 2, 4], [5, 6]):
        cache.insert(InsertParams(key=RadixKey(array("q", tokens), "user")))
    used = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", [5, 6]), "user"))).last_device_node
    cache.inc_lock_ref(used)
    requests.renew_cache("abc/1")
    assert (cache.evictable_size(), cache.protected_size()) == (0, 2)
    entering = request("user")
    requests.enter(entering)
    found = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", [5, 6]), entering.extra_key)))
    assert found.last_device_node is cache.root_node


@pytest.mark.parametrize("option", list(OPTIONS_OFF))
def test_what_would_keep_old_cache_is_refused(scheduler: Scheduler, requests: RunningRequests, option: str) -> None:
    assert requests.cannot_keep() == []
    setattr(scheduler.server_args, option, True)
    (reason,) = requests.cannot_keep()
    assert f"--{option.replace('_', '-')} " in reason


@pytest.mark.parametrize("attribute", ["linker", "cache_controller"])
def test_caches_outside_are_refused(scheduler: Scheduler, requests: RunningRequests, attribute: str) -> None:
    setattr(scheduler.tree_cache, attribute, object())
    assert len(requests.cannot_keep()) == 1


def test_an_unknown_prefix_cache_is_refused(scheduler: Scheduler, requests: RunningRequests) -> None:
    here = {"__module__": "sglang.srt.mem_cache.another"}
    for cache in (type("RadixCache", (), {})(), type("RadixCacheCpp", (), here)()):
        scheduler.tree_cache = cache
        (reason,) = requests.cannot_keep()
        assert f"its prefix cache {type(cache).__name__} has no keys" in reason


def test_the_prefix_cache_of_this_release_is_known() -> None:
    module = importlib.import_module("sglang.srt.mem_cache.unified_radix_cache")
    assert module.UnifiedRadixCache.__name__ in _KEYED, f"the default of SGLang {SGLANG_VERSION}"


# Labels


def test_without_a_batch_in_flight_the_label_changes_at_once(scheduler: Scheduler, requests: RunningRequests) -> None:
    requests.label("1")
    assert scheduler.done == ["label 1"]


def test_the_batch_in_flight_keeps_its_label(scheduler: Scheduler, requests: RunningRequests) -> None:
    scheduler.iterate("a")
    requests.label("1")
    assert scheduler.done == []
    scheduler.iterate("b")
    scheduler.iterate("c")
    assert scheduler.done == ["processed a", "label 1", "processed b"]
    assert "process_batch_result" not in vars(scheduler), "the wrapper is in the way for good"


def test_two_commits_and_every_batch_keeps_its_label(scheduler: Scheduler, requests: RunningRequests) -> None:
    scheduler.result_queue.extend([("a", None), ("b", None)])
    requests.label("1")
    scheduler.iterate("c")
    requests.label("2")
    for batch in ("d", "e", "f"):
        scheduler.iterate(batch)
    done = ["processed a", "processed b", "label 1", "processed c", "label 2", "processed d"]
    assert scheduler.done == done and "process_batch_result" not in vars(scheduler)


def test_older_releases_have_no_labels(requests: RunningRequests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Scheduler, "record_weight_version_change")
    requests.label("1")


# The end of requests


@pytest.mark.parametrize("paused", [False, True])
def test_all_end_before_a_batch_runs(scheduler: Scheduler, requests: RunningRequests, paused: bool) -> None:
    scheduler._engine_paused = paused
    requests.end_all()
    assert scheduler.done == ["pause (retract)", "abort all", *([] if paused else ["continue"])]
    assert scheduler._engine_paused == paused


def test_a_scheduler_that_cannot_end_them_ends_itself(scheduler: Scheduler, requests: RunningRequests) -> None:
    scheduler.pause_generation = None  # type: ignore[method-assign, assignment]
    with pytest.raises(SystemExit, match="weights of two versions"):
        requests.end_all()


@pytest.mark.parametrize(("fence", "lacks_memory"), [(None, False), ("why", False), (None, True)])
def test_what_comes_to_a_scheduler_that_cannot_run_it_ends(
    scheduler: Scheduler,
    requests: RunningRequests,
    fence: str | None,
    lacks_memory: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang_adapter, "_receiver", SimpleNamespace(fence=fence, lacks_memory=lacks_memory))
    monkeypatch.setattr(sglang_adapter, "_requests", requests)
    sglang_adapter._enter_queue(Scheduler._add_request_to_queue, scheduler, request(rid="late"), is_retracted=True)
    assert scheduler.done == (["abort late"] if fence or lacks_memory else []) and len(scheduler.waiting_queue) == 1


# A receiver, its engine with requests under way


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def sender(server: Server) -> Iterator[FP8Sender]:
    with FP8Sender([server.control], plane="memory", timeout_s=5.0, in_flight="keep") as made:
        yield made


@pytest.mark.parametrize("idle", [False, True])
def test_a_commit_waits_for_no_request(server: Server, sender: FP8Sender, idle: bool) -> None:
    server.engine.idle = idle
    sender.push(Trainer())
    assert server.engine.events == ["renewed for version 1"] and server.state() == "SERVING"
    assert server.engine.published == [0, 1]


def test_what_cannot_keep_is_refused_before_a_byte_is_sent(server: Server, sender: FP8Sender) -> None:
    server.engine.keep_refused = ["its cache has no keys"]
    with pytest.raises(errors.IncompatibleServerError, match=r"cannot let requests go on.*its cache has no keys"):
        sender.push(Trainer())
    assert server.state() == "SERVING" and server.version == 0 and server.receiver._session is None


def test_what_cannot_keep_any_more_is_refused_at_the_commit(server: Server, sender: FP8Sender) -> None:
    verify = sender._fleet.verify

    def then_attached() -> None:
        verify()
        server.engine.keep_refused = ["a cache outside was attached"]

    sender._fleet.verify = then_attached  # type: ignore[method-assign]
    with pytest.raises(errors.IncompatibleServerError, match="attached; nothing was touched"):
        sender.push(Trainer())
    assert server.engine.events == [] and server.state() == "SERVING"


def test_a_copy_that_fails_ends_requests(server: Server, sender: FP8Sender) -> None:
    def fail() -> None:
        raise RuntimeError("the device is lost")

    server.engine.idle, server.engine.on_synchronize = False, fail
    with pytest.raises(errors.CommitError, match="the device is lost"):
        sender.push(Trainer())
    assert server.engine.events == ["renewed for version 1", "ended"]
    assert server.state() == "FENCED" and server.receiver.fence
    server.engine.on_synchronize = lambda: None
    sender.push(Trainer(seed=2))
    assert server.state() == "SERVING" and fingerprint(server.model) == expected(Trainer(seed=2))


def test_strict_is_refused(server: Server) -> None:
    with pytest.raises(errors.ConfigError, match="strict=True holds nothing with in_flight='keep'"):
        FP8Sender([server.control], plane="memory", in_flight="keep", strict=True)
