"""A real SGLang engine and FSDP2 trainers as Ray actors on this host: rounds, deaths, and memory that comes and goes.

What the engine serves is compared with a server without the plugin, which loads the exported checkpoint of every round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import write_config
from receiver_plugin.ray_engine import EngineActor
from shared import errors, protocol
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from shared.ray_cluster import Cluster, EngineSpec, colocate
from tests.ray_actors import TinyTrainer, health
from tests.server_fixtures import CHANGES

pytestmark = pytest.mark.server

NUM_ROUNDS = 20
PROMPTS = [[11, 12, 13], [100, 200, 300, 400, 500]]
STARTS_S = 300.0
OPTIONS = {"timeout_s": 30.0, "meeting_timeout_s": 10.0, "bucket_bytes": 256 << 10}


@pytest.fixture(scope="module")
def cluster(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One engine without a checkpoint and without reserved memory, which would be kept from the trainers."""
    folder = write_config(tmp_path_factory.mktemp("ray") / "no_weights", **CHANGES)
    args = sglang_fp8_args(str(folder), FP8BlockConfig(), user_args=[*CPU_ARGS, "--fp8sync-staging", "0"])
    made = colocate(
        TinyTrainer,
        2,
        EngineActor,
        [EngineSpec(args=args)],
        sender_options=OPTIONS,
        watch_every_s=1.0,
        timeout_s=STARTS_S,
    )
    yield made
    made.close()


@pytest.fixture
def reference(loaded_server: LocalServer, server_logs: Path) -> Iterator[LocalServer]:
    """It loads other checkpoints, and in the end its own again."""
    before = loaded_server.probe()
    yield loaded_server
    load(loaded_server, server_logs / "checkpoint")
    assert loaded_server.probe() == before


def load(server: LocalServer, folder: Path) -> None:
    reply = server.post("/update_weights_from_disk", {"model_path": str(folder)})
    assert reply.status_code == 200 and reply.json()["success"], reply.text


def load_exported(cluster: Cluster, server: LocalServer, folder: Path) -> None:
    """What the trainers hold, by way of a checkpoint in a new folder in `folder`."""
    checkpoint = folder / str(len(list(folder.iterdir())))
    cluster.trainers_do("export", str(checkpoint))
    load(server, checkpoint)


def ask(cluster: Cluster, **demand: int) -> list[dict[str, Any]]:
    """As `LocalServer.generate`."""
    sampling = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
    found = []
    for prompt in PROMPTS:
        request = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        meta = ray.get(cluster.engines[0].actor.generate.remote(request, **demand), timeout=60.0)["meta_info"]
        pairs = meta["output_token_logprobs"]
        tokens, logprobs = [token for _, token, *_ in pairs], [logprob for logprob, *_ in pairs]
        found.append({"tokens": tokens, "logprobs": logprobs, "weight_version": meta["weight_version"]})
    return found


def probe(cluster: Cluster) -> list[dict[str, str]]:
    message = protocol.Probe().model_dump_json().encode()
    reply = protocol.Reply.model_validate_json(ray.get(cluster.engines[0].actor.control.remote(message, 30.0)))
    assert reply.probe is not None
    return [dict(rank) for rank in reply.probe]


def check(cluster: Cluster, reference: LocalServer, folder: Path) -> None:
    """The engine serves what a load of the trainers' weights serves: every byte, token and logprob."""
    load_exported(cluster, reference, folder)
    assert probe(cluster) == reference.probe()
    replies, wanted = ask(cluster), reference.generate(PROMPTS)
    assert [reply["tokens"] for reply in replies] == [reply["tokens"] for reply in wanted]
    assert [reply["logprobs"] for reply in replies] == [reply["logprobs"] for reply in wanted]


def test_rounds_of_train_push_generate(cluster: Cluster, reference: LocalServer, tmp_path: Path) -> None:
    found = health(cluster.engines[0])
    assert found["state"] == "FENCED" and "--load-format dummy" in found["fence"] and not found["restarted"]
    with pytest.raises(errors.ServerFencedError, match="--load-format dummy"):
        ask(cluster)
    seen = set()
    for number in range(1, NUM_ROUNDS + 1):
        cluster.trainers_do("train_step")
        report = cluster.push()
        assert report["version"] == number and set(report["staging"].values()) == {"kv_pool"}
        load_exported(cluster, reference, tmp_path)
        replies, wanted = ask(cluster, exact=number), reference.generate(PROMPTS)
        assert [reply["tokens"] for reply in replies] == [reply["tokens"] for reply in wanted]
        assert [reply["logprobs"] for reply in replies] == [reply["logprobs"] for reply in wanted]
        assert {reply["weight_version"] for reply in replies} == {str(number)}
        seen.add(str(replies[0]["logprobs"]))
    assert probe(cluster) == reference.probe() and len(seen) == NUM_ROUNDS
    with pytest.raises(errors.VersionMismatchError, match=f"version {NUM_ROUNDS} is served"):
        ask(cluster, minimum=NUM_ROUNDS + 1)


def test_memory_that_is_released_and_resumed(cluster: Cluster, reference: LocalServer, tmp_path: Path) -> None:
    """Resume the weights, push, resume the KV cache. Nothing is served on the way, and nothing is staged."""
    engine = cluster.engines[0].actor
    cluster.trainers_do("train_step")
    version = cluster.push()["version"]
    ray.get(engine.release_memory.remote())
    for again in (engine.release_memory.remote(), engine.release_memory.remote(["weights"])):
        with pytest.raises(errors.ConfigError, match=r"cannot be released now, but of \['cuda_graph'\]"):
            ray.get(again)
    refuses(cluster, "a release of their memory")
    with pytest.raises(errors.IncompatibleServerError, match="resume it first"):
        cluster.push()
    ray.get(engine.resume_memory.remote(["weights"]))
    refuses(cluster, "a release of their memory")
    cluster.trainers_do("train_step")
    report = cluster.push()
    assert report["version"] > version and set(report["staging"].values()) == {"in_place"}
    refuses(cluster, "the KV cache was released")
    ray.get(engine.resume_memory.remote(["kv_cache"]))
    check(cluster, reference, tmp_path)
    ray.get(engine.release_memory.remote(["kv_cache"]))
    refuses(cluster, "the KV cache was released")
    ray.get(engine.resume_memory.remote(["kv_cache"]))
    check(cluster, reference, tmp_path)
    assert set(cluster.push()["staging"].values()) == {"in_place"}, "no better way since the session was opened"


def refuses(cluster: Cluster, why: str) -> None:
    found = health(cluster.engines[0])
    assert found["state"] == "FENCED" and why in found["fence"]
    with pytest.raises(errors.ServerFencedError, match=why):
        ask(cluster)


def test_a_trainer_dies_while_it_pushes(cluster: Cluster, reference: LocalServer, tmp_path: Path) -> None:
    cluster.trainers_do("train_step")
    version = cluster.push()["version"]
    cluster.trainers_do("strike", "receiving", 0)
    start = time.monotonic()
    with pytest.raises(errors.RankMissingError, match="trainer rank 0 died"):
        cluster.push(timeout_s=60.0)
    assert time.monotonic() - start < 50.0
    cluster.set_up_trainers()
    cluster.trainers_do("train_step")
    assert cluster.push()["version"] == version + 1
    check(cluster, reference, tmp_path)


def test_an_engine_dies_and_is_brought_up_before_it_serves(
    cluster: Cluster, reference: LocalServer, tmp_path: Path
) -> None:
    cluster.trainers_do("train_step")
    version, pid = cluster.push()["version"], health(cluster.engines[0])["pid"]
    wanted, states = ask(cluster), set[str]()
    cluster.trainers_do("strike", "receiving", pid)
    with pytest.raises(errors.PushError):
        cluster.push(timeout_s=90.0)
    deadline = time.monotonic() + STARTS_S
    while time.monotonic() < deadline:
        try:
            replies = ask(cluster)
        except (errors.ServerFencedError, RayActorError) as error:
            states.add(type(error).__name__)
            time.sleep(0.05)
            continue
        break
    assert replies == wanted and health(cluster.engines[0])["restarted"] and states
    assert health(cluster.engines[0])["version"] == version
    cluster.trainers_do("train_step")
    assert cluster.push()["version"] == version + 1
    check(cluster, reference, tmp_path)
