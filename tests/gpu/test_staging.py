"""One GPU, a real SGLang server in each way of staging, with CUDA graphs: bytes and tokens of a checkpoint load.

One server has memory reserved for staging, another none. What was captured before the pushes reads the pushed weights,
and a KV cache that has held weights computes what one that has not computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples.local_server import LocalServer
from examples.tiny_qwen3 import hf_config, make_model
from sender import FP8Sender, export_checkpoint
from shared import errors
from shared.protocol import StagingWay
from tests.gpu.test_real_server import CHANGES, GPU_ARGS, START_S
from tests.test_models import PROMPTS

WAYS: tuple[StagingWay, ...] = ("reserved", "kv_pool", "in_place")
RESERVED_GB = 0.5
# Weights and a KV cache that may be released, as where a trainer shares the GPU.
SAVER = ("--enable-memory-saver",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("staging")
    export_checkpoint(make_model(seed=2, **CHANGES).cuda(), made / "checkpoint", hf_config=hf_config(**CHANGES))
    return made


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, LocalServer]]:
    """By what they reserve; on the checkpoint of `make_model(2)`."""
    found: dict[str, LocalServer] = {}
    try:
        for staging in (str(RESERVED_GB), "0", "auto"):
            plugin = ["--load-plugin", "fp8sync", "--fp8sync-staging", staging]
            args = ["--model-path", str(folder / "checkpoint"), *GPU_ARGS, *plugin]
            found[staging] = LocalServer(args, folder / f"reserve-{staging}.log")
        yield found
    finally:
        for server in found.values():
            server.stop()


def served(server: LocalServer) -> list[object]:
    assert server.post("/flush_cache").status_code == 200
    return [(reply["tokens"], reply["logprobs"]) for reply in server.generate(PROMPTS)]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_restores_what_a_load_left(way: StagingWay, servers: dict[str, LocalServer]) -> None:
    server = servers[str(RESERVED_GB) if way == "reserved" else "0"].wait(START_S)
    wanted, loaded = served(server), server.probe()
    with FP8Sender([server.url], staging=way, bucket_bytes=4 << 20) as sender:
        first = sender.push(make_model(seed=1, **CHANGES).cuda())
        assert served(server) != wanted
        report = sender.push(make_model(seed=2, **CHANGES).cuda())
    print(way, first, report, sep="\n")
    assert first.staging == report.staging == {server.url: way}
    assert server.probe() == loaded
    assert served(server) == wanted


def test_reserved_memory_is_there_before_the_kv_cache(servers: dict[str, LocalServer]) -> None:
    for staging, server in servers.items():
        log = server.wait(START_S).log.read_text()
        reserved, pool = log.index("GB reserved for staging"), log.index("KV Cache is allocated")
        print(staging, log[reserved - 40 : reserved + 200].splitlines()[0])
        assert reserved < pool


def test_without_memory_the_kv_cache_is_taken(servers: dict[str, LocalServer]) -> None:
    server = servers["0"].wait(START_S)
    with FP8Sender([server.url], bucket_bytes=4 << 20) as sender:
        assert sender.push(make_model(seed=2, **CHANGES).cuda()).staging == {server.url: "kv_pool"}
    with FP8Sender([server.url], staging="reserved") as sender, pytest.raises(errors.PlanError, match="--fp8sync-stag"):
        sender.push(make_model(seed=2, **CHANGES).cuda())


def test_in_place_a_push_that_ends_on_the_way_fences(servers: dict[str, LocalServer]) -> None:
    server = servers["0"].wait(START_S)
    loaded, model = server.probe(), make_model(seed=3, **CHANGES).cuda()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[100, 200] = float("nan")
    with FP8Sender([server.url], staging="in_place", bucket_bytes=64 << 10) as sender:
        with pytest.raises(errors.NonFiniteWeightError):
            sender.push(model)
        assert server.post("/generate", {"input_ids": [1, 2, 3]}).status_code == 503
        sender.push(make_model(seed=2, **CHANGES).cuda())
    assert server.probe() == loaded


def test_a_released_kv_cache_is_not_lent(folder: Path) -> None:
    """Reserved memory stays where it is when the rest is released."""
    args = ["--model-path", str(folder / "checkpoint"), *GPU_ARGS, *SAVER, "--load-plugin", "fp8sync"]
    with LocalServer([*args, "--fp8sync-staging", str(RESERVED_GB)], folder / "saver.log") as server:
        server.wait(START_S)
        wanted, loaded = served(server), server.probe()
        assert server.post("/release_memory_occupation", {"tags": ["kv_cache"]}).status_code == 200
        with FP8Sender([server.url], staging="kv_pool") as sender, pytest.raises(errors.PlanError, match="resume it"):
            sender.push(make_model(seed=1, **CHANGES).cuda())
        with FP8Sender([server.url], bucket_bytes=4 << 20) as sender:
            assert sender.push(make_model(seed=1, **CHANGES).cuda()).staging == {server.url: "reserved"}
            assert server.post("/resume_memory_occupation", {"tags": ["kv_cache"]}).status_code == 200
            sender.push(make_model(seed=2, **CHANGES).cuda())
        assert server.probe() == loaded and served(server) == wanted
