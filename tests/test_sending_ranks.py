"""Several trainer ranks send, or another one than rank 0: the same bytes, and the same outcome on every rank."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from receiver_plugin import rooms
from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from receiver_plugin.staging import Staging, copier
from sender import FP8Sender, Shard
from shared import errors, protocol
from tests.test_distributed import EVERY_PLANE, ServerProcess, _local, make_sender, make_sharded, our_threads, soon
from tests.test_push_memory import Server, expected
from tests.test_ranks import caught, run_on_ranks
from tests.test_trainer_layouts import BF16, ON_2_RANKS
from tests.tiny_models import Trainer

# ---- the same bytes


def push_from(rank: int, size: int, plane: protocol.PlaneName, all_senders: tuple[Any, ...]) -> list[Any]:
    """For each of `all_senders` three pushes, one of them prepared: whether what is served is right, and the report."""
    found = []
    for senders in all_senders:
        server = Server(fence="nothing loaded") if rank == 0 else None
        with make_sender(server, plane=plane, send_from=senders) as sender:
            for seed in range(3):
                dtype = torch.float32 if seed == 2 else BF16
                model = make_sharded(size, seed, dtype)
                if seed == 1:
                    sender.prepare(model)
                report = sender.push(model)
                same = server is None or fingerprint(server.model) == expected(Trainer(seed, dtype).to(BF16))
                found.append((same, report.model_dump()))
    return found


SENDERS: dict[int, tuple[Any, ...]] = {2: ("rank_0", (0, 1), (1,), "auto"), 3: ((2, 0), (0, 1, 2))}


@EVERY_PLANE
@pytest.mark.parametrize("size", [2, 3])
def test_the_bytes_are_those_of_a_checkpoint(plane: protocol.PlaneName, size: int) -> None:
    found = run_on_ranks(push_from, size, size, plane, SENDERS[size])
    assert all(same for of_rank in found for same, _ in of_rank)
    assert all(of_rank == found[0] for of_rank in found), "ranks were told different reports"
    for number, (_, report) in enumerate(found[0]):
        senders = SENDERS[size][number // 3]
        assert report["version"] == number % 3 + 1 and sum(report["sent_bytes"].values()) == report["wire_bytes"]
        assert (report["busiest_link"] is None) == (senders == "rank_0")
        if not isinstance(senders, str):
            assert report["senders"] == senders and set(report["sent_bytes"]) == set(senders)


def push_layouts(rank: int) -> dict[str, bool]:
    """Every layout that a trainer may have, from both ranks; and shards that the ranks name themselves."""
    server, found = Server() if rank == 0 else None, {}
    with make_sender(server, send_from=(1, 0)) as sender:
        for seed, (name, (dtype, wrap)) in enumerate(ON_2_RANKS.items()):
            sender.push(wrap(Trainer(seed, dtype)))
            found[name] = server is None or fingerprint(server.model) == expected(Trainer(seed, dtype).to(BF16))
        model = Trainer(seed=99)
        sender.push_shards(halves(model, rank))
        found["shards"] = server is None or fingerprint(server.model) == expected(model)
    return found


def halves(model: Trainer, rank: int) -> list[Shard]:
    found = []
    for name, parameter in model.named_parameters():
        middle, rest = parameter.shape[0] // 3, (0,) * (parameter.dim() - 1)
        first, end = ((0, middle), (middle, parameter.shape[0]))[rank]
        found.append(Shard(name, parameter[first:end], tuple(parameter.shape), (first, *rest)))
    return found


def test_every_layout_is_sent_from_several_ranks() -> None:
    for found in run_on_ranks(push_layouts, 2, timeout_s=120.0):
        assert found == dict.fromkeys([*ON_2_RANKS, "shards"], True)


def push_into_a_wide_window(rank: int) -> list[Any]:
    """A server that works ahead, as on a GPU, has one bucket more than there are senders, if these are small."""
    rooms.num_at_once = lambda device: 2
    server, found = Server() if rank == 0 else None, []
    for plane in ("tcp", "same_host"):
        for senders, usual in (((0, 1, 2), 512 << 20), ((2, 0), 512 << 20), ((0, 1, 2), 72 << 10)):
            setattr(rooms, "DEFAULT_BUCKET_BYTES", usual)  # noqa: B010
            with make_sender(server, plane=plane, send_from=senders) as sender:
                for seed in (1, 2):
                    report = sender.push(make_sharded(3, seed))
                    found.append(server is None or fingerprint(server.model) == expected(Trainer(seed)))
                assert report.num_buckets > 4
                if server is not None and (session := server.receiver._session) is not None:
                    num = session.staging.num_ahead
                    found.append(num == (len(senders) + 1 if usual > 1 << 20 else 2))
    return found


def test_a_server_on_a_gpu_receives_from_all_senders_at_once() -> None:
    for found in run_on_ranks(push_into_a_wide_window, 3):
        assert all(found), found


def push_in_ways(rank: int) -> list[Any]:
    """Staging of every way, a strict commit on two servers, and one that joins them."""
    found = []
    for way in ("reserved", "kv_pool", "in_place"):
        server = Server() if rank == 0 else None
        if server is not None:
            server.engine.memory.pool = [torch.zeros(4 << 20, dtype=torch.uint8)]
        for plane in ("tcp", "same_host"):
            with make_sender(server, plane=plane, staging=way, send_from=(0, 1)) as sender:
                for seed in (1, 2):
                    report = sender.push(make_sharded(2, seed))
                    found.append(report.staging == {"server": way})
                    found.append(server is None or fingerprint(server.model) == expected(Trainer(seed)))
    servers = [Server(name=name) for name in "abc"] if rank == 0 else []
    urls: list[Any] = [server.control for server in servers[:2]] or ["http://127.0.0.1:9", "http://127.0.0.1:8"]
    with FP8Sender(urls, strict=True, send_from=(1,), timeout_s=20.0, bucket_bytes=64 << 10) as sender:
        sender.push(make_sharded(2, 1))
        if rank == 0:
            sender.add_server(servers[2].control)
        report = sender.push(make_sharded(2, 2))
        found += [report.senders == (1,), len(report.servers) == 3]
        found += [fingerprint(server.model) == expected(Trainer(2)) for server in servers]
    return found


def test_servers_stage_and_commit_as_ever() -> None:
    for found in run_on_ranks(push_in_ways, 2):
        assert all(found), found


# ---- failures


Outcome = dict[str, Any]


def push_and_heal(rank: int, senders: Any, harm: Callable[[FP8Sender, Any], Any], **settings: Any) -> Outcome:
    """A push that `harm` spoils, on whichever ranks it does, and one after it. `harm` returns what undoes it."""
    server = Server() if rank == 0 else None
    before = fingerprint(server.model) if server else None
    model = make_sharded(2, 1)
    with make_sender(server, send_from=senders, **settings) as sender:
        sender.prepare(model)
        heal = harm(sender, (rank, server, model))
        found = caught(sender.push, model)
        state = server.state() if server else "SERVING"
        found["untouched"] = server is None or fingerprint(server.model) == before
        if heal is not None:
            heal()
        report = sender.push(model)
        wanted = expected(Trainer(1)) if server else None
        found["healed"] = server is None or fingerprint(server.model) == wanted
    return {**found, "state": state, "version": report.version}


def cannot_pack(sender: FP8Sender, where: Any) -> Any:
    """On rank 1, its second bucket."""
    packed = sender._holder.whole._packed

    def fail(plan: Any, bucket: Any, *more: Any) -> Any:
        if bucket.index == 3:
            raise RuntimeError("no memory is left")
        return packed(plan, bucket, *more)

    if where[0] == 1:
        sender._holder.whole._packed = fail  # type: ignore[method-assign, assignment]
    return lambda: setattr(sender._holder.whole, "_packed", packed)


def close_session(sender: FP8Sender, where: Any) -> None:
    """The server ends the session while rank 0 gathers bucket 3."""
    rank, server, _ = where
    if rank == 0:
        gathered = sender._gathered

        def gather(*args: Any) -> Any:
            for bucket, found in gathered(*args):
                if bucket.index == 3:
                    server.receiver.handle(protocol.Close(session=sender._fleet._session))
                    sender._gathered = gathered  # type: ignore[method-assign]
                yield bucket, found

        sender._gathered = gather  # type: ignore[method-assign, assignment]


def lose_plane(sender: FP8Sender, where: Any) -> None:
    """Rank 1's plane breaks, and it does not notice before it sends."""
    if where[0] == 1:
        sender._fleet.half.plane.close()  # type: ignore[union-attr]


NAMES = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight")


def be_nan(sender: FP8Sender, where: Any) -> Any:
    rank, _, model = where
    for name in NAMES:
        if (name == NAMES[0]) == (rank == 0):
            _local(model, name).view(-1)[-1] = float("nan")

    def heal() -> None:
        for name in dict(Trainer(1).named_parameters()):
            whole = make_sharded(2, 1).get_parameter(name)
            model.get_parameter(name).data.copy_(whole.data)

    return heal


def spoilt(rank: int, senders: Any, plane: protocol.PlaneName) -> dict[str, Outcome]:
    harms = {"pack": cannot_pack, "session": close_session, "plane": lose_plane, "nan": be_nan}
    return {name: push_and_heal(rank, senders, harm, plane=plane) for name, harm in harms.items()}


@EVERY_PLANE
@pytest.mark.parametrize("senders", [(0, 1), (1,)])
def test_what_fails_on_one_rank_fails_on_all_and_heals(plane: protocol.PlaneName, senders: Any) -> None:
    ranks = run_on_ranks(spoilt, 2, senders, plane, timeout_s=120.0)
    for found in ranks:
        for name, outcome in found.items():
            assert outcome["untouched"] and outcome["healed"] and outcome["state"] == "SERVING", (name, outcome)
            assert outcome["seconds"] < 10.0, (name, outcome)
            assert outcome["kind"] == ranks[0][name]["kind"], (name, "ranks were told different errors")
        wanted = "trainer rank 1: RuntimeError: no memory is left"
        assert found["pack"]["kind"] == "PushError" and wanted in found["pack"]["text"]
        assert found["session"]["kind"] in ("TransferError", "SessionLostError")
        assert found["plane"]["kind"] in ("TransferError", "SessionLostError")
        assert found["nan"]["kind"] == "NonFiniteWeightError" and set(found["nan"]["problems"]) == set(NAMES)


def nan_in_place(rank: int) -> Outcome:
    return push_and_heal(rank, (0, 1), be_nan, staging="in_place")


def test_nan_on_any_rank_fences_a_server_that_stages_in_place() -> None:
    for rank, found in enumerate(run_on_ranks(nan_in_place, 2)):
        assert found["kind"] == "NonFiniteWeightError" and set(found["problems"]) <= set(NAMES)
        assert found["healed"] and found["version"] == 1 and found["seconds"] < 10.0
        assert found["state"] == ("SERVING" if rank else "FENCED") and found["untouched"] == (rank == 1)


def die_in_the_middle(rank: int, senders: Any) -> Any:
    server = Server() if rank == 0 else None
    before, started = fingerprint(server.model) if server else None, time.monotonic()
    sender = make_sender(server, send_from=senders)
    sender.prepare(make_sharded(2))
    send = sender._holder.whole.send

    def die(packed: Any, index: int) -> None:
        if index == 3:
            os._exit(1)
        send(packed, index)

    if rank == 1:
        sender._holder.whole.send = die  # type: ignore[method-assign]
    found = caught(sender.push, make_sharded(2))
    sender.close()
    assert server is not None
    quiet = soon(lambda: not our_threads())
    return found["kind"], server.state(), fingerprint(server.model) == before, quiet, time.monotonic() - started


@pytest.mark.parametrize("senders", [(0, 1), (1,)])
def test_a_sender_that_is_killed_leaves_servers_as_they_were(senders: Any) -> None:
    (kind, state, untouched, quiet, seconds), dead = run_on_ranks(die_in_the_middle, 2, senders)
    assert dead == "died" and kind != "" and state == "SERVING" and untouched and quiet and seconds < 15.0


def lose_a_server(rank: int, senders: Any, plane: protocol.PlaneName) -> Any:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has a child
    victim, survivor = (ServerProcess("victim"), Server(name="survivor")) if rank == 0 else (None, None)
    urls: list[Any] = ["http://127.0.0.1:9"]
    if victim is not None and survivor is not None:
        urls = [survivor.control, victim]
    found = {}
    with FP8Sender(urls, plane=plane, send_from=senders, timeout_s=20.0, bucket_bytes=64 << 10) as sender:
        sender.prepare(make_sharded(2))
        gathered = sender._gathered

        def gather(*args: Any) -> Any:
            for bucket, rows in gathered(*args):
                if bucket.index == 2 and victim is not None:
                    victim.close()
                yield bucket, rows

        sender._gathered = gather  # type: ignore[method-assign, assignment]
        found = caught(sender.push, make_sharded(2))
        sender._gathered = gathered  # type: ignore[method-assign]
        if rank == 0:
            sender.remove_server("victim")
        sender.push(make_sharded(2, 5))
    found["healed"] = survivor is None or fingerprint(survivor.model) == expected(Trainer(5))
    return found


@EVERY_PLANE
@pytest.mark.parametrize("senders", [(0, 1), (1,)])
def test_a_server_that_is_killed_is_named_on_all_ranks(plane: protocol.PlaneName, senders: Any) -> None:
    for found in run_on_ranks(lose_a_server, 2, senders, plane):
        assert found["kind"] == "TransferError" and found["seconds"] < 15.0 and found["healed"]
        assert found["text"].startswith("victim: "), found


def cannot_receive(rank: int) -> Outcome:
    def make_staging(*parts: Any) -> Staging:
        staging = Staging(*parts)
        staging._scatter[1] = copier([torch.zeros(3)], [torch.zeros(5)])
        return staging

    server = Server() if rank == 0 else None
    if server is not None:
        server.receiver = Receiver(server.model, server.engine, SingleRank(), make_staging=make_staging)
        server.control._handle = server.receiver.handle
    with make_sender(server, send_from=(1,)) as sender:
        return caught(sender.push, make_sharded(2))


def test_a_server_that_fails_by_itself_is_quoted() -> None:
    for found in run_on_ranks(cannot_receive, 2):
        assert found["kind"] == "ReceiveError" and "size of tensor" in found["text"] and found["seconds"] < 10.0


def begin_in_vain(rank: int) -> list[Any]:
    server = Server() if rank == 0 else None
    with make_sender(server, send_from=(1, 0)) as sender:
        sender.push(make_sharded(2), version=7)
        stale = caught(sender.push, make_sharded(2), version=7)
        if server is not None:
            server.engine.unsafe_reasons = ["a layer was wrapped"]
        unsafe = caught(sender.push, make_sharded(2))
        if server is not None:
            server.engine.unsafe_reasons = []
        return [stale, unsafe, sender.push(make_sharded(2)).version]


def test_a_push_that_cannot_begin_or_commit_ends_at_once() -> None:
    for stale, unsafe, version in run_on_ranks(begin_in_vain, 2):
        assert stale["kind"] == "StaleVersionError" and stale["seconds"] < 5.0
        assert unsafe["kind"] == "IncompatibleServerError" and unsafe["seconds"] < 5.0 and version == 8


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"send_from": "all"}, "it is 'rank_0', 'auto', 'holders', or a tuple"),
        ({"send_from": 1}, "it is 'rank_0', 'auto', 'holders', or a tuple"),
        ({"send_from": ()}, "names some of the 1 trainer ranks"),
        ({"send_from": (0, 0)}, "each once"),
        ({"send_from": (1,)}, "names some of the 1 trainer ranks"),
        ({"send_from": (-1,)}, "names some of the 1 trainer ranks"),
        ({"send_from": (True,)}, "names some of the 1 trainer ranks"),
        ({"send_from": "auto", "plane": "memory"}, "plane='memory' takes rank 0 alone"),
        ({"send_from": "auto", "quorum": 1}, "quorum takes rank 0 alone"),
        ({"send_from": "auto", "keep_snapshot": True}, "keep_snapshot keeps what rank 0 sends alone"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(errors.ConfigError, match=why):
        FP8Sender(["http://127.0.0.1:9"], **settings)


def test_one_rank_chooses_itself() -> None:
    server = Server()
    with make_sender(server, send_from="auto") as sender:
        with pytest.raises(errors.ConfigError, match="push_async sends from rank 0 alone"):
            sender.push_async(Trainer())
        report = sender.push(Trainer())
    assert report.senders == (0,) and report.busiest_link == report.busiest_link_of_rank_0 != None  # noqa: E711
    assert fingerprint(server.model) == expected(Trainer())


def mean_different_things(rank: int) -> list[Any]:
    server = Server() if rank == 0 else None
    found = []
    for mine in (("rank_0", (1,)), ((0, 1), "auto")):
        with make_sender(server, send_from=mine[rank]) as sender:
            found.append(caught(sender.push, make_sharded(2)))
    return found


def test_ranks_that_mean_different_senders_are_told() -> None:
    for found in run_on_ranks(mean_different_things, 2):
        for outcome in found:
            assert outcome["kind"] == "ConfigError" and "send_from=" in outcome["text"] and outcome["seconds"] < 5.0
