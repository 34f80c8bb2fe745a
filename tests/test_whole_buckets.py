"""Reserved memory that keeps the buckets themselves: nothing is spread before the commit, and then all at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from receiver_plugin.manifest import expected_in_fp8, manifest_of, plan_rank
from receiver_plugin.probe import fingerprint
from receiver_plugin.recorder import Fill
from receiver_plugin.rooms import Need, enter
from receiver_plugin.staging import Staging
from receiver_plugin.windows import View
from sender import FP8Sender
from sender.packer import Packer
from sender.source import ModuleSource
from shared import errors
from shared.buckets import make_layout
from shared.config import FP8BlockConfig
from shared.planes import shared_memory
from shared.planes.shared_memory import SharedMapping
from tests.test_push_memory import expected
from tests.test_same_host import shared_maps, unmapped
from tests.test_ways import Watched
from tests.tiny_models import FakeMemory, Served, Trainer

BUCKET_BYTES = 64 << 10


def pushing(server: Watched, **options: Any) -> FP8Sender:
    return FP8Sender([server.control], **{"plane": "memory", "timeout_s": 5.0, "bucket_bytes": BUCKET_BYTES, **options})


def staging_of(server: Watched) -> Staging:
    session = server.receiver._session
    assert session is not None
    return session.staging


def writes_from(server: Watched) -> int | None:
    session = server.receiver._session
    assert session is not None
    return session.writes_from


def packed(seed: int) -> torch.Tensor:
    """All buckets of `Trainer(seed)`, one behind the other."""
    trainer = Trainer(seed=seed)
    source = ModuleSource(trainer)
    layout = make_layout(manifest_of(source.tensors, expected_in_fp8(source.tensors, FP8BlockConfig())), BUCKET_BYTES)
    packer = Packer(layout, FP8BlockConfig(), torch.device("cpu"))
    return torch.cat([packer.pack(bucket, source.gather(bucket.names)).clone() for bucket in layout.buckets])


def test_reserved_memory_holds_what_was_sent() -> None:
    server = Watched("reserved")
    reserved, at_commit = server.engine.memory.reserved, list[tuple[bool, bool]]()
    assert reserved is not None
    with pushing(server) as sender:
        sender.push(Trainer(seed=1))
        assert staging_of(server).room.whole and staging_of(server).room.buffers == []
        served, sent = fingerprint(server.model), packed(2)

        def look(message: Any) -> None:
            if message.kind == "commit" and server.state() == "STAGED":
                at_commit.append((fingerprint(server.model) == served, reserved[: sent.numel()].equal(sent)))

        server.on_message = look
        for server.receiver._sessions._closed in ([], []):  # whatever lingered is of no concern here
            report = sender.push(Trainer(seed=2))
        assert report.num_buckets > 3
    assert fingerprint(server.model) == expected(Trainer(seed=2)) and reserved[: sent.numel()].equal(sent)


def test_no_parameter_is_written_before_the_commit() -> None:
    served, trainer = Served(), Trainer(seed=4)
    source = ModuleSource(trainer)
    tensors = manifest_of(source.tensors, expected_in_fp8(source.tensors, FP8BlockConfig()))
    plan, _ = plan_rank(served, tensors)
    layout = make_layout(tensors, BUCKET_BYTES)
    need = Need.of(served, plan, layout)
    staging = Staging(served, plan, layout, enter("reserved", need, FakeMemory()))
    assert staging.room.whole and staging.num_ahead == need.num_at_once < staging.num_at_once == len(layout.buckets)
    before, bytes_of_all = fingerprint(served), packed(4)
    at = 0
    for bucket in layout.buckets:
        staging.bucket(bucket.index)[:] = bytes_of_all[at : at + bucket.num_bytes]
        staging.accept(bucket.index, sent=0, begin=lambda data, index: lambda: 1)
        at += bucket.num_bytes
    assert fingerprint(served) == before and not staging.touched
    staging.commit()
    assert fingerprint(served) == expected(trainer) and not staging.touched


def test_constants_are_written_by_the_commit() -> None:
    served = Served()
    source = ModuleSource(Trainer())
    tensors = manifest_of(source.tensors, expected_in_fp8(source.tensors, FP8BlockConfig()))
    plan, _ = plan_rank(served, tensors)
    name, parameter = next((n, p) for n, p in served.named_parameters() if p.dim() == 1)
    constant = Fill(name, View(0, tuple(parameter.shape), (1,)), 2.5)
    copies = tuple(copy for copy in plan.copies if copy.parameter != name)
    plan = type(plan)(copies, (constant,), plan.calls, ())
    layout = make_layout(tensors, BUCKET_BYTES)
    staging = Staging(served, plan, layout, enter("reserved", Need.of(served, plan, layout), FakeMemory()))
    before = parameter.detach().clone()
    staging.bucket(0).zero_()
    assert parameter.equal(before)
    for _ in range(2):
        staging.commit()
        assert parameter.eq(2.5).all(), name
        parameter.data.zero_()


# ---- written there by a trainer of this host


@pytest.fixture
def shared_server() -> Iterator[Watched]:
    """Its reserved memory is what a CPU server reserves: another process can open it."""
    server = Watched("reserved")
    server.engine.memory.reserved = shared_memory.allocate(8 << 20)
    yield server
    server.engine.memory.reserved = None
    del server
    assert unmapped(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its server rank is in this process, which opens no GPU memory")
def test_a_trainer_of_this_host_packs_into_reserved_memory(
    shared_server: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied between packing and commit."""
    server, moved = shared_server, list[bool]()
    write = SharedMapping.write

    def noted(mapping: SharedMapping, data: torch.Tensor, offset: int) -> Any:
        moved.append(data.data_ptr() != mapping._opened.data_ptr() + offset)
        return write(mapping, data, offset)

    monkeypatch.setattr(SharedMapping, "write", noted)
    with pushing(server, plane="same_host") as sender:
        for seed in (1, 2, 3):
            report = sender.push(Trainer(seed=seed))
            assert report.staging == {"server": "reserved"} and staging_of(server).room.whole
            assert fingerprint(server.model) == expected(Trainer(seed=seed))
            assert shared_maps() == 2, "its own, and that of the sender"
        assert len(moved) == 3 * report.num_buckets and moved.count(False) > 2 * report.num_buckets
        reserved, sent = server.engine.memory.reserved, packed(3)
        assert reserved is not None and reserved[: sent.numel()].equal(sent)
        del reserved


@pytest.mark.skipif(torch.cuda.is_available(), reason="its server rank is in this process, which opens no GPU memory")
def test_a_push_that_breaks_leaves_what_is_served(shared_server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    server = shared_server
    with pushing(server, plane="same_host") as sender:
        sender.push(Trainer(seed=1))
        write, left = SharedMapping.write, [3]

        def spoil(mapping: SharedMapping, data: torch.Tensor, offset: int) -> Any:
            left[0] -= 1
            ended = write(mapping, data, offset)
            if left[0] == 0:
                mapping._opened[offset + 5] ^= 1
            return ended

        monkeypatch.setattr(SharedMapping, "write", spoil)
        with pytest.raises(errors.TransferError, match=r"bytes of bucket\(s\) \[2\]"):
            sender.push(Trainer(seed=2))
        assert fingerprint(server.model) == expected(Trainer(seed=1)) and server.state() == "SERVING"
        assert sender.push(Trainer(seed=3)).staging == {"server": "reserved"}
        assert fingerprint(server.model) == expected(Trainer(seed=3))


# ---- an earlier sender that may still write there


class Lingering:
    """A session whose thread does not end, because its sender is stopped."""

    def __init__(self, reserved: torch.Tensor | None) -> None:
        self.writes_from = None if reserved is None else reserved.data_ptr()
        self.is_there, self.waited_s, self.writes_live = True, 0.0, False

    def lingers_for(self, seconds: float) -> bool:
        self.waited_s = max(self.waited_s, seconds)
        return self.is_there

    @property
    def lingers(self) -> bool:
        return self.is_there


def beside_a_stopped_sender() -> tuple[Watched, Lingering]:
    """A server that may stage in every way, and the session that lingers there."""
    server = Watched("reserved")
    memory = server.engine.memory
    memory.pool = [torch.zeros(8 << 20, dtype=torch.uint8)]
    other = Lingering(memory.reserved)
    server.receiver._sessions._closed.append(other)  # type: ignore[arg-type]
    return server, other


def test_a_stopped_sender_keeps_reserved_memory_from_the_next_one() -> None:
    server, other = beside_a_stopped_sender()
    memory = server.engine.memory
    assert memory.reserved is not None
    untouched = memory.reserved.fill_(7).clone()
    with (
        pushing(server, staging="reserved") as sender,
        pytest.raises(errors.PlanError, match="an earlier sender may still write"),
    ):
        sender.push(Trainer(seed=1))
    assert other.waited_s > 0, "it may be about to end"
    with pushing(server) as sender:
        assert sender.push(Trainer(seed=2)).staging == {"server": "kv_pool"}
        assert fingerprint(server.model) == expected(Trainer(seed=2)) and memory.reserved.equal(untouched)
    other.is_there = False
    with pushing(server) as sender:
        assert sender.push(Trainer(seed=3)).staging == {"server": "reserved"}
    assert fingerprint(server.model) == expected(Trainer(seed=3))


def test_a_session_that_never_began_a_push_writes_nowhere() -> None:
    """Its thread may still wait for a sender that never came."""
    server = Watched("reserved")
    with pushing(server) as sender:
        sender.prepare(Trainer())
        assert writes_from(server) is None
        sender.push(Trainer())
        reserved = server.engine.memory.reserved
        assert reserved is not None and writes_from(server) == reserved.data_ptr()
    other = Lingering(None)
    server.receiver._sessions._closed.append(other)  # type: ignore[arg-type]
    with pushing(server) as sender:
        assert sender.push(Trainer(seed=2)).staging == {"server": "reserved"}
    assert other.waited_s == 0.0, "nobody waits for it"


@pytest.mark.parametrize("staging", ["kv_pool", "in_place"])
def test_who_needs_no_reserved_memory_waits_for_nobody(staging: Any) -> None:
    server, other = beside_a_stopped_sender()
    with pushing(server, staging=staging) as sender:
        assert sender.push(Trainer(seed=2)).staging == {"server": staging}
    assert other.waited_s <= 0.0


def test_a_session_that_is_over_is_waited_for_no_longer_than_it_takes() -> None:
    server = Watched("reserved")
    with pushing(server) as sender:
        sender.push(Trainer(seed=1))
        session = server.receiver._session
        assert session is not None and session.lingers_for(0.05)
        started = time.monotonic()
    assert not session.lingers_for(30.0) and time.monotonic() - started < 10.0
