"""Several servers in one push: on all or on none, without those that fail (`quorum`), and those that join late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from pydantic import BaseModel

from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from sender import FP8Sender
from sender.control import InProcessControl
from shared import errors, protocol
from tests.faults.models import Trainer as CutTrainer
from tests.faults.models import reference
from tests.faults.server import Server as RankedServer
from tests.faults.tripwire import Tripwire
from tests.staged import staged
from tests.test_distributed import gathered, make_sharded
from tests.test_push_memory import Server, expected
from tests.test_ranks import caught, run_on_ranks
from tests.tiny_models import Trainer


class Watched(InProcessControl):
    """`on_message` may raise in place of the server's answer, or after it (`after`)."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(name, server.receiver.handle)
        self.on_message: Callable[[Any], None] = lambda message: None
        self.after: Callable[[Any], None] = lambda message: None
        self.kinds: list[str] = []

    def call(self, message: BaseModel, timeout_s: float) -> protocol.Reply:
        self.kinds.append(str(getattr(message, "kind", "")))
        self.on_message(message)
        reply = super().call(message, timeout_s)
        self.after(message)
        return reply


class Fleet:
    """Three servers of one rank and a sender."""

    made: ClassVar[list[Fleet]] = []

    def __init__(self, **settings: Any) -> None:
        self.servers = [Server(name=name) for name in "abc"]
        self.controls = [Watched(server, name) for server, name in zip(self.servers, "abc", strict=True)]
        settings = {"plane": "memory", "timeout_s": 5.0, "bucket_bytes": 64 << 10, **settings}
        self.sender = FP8Sender(self.controls, **settings)
        self.made.append(self)

    def serving(self, seed: int) -> str:
        """The names of those that serve `Trainer(seed)`."""
        wanted = expected(Trainer(seed=seed))
        return "".join(n for n, s in zip("abc", self.servers, strict=True) if self._serves(s, wanted))

    def _serves(self, server: Server, wanted: dict[str, str]) -> bool:
        return server.state() == "SERVING" and fingerprint(server.model) == wanted

    def states(self) -> list[str]:
        return [server.state() for server in self.servers]


@pytest.fixture(autouse=True)
def all_closed() -> Iterator[None]:
    yield
    for fleet in Fleet.made:
        for control in fleet.controls:
            control.on_message = control.after = lambda message: None
        fleet.sender.close()
    Fleet.made.clear()


def raising(kind: str, error: Exception, times: int = 99) -> Callable[[Any], None]:
    left = [times]

    def on_message(message: Any) -> None:
        if message.kind == kind and left[0]:
            left[0] -= 1
            raise error

    return on_message


LOST = errors.ServerUnreachableError("lost")


# ---- on all or on none


@pytest.mark.parametrize("strict", [False, True])
def test_each_promises_before_any_commits(strict: bool) -> None:
    fleet = Fleet(strict=strict)
    fleet.sender.push(Trainer(seed=1))
    for control in fleet.controls:
        kinds = [kind for kind in control.kinds if kind in ("prepare", "hold", "commit", "release")]
        assert kinds == (["hold", "commit", "release"] if strict else ["prepare", "commit"])
    assert fleet.serving(1) == "abc"


def test_one_server_needs_no_promise() -> None:
    server = Server()
    control = Watched(server, "alone")
    with FP8Sender([control], plane="memory", timeout_s=5.0) as sender:
        sender.push(Trainer())
    assert "prepare" not in control.kinds


@pytest.mark.parametrize("strict", [False, True])
def test_one_that_cannot_promise_keeps_the_old_version_everywhere(strict: bool) -> None:
    fleet = Fleet(strict=strict)
    fleet.sender.push(Trainer(seed=1))
    fleet.controls[1].on_message = raising("hold" if strict else "prepare", errors.CommitError("not now"))
    with pytest.raises(errors.CommitError, match="not now"):
        fleet.sender.push(Trainer(seed=2))
    assert fleet.serving(1) == "abc"


@pytest.mark.parametrize("strict", [False, True])
def test_one_that_fails_its_commit_beside_others_is_fenced_and_named(strict: bool) -> None:
    fleet = Fleet(strict=strict)
    fleet.sender.push(Trainer(seed=1))

    def busy(message: Any) -> None:
        fleet.servers[1].engine.idle = message.kind != "commit"

    fleet.controls[1].on_message = busy
    with pytest.raises(errors.CommitError, match=r"served by \['a', 'c'\] but not by these, which are fenced.*'b'"):
        fleet.sender.push(Trainer(seed=2))
    assert fleet.states() == ["SERVING", "FENCED", "SERVING"] and fleet.serving(2) == "ac"
    fleet.controls[1].on_message = lambda message: None
    fleet.servers[1].engine.idle = True
    fleet.sender.push(Trainer(seed=3))
    assert fleet.serving(3) == "abc"


def test_if_no_server_commits_all_go_back() -> None:
    fleet = Fleet()
    fleet.sender.push(Trainer(seed=1))
    for server, control in zip(fleet.servers, fleet.controls, strict=True):

        def busy(message: Any, server: Server = server) -> None:
            server.engine.idle = message.kind != "commit"

        control.on_message = busy
    with pytest.raises(errors.CommitError, match="served by no server"):
        fleet.sender.push(Trainer(seed=2))
    assert fleet.serving(1) == "abc"


def test_a_commit_whose_answer_was_lost_is_asked_after() -> None:
    fleet = Fleet()
    fleet.controls[1].after = raising("commit", LOST)
    assert fleet.sender.push(Trainer(seed=1)).version == 1
    assert fleet.serving(1) == "abc"


def test_if_none_is_known_to_have_committed_but_one_may_have_the_others_are_fenced() -> None:
    fleet = Fleet()
    fleet.sender.push(Trainer(seed=1))
    fleet.controls[0].on_message = raising("commit", errors.CommitError("no"))
    fleet.controls[1].on_message = raising("commit", errors.CommitError("no"))

    def gone(message: Any) -> None:
        if message.kind == "commit" or fleet.controls[2].kinds.count("commit") > 1:
            raise LOST

    fleet.controls[2].on_message = gone
    with pytest.raises(errors.CommitError, match="served by no server but not by these"):
        fleet.sender.push(Trainer(seed=2))
    assert fleet.states() == ["FENCED", "FENCED", "PROMISED"], "the silent one fences itself when its promise runs out"


# ---- promises


def promised(server: Server, hold_s: float = 30.0, version: int = 1) -> tuple[FP8Sender, str]:
    """A server that has promised `version`, and what it may be told by."""
    sender, session = staged(server.control, version)
    prepare = protocol.Prepare(session=session, version=version, hold_s=hold_s, idle=False, promise=True)
    reply = server.receiver.handle(prepare)
    assert reply.error is None and reply.state == "PROMISED"
    return sender, session


def test_a_promise_needs_no_idle_server() -> None:
    server = Server()
    server.engine.idle = False
    sender, _ = promised(server)
    sender.close()


def test_a_promise_that_is_aborted_goes_back() -> None:
    server = Server()
    sender, session = promised(server)
    reply = server.receiver.handle(protocol.Abort(session=session, version=1, reason="why"))
    assert reply.state == "SERVING" and reply.fence is None
    sender.close()


@pytest.mark.parametrize("end", ["time", "close", "abort"])
def test_a_promise_that_is_not_kept_fences(end: str) -> None:
    server = Server()
    sender, session = promised(server, hold_s=0.1 if end == "time" else 30.0)
    if end == "time":
        time.sleep(0.15)
    elif end == "close":
        server.receiver.handle(protocol.Close(session=session))
    else:
        server.receiver.handle(protocol.Abort(session=session, version=1, reason="others did", fence=True))
    assert server.state() == "FENCED"
    late = protocol.Commit(session=session, version=1, drain_s=5.0)
    for _ in range(2):
        reply = server.receiver.handle(late)
        assert reply.error is not None and reply.version == 0 and reply.state == "FENCED"
    sender.close()
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as healer:
        healer.push(Trainer(seed=3))
    assert server.state() == "SERVING"


def test_another_sender_cannot_take_over_a_server_that_promised() -> None:
    server = Server()
    sender, _ = promised(server)
    with (
        FP8Sender([server.control], plane="memory", timeout_s=5.0) as second,
        pytest.raises(errors.ServerBusyError, match="in the middle of a push"),
    ):
        second.push(Trainer())
    assert server.state() == "PROMISED"
    sender.close()


# ---- with a quorum


@pytest.mark.parametrize("kind", ["describe", "offer", "open", "begin", "verify", "prepare"])
def test_one_that_fails_before_the_decision_is_left_out(kind: str) -> None:
    fleet = Fleet(quorum=2)
    fleet.controls[1].on_message = raising(kind, errors.PushError("its disk is full"))
    report = fleet.sender.push(Trainer(seed=1))
    assert report.servers == ("a", "c") and list(report.left_out) == ["b"]
    assert report.left_out["b"] == "PushError: its disk is full"
    assert fleet.serving(1) == "ac" and fleet.servers[1].state() == "SERVING" and fleet.servers[1].version == 0
    fleet.controls[1].on_message = lambda message: None
    report = fleet.sender.push(Trainer(seed=2))
    assert report.left_out == {} and fleet.serving(2) == "abc"
    plan = fleet.sender._planned
    fleet.sender.push(Trainer(seed=3))
    assert fleet.sender._planned is plan, "with all servers back, plans hold again"


@pytest.mark.parametrize("kind", ["hold", "commit"])
def test_strict_with_a_quorum(kind: str) -> None:
    fleet = Fleet(quorum=2, strict=True)
    fleet.controls[1].on_message = raising(kind, errors.CommitError("not now"))
    report = fleet.sender.push(Trainer(seed=1))
    assert report.servers == ("a", "c") and fleet.serving(1) == "ac"
    assert fleet.servers[1].state() == ("FENCED" if kind == "commit" else "SERVING")


def test_one_that_is_dead_is_tried_again_with_little_patience_and_blocks_no_plan() -> None:
    fleet = Fleet(quorum=2)
    fleet.controls[2].on_message = raising("describe", LOST)
    fleet.sender.push(Trainer(seed=1))
    plan = fleet.sender._planned
    report = fleet.sender.push(Trainer(seed=2))
    assert fleet.sender._planned is plan and list(report.left_out) == ["c"]
    assert fleet.controls[2].kinds == ["describe", "describe"]


@pytest.mark.parametrize("kind", ["describe", "begin", "verify", "prepare"])
def test_fewer_than_the_quorum_is_an_error_and_nothing_is_touched(kind: str) -> None:
    fleet = Fleet(quorum=2)
    fleet.sender.push(Trainer(seed=1))
    if kind == "describe":  # which a session that is open does without
        fleet.sender._fleet.close_session("it is asked for again")
    for control in fleet.controls[:2]:
        control.on_message = raising(kind, errors.PushError("its disk is full"))
    with pytest.raises(errors.PushError, match=r"1 server\(s\) are left, quorum=2.*its disk is full"):
        fleet.sender.push(Trainer(seed=2))
    for control in fleet.controls:
        control.on_message = lambda message: None
    assert fleet.serving(1) == "abc"
    fleet.sender.push(Trainer(seed=3))
    assert fleet.serving(3) == "abc"


def test_what_the_trainer_did_wrong_fails_the_push_at_once() -> None:
    fleet = Fleet(quorum=1)
    model = Trainer(seed=1)
    model.get_parameter("model.embed_tokens.weight").data[0, 0] = float("nan")
    with pytest.raises(errors.NonFiniteWeightError):
        fleet.sender.push(model)
    wrong = Trainer(seed=1)
    wrong.model.add_module("more_proj", torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16))
    with pytest.raises(errors.PlanError):
        fleet.sender.push(wrong)
    assert all(control.kinds.count("offer") == 2 for control in fleet.controls), "once a push"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_that_dies_in_mid_bucket_costs_one_more_transfer(asynchronous: bool) -> None:
    """Over gloo it takes the data plane away from all."""
    fleet = Fleet(quorum=2, plane="gloo", timeout_s=20.0)
    fleet.sender.push(Trainer(seed=1))
    die_at(fleet.sender, fleet.servers[1], fleet.controls[1], 2)
    started = time.monotonic()
    model, sender = Trainer(seed=2), fleet.sender
    report = sender.push_async(model).wait() if asynchronous else sender.push(model)
    assert time.monotonic() - started < 15.0
    assert report.servers == ("a", "c") and list(report.left_out) == ["b"] and report.version == 2
    assert fleet.serving(2) == "ac"
    fleet.sender.close()


def die_at(sender: FP8Sender, server: Server, control: Watched, bucket: int) -> None:
    """Before `bucket` is sent: its connections break, and it answers nothing any more."""
    send = sender._fleet.send

    def send_after_death(packed: torch.Tensor, index: int, check: Callable[[], None] | None = None) -> None:
        if index == bucket:
            sender._fleet.send = send  # type: ignore[method-assign]

            def gone(message: Any) -> None:
                raise LOST

            control.on_message = gone
            session = server.receiver._session
            assert session is not None and session.transfer is not None
            session.transfer.cancelled.set()
        send(packed, index, check)

    sender._fleet.send = send_after_death  # type: ignore[method-assign, assignment]


def push_from_ranks(rank: int, size: int) -> Any:
    model = make_sharded(size, seed=5)
    whole = gathered(model)
    fleet = Fleet(quorum=2, plane="gloo", timeout_s=20.0) if rank == 0 else None
    urls = ["http://127.0.0.1:9/".replace("9", str(port)) for port in (1, 2, 3)]
    sender = fleet.sender if fleet else FP8Sender(urls, quorum=2, plane="gloo", timeout_s=20.0, bucket_bytes=64 << 10)
    if fleet is not None:
        die_at(sender, fleet.servers[2], fleet.controls[2], 3)
    report = sender.push(model)
    wanted = expected(whole)
    same = fleet is None or [fingerprint(server.model) == wanted for server in fleet.servers] == [True, True, False]
    for control in fleet.controls[:2] if fleet else ():
        control.on_message = raising("begin", errors.PushError("its disk is full"))
    too_few = caught(sender.push, model)
    return report.model_dump(), same, (too_few["kind"], too_few["text"].split(":")[0])


def test_all_trainer_ranks_gather_again() -> None:
    found = run_on_ranks(push_from_ranks, 2, 2, timeout_s=90.0)
    assert found[0] == found[1] and found[0][1]
    assert list(found[0][0]["left_out"]) == ["c"]
    assert found[0][2] == ("PushError", "0 server(s) are left, quorum=2")


@pytest.mark.parametrize("quorum", [0, 4, -1])
def test_a_quorum_is_a_number_of_servers(quorum: int) -> None:
    with pytest.raises(errors.ConfigError, match="quorum"):
        Fleet(quorum=quorum)


# ---- coming and going


def test_a_server_that_joins_gets_the_next_push_and_one_that_leaves_gets_none() -> None:
    fleet, late = Fleet(), Server(name="late")
    fleet.sender.push(Trainer(seed=1))
    fleet.sender.add_server(late.control)
    fleet.sender.remove_server("b")
    report = fleet.sender.push(Trainer(seed=2))
    assert report.servers == ("a", "c", "late") and fleet.serving(2) == "ac" and fleet.serving(1) == "b"
    assert fingerprint(late.model) == expected(Trainer(seed=2))
    with pytest.raises(errors.ConfigError, match="one of the servers already"):
        fleet.sender.add_server(late.control)
    with pytest.raises(errors.ConfigError, match="none of the servers"):
        fleet.sender.remove_server("b")
    fleet.sender.remove_server("a")
    fleet.sender.remove_server("c")
    with pytest.raises(errors.ConfigError, match="the last server"):
        fleet.sender.remove_server("late")


def test_a_late_joiner_and_servers_that_fell_behind_catch_up_without_a_gather() -> None:
    fleet, late = Fleet(quorum=1, keep_snapshot=True), Server(name="late", fence="no weights")
    with pytest.raises(errors.ConfigError, match="no snapshot"):
        fleet.sender.catch_up()
    fleet.controls[1].on_message = raising("begin", errors.PushError("its disk is full"), times=1)
    fleet.sender.push(Trainer(seed=1))
    assert fleet.serving(1) == "ac"
    fleet.servers[2].receiver.weights_changed("a stock route")
    fleet.sender.add_server(late.control)
    found: list[tuple[str, ...]] = []
    thread = threading.Thread(target=lambda: found.append(fleet.sender.catch_up()))
    thread.start()
    thread.join(20.0)
    assert found == [("b", "c", "late")] and fleet.serving(1) == "abc"
    assert late.state() == "SERVING" and late.version == 1 and fingerprint(late.model) == expected(Trainer(seed=1))
    assert fleet.sender.catch_up() == ()
    assert fleet.sender.push(Trainer(seed=2)).servers == ("a", "b", "c", "late") and fleet.serving(2) == "abc"


def test_a_snapshot_that_does_not_fit_is_refused_and_the_others_are_fed() -> None:
    fleet, late = Fleet(keep_snapshot=True), Server(name="late")
    fleet.sender.push(Trainer(seed=1))
    other = Trainer(seed=1)
    fleet.sender.push(other)

    def other_manifest(message: Any) -> protocol.Reply:
        reply = late.receiver.handle(message)
        if isinstance(message, protocol.Offer) and reply.manifest:
            first = reply.manifest[0].model_copy(update={"dtype": "float16"})
            late.receiver._manifest = (first, *reply.manifest[1:])
            return reply.model_copy(update={"manifest": late.receiver._manifest})
        return reply

    fleet.sender.add_server(InProcessControl("late", other_manifest))
    fleet.servers[0].receiver.weights_changed("a stock route")
    with pytest.raises(errors.PlanError, match="late wants it as float16"):
        fleet.sender.catch_up()
    assert late.version == 0 and fleet.serving(1) == "abc"


def test_a_push_that_failed_keeps_the_snapshot_of_the_last_good_one() -> None:
    fleet = Fleet(keep_snapshot=True)
    fleet.sender.push(Trainer(seed=1))
    fleet.controls[0].on_message = raising("verify", errors.TransferError("why"))
    with pytest.raises(errors.TransferError):
        fleet.sender.push(Trainer(seed=2))
    fleet.controls[0].on_message = lambda message: None
    fleet.servers[1].receiver.weights_changed("a stock route")
    assert fleet.sender.catch_up() == ("b",) and fleet.serving(1) == "abc"


def test_a_push_waits_for_a_catch_up_and_a_catch_up_for_a_push() -> None:
    fleet = Fleet(keep_snapshot=True)
    fleet.sender.push(Trainer(seed=1))
    fleet.servers[1].receiver.weights_changed("a stock route")
    meanwhile: list[Any] = []

    def catch_up_meanwhile(message: Any) -> None:
        if message.kind == "verify" and not meanwhile:
            thread = threading.Thread(target=lambda: meanwhile.append(fleet.sender.catch_up()))
            meanwhile.append(thread)
            thread.start()

    fleet.controls[0].on_message = catch_up_meanwhile
    fleet.sender.push(Trainer(seed=2))
    meanwhile[0].join(20.0)
    assert meanwhile[1] == () and fleet.serving(2) == "abc", "nobody was behind when it had its turn"
    fleet.servers[1].receiver.weights_changed("a stock route")
    pushing = threading.Thread(target=lambda: fleet.sender.push(Trainer(seed=3)))

    def push_meanwhile(message: Any) -> None:
        if message.kind == "commit" and not pushing.is_alive():
            pushing.start()
            time.sleep(0.2)

    fleet.controls[1].on_message = push_meanwhile
    assert fleet.sender.catch_up() == ("b",)
    fleet.controls[1].on_message = lambda message: None
    pushing.join(20.0)
    assert fleet.serving(3) == "abc"


def test_between_a_push_async_and_its_wait_nothing_comes() -> None:
    fleet = Fleet(keep_snapshot=True)
    handle = fleet.sender.push_async(Trainer(seed=1))
    for call in (fleet.sender.catch_up, lambda: fleet.sender.remove_server("a")):
        with pytest.raises(errors.ConfigError, match="wait"):
            call()
    handle.wait()
    fleet.servers[1].receiver.weights_changed("a stock route")
    assert fleet.sender.catch_up() == ("b",) and fleet.serving(1) == "abc"


# ---- servers that differ, and the order in which they come


def test_servers_of_one_and_of_two_ranks_in_one_push() -> None:
    servers = [RankedServer(index, tp_size, Tripwire()) for index, tp_size in enumerate((1, 2, 2))]
    try:
        calls = [(server.name, server.call) for server in servers]
        from tests.faults.sending import WatchedSender

        sender = WatchedSender(calls, "gloo", 20.0)
        for seed in (1, 2):
            sender.inner.push(CutTrainer(seed))
            assert [server.look().prints for server in servers] == [reference(seed, tp) for tp in (1, 2, 2)]
        sender.close()
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ranks_may_join_in_any_order(order: tuple[int, int]) -> None:
    """Nobody waits for a server that is named before it."""
    from shared.planes import open_receiver

    servers, turn = [Server(name=name) for name in "ab"], [threading.Event(), threading.Event()]
    turn[order[0]].set()
    for index, server in enumerate(servers):

        def join(rendezvous: protocol.Rendezvous, rank: int, index: int = index) -> Any:
            assert turn[index].wait(10.0)
            timer = threading.Timer(0.3, turn[order[1]].set)
            timer.start()
            return open_receiver(rendezvous, rank)

        server.receiver = Receiver(server.model, server.engine, SingleRank(), join=join)
        server.control._handle = server.receiver.handle
    with FP8Sender([server.control for server in servers], timeout_s=20.0) as sender:
        sender.push(Trainer(seed=1))
    assert [fingerprint(server.model) for server in servers] == [expected(Trainer(seed=1))] * 2


# ---- senders that are gone


@pytest.mark.parametrize("plane", ["memory", "gloo"])
def test_the_session_of_a_dead_sender_ends_by_itself(plane: protocol.PlaneName) -> None:
    """Its thread goes, though nobody asks the server anything, and it goes with the next message of anybody."""
    server = Server()
    sender = FP8Sender([server.control], plane=plane, timeout_s=20.0)
    sender.push(Trainer(seed=1))
    session, fleet = server.receiver._session, sender._fleet
    assert session is not None
    time.sleep(2.5)
    assert session._thread.is_alive(), "its sender is there"
    assert fleet.half.plane is not None
    fleet.half.plane.close()
    thread = session._thread
    thread.join(10.0)
    assert not thread.is_alive()
    server.receiver.handle(protocol.Describe())
    assert server.receiver._session is None
    with pytest.raises(errors.SessionLostError, match="let go of the session"):
        sender.push(Trainer(seed=2))
    sender.push(Trainer(seed=2))
    assert fingerprint(server.model) == expected(Trainer(seed=2))
    sender.close()
