"""Every trainer rank writes what it holds itself, straight to where servers keep it: the same bytes, however they are
cut, and what becomes of a push that ends on the way. Over shared memory; on GPUs `benchmarks.layouts --send-from
holders` compares every byte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from sender import FP8Sender, sending_ranks
from sender.slices import SliceHolder
from shared import errors, protocol
from shared.errors import ConfigError, TransferError
from shared.planes import shared_memory
from shared.planes.shared_memory import allocate
from shared.slices import Memory, SliceMap
from tests.test_distributed import _local, make_sender, make_sharded, soon
from tests.test_push_memory import Server, expected
from tests.test_ranks import caught, run_on_ranks
from tests.test_sending_ranks import halves
from tests.test_trainer_layouts import BF16, ON_2_RANKS
from tests.tiny_models import Trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its server ranks are in this process")

NORM = "model.layers.1.input_layernorm.weight"
HOLDERS: Any = {"plane": "same_host", "send_from": "holders"}


def server_of(rank: int, **options: Any) -> Server | None:
    """With reserved memory that trainers can open."""
    if rank != 0:
        return None
    server = Server(**options)
    server.engine.memory.reserved = allocate(8 << 20)
    return server


# ---- the same bytes


def push_slices(rank: int, size: int) -> list[Any]:
    server, found = server_of(rank, fence="nothing loaded"), []
    with make_sender(server, **HOLDERS) as sender:
        for seed in range(4):
            dtype = torch.float32 if seed == 2 else BF16
            model = make_sharded(size, seed, dtype) if size > 1 else Trainer(seed, dtype)
            if seed == 1:
                sender.prepare(model)
            report = sender.push(model)
            same = server is None or fingerprint(server.model) == expected(Trainer(seed, dtype).to(BF16))
            found.append((same, report.model_dump()))
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_bytes_are_those_of_a_checkpoint(size: int) -> None:
    found = run_on_ranks(push_slices, size, size)
    for of_rank in found:
        assert [same for same, _ in of_rank] == [True] * 4 and of_rank == found[0]
        for number, (_, report) in enumerate(of_rank):
            assert report["version"] == number + 1 and report["staging"] == {"server": "reserved"}
            assert report["senders"] == tuple(range(size)) == tuple(report["sent_bytes"])
            sent = sum(report["sent_bytes"].values())  # buckets have a little between their tensors
            assert report["wire_bytes"] - 128 * 2 * report["num_tensors"] < sent <= report["wire_bytes"]


def push_and_count(rank: int) -> tuple[dict[int, int], dict[int, int]]:
    """What the report says that each rank wrote, and what it did."""
    server, written = server_of(rank), list[int]()
    with make_sender(server, **HOLDERS) as sender:
        model = Trainer(1)
        for layer in range(2):
            fully_shard(model.get_submodule(f"model.layers.{layer}"), mesh=init_device_mesh("cpu", (2,)))
        sender.prepare(model)  # the embedding is gathered whole
        plane: Any = sender._fleet.half.plane
        put = plane.put

        def counted(sizes: Any, *more: Any) -> None:
            written.extend(sizes)
            put(sizes, *more)

        plane.put = counted
        report = sender.push(model)
    return report.sent_bytes, {rank: sum(written)}


def test_the_report_says_who_wrote_how_much() -> None:
    (told, first), (same, second) = run_on_ranks(push_and_count, 2)
    assert told == same == {**first, **second}


def push_layouts(rank: int) -> dict[str, bool]:
    """Every layout that a trainer may have, from both ranks; and shards that the ranks name themselves."""
    server, found = server_of(rank), {}
    with make_sender(server, **HOLDERS) as sender:
        for seed, (name, (dtype, wrap)) in enumerate(ON_2_RANKS.items()):
            sender.push(wrap(Trainer(seed, dtype)))
            found[name] = server is None or fingerprint(server.model) == expected(Trainer(seed, dtype).to(BF16))
        model = Trainer(seed=99)
        sender.push_shards(halves(model, rank))
        found["shards"] = server is None or fingerprint(server.model) == expected(model)
    return found


CHOICES: dict[str, Any] = {
    "two servers": ("89", "auto", True),
    "one server": ("9", "auto", True),
    "nothing reserved": ("89", "auto", False),
    "in the KV cache": ("89", "kv_pool", True),
    "in place": ("89", "in_place", True),
    "refused": ("89", "auto", True),
    "cannot land": ("89", "auto", True),
}


def refuse_slices(server: Server) -> None:
    """It says that it takes them, and then does not."""
    handle = server.control._handle

    def answers(message: Any) -> Any:
        if message.kind == "open" and message.slices:
            assert message.staging == "reserved"
            message = message.model_copy(update={"plan_hash": "another"})
        return handle(message)

    server.control._handle = answers


def raise_transfer() -> None:
    raise TransferError("memory of the server cannot be opened")


def setattr_of(owner: type, name: str, value: Any) -> Callable[[], None]:
    """What takes it back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def push_by_choice(rank: int) -> dict[str, Any]:
    """Whether slices were written, and by whom; GPUs are names here."""
    found = {}
    place = protocol.Place(host="a", gpu=str(rank))
    setattr(sending_ranks, "place_of", lambda device: place)  # noqa: B010
    for case, (gpus, staging, reserves) in CHOICES.items():
        servers = [server for name in gpus if (server := server_of(rank, name=name)) is not None]
        for server in servers:
            server.receiver._places = (protocol.Place(host="a", gpu=server.control.name),)
            server.engine.memory.pool = [torch.zeros(4 << 20, dtype=torch.uint8)]
            if not reserves:
                server.engine.memory.reserved = None
            if case == "refused":
                refuse_slices(server)
        urls: list[Any] = [server.control for server in servers] or [f"http://127.0.0.1:{port}" for port in gpus]
        options: Any = {"plane": "same_host", "send_from": "auto", "staging": staging, "bucket_bytes": 64 << 10}
        with FP8Sender(urls, timeout_s=20.0, **options) as sender:
            if case == "cannot land":  # found out when something is to be written, and not tried again
                cannot = setattr_of(SliceHolder, "pack", lambda *_: raise_transfer())
                assert caught(sender.push, make_sharded(2, 1))["kind"] == "TransferError"
                cannot()
            for seed in (1, 2):
                report = sender.push(make_sharded(2, seed))
                assert all(fingerprint(server.model) == expected(Trainer(seed)) for server in servers)
            assert sender._planned is not None and report.busiest_link is not None
            found[case] = sender._planned.slices, report.senders, report.busiest_link == report.busiest_link_of_rank_0
    return found


def test_auto_lets_every_rank_write_what_it_holds_where_that_spares_a_link() -> None:
    """And where no server is less safe for it."""
    for found in run_on_ranks(push_by_choice, 2):
        assert found == {
            "two servers": (True, (0, 1), False),  # what each holds leaves its GPU twice, in place of everything
            "one server": (False, (0,), True),  # everything comes to its GPU, whoever sends
            "nothing reserved": (False, (0, 1), False),  # they would have to write where a server serves from
            "in the KV cache": (False, (0, 1), False),
            "in place": (False, (0, 1), False),
            "refused": (False, (0, 1), False),
            "cannot land": (False, (0, 1), False),
        }


def test_every_layout_is_written_from_both_ranks() -> None:
    for found in run_on_ranks(push_layouts, 2, timeout_s=120.0):
        assert found == dict.fromkeys([*ON_2_RANKS, "shards"], True)


def push_to_three_servers(rank: int) -> list[Any]:
    servers = [server for name in "abc" if (server := server_of(rank, name=name)) is not None]
    urls: list[Any] = [server.control for server in servers] or [f"http://127.0.0.1:{port}" for port in "987"]
    found = []
    with FP8Sender(urls, timeout_s=20.0, bucket_bytes=64 << 10, **HOLDERS) as sender:
        for seed in (1, 2):
            report = sender.push(make_sharded(2, seed))
            found += [fingerprint(server.model) == expected(Trainer(seed)) for server in servers]
            found.append(len(report.servers) == 3)
    return found


def test_several_servers_get_the_same() -> None:
    found, other = run_on_ranks(push_to_three_servers, 2)
    assert all(found) and len(found) == 8 and other == [True, True]


def test_what_is_held_in_another_type_is_converted() -> None:
    server = server_of(0)
    assert server is not None and dict(server.model.named_parameters())[NORM].dtype == torch.float32
    with make_sender(server, **HOLDERS) as sender:
        sender.push(Trainer(5))
    norm = dict(server.model.named_parameters())[NORM]
    assert torch.equal(norm, Trainer(5).get_parameter(NORM).to(torch.float32))


def push_to_what_is_no_longer_there(rank: int) -> list[Any]:
    """A server that starts again between two pushes, then one that lets go of the session: ranks write before it is
    known that the push has begun."""
    server, found = server_of(rank), list[Any]()
    with make_sender(server, **HOLDERS) as sender:
        for seed in range(5):
            model = make_sharded(2, seed=seed)
            if server is not None and seed == 1:
                server.receiver._sessions.close()  # it leaves the data plane, as one that died
                server.receiver = Receiver(server.model, server.engine, SingleRank(), "started again")
                server.control._handle = server.receiver.handle
            if server is not None and seed == 3:
                server.receiver.handle(protocol.Close(session=sender._fleet._session))
            if seed == 3:
                found.append(caught(sender.push, model)["kind"])
            report = sender.push(model)
            found.append((report.version, server is None or fingerprint(server.model) == expected(Trainer(seed))))
    return found


def test_all_ranks_plan_anew_for_a_server_that_started_again() -> None:
    for found in run_on_ranks(push_to_what_is_no_longer_there, 2):
        assert found == [(1, True), (2, True), (3, True), "SessionLostError", (4, True), (5, True)]


def push_late_begun(rank: int) -> list[Any]:
    """A server that takes its time to begin, while everything is written and told."""
    server, found = server_of(rank), list[Any]()
    with make_sender(server, **HOLDERS) as sender:
        sender.push(make_sharded(2, 1))
        if server is not None:
            handle = server.control._handle

            def slow(message: Any) -> Any:
                if message.kind == "begin":
                    time.sleep(1.5)  # longer than a session looks away
                return handle(message)

            server.control._handle = slow
        for seed in (2, 3):
            report = sender.push(make_sharded(2, seed))
            same = server is None or fingerprint(server.model) == expected(Trainer(seed))
            found.append((report.version, same, report.seconds["send"] < 1.0))
    return found


def test_slices_are_written_before_a_server_has_begun() -> None:
    for found in run_on_ranks(push_late_begun, 2):
        assert found == [(2, True, True), (3, True, True)]


# ---- what ends a push


def push_through_failures(rank: int) -> dict[str, Any]:
    server, found = server_of(rank), dict[str, Any]()
    before = fingerprint(server.model) if server else None
    with make_sender(server, **HOLDERS) as sender:
        model = make_sharded(2, 1)
        sender.prepare(model)
        if rank == 1:
            _local(model, "model.layers.1.mlp.up_proj.weight").view(-1)[-1] = float("nan")
        found["nan"] = caught(sender.push, model)
        found["kept"] = server is None or (fingerprint(server.model) == before and server.state() == "SERVING")
        sender.push(make_sharded(2, 2))
        found["healed"] = server is None or fingerprint(server.model) == expected(Trainer(2))
        if server is not None:  # bytes that somebody else changed
            session = server.receiver._session
            assert session is not None and session._landing is not None
            digests, memory = session._landing.digests, session._landing.memories[0]

            def spoiled(*args: Any) -> Any:
                made = digests(*args)
                begin = made.begin
                setattr(made, "begin", lambda index: (memory.add_(index == 2), begin(index)))  # noqa: B010
                return made

            setattr(session._landing, "digests", spoiled)  # noqa: B010
        found["spoiled"] = caught(sender.push, make_sharded(2, 3))
        found["kept too"] = server is None or fingerprint(server.model) == expected(Trainer(2))
        sender.push(make_sharded(2, 4))
        found["healed too"] = server is None or fingerprint(server.model) == expected(Trainer(4))
    return found


def test_a_push_that_fails_leaves_what_was_served() -> None:
    for found in run_on_ranks(push_through_failures, 2):
        assert found.pop("nan")["kind"] == "NonFiniteWeightError"
        spoiled = found.pop("spoiled")
        assert spoiled["kind"] == "TransferError" and "not those that were sent" in spoiled["text"], spoiled
        assert all(found.values()), found


def push_and_die(rank: int) -> Any:
    server = server_of(rank)
    before, started = fingerprint(server.model) if server else None, time.monotonic()
    sender = make_sender(server, **HOLDERS)
    sender.prepare(make_sharded(2))
    send = sender._holder.slices.send

    def die(made: Any, index: int) -> None:
        if index == 3:
            os._exit(1)
        send(made, index)

    if rank == 1:
        setattr(sender._holder.slices, "send", die)  # noqa: B010
    found = caught(sender.push, make_sharded(2))
    same = server is not None and fingerprint(server.model) == before
    state = server is not None and soon(lambda: server.state() == "SERVING")
    return found, same, state, time.monotonic() - started


def test_a_rank_that_dies_ends_the_push() -> None:
    found, same, state, took_s = run_on_ranks(push_and_die, 2, timeout_s=90.0)[0]
    assert found["kind"] in ("TransferError", "RankMissingError") and same and state and took_s < 90.0, found


# ---- in place


def push_in_place(rank: int) -> dict[str, Any]:
    """As on a GPU, where parameters can be opened by trainers: these lie in shared memory."""
    from receiver_plugin import rooms

    server, found = server_of(rank), dict[str, Any]()
    if server is not None:
        for parameter in server.model.parameters():
            memory = allocate(parameter.nbytes)
            memory.copy_(parameter.data.view(-1).view(torch.uint8))
            parameter.data = memory.view(parameter.dtype).view(parameter.shape)
        server.receiver = Receiver(server.model, server.engine, SingleRank())
        server.control._handle = server.receiver.handle
        obstacles = rooms._obstacles_to_landing
        rooms._obstacles_to_landing = lambda *args: {k: v for k, v in obstacles(*args).items() if k != "in_place"}
    addresses = [p.data_ptr() for p in server.model.parameters()] if server else []
    with make_sender(server, staging="in_place", **HOLDERS) as sender:
        for seed in (1, 2):
            report = sender.push(make_sharded(2, seed))
            found[f"push {seed}"] = server is None or fingerprint(server.model) == expected(Trainer(seed))
        found["way"] = report.staging == {"server": "in_place"}
        model = make_sharded(2, 3)
        if rank == 1:
            _local(model, "model.layers.1.mlp.up_proj.weight").view(-1)[-1] = float("nan")
        found["failed"] = caught(sender.push, model)["kind"] == "NonFiniteWeightError"
        found["fenced"] = server is None or server.state() == "FENCED"
        sender.push(make_sharded(2, 4))
        found["healed"] = server is None or fingerprint(server.model) == expected(Trainer(4))
        found["serves"] = server is None or server.state() == "SERVING"
    found["addresses"] = server is None or addresses == [p.data_ptr() for p in server.model.parameters()]
    return found


def test_parameters_are_written_where_they_are_served() -> None:
    for found in run_on_ranks(push_in_place, 2):
        assert all(found.values()), found


def test_nobody_else_begins_while_parameters_may_still_be_written() -> None:
    server = server_of(0)
    assert server is not None
    sessions = server.receiver._sessions

    class Lingering:
        sender, writes_live, lingers, writes_from = "stopped-0a", True, True, None

        def lingers_for(self, seconds: float) -> bool:
            return True

    sessions._closed.append(Lingering())  # type: ignore[arg-type]
    with make_sender(server) as sender, pytest.raises(errors.ServerBusyError, match="stopped-0a may still write"):
        sender.push(Trainer())


def test_memory_that_is_written_before_a_push_begins_is_not_given_to_others() -> None:
    server = server_of(0)
    assert server is not None and server.engine.memory.reserved is not None
    with make_sender(server, **HOLDERS) as sender:
        sender.prepare(Trainer())
        assert server.receiver._session is not None
        assert server.receiver._session.writes_from == server.engine.memory.reserved.data_ptr()


# ---- what cannot be


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"plane": "tcp"}, "takes plane='same_host'"),
        ({"plane": "same_host", "quorum": 1}, "quorum takes rank 0 alone"),
        ({"plane": "same_host", "keep_snapshot": True}, "keep_snapshot keeps"),
    ],
)
def test_what_does_not_go_with_it(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_sender(Server(), send_from="holders", **settings)


def test_push_async_is_refused() -> None:
    with make_sender(server_of(0), **HOLDERS) as sender, pytest.raises(ConfigError, match="push_async sends from rank"):
        sender.push_async(Trainer())


@pytest.mark.parametrize(
    ("staging", "text"),
    [("kv_pool", "write to no KV cache"), ("in_place", "no other process can open"), ("reserved", "cannot be opened")],
)
def test_a_server_says_why_it_cannot(staging: str, text: str) -> None:
    with make_sender(Server(), staging=staging, **HOLDERS) as sender, pytest.raises(errors.PlanError, match=text):
        sender.push(Trainer())


def test_weights_elsewhere_than_the_memory_are_refused() -> None:
    """A kernel, or a copy of this process, would end it."""
    from shared.planes.same_host import SameHostSender

    plane = SameHostSender("127.0.0.1", 5.0, gpu=0)
    with pytest.raises(TransferError, match="its weights are on cuda:1, and this plane writes from GPU 0"):
        plane.targets([128], torch.device("cuda", 1), 1.0)
    plane.close()


# ---- the map


def test_a_map_is_read_as_it_was_written() -> None:
    rows = np.array([[0, 128, 2, 4, 8, 16, 0], [64, 0, 1, 64, 0, 0, 1]], dtype=np.int64)
    made = SliceMap((Memory(b"host", 256, b"here"), Memory(b"cuda", 64, b"there")), (rows, rows[:0]))
    read = SliceMap.read(made.packed(), [128, 0])
    assert [(m.kind, m.num_bytes, m.where.rstrip(b"\0")) for m in read.memories] == list(made.memories)
    assert all(np.array_equal(a, b) for a, b in zip(read.buckets, made.buckets, strict=True))
    assert read.num_bytes == (72, 0)


@pytest.mark.parametrize(
    "change",
    [
        {0: -1}, {0: 120}, {1: 250}, {1: 1 << 62}, {2: 0}, {3: -4}, {2: 1 << 40}, {4: 2}, {5: 1}, {6: 2}, {6: -1},
        {4: 1 << 47},
    ],
)  # fmt: skip
def test_a_map_that_reaches_elsewhere_is_refused(change: dict[int, int]) -> None:
    rows = np.array([[0, 128, 2, 4, 8, 16, 0]], dtype=np.int64)
    for column, value in change.items():
        rows[0, column] = value
    data = SliceMap((Memory(b"host", 256, b""), Memory(b"host", 64, b"")), (rows,)).packed()
    with pytest.raises(TransferError, match="reaches beyond"):
        SliceMap.read(data, [128])


@pytest.mark.parametrize("cut", [0, 7, 9, 200, -1, -56])
def test_a_map_that_is_cut_is_refused(cut: int) -> None:
    rows = np.array([[0, 128, 2, 4, 8, 16, 0]] * 3, dtype=np.int64)
    data = SliceMap((Memory(b"host", 256, b""), Memory(b"host", 64, b"")), (rows,)).packed()
    with pytest.raises(TransferError, match="its map of slices"):
        SliceMap.read(data[:cut], [128])


def test_nothing_stays_behind() -> None:
    with make_sender(server := server_of(0), **HOLDERS) as sender:
        sender.push(Trainer())
        assert server is not None and len(shared_memory._files) > 0
    assert soon(lambda: server.receiver._session is None or not server.receiver._session.lingers)
