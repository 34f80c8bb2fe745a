"""From the HTTP process to the schedulers of all replicas and back: answers that come late, twice or never."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.utils import TypeBasedDispatcher

from receiver_plugin import sglang_http
from receiver_plugin.sglang_http import SchedulerChannel
from receiver_plugin.sglang_messages import Fp8SyncReqOutput
from shared import errors, protocol


class Manager:
    """SGLang's tokenizer manager, as far as the channel knows it. `on_request` is what the schedulers do."""

    def __init__(self, num_replicas: int) -> None:
        self.server_args = SimpleNamespace(dp_size=num_replicas)
        self._result_dispatcher = TypeBasedDispatcher([])
        self.sent: list[Any] = []
        self.on_request: Callable[[Any], None] = self.answer_all

    def auto_create_handle_loop(self) -> None:
        """It runs already."""

    def _dispatch_to_scheduler(self, request: Any) -> None:
        self.sent.append(request)
        self.on_request(request)

    def answer_all(self, request: Any) -> None:
        for replica in reversed(range(self.server_args.dp_size)):
            self.answer(request, replica)

    def answer(self, request: Any, replica: int) -> None:
        reply = protocol.Reply(state="SERVING", version=10 + replica, fence=None)
        output = Fp8SyncReqOutput(nonce=request.nonce, replica=replica, reply=reply.model_dump_json())
        asyncio.get_running_loop().call_soon(self._result_dispatcher, output)


def ask(manager: Manager, num_messages: int = 1) -> list[Any]:
    async def run() -> list[Any]:
        channel = SchedulerChannel(manager)
        messages = [channel.ask(protocol.Describe()) for _ in range(num_messages)]
        return list(await asyncio.gather(*messages, return_exceptions=True))

    return asyncio.run(run())


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_answers_come_in_the_order_of_replicas(num_replicas: int) -> None:
    (replies,) = ask(Manager(num_replicas))
    assert [reply.version for reply in replies] == [10 + replica for replica in range(num_replicas)]


def test_a_silent_replica_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_http, "_ANSWER_TIMEOUT_S", 0.05)
    manager = Manager(2)
    manager.on_request = lambda request: manager.answer(request, 0)
    (error,) = ask(manager)
    assert isinstance(error, errors.PushError) and r"replica(s) [1] did not answer" in str(error)


def test_an_answer_to_a_message_that_was_given_up_counts_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_http, "_ANSWER_TIMEOUT_S", 0.05)
    manager = Manager(2)

    async def run() -> None:
        channel = SchedulerChannel(manager)
        manager.on_request = lambda request: manager.answer(request, 0)
        with pytest.raises(errors.PushError):
            await channel.ask(protocol.Describe())

        def late(request: Any) -> None:
            manager.answer(manager.sent[0], 1)
            manager.answer(request, 0)

        manager.on_request = late
        with pytest.raises(errors.PushError, match=r"\[1\]"):
            await channel.ask(protocol.Describe())
        manager.on_request = manager.answer_all
        assert len(await channel.ask(protocol.Describe())) == 2

    asyncio.run(run())


def test_one_message_at_a_time() -> None:
    manager, under_way = Manager(2), []

    def on_request(request: Any) -> None:
        under_way.append(len(manager.sent))
        asyncio.get_running_loop().call_later(0.01, manager.answer_all, request)

    manager.on_request = on_request
    assert [len(replies) for replies in ask(manager, 3)] == [2, 2, 2] and under_way == [1, 2, 3]
    assert len({request.nonce for request in manager.sent}) == 3
