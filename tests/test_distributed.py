"""The planes with real processes: sharded trainers, a server that dies, sockets and threads that stay behind."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from receiver_plugin.staging import Staging, copier
from receiver_plugin.startup import fence_reason
from sender import FP8Sender, Shard, export_checkpoint
from sender.control import ControlClient, checked
from shared import errors, protocol
from tests.test_push_memory import Server, expected
from tests.test_ranks import PROCESSES, caught, run_on_ranks, tell, wait_for
from tests.tiny_models import FakeEngine, Served, Trainer

# ---- trainers of several processes; rank 0 has the server in its own


def make_sharded(size: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Trainer:
    model, mesh = Trainer(seed, dtype), init_device_mesh("cpu", (size,))
    for name, module in model.named_modules():
        if name in ("model.layers.0", "model.layers.1"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gathered(model: torch.nn.Module) -> Trainer:
    """An unsharded model of the same weights. A collective."""
    whole = Trainer()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole.get_parameter(name).data.copy_(parameter.full_tensor())
    return whole


def make_sender(server: Server | None, **settings: Any) -> FP8Sender:
    servers: list[str | ControlClient] = [server.control if server else "http://127.0.0.1:9"]
    return FP8Sender(servers, bucket_bytes=64 << 10, **{"timeout_s": 20.0, "meeting_timeout_s": 20.0, **settings})


def push_sharded(rank: int, size: int) -> list[Any]:
    server = Server(fence="nothing loaded") if rank == 0 else None
    found = []
    with make_sender(server) as sender:
        for push, dtype in enumerate((torch.bfloat16, torch.bfloat16, torch.float32)):
            model = make_sharded(size, seed=push, dtype=dtype)
            local = {name: _bits(p) for name, p in model.named_parameters()}
            report = sender.push(model)
            assert all(torch.equal(_bits(p), local[name]) for name, p in model.named_parameters()), "a push wrote"
            whole = gathered(model)
            same = server is None or fingerprint(server.model) == expected(whole)
            found.append((report.version, report.model_dump(), same))
    return found


def push_to_what_is_no_longer_there(rank: int, staging: protocol.StagingChoice) -> list[Any]:
    """A server that starts again between two pushes, then one that lets go of the session; the ranks begin early."""
    server, found = Server() if rank == 0 else None, list[Any]()
    with make_sender(server, staging=staging) as sender:
        for seed in range(4):
            model = make_sharded(2, seed=seed)
            if server is not None and seed == 1:
                server.receiver = Receiver(server.model, server.engine, SingleRank(), "started again")
                server.control._handle = server.receiver.handle
            if server is not None and seed == 2:
                server.receiver.handle(protocol.Close(session=sender._fleet._session))
            if seed == 2:
                found.append(caught(sender.push, model)["kind"])
            report = sender.push(model)
            whole = gathered(model)
            found.append((report.version, server is None or fingerprint(server.model) == expected(whole)))
    return found


@pytest.mark.parametrize("staging", ["auto", "in_place"])
def test_all_ranks_plan_anew_for_a_server_that_started_again(staging: str) -> None:
    for found in run_on_ranks(push_to_what_is_no_longer_there, 2, staging):
        assert found == [(1, True), (2, True), "SessionLostError", (3, True), (4, True)]


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach().clone()


@pytest.mark.parametrize("size", [2, 3])  # 250 rows of the embedding: even and ragged shards
def test_a_sharded_trainer_serves_what_a_checkpoint_would(size: int) -> None:
    found = run_on_ranks(push_sharded, size, size)
    assert all(same for of_rank in found for _, _, same in of_rank)
    assert [version for version, _, _ in found[0]] == [1, 2, 3]
    assert all(of_rank == found[0] for of_rank in found), "ranks were told different reports"


def push_nan_then_heal(rank: int) -> Any:
    server = Server() if rank == 0 else None
    before = fingerprint(server.model) if server else None
    model = make_sharded(2)
    names = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight")
    if rank == 1:
        for name in names:
            _local(model, name).view(-1)[-1] = float("nan")
    with make_sender(server) as sender:
        found = caught(sender.push, model)
        untouched = server is None or fingerprint(server.model) == before
        if rank == 1:
            for name in names:
                _local(model, name).nan_to_num_(nan=0.5)
        sender.push(model)
        whole = gathered(model)
        return found, untouched, server is None or fingerprint(server.model) == expected(whole)


def _local(model: torch.nn.Module, name: str) -> torch.Tensor:
    parameter = model.get_parameter(name)
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()


def test_nan_on_one_rank_is_named_on_all() -> None:
    for found, untouched, healed in run_on_ranks(push_nan_then_heal, 2):
        assert found["kind"] == "NonFiniteWeightError" and untouched and healed
        assert set(found["problems"]) == {"model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"}


def push_without_rank_1(rank: int) -> Any:
    server = Server() if rank == 0 else None
    model, found = make_sharded(2), None
    with make_sender(server, meeting_timeout_s=1.0 if rank == 0 else 20.0) as sender:
        if rank == 0:
            found = caught(sender.push, model)
            sender._ranks._timeout_s = 20.0
            tell("rank 0 was told")
        else:
            wait_for("rank 0 was told")
        report = sender.push(model)
    return found, report.version


def test_a_push_on_some_ranks_only_names_the_others() -> None:
    (found, version), (_, same) = run_on_ranks(push_without_rank_1, 2)
    assert found["kind"] == "RankMissingError" and "rank(s) [1] of 2" in found["text"] and found["seconds"] < 5.0
    assert version == same == 1


def push_halves(rank: int) -> Any:
    server = Server() if rank == 0 else None
    model, shards = Trainer(seed=5), []
    for name, parameter in model.named_parameters():
        cut, last = parameter.dim() - 1, parameter.shape[-1] // 3  # columns, unevenly
        first = 0 if rank == 0 or "norm" in name else last  # the norms lie on both ranks
        length = (last if rank == 0 else parameter.shape[-1] - last) if "norm" not in name else parameter.shape[-1]
        offsets = (0,) * cut + (first,)
        shards.append(Shard(name, parameter.narrow(cut, first, length), tuple(parameter.shape), offsets))
    with make_sender(server) as sender:
        broken = caught(sender.push_shards, shards if rank == 0 else shards[1:])
        sender.push_shards(shards)
    return broken, server is None or fingerprint(server.model) == expected(model)


def test_shards_of_two_ranks() -> None:
    for broken, same in run_on_ranks(push_halves, 2):
        assert same
        assert broken["kind"] == "PlanError" and broken["problems"] == (
            "model.embed_tokens.weight: no rank holds its part ((0, 250), (64, 192))",
        )


def export(rank: int, folder: str) -> Any:
    model = make_sharded(2, seed=8)
    export_checkpoint(model, folder, hf_config={"model_type": "tiny"}, timeout_s=20.0)
    again = caught(export_checkpoint, model, folder, hf_config={}, timeout_s=20.0)
    return again, expected(gathered(model))


def test_an_export_of_two_ranks_loads_as_a_push_would(tmp_path: Path) -> None:
    outcomes = run_on_ranks(export, 2, str(tmp_path / "out"))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    served = Served()
    served.load_weights((name, tensor) for file in files for name, tensor in load_file(file).items())
    assert fence_reason(Served(), str(tmp_path / "out"), "auto") is None
    for again, wanted in outcomes:
        assert fingerprint(served) == wanted
        assert again["kind"] == "ConfigError" and "already holds a checkpoint" in again["text"]


# ---- a server in a process of its own

IN_THIS_PROCESS = pytest.mark.skipif(torch.cuda.is_available(), reason="no process opens GPU memory of its own")
EVERY_PLANE = pytest.mark.parametrize("plane", ["tcp", "gloo", pytest.param("same_host", marks=IN_THIS_PROCESS)])


def serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    receiver = Receiver(Served(), FakeEngine(), SingleRank())
    while True:
        message = protocol.decode_message(pipe.recv_bytes())
        pipe.send_bytes(receiver.handle(message).model_dump_json().encode())


class ServerProcess:
    """A `ControlClient` over a pipe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, message: BaseModel, timeout_s: float) -> protocol.Reply:
        try:
            self._pipe.send_bytes(message.model_dump_json().encode())
            if not self._pipe.poll(timeout_s):
                raise errors.ServerUnreachableError(f"{self.name} did not answer")
            return checked(self.name, protocol.Reply.model_validate_json(self._pipe.recv_bytes()))
        except (EOFError, OSError) as error:
            raise errors.ServerUnreachableError(f"{self.name} is gone") from error

    def local_host(self) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def at_bucket(sender: FP8Sender, index: int, action: Callable[[], object]) -> None:
    """Run `action` in the middle of the next push, before bucket `index` is sent."""
    send = sender._fleet.send

    def send_after_action(bucket: torch.Tensor, number: int, check: Callable[[], None] | None = None) -> None:
        if number == index:
            sender._fleet.send = send  # type: ignore[method-assign]
            action()
        send(bucket, number, check)

    sender._fleet.send = send_after_action  # type: ignore[method-assign, assignment]


@EVERY_PLANE
def test_a_server_that_is_killed_mid_push_fails_the_push_and_spares_the_others(plane: protocol.PlaneName) -> None:
    victim, survivor = ServerProcess("victim"), Server(name="survivor")
    before, model = fingerprint(survivor.model), Trainer()
    with FP8Sender([victim, survivor.control], plane=plane, timeout_s=20.0, bucket_bytes=64 << 10) as sender:
        at_bucket(sender, 2, victim.close)
        found = caught(sender.push, model)
        assert found["kind"] == "TransferError" and found["seconds"] < 15.0
        assert fingerprint(survivor.model) == before
        assert survivor.receiver.state == "SERVING" and survivor.version == 0
        with pytest.raises(errors.ServerUnreachableError, match="victim is gone"):
            sender.push(model)
    with make_sender(survivor) as sender:
        sender.push(model)
    assert fingerprint(survivor.model) == expected(model)


@EVERY_PLANE
def test_a_session_that_is_closed_mid_push_fails_the_push(plane: protocol.PlaneName) -> None:
    server, model = Server(), Trainer()
    before = fingerprint(server.model)
    with make_sender(server, plane=plane) as sender:
        fleet = sender._fleet
        at_bucket(sender, 2, lambda: server.receiver.handle(protocol.Close(session=fleet._session)))
        found = caught(sender.push, model)
        assert found["kind"] in ("TransferError", "SessionLostError") and found["seconds"] < 15.0
        assert fingerprint(server.model) == before
        sender.push(model)
    assert fingerprint(server.model) == expected(model)


@EVERY_PLANE
def test_a_bucket_of_another_size_fails_the_push_and_not_the_server(plane: protocol.PlaneName) -> None:
    """Gloo itself ends the process in which more bytes arrive than were expected."""
    server, model = ServerProcess("server"), Trainer()
    with FP8Sender([server], plane=plane, timeout_s=20.0, bucket_bytes=64 << 10) as sender:
        plan = sender.prepare(model)
        small, large = sorted(plan.layout.buckets, key=lambda bucket: bucket.num_bytes)[:: len(plan.layout.buckets) - 1]
        send = sender._fleet.send

        def send_the_wrong_one(bucket: torch.Tensor, number: int, check: Callable[[], None] | None = None) -> None:
            send(torch.zeros(large.num_bytes, dtype=torch.uint8) if number == small.index else bucket, number)

        sender._fleet.send = send_the_wrong_one  # type: ignore[method-assign, assignment]
        found = caught(sender.push, model)
        assert found["kind"] == "TransferError" and found["seconds"] < 10.0
        assert server.process.is_alive()
        sender._fleet.send = send  # type: ignore[method-assign]
        assert sender.push(model).version == 1


@EVERY_PLANE
def test_a_rank_that_cannot_receive_fails_the_push_at_once(plane: protocol.PlaneName) -> None:
    """Not at its deadline, which may be minutes away."""

    def make_staging(*parts: Any) -> Staging:
        staging = Staging(*parts)
        staging._scatter[1] = copier([torch.zeros(3)], [torch.zeros(5)])
        return staging

    server, model = Server(), Trainer()
    server.receiver = Receiver(server.model, server.engine, SingleRank(), make_staging=make_staging)
    server.control._handle = server.receiver.handle
    with make_sender(server, plane=plane) as sender:
        found = caught(sender.push, model)
    assert found["kind"] == "ReceiveError" and found["seconds"] < 10.0
    assert "size of tensor" in found["text"], "the server's own words"


# ---- what is left behind


def listening() -> set[str]:
    """The addresses, in hex as the kernel writes them, on which this process listens."""
    mine = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            mine.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    rows = [
        line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{file}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fp8sync")]


def soon(condition: Callable[[], bool], timeout_s: float = 2.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def before(caplog: pytest.LogCaptureFixture) -> Iterator[set[str]]:
    """The sockets there were. A logged error is kept by pytest, and with it the frames and sockets it came from."""
    caplog.set_level("CRITICAL", "sender.fleet")
    gc.collect()
    assert soon(lambda: not our_threads()), f"left by an earlier test: {our_threads()}"
    yield listening()


@EVERY_PLANE
def test_sockets_listen_on_loopback_only_and_are_closed(before: set[str], plane: protocol.PlaneName) -> None:
    server, opened = Server(), set[str]()
    answer = server.control._handle

    def note(message: Any) -> protocol.Reply:
        opened.update(listening() - before)
        return answer(message)

    server.control._handle = note
    with make_sender(server, plane=plane) as sender:
        sender.push(Trainer())
        assert opened, "no socket was found: the test looks at the wrong place"
        if plane == "tcp":
            assert listening() <= before, "it listens on, though all have joined"
        opened |= listening() - before
        loopback = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
        assert all(address.startswith(loopback) for address in opened), opened
        assert soon(lambda: bool(our_threads()))
    assert soon(lambda: listening() <= before), listening() - before
    assert soon(lambda: not our_threads()), our_threads()


def raise_out_of_memory() -> None:
    raise RuntimeError("out of memory")


@EVERY_PLANE
def test_a_failure_mid_push_leaves_no_threads_and_no_sockets(before: set[str], plane: protocol.PlaneName) -> None:
    server = Server()
    with make_sender(server, plane=plane) as sender:
        sender.push(Trainer())
        at_bucket(sender, 2, raise_out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            sender.push(Trainer())
        assert server.receiver.state == "SERVING"
    assert soon(lambda: not our_threads()), our_threads()
    assert soon(lambda: listening() <= before), listening() - before


def test_a_closed_sender_can_be_closed_again(before: set[str]) -> None:
    sender = make_sender(Server())
    sender.prepare(Trainer())
    sender.close()
    sender.close()
    assert soon(lambda: not our_threads()), our_threads()


@EVERY_PLANE
def test_a_server_that_never_joins_the_plane_is_an_error_not_a_hang(
    before: set[str], plane: protocol.PlaneName
) -> None:
    server = Server()
    answer = server.control._handle

    def deaf(message: Any) -> protocol.Reply:
        """A server that says yes to `Open` and does nothing."""
        return answer(protocol.Describe()) if isinstance(message, protocol.Open) else answer(message)

    server.control._handle = deaf
    with make_sender(server, plane=plane, timeout_s=1.0) as sender:
        found = caught(sender.push, Trainer())
        assert found["kind"] == "TransferError" and "did not come together" in found["text"]
        assert found["seconds"] < 10.0
    assert soon(lambda: not our_threads()), our_threads()
    assert soon(lambda: listening() <= before), listening() - before
