"""Two ranks of one server, on threads: whatever fails on one of them, both give the same answer and stay in step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from receiver_plugin.probe import fingerprint
from receiver_plugin.receiver import Receiver
from receiver_plugin.staging import Staging
from sender import FP8Sender
from sender.control import InProcessControl
from shared import errors, protocol
from shared.planes import ReceiveHalf, open_receiver
from tests.tiny_models import FakeEngine, Served, Trainer


class ThreadRanks:
    """Ranks on threads of one process; `gather` has a deadline, so that a rank left alone is an error, not a hang."""

    def __init__(self, index: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.index, self.size, self._barrier, self._table = index, size, barrier, table
        self.on_gather: Callable[[int], None] = lambda number: None
        self.num_gathers = 0

    def gather(self, item: Any) -> list[Any]:
        self.num_gathers += 1
        self.on_gather(self.num_gathers)
        self._table[self.index] = item
        self._barrier.wait(5.0)
        found = list(self._table)
        self._barrier.wait(5.0)
        return found


class Engine(FakeEngine):
    def info(self, incarnation: str) -> protocol.ServerInfo:
        return super().info(incarnation).model_copy(update={"num_ranks": 2})


class Spoiling:
    """Half of a data plane that changes a bit of one bucket."""

    def __init__(self, inner: ReceiveHalf, rank: int, spoilt: list[int]) -> None:
        self._inner, self._rank, self._spoilt = inner, rank, spoilt

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        sent = self._inner.receive(bucket, timeout_s)
        if self._rank in self._spoilt:
            self._spoilt.remove(self._rank)
            bucket[7] ^= 1
        return sent

    def arrive(self, timeout_s: float) -> None:
        self._inner.arrive(timeout_s)

    def release(self, timeout_s: float) -> None:
        self._inner.release(timeout_s)

    def interrupt(self) -> None:
        self._inner.interrupt()

    def alive(self) -> bool:
        return self._inner.alive()

    def close(self) -> None:
        self._inner.close()


class TwoRanks:
    """Both ranks hold the whole model, which is enough to fall out of step."""

    def __init__(self) -> None:
        barrier, table = threading.Barrier(2), [None, None]
        self.ranks = [ThreadRanks(index, 2, barrier, table) for index in range(2)]
        self.models, self.engines = [Served(), Served()], [Engine(), Engine()]
        self._pool = ThreadPoolExecutor(2)
        parts = zip(self.models, self.engines, self.ranks, strict=True)
        self.make_staging: Callable[..., Staging] = Staging
        self.spoilt: list[int] = []  # ranks on which the next bucket is not what was sent
        faults: dict[str, Any] = {"make_staging": self._stage, "join": self._join}
        made = [self._pool.submit(Receiver, *part, **faults) for part in parts]
        self.receivers = [future.result(10.0) for future in made]
        self.control = InProcessControl("two ranks", self.handle)

    def _stage(self, *args: Any) -> Staging:
        return self.make_staging(*args)

    def _join(self, rendezvous: protocol.Rendezvous, rank: int) -> ReceiveHalf:
        return Spoiling(open_receiver(rendezvous, rank), rank, self.spoilt)

    def handle(self, message: Any) -> protocol.Reply:
        replies = [future.result(20.0) for future in [self._pool.submit(r.handle, message) for r in self.receivers]]
        assert replies[0].model_dump(exclude={"info"}) == replies[1].model_dump(exclude={"info"}), "ranks differ"
        return replies[0]


@pytest.fixture
def server() -> TwoRanks:
    return TwoRanks()


@pytest.fixture
def sender(server: TwoRanks) -> Iterator[FP8Sender]:
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as made:
        yield made


def assert_heals(server: TwoRanks, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=5))
    assert fingerprint(server.models[0]) == fingerprint(server.models[1])
    assert server.handle(protocol.Describe()).state == "SERVING"


def test_both_ranks_get_a_push(server: TwoRanks, sender: FP8Sender) -> None:
    assert_heals(server, sender)


def test_a_refusal_on_one_rank_at_the_start_of_a_push(server: TwoRanks, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    server.engines[1].unsafe_reasons = ["its memory is released"]
    with pytest.raises(errors.IncompatibleServerError, match=r"memory is released \(rank 1 of 2\)"):
        sender.push(Trainer(seed=2))
    server.engines[1].unsafe_reasons = []
    assert_heals(server, sender)


def test_no_memory_for_staging_on_one_rank(server: TwoRanks, sender: FP8Sender) -> None:
    def scarce(model: Any, plan: Any, layout: Any, room: Any) -> Any:
        if model is server.models[1]:
            raise errors.PlanError("no memory for staging")
        return Staging(model, plan, layout, room)

    server.make_staging = scarce
    with pytest.raises(errors.PlanError, match="no memory"):
        sender.push(Trainer(seed=1))
    server.make_staging = Staging
    assert_heals(server, sender)


def test_a_copy_that_fails_on_one_rank_fences_both(server: TwoRanks, sender: FP8Sender) -> None:
    def broken() -> None:
        raise RuntimeError("device lost")

    server.engines[1].on_synchronize = broken
    with pytest.raises(errors.CommitError, match=r"fenced.*device lost \(rank 1 of 2\)"):
        sender.push(Trainer())
    assert server.handle(protocol.Describe()).state == "FENCED"
    server.engines[1].on_synchronize = lambda: None
    assert_heals(server, sender)


def test_a_collective_that_fails_after_the_copy_fences(server: TwoRanks, sender: FP8Sender) -> None:
    """The other rank died: nobody can say whether it copied."""
    sender.push(Trainer(seed=1))
    copied = threading.Event()
    server.engines[0].on_synchronize = copied.set
    server.engines[1].on_synchronize = copied.set

    def broken(number: int) -> None:
        if copied.is_set():
            copied.clear()
            raise RuntimeError("connection closed by peer")

    server.ranks[0].on_gather = broken
    server.ranks[1].on_gather = broken
    with pytest.raises((errors.CommitError, AssertionError)):
        sender.push(Trainer(seed=2))
    assert all(receiver._fence is not None for receiver in server.receivers if receiver._version == 1)
    assert any(receiver._version == 1 for receiver in server.receivers)


def test_a_version_that_one_rank_cannot_publish_fences_both(server: TwoRanks, sender: FP8Sender) -> None:
    publish = server.engines[1].publish

    def broken(version: int) -> None:
        raise RuntimeError("no such record")

    server.engines[1].publish = broken  # type: ignore[method-assign]
    with pytest.raises(errors.CommitError, match=r"fenced.*no such record \(rank 1 of 2\)"):
        sender.push(Trainer())
    assert server.handle(protocol.Describe()).state == "FENCED"
    server.engines[1].publish = publish  # type: ignore[method-assign]
    assert_heals(server, sender)


def test_what_one_rank_did_not_get_is_staged_on_none(server: TwoRanks, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    server.spoilt.append(1)
    with pytest.raises(errors.TransferError, match=r"not those that were sent \(rank 1 of 2\)"):
        sender.push(Trainer(seed=2))  # `handle` asserts that both ranks are in the same state
    assert_heals(server, sender)


def test_ranks_that_lose_each_other_before_the_copy_fence(server: TwoRanks, sender: FP8Sender) -> None:
    """The one that is heard no more may have got its answer, and have copied: what is served then is no version."""
    sender.push(Trainer(seed=1))
    check = server.engines[0].flush_cache

    def flush_then_lose() -> bool:
        server.ranks[0].on_gather = server.ranks[1].on_gather = broken
        return check()

    def broken(number: int) -> None:
        raise RuntimeError("connection closed by peer")

    server.engines[0].flush_cache = server.engines[1].flush_cache = flush_then_lose  # type: ignore[method-assign]
    with pytest.raises(errors.CommitError, match=r"fenced.*lost each other.*closed by peer"):
        sender.push(Trainer(seed=2))
    assert all(receiver.state == "FENCED" and receiver._version == 1 for receiver in server.receivers)
    server.engines[0].flush_cache = server.engines[1].flush_cache = check  # type: ignore[method-assign]
    server.ranks[0].on_gather = server.ranks[1].on_gather = lambda number: None
    assert_heals(server, sender)


def test_another_route_changes_the_weights_while_staged(server: TwoRanks, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    sender._fleet.survey()
    sender._fleet.begin(2)
    for receiver in server.receivers:
        receiver.weights_changed("update_weights_from_disk")
    assert server.handle(protocol.Describe()).fence == "its weights were changed by update_weights_from_disk"
    with pytest.raises(errors.TransferError, match="changed by update_weights_from_disk"):
        sender._fleet.commit()
    sender._fleet.fail(RuntimeError("the test is over"))
    assert_heals(server, sender)


def test_a_loader_that_derives_weights_is_refused(server: TwoRanks, sender: FP8Sender) -> None:
    for model in server.models:
        load = model.load_weights

        def load_and_derive(weights: Any, model: Served = model, load: Any = load) -> None:
            load(weights)
            norm = dict(model.named_parameters())["model.layers.0.input_layernorm.weight"]
            model.derived = norm * 2

        model.load_weights = load_and_derive  # type: ignore[method-assign]
    with pytest.raises(errors.PlanError, match="what it derives would stay that of the old weights"):
        sender.push(Trainer())


def test_persistent_buffers_have_to_arrive(server: TwoRanks, sender: FP8Sender) -> None:
    for model in server.models:
        model.register_buffer("layer_scalar", torch.ones(3, dtype=torch.bfloat16))
        model.register_buffer("cache", torch.ones(3), persistent=False)
    with pytest.raises(errors.PlanError, match=r"layer_scalar \[3\]: the server needs it and got nothing for it"):
        sender.push(Trainer())
    trainer = Trainer()
    trainer.register_buffer("layer_scalar", torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    trainer.register_buffer("scratch", torch.ones(3), persistent=False)
    for model in server.models:
        load = model.load_weights

        def load_buffers(weights: Any, model: Served = model, load: Any = load) -> None:
            weights = list(weights)
            load(item for item in weights if item[0] != "layer_scalar")
            for name, weight in weights:
                if name == "layer_scalar":
                    model.get_buffer("layer_scalar").copy_(weight)

        model.load_weights = load_buffers  # type: ignore[method-assign]
    sender.push(trainer)
    assert all(model.get_buffer("layer_scalar").tolist() == [1.0, 2.0, 3.0] for model in server.models)
