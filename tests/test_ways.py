"""Pushes in each way of staging, whole and broken: what is served, what is fenced, what is given back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pytest
import torch

from receiver_plugin.probe import fingerprint
from receiver_plugin.staging import Staging
from sender import FP8Sender
from sender.control import InProcessControl
from shared import errors, protocol
from shared.planes.memory import MemoryPlane
from shared.protocol import StagingWay
from tests.test_push_memory import Server, expected, faulty, flip
from tests.test_receiver_ranks import TwoRanks
from tests.tiny_models import FakeEngine, Trainer

WAYS: tuple[StagingWay, ...] = ("reserved", "kv_pool", "in_place")


def lend(engine: FakeEngine, way: StagingWay) -> None:
    """Let `way` be the best that there is."""
    memory = engine.memory
    if way != "reserved":
        memory.reserved = None
        memory.pool = [torch.zeros(100_001, dtype=torch.uint8) for _ in range(64 if way == "kv_pool" else 0)]


class Watched(Server):
    """A server that notes the messages it gets; on each, `on_message` may say something in its place."""

    def __init__(self, way: StagingWay, name: str = "server", fence: str | None = None) -> None:
        super().__init__(fence, name)
        lend(self.engine, way)
        self.kinds: list[str] = []
        self.on_message: Callable[[Any], None] = lambda message: None
        self.control = InProcessControl(name, self._handle)

    def _handle(self, message: Any) -> protocol.Reply:
        self.kinds.append(message.kind)
        self.on_message(message)
        return self.receiver.handle(message)

    def clean(self) -> bool:
        return not any(buffer.any() for buffer in self.engine.memory.pool)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> StagingWay:
    found: StagingWay = request.param
    return found


@pytest.fixture(params=WAYS[1:])
def exclusive_way(request: pytest.FixtureRequest) -> StagingWay:
    found: StagingWay = request.param
    return found


def made(*servers: Watched, **options: Any) -> FP8Sender:
    options = {"timeout_s": 5.0, "bucket_bytes": 64 << 10, **options}
    return FP8Sender([server.control for server in servers], plane="memory", **options)


def push_kinds(kinds: list[str]) -> list[str]:
    """Without repetitions and what comes before the first push."""
    found = kinds[kinds.index("open") + 1 :]
    return [kind for kind, _ in groupby(found)]


def test_each_way_serves_the_bytes_of_a_checkpoint(way: StagingWay) -> None:
    server, model = Watched(way), Trainer(seed=2)
    addresses = {name: p.data_ptr() for name, p in server.model.named_parameters()}
    with made(server) as sender:
        first = sender.push(Trainer(seed=1))
        report = sender.push(model)
        assert report.staging == first.staging == {"server": way}
        assert fingerprint(server.model) == expected(model) and server.state() == "SERVING"
        assert 0.0 < report.stood_still_s["server"] < report.seconds["total"]
    assert {name: p.data_ptr() for name, p in server.model.named_parameters()} == addresses
    assert way != "kv_pool" or server.clean()


def test_the_door_is_shut_before_the_first_byte_and_opens_after_the_commit(exclusive_way: StagingWay) -> None:
    server = Watched(exclusive_way)
    with made(server) as sender:
        sender.push(Trainer())
        order = push_kinds(server.kinds)
    assert order == ["begin", "commit"], "a single server is shut by one and released by the other"


def test_reserved_memory_needs_no_hold() -> None:
    server = Watched("reserved")
    with made(server) as sender:
        sender.push(Trainer())
    assert not {"hold", "release"} & set(server.kinds)


def test_strict_adds_nothing_where_the_door_is_shut_already() -> None:
    servers = Watched("in_place", "a"), Watched("reserved", "b")
    with made(*servers, strict=True) as sender:
        report = sender.push(Trainer())
    assert [server.kinds.count("hold") for server in servers] == [0, 1]
    assert servers[1].kinds.index("begin") < servers[1].kinds.index("hold")
    assert all(server.kinds.count("release") == 1 for server in servers)
    assert set(report.stood_still_s) == {"a", "b"}


def test_servers_of_different_ways_in_one_push() -> None:
    servers, model, begun = [Watched(way, way) for way in WAYS], Trainer(seed=3), list[protocol.Begin]()
    for server in servers:
        server.on_message = lambda m: begun.append(m) if isinstance(m, protocol.Begin) else None
    with made(*servers) as sender:
        report = sender.push(model)
    assert report.staging == {way: way for way in WAYS}
    assert all(fingerprint(server.model) == expected(model) for server in servers)
    assert sorted(begin.shut is not None for begin in begun) == [False, True, True]
    assert not any("hold" in server.kinds for server in servers)
    assert all(begin.deadline_s == 2 * 5.0 for begin in begun), "one may wait until requests have ended on another"


@pytest.mark.parametrize("forced", WAYS)
def test_a_way_can_be_forced(forced: StagingWay) -> None:
    server = Watched("reserved")
    server.engine.memory.pool = [torch.zeros(8 << 20, dtype=torch.uint8)]
    with made(server, staging=forced) as sender:
        assert sender.push(Trainer()).staging == {"server": forced}


@pytest.mark.parametrize(("forced", "flag"), [("reserved", "--fp8sync-staging"), ("kv_pool", "--mem-fraction-static")])
def test_what_a_server_cannot_give_names_the_flag(forced: Any, flag: str) -> None:
    server = Watched("in_place")
    before = fingerprint(server.model)
    with made(server, staging=forced) as sender, pytest.raises(errors.PlanError, match=flag):
        sender.push(Trainer())
    assert fingerprint(server.model) == before and server.state() == "SERVING"
    with pytest.raises(errors.ConfigError, match="staging='best'"):
        made(server, staging="best")


def test_push_async_in_each_way(way: StagingWay) -> None:
    server, model = Watched(way), Trainer(seed=6)
    with made(server) as sender:
        assert sender.push_async(model).wait().staging == {"server": way}
    assert fingerprint(server.model) == expected(model)


def test_a_fenced_server_is_healed_in_each_way(way: StagingWay) -> None:
    server = Watched(way, fence="no weights")
    with made(server) as sender:
        sender.push(Trainer())
    assert server.state() == "SERVING" and fingerprint(server.model) == expected(Trainer())


# ---- what is lent is given back


def test_a_transfer_gives_its_memory_back(exclusive_way: StagingWay) -> None:
    server = Watched(exclusive_way)
    buckets: list[weakref.ref[Staging]] = []

    def note(message: Any) -> None:
        if message.kind == "commit" and server.receiver._session is not None:
            buckets.append(weakref.ref(server.receiver._session.staging))

    server.on_message = note
    with made(server) as sender:
        sender.push(Trainer())
        gc.collect()
        assert buckets and all(bucket() is None for bucket in buckets)
        assert exclusive_way != "kv_pool" or server.clean()
        sender.push(Trainer(seed=1))


def test_no_request_ends_for_a_model_that_cannot_be_pushed(exclusive_way: StagingWay) -> None:
    server, kinds = Watched(exclusive_way), list[str]()
    with made(server) as sender:
        sender.push(Trainer())
        server.on_message = lambda message: kinds.append(message.kind)
        model = Trainer(seed=1)
        model.register_parameter("odd", torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
        with pytest.raises(errors.ConfigError, match="cannot be pushed"):
            sender.push(model)
        assert not {"hold", "begin"} & set(kinds)


# ---- failures. OLD: the bytes and the version of before; FENCED: until the next push


def ends_old(server: Watched, before: dict[str, str]) -> None:
    assert server.state() == "SERVING" and fingerprint(server.model) == before


def ends_fenced(server: Watched) -> None:
    reply = server.receiver.handle(protocol.Describe())
    assert reply.state == "FENCED" and reply.fence is not None and not reply.exclusive
    assert "written in part" in reply.fence or "copied in part" in reply.fence


def ends(server: Watched, way: StagingWay, before: dict[str, str]) -> None:
    """In place something was written; elsewhere nothing."""
    ends_fenced(server) if way == "in_place" else ends_old(server, before)


@pytest.fixture
def pushed(way: StagingWay) -> Iterator[tuple[Watched, FP8Sender]]:
    """After the fault, the pool must be clean and the next push heal."""
    server = Watched(way)
    with made(server) as sender:
        sender.push(Trainer(seed=1))
        yield server, sender
        server.on_message = lambda message: None
        server.engine.on_synchronize, server.engine.idle = lambda: None, True
        sender._fleet._make_memory_plane = MemoryPlane
        assert way != "kv_pool" or server.clean()
        sender.push(Trainer(seed=9))
        assert server.state() == "SERVING" and fingerprint(server.model) == expected(Trainer(seed=9))


Pushed = tuple[Watched, FP8Sender]


def test_requests_that_do_not_end(pushed: Pushed, way: StagingWay) -> None:
    server, sender = pushed
    before, server.engine.idle = fingerprint(server.model), False
    with pytest.raises(errors.ServerBusyError, match="still running"):
        sender.push(Trainer(seed=2))
    assert server.kinds.count("begin") == 2
    ends_old(server, before)


def test_an_error_before_the_first_bucket(pushed: Pushed, way: StagingWay) -> None:
    server, sender = pushed
    before = fingerprint(server.model)

    def fail(bucket: torch.Tensor, index: int, check: Callable[[], None] | None = None) -> None:
        raise RuntimeError("the sender fails")

    sender._fleet.send, send = fail, sender._fleet.send  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the sender fails"):
        sender.push(Trainer(seed=2))
    sender._fleet.send = send  # type: ignore[method-assign]
    ends_old(server, before)


def test_an_error_after_the_first_bucket(pushed: Pushed, way: StagingWay) -> None:
    server, sender = pushed
    before, send = fingerprint(server.model), sender._fleet.send

    def fail(bucket: torch.Tensor, index: int, check: Callable[[], None] | None = None) -> None:
        if index == 2:
            wait_for_buckets(server, 2)
            raise RuntimeError("the sender fails")
        send(bucket, index)

    sender._fleet.send = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the sender fails"):
        sender.push(Trainer(seed=2))
    sender._fleet.send = send  # type: ignore[method-assign]
    ends(server, way, before)


def wait_for_buckets(server: Server, number: int) -> None:
    from tests.test_distributed import soon

    session = server.receiver._session
    assert session is not None and session.transfer is not None
    transfer = session.transfer
    assert soon(lambda: len(transfer.taken) >= number)


@pytest.mark.parametrize("index", [0, 2])
def test_a_flipped_bit(way: StagingWay, index: int) -> None:
    """In place the bucket is not written, so that the first one does no harm."""

    def spoil(number: int, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from flip(1 if number == index else 0, bucket)

    server = Watched(way)
    with made(server) as sender:
        faulty(sender, spoil)
        before = fingerprint(server.model)
        with pytest.raises(errors.TransferError, match=rf"bucket\(s\) \[{index}\]|fenced"):
            sender.push(Trainer(seed=2))
        ends(server, way if index else "reserved", before)
        assert way != "kv_pool" or server.clean()
        sender._fleet._make_memory_plane = MemoryPlane
        sender.push(Trainer(seed=9))
    assert fingerprint(server.model) == expected(Trainer(seed=9))


def test_weights_that_are_no_numbers(pushed: Pushed, way: StagingWay) -> None:
    """In place, the bucket that holds one is never sent: of those before it something was written."""
    server, sender = pushed
    model, before = Trainer(seed=2), fingerprint(server.model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = float("nan")
    with pytest.raises(errors.NonFiniteWeightError, match=r"layers\.1\.mlp\.up_proj"):
        sender.push(model)
    ends(server, way, before)


def test_no_weights_that_are_no_numbers_are_written_in_place() -> None:
    server, model = Watched("in_place"), Trainer(seed=2)
    before = fingerprint(server.model)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[3, 5] = float("inf")
    with made(server, bucket_bytes=64 << 20) as sender, pytest.raises(errors.NonFiniteWeightError):
        sender.push(model)  # all in one bucket
    ends_old(server, before)


def test_a_copy_that_fails(pushed: Pushed, way: StagingWay) -> None:
    server, sender = pushed

    def break_engine(message: Any) -> None:
        def broken() -> None:
            raise RuntimeError("device lost")

        if message.kind == "commit":
            server.engine.on_synchronize = broken
        elif message.kind == "abort":
            server.engine.on_synchronize = lambda: None

    server.on_message = break_engine
    with pytest.raises(errors.CommitError, match="fenced"):
        sender.push(Trainer(seed=2))
    ends_fenced(server)


def test_a_commit_that_is_refused(pushed: Pushed, way: StagingWay) -> None:
    """Nothing was copied, but in place all is written."""
    server, sender = pushed
    before = fingerprint(server.model)

    def unsafe(message: Any) -> None:
        server.engine.unsafe_reasons = ["a layer was wrapped"] if message.kind == "commit" else []

    server.on_message = unsafe
    with pytest.raises(errors.IncompatibleServerError, match="a layer was wrapped"):
        sender.push(Trainer(seed=2))
    ends(server, way, before)


def test_a_sender_that_dies(way: StagingWay) -> None:
    """Its connection breaks; whoever asks the server next learns what became of it."""
    server = Watched(way)
    sender = made(server, timeout_s=30.0)
    plan = sender.prepare(Trainer())
    before, fleet = fingerprint(server.model), sender._fleet
    fleet.survey()
    fleet.begin(1)
    for bucket in plan.layout.buckets[:2]:
        fleet.send(torch.zeros(bucket.num_bytes, dtype=torch.uint8), bucket.index)
    wait_for_buckets(server, 2)
    reply = server.receiver.handle(protocol.Describe())
    assert reply.state == "RECEIVING" and reply.exclusive == (way != "reserved")
    session = server.receiver._session
    assert session is not None and session.transfer is not None and fleet.half.plane is not None
    fleet.half.plane.close()
    assert session.transfer.done.wait(5.0)
    ends(server, way, before)
    assert way != "kv_pool" or server.clean()
    fleet.half.plane = None
    sender.close()
    with made(server) as second:
        second.push(Trainer(seed=2))
    assert fingerprint(server.model) == expected(Trainer(seed=2))


def begun(server: Watched, buckets: int = 2) -> FP8Sender:
    sender = made(server)
    plan = sender.prepare(Trainer())
    sender._fleet.survey()
    sender._fleet.begin(1)
    for bucket in plan.layout.buckets[:buckets]:
        sender._fleet.send(torch.zeros(bucket.num_bytes, dtype=torch.uint8), bucket.index)
    wait_for_buckets(server, buckets)
    return sender


def test_nothing_is_written_after_the_end_of_a_transfer(exclusive_way: StagingWay) -> None:
    """Buckets of a sender that was given up, and does not know it, go nowhere."""
    server = Watched(exclusive_way)
    sender = begun(server)
    session = server.receiver._session
    assert session is not None and session.transfer is not None
    transfer = session.transfer
    server.receiver.handle(protocol.Abort(session=session.id, version=1, reason="why"))
    after = fingerprint(server.model)
    sender._fleet.send(torch.ones(sender._planned.layout.buckets[2].num_bytes, dtype=torch.uint8), 2)  # type: ignore[union-attr]
    assert transfer.done.wait(5.0)
    assert transfer.error == "the push was aborted" and len(transfer.taken) == 2
    assert fingerprint(server.model) == after and (exclusive_way != "kv_pool" or server.clean())
    sender.close()


@pytest.mark.parametrize("tags", [("kv_cache",), ("weights",), ("weights", "kv_cache"), ("cuda_graph",)])
def test_memory_that_is_released_under_a_transfer(way: StagingWay, tags: tuple[str, ...]) -> None:
    """Only what a transfer uses ends it, and only what was written to live parameters fences."""
    server = Watched(way)
    before = fingerprint(server.model)
    sender = begun(server)
    server.receiver.memory_leaves(tags)
    uses = {"reserved": set[str](), "kv_pool": {"kv_cache", "weights"}, "in_place": {"weights"}}[way]
    if uses & set(tags):
        ends(server, way, before)
    else:
        assert server.state() == "RECEIVING"
    sender._fleet.fail(RuntimeError("the test is over"))
    sender.close()


def test_a_pool_that_was_released_between_pushes(pushed: Pushed, way: StagingWay) -> None:
    server, sender = pushed
    server.engine.memory.refusal = "its memory is released: resume it first"
    before = fingerprint(server.model)
    if way == "kv_pool":
        with pytest.raises(errors.PlanError, match="resume it first"):
            sender.push(Trainer(seed=2))
        ends_old(server, before)
        assert sender.push(Trainer(seed=2)).staging == {"server": "in_place"}
    else:
        assert sender.push(Trainer(seed=2)).staging == {"server": way}
    server.engine.memory.refusal = ""


def test_a_begin_without_a_shut_door_is_refused(exclusive_way: StagingWay) -> None:
    server = Watched(exclusive_way)
    with made(server) as sender:
        sender.prepare(Trainer())
        begin = protocol.Begin(session=sender._fleet._session, version=1, deadline_s=5.0)
        reply = server.receiver.handle(begin)
        assert reply.error is not None and "door must be shut first" in reply.error.message
        assert not reply.exclusive and reply.state == "SERVING"


# ---- the ranks of a server


class Ranks(TwoRanks):
    def __init__(self, *ways: StagingWay) -> None:
        super().__init__()
        for engine, way in zip(self.engines, ways, strict=True):
            lend(engine, way)


@pytest.mark.parametrize(
    ("ways", "taken"),
    [
        (("reserved", "kv_pool"), "in_place"),  # a rank with reserved memory and no pool, and one with a pool alone
        (("reserved", "in_place"), "in_place"),
        (("kv_pool", "kv_pool"), "kv_pool"),
        (("in_place", "in_place"), "in_place"),
    ],
)
def test_all_ranks_take_the_way_that_the_weakest_can(ways: tuple[StagingWay, ...], taken: StagingWay) -> None:
    server = Ranks(*ways)
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as sender:
        assert sender.push(Trainer(seed=5)).staging == {"two ranks": taken}
    assert [fingerprint(model) for model in server.models] == [expected(Trainer(seed=5))] * 2


def test_what_one_rank_wrote_fences_all() -> None:
    server = Ranks("in_place", "in_place")
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as sender:
        server.spoilt = [1]
        before = fingerprint(server.models[1])
        with pytest.raises(errors.TransferError):
            sender.push(Trainer(seed=5))
        assert fingerprint(server.models[1]) == before != fingerprint(server.models[0])
        reply = server.handle(protocol.Describe())  # the same on both ranks
        assert reply.state == "FENCED" and "written in part" in (reply.fence or "")
        sender.push(Trainer(seed=6))
    assert [fingerprint(model) for model in server.models] == [expected(Trainer(seed=6))] * 2
    assert server.handle(protocol.Describe()).state == "SERVING"


def test_no_room_on_one_rank_leaves_none_on_the_other() -> None:
    server = Ranks("kv_pool", "kv_pool")
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as sender:
        sender.prepare(Trainer())
        server.engines[1].memory.refusal = "it is away"
        with pytest.raises(errors.PlanError, match=r"it is away \(rank 1 of 2\)"):
            sender.push(Trainer())
        assert not any(receiver._sessions.exclusive for receiver in server.receivers)
        server.engines[1].memory.refusal = ""
        sender.push(Trainer())
