"""Pushes between Ray actors: engines of two slots, FSDP2 trainers on both, and whoever dies on the way.

The engines are receivers without SGLang (`tests.ray_fixtures`), so that they can be killed often; `test_server_ray` has
a real one. After each death: nothing waits beyond its deadline, no two versions are served, the next push heals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from receiver_plugin.ray_engine import EngineActor
from sender.ray_trainer import RayControl, ordinal_of
from shared import errors, protocol
from shared.ray_cluster import Cluster, EngineSpec, Slot, colocate, divided
from tests.ray_actors import SmallEngine, SmallTrainer, Stage, answered, health, kill
from tests.test_push_memory import expected
from tests.tiny_models import Trainer

TIMEOUT_S, MEETING_S = 6.0, 3.0
LONGEST_S = 40.0  # for a push that fails, with all that it waits for
STARTS_S = 240.0  # processes, on a busy machine
OPTIONS = {"timeout_s": TIMEOUT_S, "meeting_timeout_s": MEETING_S, "bucket_bytes": 64 << 10}


@pytest.fixture(scope="module")
def cluster(local_ray: None) -> Iterator[Cluster]:
    """Two engines of one rank each beside two trainers; nobody brings an engine up but the next push."""
    specs = [EngineSpec(args=()), EngineSpec(args=())]
    made = colocate(SmallTrainer, 2, SmallEngine, specs, sender_options=OPTIONS, engine_restarts=-1, timeout_s=STARTS_S)
    yield made
    made.close()


def served(cluster: Cluster) -> list[dict[str, Any] | None]:
    """By engine, the version that it serves and the fingerprint of its weights; None where it refuses requests."""
    found = list[dict[str, Any] | None]()
    for engine in cluster.engines:
        try:
            found.append(answered(lambda engine=engine: engine.actor.generate.remote({})))  # type: ignore[misc]
        except errors.ServerFencedError:
            found.append(None)
    return found


def push(cluster: Cluster, seed: int) -> int:
    """The weights of `Trainer(seed)` to both engines, which serve them then, byte for byte."""
    cluster.trainers_do("load", seed)
    report = cluster.push(timeout_s=LONGEST_S)
    assert set(report["servers"]) == {engine.name for engine in cluster.engines}
    wanted = {"version": report["version"], "weights": expected(Trainer(seed))}
    assert served(cluster) == [wanted, wanted]
    return int(report["version"])


def restarted(cluster: Cluster, index: int, pid: int) -> None:
    """Return when the engine that was `pid` has started again: fenced, whatever it starts with."""
    found = new_health(cluster, index, pid)
    assert found["state"] == "FENCED" and found["restarted"] and found["version"] == 0
    with pytest.raises(errors.ServerFencedError, match="started without weights"):
        ray.get(cluster.engines[index].actor.generate.remote({}))


def new_health(cluster: Cluster, index: int, pid: int) -> dict[str, Any]:
    """That of the engine that was `pid`, once it has started again."""
    deadline = time.monotonic() + STARTS_S
    while (found := health(cluster.engines[index]))["pid"] == pid:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_twenty_rounds_on_the_plane_of_one_host(cluster: Cluster) -> None:
    assert cluster.push(timeout_s=LONGEST_S)["staging"] == {engine.name: "reserved" for engine in cluster.engines}
    first = push(cluster, 1)
    assert [push(cluster, seed) for seed in range(2, 21)] == list(range(first + 1, first + 20))


def test_an_error_reaches_the_driver_as_what_it_is(cluster: Cluster) -> None:
    version = push(cluster, 1)
    with pytest.raises(errors.StaleVersionError, match=rf"version {version} is not newer"):
        cluster.push(version, timeout_s=LONGEST_S)
    with pytest.raises(errors.PushError, match=r"(?s)trainer rank 0 failed: .*no number"):
        cluster.trainers_do("load", "no number", timeout_s=LONGEST_S)
    assert push(cluster, 2) == version + 1


def test_versions_are_demanded_and_messages_judged(cluster: Cluster) -> None:
    """What is no control message is an error of the reply; an actor has to say it in time, and be there."""
    engine = cluster.engines[0]
    answer = ray.get(engine.actor.control.remote(b'{"kind": "launch"}', 5.0))
    reply = protocol.Reply.model_validate_json(answer)
    assert reply.error is not None and reply.error.kind == "ConfigError"
    big = protocol.Reply.model_validate_json(
        ray.get(engine.actor.control.remote(b" " * (protocol.MAX_BODY_BYTES + 1), 5.0))
    )
    assert big.error is not None and "more than" in big.error.message


STAGES: tuple[Stage, ...] = ("receiving", "promised", "committed")


@pytest.mark.parametrize(
    ("rank", "stage"),
    [*((0, stage) for stage in ("before", *STAGES)), (1, "before"), (1, "receiving"), (1, "committed")],
)
def test_a_trainer_dies(cluster: Cluster, rank: int, stage: Any) -> None:
    version, pids = push(cluster, 1), cluster.trainers_do("pid")
    cluster.trainers_do("load", 2)
    if stage == "before":
        kill(pids[rank])
    else:
        cluster.trainers_do("strike", stage, 0 if rank == 0 else pids[1])
    start = time.monotonic()
    with pytest.raises(errors.PushError):
        cluster.push(timeout_s=LONGEST_S)
    assert time.monotonic() - start < LONGEST_S - 5
    one, other = settled(cluster)
    old = {"version": version, "weights": expected(Trainer(1))}
    new = {"version": version + 1, "weights": expected(Trainer(2))}
    if stage in ("before", "receiving"):
        assert one == other == old
    elif stage == "committed" or rank == 1:
        assert one == other == new
    else:  # rank 0 died with the promises of both: neither may serve on
        assert one is None and other is None
    cluster.set_up_trainers()
    push(cluster, 3)


def settled(cluster: Cluster) -> list[dict[str, Any] | None]:
    """What is served once no push is under way any more, a promise least of all."""
    deadline = time.monotonic() + 3 * TIMEOUT_S
    while any(health(engine)["state"] not in ("SERVING", "FENCED") for engine in cluster.engines):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return served(cluster)


@pytest.mark.parametrize("stage", ["before", *STAGES])
def test_an_engine_dies(cluster: Cluster, stage: Any) -> None:
    version, pid = push(cluster, 1), health(cluster.engines[0])["pid"]
    cluster.trainers_do("load", 2)
    if stage == "before":
        kill(pid)
    else:
        cluster.trainers_do("strike", stage, pid)
    start = time.monotonic()
    if stage == "committed":
        assert cluster.push(timeout_s=LONGEST_S)["version"] == version + 1
    elif stage == "before":  # it may have started again in time
        reached(lambda: cluster.push(timeout_s=LONGEST_S))
    else:
        with pytest.raises(errors.PushError, match=r"engine 0|server rank"):
            cluster.push(timeout_s=LONGEST_S)
    assert time.monotonic() - start < LONGEST_S - 5
    if stage == "before":
        new_health(cluster, 0, pid)
    else:
        restarted(cluster, 0, pid)
        old = {"version": version, "weights": expected(Trainer(1))}
        new = {"version": version + 1, "weights": expected(Trainer(2))}
        assert served(cluster) == [None, old if stage == "receiving" else new]
    push(cluster, 3)


def reached(step: Callable[[], Any]) -> bool:
    try:
        step()
        return True
    except errors.PushError:
        return False


def test_an_actor_that_is_gone_is_named(local_ray: None) -> None:
    actor = ray.remote(SmallEngine).options(num_cpus=0.1).remote(())
    node = ray.get_runtime_context().get_node_id()
    control = RayControl(actor, "engine 9", node, "127.0.0.1")
    assert control.local_host() == "127.0.0.1"
    assert control.call(protocol.Describe(), STARTS_S).fence == "started without weights"
    other = RayControl(actor, "engine 9", "another node", "127.0.0.1")
    assert other.local_host() == "127.0.0.1"
    ray.kill(actor)
    start = time.monotonic()
    with pytest.raises(errors.ServerUnreachableError, match=r"engine 9 cannot be reached: .*"):
        control.call(protocol.Describe(), 5.0)
    assert time.monotonic() - start < 8.0


class Silent:
    """An actor that is there and answers nothing in time, or nothing of ours."""

    async def control(self, message: bytes, timeout_s: float) -> bytes:
        if timeout_s < 1.0:
            time.sleep(6.0)
        return b'{"state": "SERVING"}'


def test_an_actor_that_is_silent_is_named(local_ray: None) -> None:
    actor = ray.remote(Silent).options(num_cpus=0.1).remote()
    control = RayControl(actor, "engine 9", "", "127.0.0.1")
    with pytest.raises(errors.PushError, match="engine 9 answered with no reply of ours"):
        control.call(protocol.Describe(), STARTS_S)
    with pytest.raises(errors.ServerUnreachableError, match=r"engine 9 did not answer within 0 s"):
        control.call(protocol.Describe(), 0.2)
    ray.kill(actor)


def test_more_than_there_is_room_for(local_ray: None) -> None:
    spec = EngineSpec(args=())
    with pytest.raises(errors.ConfigError, match=r"did not have 1 node\(s\) with 16 times"):
        colocate(SmallTrainer, 16, SmallEngine, [spec], timeout_s=2.0)
    with pytest.raises(errors.ConfigError, match="engines with 3 ranks on 2 slots"):
        colocate(SmallTrainer, 2, SmallEngine, [EngineSpec(args=(), tp_size=3)])
    with pytest.raises(errors.ConfigError, match="3 trainers cannot be divided evenly among 2"):
        colocate(SmallTrainer, 3, SmallEngine, [spec], num_nodes=2)


class Broken(SmallEngine):
    def __init__(self, *args: Any) -> None:
        raise RuntimeError("no such checkpoint")


def test_an_engine_that_does_not_start_is_named(local_ray: None) -> None:
    before = ray.available_resources()["CPU"]
    with pytest.raises(errors.IncompatibleServerError, match=r"engine 0 \(actor \w+\) does not start: "):
        colocate(
            SmallTrainer, 1, Broken, [EngineSpec(args=())], engine_restarts=0, cpus_per_slot=0.1, timeout_s=STARTS_S
        )
    deadline = time.monotonic() + 10.0
    while ray.available_resources()["CPU"] != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == before


def test_an_engine_that_started_again_is_brought_up_before_it_serves(cluster: Cluster) -> None:
    """Asked all the time, it answers with the version that all others serve, or not at all."""
    engine = cluster.engines[1]
    assert cluster.trainer_spec is not None
    cluster.trainer_spec = cluster.trainer_spec._replace(watch_every_s=0.2)
    cluster.set_up_trainers()
    version, pid = push(cluster, 7), health(engine)["pid"]
    wanted, outcomes = {"version": version, "weights": expected(Trainer(7))}, set[str]()
    kill(pid)
    deadline = time.monotonic() + STARTS_S
    while time.monotonic() < deadline:
        try:
            reply = ray.get(engine.actor.generate.remote({}), timeout=STARTS_S)
        except errors.ServerFencedError:
            outcomes.add("fenced")
        except RayActorError:
            outcomes.add("gone")
        else:
            assert reply == wanted
            if health(engine)["pid"] != pid:
                break
    assert health(engine)["pid"] != pid and health(engine)["restarted"] and "gone" in outcomes
    assert served(cluster) == [wanted, wanted]
    assert cluster.trainers_do("catch_up") == [(), ()]
    assert push(cluster, 8) == version + 1


# Without a cluster


def slots_of(*nodes: str) -> list[Slot]:
    return [Slot(None, index, node, "", str(index)) for index, node in enumerate(nodes)]


def test_engines_of_different_sizes_take_slots_in_order() -> None:
    slots = slots_of("a", "a", "a", "a", "b", "b", "b", "b")
    specs = [EngineSpec(args=(), tp_size=size) for size in (2, 1, 1, 4)]
    assert [[slot.gpu for slot in mine] for mine in divided(slots, specs)] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5", "6", "7"],
    ]
    with pytest.raises(errors.ConfigError, match="engine 0 of 2 ranks would lie on two nodes"):
        divided(slots_of("a", "b", "b"), [EngineSpec(args=(), tp_size=2)])


@pytest.mark.parametrize(
    ("visible", "gpu", "ordinal"),
    [(None, "2", 2), ("4,5,6", "6", 2), ("GPU-aa,GPU-bb", "GPU-bb", 1), ("3,1", "0", None)],
)
def test_a_trainer_finds_its_gpu(
    visible: str | None, gpu: str, ordinal: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray names GPUs as CUDA_VISIBLE_DEVICES does; the process counts those that it sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if ordinal is None:
        with pytest.raises(errors.ConfigError, match="does not see GPU 0"):
            ordinal_of(gpu)
    else:
        assert ordinal_of(gpu) == ordinal


@pytest.mark.parametrize("again", [False, True])
def test_an_engine_of_an_actor_starts_in_an_environment_of_its_own(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what torchrun left; with its own GPUs; without a checkpoint if it is not the first time."""
    started = list[list[str]]()
    monkeypatch.setattr("receiver_plugin.ray_engine.start", lambda args: started.append(args))
    monkeypatch.setattr("receiver_plugin.ray_engine.was_restarted", lambda: again)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("MINE", "before")
    EngineActor(["--model-path", "M", "--tp-size", "2"], ["3", "GPU-aa"], {"MINE": "after"})
    gone = {"TORCHELASTIC_USE_AGENT_STORE", "RANK", "MASTER_PORT"} & set(os.environ)
    assert not gone and os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-aa" and os.environ["MINE"] == "after"
    assert started == [["--model-path", "M", "--tp-size", "2", *(["--load-format", "dummy"] if again else [])]]
