"""Ranks of a server that are out of step, and pushes of a sender that end beside each other or in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from receiver_plugin.probe import fingerprint
from sender import FP8Sender
from sender.source import ModuleSource
from shared import errors, protocol
from shared.protocol import StagingWay
from tests.staged import staged
from tests.test_distributed import soon
from tests.test_many_servers import Fleet, all_closed
from tests.test_push_memory import expected
from tests.test_ways import Ranks, way
from tests.tiny_models import Trainer

__all__ = ["all_closed", "way"]

# ---- ranks that are out of step


def no_session(server: Ranks) -> None:
    session = server.receivers[1]._session
    assert session is not None
    session.end_transfer("lost")
    server.receivers[1]._sessions.close()


def no_transfer(server: Ranks) -> None:
    session = server.receivers[1]._session
    assert session is not None
    session.end_transfer("lost")


def another_version(server: Ranks) -> None:
    session = server.receivers[1]._session
    assert session is not None and session.transfer is not None
    session.transfer.version += 1


def another_session(server: Ranks) -> None:
    session = server.receivers[1]._session
    assert session is not None
    session.id = "of another sender"


OUT_OF_STEP: list[Callable[[Ranks], None]] = [no_session, no_transfer, another_version, another_session]


@pytest.mark.parametrize("fault", OUT_OF_STEP)
def test_ranks_that_are_out_of_step_fence_and_let_go_each_by_itself(fault: Callable[[Ranks], None]) -> None:
    """No step that both would take could be trusted to be the same one, so none waits for the other."""
    server = Ranks("reserved", "reserved")
    sender, _ = staged(server.control)
    threads = [receiver._session._thread for receiver in server.receivers if receiver._session]
    assert len(threads) == 2
    fault(server)
    reply = server.handle(protocol.Describe())  # the same on both ranks
    assert reply.state == "FENCED" and reply.fence == "its ranks are out of step with each other"
    assert [receiver._session for receiver in server.receivers] == [None, None]
    assert soon(lambda: not any(thread.is_alive() for thread in threads))
    sender.close()
    heals(server)


def heals(server: Ranks) -> None:
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as healer:
        healer.push(Trainer(seed=5))
    assert [fingerprint(model) for model in server.models] == [expected(Trainer(seed=5))] * 2
    assert server.handle(protocol.Describe()).state == "SERVING"


@pytest.mark.parametrize("fault", [no_session, no_transfer])
def test_what_was_lent_is_given_back_on_each(way: StagingWay, fault: Callable[[Ranks], None]) -> None:
    server = Ranks(way, way)
    sender, _ = staged(server.control)
    fault(server)
    reply = server.handle(protocol.Describe())
    assert reply.fence == "its ranks are out of step with each other" and not reply.exclusive
    assert not any(buffer.any() for engine in server.engines for buffer in engine.memory.pool)
    sender.close()
    heals(server)


def test_a_promise_of_ranks_that_are_out_of_step_is_not_kept() -> None:
    server = Ranks("reserved", "reserved")
    before = [fingerprint(model) for model in server.models]
    sender, session = staged(server.control)
    promise = protocol.Prepare(session=session, version=1, idle=False, promise=True)
    assert server.handle(promise).state == "PROMISED"
    no_transfer(server)
    reply = server.handle(protocol.Commit(session=session, version=1, drain_s=5.0))
    assert reply.state == "FENCED" and reply.version == 0 and reply.error is not None
    assert [fingerprint(model) for model in server.models] == before
    sender.close()


def test_the_sender_is_told_why(way: StagingWay) -> None:
    """And not that another sender took over."""
    server = Ranks(way, way)
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as sender:
        verify = sender._fleet.verify

        def fall_out_of_step() -> None:
            no_transfer(server)
            verify()

        sender._fleet.verify = fall_out_of_step  # type: ignore[method-assign]
        with pytest.raises(errors.SessionLostError, match="its ranks are out of step"):
            sender.push(Trainer(seed=1))


# ---- a second push beside one that is under way


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(keep_snapshot=True)


@pytest.fixture
def blocked(fleet: Fleet) -> Iterator[threading.Event]:
    """A push waits at its verify until this is set."""
    go_on = threading.Event()

    def wait(message: Any) -> None:
        if message.kind == "verify":
            assert go_on.wait(10.0)

    fleet.controls[0].on_message = wait
    yield go_on
    go_on.set()


@pytest.mark.parametrize("call", ["push", "push_async", "prepare"])
@pytest.mark.parametrize("thread", ["the same", "another"])
def test_a_second_push_does_not_end_the_first(fleet: Fleet, blocked: threading.Event, call: str, thread: str) -> None:
    handle, found = fleet.sender.push_async(Trainer(seed=1)), list[BaseException]()

    def second() -> None:
        try:
            getattr(fleet.sender, call)(Trainer(seed=2))
        except BaseException as error:
            found.append(error)

    if thread == "another":
        beside = threading.Thread(target=second)
        beside.start()
        beside.join(10.0)
    else:
        second()
    assert isinstance(found[0], errors.ConfigError) and "wait() for it first" in str(found[0])
    assert not any("abort" in control.kinds or "close" in control.kinds for control in fleet.controls)
    with pytest.raises(errors.ConfigError, match="still under way"):
        fleet.sender.catch_up()
    blocked.set()
    assert handle.wait().version == 1 and fleet.serving(1) == "abc"
    assert fleet.sender.catch_up() == () and fleet.sender.push(Trainer(seed=3)).version == 2


# ---- a push that ends with no error of ours


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("call", ["push", "push_async"])
@pytest.mark.parametrize("where", ["gather", "_packed", "plan"])
def test_whatever_ends_a_push_others_have_their_turn(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], call: str, where: str
) -> None:
    """At once, and no server waits for the rest of it."""
    fleet.sender.push(Trainer(seed=1))

    def interrupted(*args: Any) -> dict[str, torch.Tensor]:
        raise stop("enough")

    with monkeypatch.context() as patched:
        if where == "gather":
            patched.setattr(ModuleSource, "gather", interrupted)
        else:
            owner: Any = fleet.sender._holder.whole if where == "_packed" else fleet.sender._leader
            whole = getattr(owner, where)
            patched.setattr(owner, where, lambda *args: (whole(*args), interrupted()))
        with pytest.raises(stop, match="enough"):
            getattr(fleet.sender, call)(Trainer(seed=2)).wait()
    fleet.sender._turns._patience_s = 0.1
    assert fleet.states() == ["SERVING"] * 3 and fleet.serving(1) == "abc"
    assert fleet.sender._fleet._session == "", "it was told to all servers"
    assert fleet.sender.catch_up() == ()
    assert fleet.sender.push(Trainer(seed=3)).version == 2 and fleet.serving(3) == "abc"
