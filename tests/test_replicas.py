"""Replicas behind one URL: real receivers under the real `Control`, one of which fails, is late or never answers.

What must hold: the server is never without fence while its replicas hold different versions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from receiver_plugin.staging import Staging
from sender import FP8Sender
from sender.control import InProcessControl
from shared import errors, protocol
from shared.protocol import StagingWay
from tests.replicas import SILENT, Replicas, on, refuse, silence
from tests.tiny_models import FakeEngine, Served, Trainer


@pytest.fixture
def server() -> Replicas:
    return Replicas()


@pytest.fixture
def sender(server: Replicas) -> Iterator[FP8Sender]:
    with FP8Sender([server.client], plane="memory", timeout_s=5.0, bucket_bytes=64 << 10) as made:
        yield made


def heals(server: Replicas, sender: FP8Sender) -> None:
    """The next full push reaches both replicas."""
    server.on_message = lambda replica, message: None
    version = sender.push(Trainer(seed=9)).version
    assert server.versions() == [version] * 2 and server.serves() == version
    assert server.held()[0] == server.held()[1]


# ---- what works


def test_a_push_reaches_both(server: Replicas, sender: FP8Sender) -> None:
    assert sender.push(Trainer(seed=1)).version == 1
    first = server.held()
    assert sender.push(Trainer(seed=2)).version == 2
    assert first[0] == first[1] != server.held()[0] == server.held()[1]
    assert server.versions() == [2, 2] and server.serves() == 2
    assert [engine.published for engine in server.engines] == [[0, 1, 2]] * 2
    assert server.kinds.count("prepare") == server.kinds.count("commit") == 2


def test_a_fenced_server_serves_after_its_first_push() -> None:
    server = Replicas(fence="random weights")
    assert server.serves() is None and server.describe().fence == "random weights"
    with FP8Sender([server.client], plane="memory", timeout_s=5.0) as sender:
        sender.push(Trainer())
    assert server.serves() == 1


def test_it_is_one_server_of_two_ranks(server: Replicas) -> None:
    found = server.describe().info
    assert found is not None and found.num_ranks == 2
    parts = found.incarnation.split("+")
    assert [receiver._incarnation for receiver in server.receivers] == parts
    assert len(server.send(protocol.Probe()).probe or ()) == 2


def test_beside_another_server(server: Replicas) -> None:
    other = Receiver(Served(), FakeEngine(), SingleRank())
    clients = [InProcessControl("alone", other.handle), server.client]
    with FP8Sender(clients, plane="memory", timeout_s=5.0) as sender:
        sender.push(Trainer())
    assert server.versions() == [1, 1] and fingerprint(other._model) == server.held()[0] == server.held()[1]


# ---- before the commit: nothing is touched


@pytest.mark.parametrize("replica", [0, 1])
@pytest.mark.parametrize("kind", ["describe", "offer", "open", "begin", "verify", "prepare"])
def test_what_fails_on_one_replica_before_the_commit_touches_none(
    server: Replicas, sender: FP8Sender, kind: str, replica: int
) -> None:
    sender.push(Trainer(seed=1))
    before = server.held()
    sender._fleet.close_session("so that it offers again")
    server.on_message = on(kind, replica, refuse("TransferError", "the disk of this host is full"))
    with pytest.raises(errors.TransferError, match=f"replica {replica} of 2: the disk"):
        sender.push(Trainer(seed=2))
    assert "commit" not in server.kinds[server.kinds.index("commit") + 1 :]
    assert server.held() == before and server.serves() == 1
    heals(server, sender)


def test_no_deadline_passes_between_the_word_and_the_commit(server: Replicas, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))

    def on_message(replica: int, message: Any) -> None:
        session = server.receivers[1]._session
        if session is not None and session.transfer is not None and replica == 1:
            if message.kind == "prepare":
                session.transfer.deadline = time.monotonic() + 0.2
            elif message.kind == "commit":
                time.sleep(0.3)

    server.on_message = on_message
    assert sender.push(Trainer(seed=2)).version == 2 and server.versions() == [2, 2]


@pytest.mark.parametrize("kind", ["verify", "prepare"])
def test_a_replica_that_is_silent_before_the_commit(server: Replicas, sender: FP8Sender, kind: str) -> None:
    sender.push(Trainer(seed=1))
    server.on_message = on(kind, 1, silence)
    with pytest.raises(errors.PushError, match=r"replica\(s\) \[1\] did not answer"):
        sender.push(Trainer(seed=2))
    assert server.versions() == [1, 1] and server.serves() == 1
    heals(server, sender)


@pytest.mark.parametrize("way", ["reserved", "in_place"])
def test_a_replica_whose_last_bucket_is_late(way: StagingWay) -> None:
    """No replica commits before all are STAGED, also where the door is held."""
    server = Replicas()
    late = server.receivers[1]
    make_staging = late._make_staging

    class Late(Staging):
        def accept(self, index: int, *args: Any) -> Any:
            time.sleep(0.05)
            return super().accept(index, *args)

    late._make_staging = lambda model, plan, layout, room: Late(model, plan, layout, room)
    with FP8Sender([server.client], plane="memory", timeout_s=5.0, bucket_bytes=64 << 10, staging=way) as sender:
        for version in (1, 2):
            assert sender.push(Trainer(seed=version)).version == version
            assert server.versions() == [version] * 2 and server.serves() == version
    assert make_staging is Staging


def test_a_stage_that_is_void_on_one_replica(server: Replicas, sender: FP8Sender) -> None:
    """Between Verify and Commit one replica lost what it had staged: no replica may commit."""
    sender.push(Trainer(seed=1))
    before = server.held()

    def void() -> None:
        session = server.receivers[1]._session
        assert session is not None
        session.end_transfer("its deadline passed")

    server.on_message = on("prepare", 1, void)
    with pytest.raises(errors.TransferError, match="replica 1 of 2: version 2 is not on its way"):
        sender.push(Trainer(seed=2))
    assert server.held() == before and server.versions() == [1, 1] and server.serves() == 1
    heals(server, sender)


def test_requests_on_one_replica_are_waited_for(server: Replicas, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    server.engines[1].idle = False

    def later() -> None:
        server.engines[1].idle = server.kinds.count("prepare") > 4

    server.on_message = on("prepare", 1, later)
    assert sender.push(Trainer(seed=2)).version == 2
    assert server.versions() == [2, 2] and server.kinds.count("commit") == 2


def test_requests_that_do_not_end_on_one_replica_touch_none(server: Replicas, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    server.engines[1].idle, server.drain_s = False, 0.1
    with pytest.raises(errors.ServerBusyError, match="replica 1 of 2: requests are still running; nothing was touched"):
        sender.push(Trainer(seed=2))
    assert server.versions() == [1, 1] and server.serves() == 1
    server.engines[1].idle = True
    heals(server, sender)


# ---- in the commit: fenced, until a full push


@pytest.mark.parametrize("replica", [0, 1])
def test_a_copy_that_fails_on_one_replica_fences_both(
    server: Replicas, sender: FP8Sender, monkeypatch: pytest.MonkeyPatch, replica: int
) -> None:
    sender.push(Trainer(seed=1))
    commit = Staging.commit

    def fail(staging: Staging) -> None:
        session = server.receivers[replica]._session
        if session is not None and staging is session.staging:
            raise RuntimeError("the memory is gone")
        commit(staging)

    monkeypatch.setattr(Staging, "commit", fail)
    with pytest.raises(errors.CommitError, match="the server is fenced") as raised:
        sender.push(Trainer(seed=2))
    assert f"replica {replica} of 2" in str(raised.value) and "the memory is gone" in str(raised.value)
    assert sorted(server.versions()) == [1, 2] and server.serves() is None
    monkeypatch.undo()
    heals(server, sender)


def test_a_replica_that_refuses_what_the_other_committed(server: Replicas, sender: FP8Sender) -> None:
    """It said that it could, and then could not: half a commit, which no message may call untouched."""
    sender.push(Trainer(seed=1))

    def busy() -> None:
        server.engines[1].idle = False

    server.on_message = on("commit", 1, busy)
    with pytest.raises(errors.CommitError, match="the server is fenced") as raised:
        sender.push(Trainer(seed=2))
    assert "different versions: [2, 1]" in str(raised.value)
    assert "replica 1 of 2: requests are still running" in str(raised.value)
    assert "nothing was touched" not in str(raised.value)
    assert server.kinds.count("commit") == 2, "it is not tried again"
    found = server.describe()
    assert found.state == "FENCED" and found.version == 2 and server.serves() is None
    server.engines[1].idle = True
    heals(server, sender)
    assert server.versions() == [3, 3], "newer than what either of them held"


def test_a_commit_that_one_replica_does_not_confirm_fences(server: Replicas, sender: FP8Sender) -> None:
    """Even where that replica never got the commit: nobody here can know."""
    sender.push(Trainer(seed=1))
    server.on_message = on("commit", 1, silence)
    with pytest.raises(errors.PushError, match=r"replica\(s\) \[1\]"):
        sender.push(Trainer(seed=2))
    assert server.versions() == [2, 1] and server.serves() is None
    assert "different versions" in str(server.describe().fence)
    heals(server, sender)


def test_a_commit_that_both_did_though_one_answer_was_lost(server: Replicas, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    lost = False

    async def ask(message: Any) -> tuple[protocol.Reply, ...]:
        nonlocal lost
        replies = await Replicas.ask(server, message)
        if message.kind == "commit" or lost:
            lost = True
            raise SILENT
        return replies

    server.control._channel.ask = ask  # type: ignore[method-assign]
    with pytest.raises(errors.PushError, match=r"replica\(s\) \[1\]"):
        sender.push(Trainer(seed=2))
    assert server.serves() is None, "as long as one of them is silent"
    del server.control._channel.ask
    assert server.describe().fence is None and server.versions() == [2, 2] and server.serves() == 2


def test_a_server_that_restarted_refuses_the_old_plan(server: Replicas, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    server.receivers[1] = Receiver(server.models[1], server.engines[1], SingleRank(), "just started")
    assert server.serves() == 1, "nobody told the HTTP process yet"
    assert sender.push(Trainer(seed=2)).version == 2, "it plans anew"
    assert server.versions() == [2, 2] and server.serves() == 2
