"""One GPU, model families with experts, MLA and linear attention, by MoE backend: a push restores what a load left.

One server a cell, as in `tests/test_models.py`: it loads an FP8 checkpoint the stock way, is pushed other weights, and
then those of the checkpoint again. Bytes, tokens and logprobs have to be the first ones. CUDA graphs are captured
before the pushes, so equal tokens mean that they read the pushed weights. All servers share the GPU and start at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from examples.local_server import LocalServer
from sender import FP8Sender, export_checkpoint
from tests.gpu.test_real_server import GPU_ARGS, START_S
from tests.test_models import PROMPTS, assert_all_changed
from tests.zoo import CASES, Case

# What the CUDA kernels want: latents of 512 for MLA.
FULL_LATENTS = {"kv_lora_rank": 512}


@dataclass(frozen=True)
class Cell:
    family: str
    args: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        case = CASES[self.family]
        return replace(case, config={**case.config, **self.changes})


def moe(backend: str) -> tuple[str, ...]:
    return "--moe-runner-backend", backend


CELLS = {
    "qwen3_moe, triton": Cell("qwen3_moe", moe("triton")),
    "qwen3_moe, deep_gemm": Cell("qwen3_moe", moe("deep_gemm")),
    "qwen3_moe, cutlass": Cell("qwen3_moe", moe("cutlass")),
    "qwen2_moe": Cell("qwen2_moe"),
    "glm4_moe": Cell("glm4_moe"),
    "deepseek_v2": Cell("deepseek_v2", changes=FULL_LATENTS),
    "deepseek_v3, triton": Cell("deepseek_v3", ("--fp8-gemm-backend", "triton"), FULL_LATENTS),
    "deepseek_v3, deep_gemm": Cell("deepseek_v3", ("--fp8-gemm-backend", "deep_gemm"), FULL_LATENTS),
    "qwen3_next": Cell("qwen3_next"),
    "qwen3_moe_kept": Cell("qwen3_moe_kept"),
}


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, LocalServer]]:
    """A server for each cell that is to be run, on the checkpoint of `make_model(2)`; still starting."""
    found: dict[str, LocalServer] = {}
    folder = tmp_path_factory.mktemp("models")
    mine = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == Path(__file__)]
    names = [str(item.callspec.params["name"]) for item in mine]
    try:
        for name in names:
            checkpoint, case = folder / name.replace(", ", "-"), CELLS[name].case
            export_checkpoint(case.make_model(2).cuda(), checkpoint, config=case.fp8, hf_config=case.hf_config())
            args = ["--model-path", str(checkpoint), *GPU_ARGS, *CELLS[name].args, "--load-plugin", "fp8sync"]
            found[name] = LocalServer(args, Path(f"{checkpoint}.log"))
        yield found
    finally:
        for server in found.values():
            server.stop()


def served(server: LocalServer) -> list[Any]:
    assert server.post("/flush_cache").status_code == 200
    return [(reply["tokens"], reply["logprobs"]) for reply in server.generate(PROMPTS)]


@pytest.mark.parametrize("name", CELLS)
def test_a_push_equals_a_load(name: str, servers: dict[str, LocalServer]) -> None:
    server, case = servers[name].wait(START_S), CELLS[name].case
    info = server.http.get("/fp8sync/info").json()
    assert (info["state"], info["version"]) == ("SERVING", 0), info["fence"]
    wanted, loaded = served(server), server.probe()
    with FP8Sender([server.url], config=case.fp8) as sender:
        sender.push(case.make_model(1).cuda())
        between = server.probe()
        assert served(server) != wanted
        report = sender.push(case.make_model(2).cuda())
    assert_all_changed(between, loaded)
    assert server.probe() == loaded
    assert served(server) == wanted
    print(name, info["info"]["gemm_backend"], info["info"]["moe_backend"], report, sep=" | ")
