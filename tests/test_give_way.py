"""A scheduler that has nothing to do leaves its processor to what receives, and looks at its model for the next push;
one that computes does not wait for it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from receiver_plugin import sglang_adapter as adapter


@pytest.mark.parametrize("receiving", [True, False, None])
@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("requests", [[], ["a request"]])
@pytest.mark.parametrize("session", [True, False])
def test_what_a_turn_of_the_event_loop_means(
    receiving: bool | None,
    paused: bool,
    idle: bool,
    requests: list[str],
    session: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept, told = list[float](), list[str]()
    receiver = SimpleNamespace(
        is_receiving=receiving and session,
        has_session=session,
        idle=lambda: told.append("idle"),
        busy=lambda: told.append("busy"),
    )
    monkeypatch.setattr(adapter, "_receiver", None if receiving is None else receiver)
    monkeypatch.setattr(adapter, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic))
    scheduler = SimpleNamespace(_engine_paused=paused, is_fully_idle=lambda: idle)
    assert adapter._turn(lambda _, came: f"did {came}", scheduler, requests) == f"did {requests}"
    assert bool(slept) == (bool(receiving and session) and (paused or idle) and not requests)
    nothing_ran = idle and session and not requests
    assert told == ([] if receiving is None else ["idle"] if nothing_ran else ["busy"])


def test_a_prefill_that_sglang_counts_as_nothing_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--enable-pdmux` it is done a few layers a turn."""
    told = list[str]()
    receiver = SimpleNamespace(
        is_receiving=False, has_session=True, idle=lambda: told.append("idle"), busy=lambda: told.append("busy")
    )
    monkeypatch.setattr(adapter, "_receiver", receiver)
    for batch in (object(), None):
        scheduler = SimpleNamespace(_engine_paused=False, is_fully_idle=lambda: True, split_prefill_batch=batch)
        adapter._turn(lambda *_: None, scheduler, [])
    assert told == ["busy", "idle"]


def test_of_several_requests_in_one_turn_each_may_follow_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()
    receiver = SimpleNamespace(is_receiving=False, has_session=True, busy=lambda: told.append("busy"))
    monkeypatch.setattr(adapter, "_receiver", receiver)
    scheduler = SimpleNamespace(_engine_paused=False, is_fully_idle=lambda: True)
    adapter._turn(lambda *_: told.append("does both"), scheduler, ["a release of memory", "a commit"])
    assert told == ["busy", "does both", "busy"]
