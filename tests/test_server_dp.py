"""Two replicas behind one URL (`--dp-size 2`): one push reaches both, and what both hold is what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8BlockConfig, FP8Sender, export_checkpoint
from shared.launch import sglang_fp8_args
from tests.server_fixtures import CHANGES
from tests.test_server_keep import Asking, cached

pytestmark = pytest.mark.server

# A CUDA build of torch ships an NCCL that SGLang would otherwise try on the CPU.
ENV = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "none"}
ARGS = [*CPU_ARGS, "--dp-size", "2"]
PROMPTS = [[11, 12, 13], list(range(3, 40))]
MORE_THAN_ARE_AWAITED = 1900
CONFIG = {**CHANGES, "max_position_embeddings": 2000}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("dp")
    fp8 = sglang_fp8_args(str(write_config(folder / "no_weights", **CONFIG)), FP8BlockConfig())
    with LocalServer([*fp8, *ARGS], folder / "pushed.log", env=ENV) as started:
        yield started.wait()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model(3, **CHANGES)


def replies_of(server: LocalServer, replica: int) -> list[dict[str, Any]]:
    assert server.post("/flush_cache").status_code == 200  # so that all servers are asked in the same state
    sampling = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
    request = {"sampling_params": sampling, "return_logprob": True, "routed_dp_rank": replica}
    found = []
    for prompt in PROMPTS:
        response = server.post("/generate", {"input_ids": prompt, **request})
        response.raise_for_status()
        found.append(response.json())
    return found


def versions(replies: list[dict[str, Any]]) -> set[str]:
    return {reply["meta_info"]["weight_version"] for reply in replies}


def output(replies: list[dict[str, Any]]) -> list[Any]:
    return [reply["meta_info"]["output_token_logprobs"] for reply in replies]


def test_it_starts_fenced(server: LocalServer) -> None:
    found = server.http.get("/fp8sync/info").json()
    assert found["state"] == "FENCED" and found["info"]["num_ranks"] == 2
    assert "--load-format dummy" in found["fence"] and "replica" not in found["fence"]
    assert server.post("/generate", {"input_ids": [1, 2]}).status_code == 503


def test_both_replicas_equal_a_checkpoint_load(server: LocalServer, model: nn.Module, tmp_path: Path) -> None:
    with FP8Sender([server.url], bucket_bytes=256 << 10) as sender:
        sender.push(make_model(4, **CHANGES))
        before = [replies_of(server, replica) for replica in range(2)]
        assert sender.push(model).num_buckets > 3
    bytes_of_ranks, after = server.probe(), [replies_of(server, replica) for replica in range(2)]
    assert [versions(found) for found in (*before, *after)] == [{"1"}, {"1"}, {"2"}, {"2"}]
    assert output(before[0]) == output(before[1]) != output(after[0])
    export_checkpoint(model, tmp_path / "checkpoint", hf_config=hf_config(**CONFIG))
    args = ["--model-path", str(tmp_path / "checkpoint"), *CPU_ARGS]
    with LocalServer(args, tmp_path / "loaded.log", env={**ENV, "FP8SYNC_PROBE": "1"}) as loaded:
        loaded.wait()
        assert bytes_of_ranks == loaded.probe() * 2
        wanted = replies_of(loaded, 0)
    assert output(after[0]) == output(after[1]) == output(wanted)


def test_requests_of_both_go_on_across_a_commit(server: LocalServer, model: nn.Module) -> None:
    """What is said of a token is what its replica did. They stand still meanwhile: two that generate leave a trainer on
    the same two cores no time, and would be done before it.
    """
    prompt, first = PROMPTS[0], make_model(5, **CHANGES)
    with closing(Asking(server)) as ask, FP8Sender([server.url], in_flight="keep") as sender:
        before = sender.push(first).version
        streams = [ask.stream(prompt, MORE_THAN_ARE_AWAITED, routed_dp_rank=replica) for replica in range(2)]
        for stream, _ in streams:
            stream.until(5)
        assert server.post("/pause_generation", {"mode": "in_place"}).status_code == 200
        after = sender.push(model).version
        assert not any(done.done() for _, done in streams)
        assert server.post("/continue_generation").status_code == 200
        for stream, _ in streams:
            stream.until(20)
        assert server.post("/abort_request", {"abort_all": True}).status_code == 200
        for stream, done in streams:
            done.result()
            assert [span["version"] for span in stream.spans] == [str(before), str(after)]
        again = [ask.now(prompt, routed_dp_rank=replica) for replica in range(2)]
        fresh = [replies_of(server, replica)[0] for replica in range(2)]
        assert [cached(reply) for reply in again] == [0, 0]
        assert all(a["output_ids"] == f["output_ids"][:8] for a, f in zip(again, fresh, strict=True))
        sender.push(first)
        for stream, _ in streams:
            switched = stream.spans[0]["end"]
            old = ask.now(prompt, switched + 8)["output_ids"]
            assert stream.tokens[:switched] == old[:switched]
            assert stream.tokens[switched : switched + 8] != old[switched:]


def test_another_sender_may_take_over(server: LocalServer, model: nn.Module) -> None:
    with FP8Sender([server.url]) as other:
        version = other.push(model).version
    found = server.http.get("/fp8sync/info").json()
    assert (found["state"], found["version"]) == ("SERVING", version)


def test_a_stock_update_fences_both_until_the_next_push(server: LocalServer, model: nn.Module, tmp_path: Path) -> None:
    export_checkpoint(model, tmp_path / "checkpoint", hf_config=hf_config(**CONFIG))
    server.post("/update_weights_from_disk", {"model_path": str(tmp_path / "checkpoint")})
    found = server.http.get("/fp8sync/info").json()
    assert found["state"] == "FENCED" and "UpdateWeightFromDisk" in found["fence"]
    assert server.post("/generate", {"input_ids": [1, 2]}).status_code == 503
    with FP8Sender([server.url]) as sender:
        version = sender.push(model).version
    assert [versions(replies_of(server, replica)) for replica in range(2)] == [{str(version)}] * 2
