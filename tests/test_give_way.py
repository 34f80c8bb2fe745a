"""A scheduler that has nothing to do leaves its processor to what receives; one that computes does not wait for it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from receiver_plugin import sglang_adapter as adapter


@pytest.mark.parametrize("receiving", [True, False, None])
@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("requests", [[], ["a request"]])
def test_only_an_idle_scheduler_beside_a_push_gives_way(
    receiving: bool | None, paused: bool, idle: bool, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    receiver = None if receiving is None else SimpleNamespace(is_receiving=receiving)
    monkeypatch.setattr(adapter, "_receiver", receiver)
    monkeypatch.setattr(adapter, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic))
    adapter._give_way(None, SimpleNamespace(_engine_paused=paused, is_fully_idle=lambda: idle), requests)
    assert bool(slept) == (receiving is True and (paused or idle) and not requests)
