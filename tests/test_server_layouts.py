"""Layouts of ranks, each on real processes: what every rank holds after a push is what it would load from a checkpoint.

The layouts that every `make test` proves are in `test_server_tp.py` and `test_server_dp.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8BlockConfig, FP8Sender, export_checkpoint
from shared.launch import sglang_fp8_args

pytestmark = [pytest.mark.server, pytest.mark.models]

PROMPTS = [[11, 12, 13], list(range(3, 40))]
# One head a rank at TP 4, and two KV heads, so that two ranks hold copies of the same.
TWO_KV_HEADS = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 4, "intermediate_size": 512}
LAYOUTS = {
    "tp4-kv-heads-replicated": ("--tp-size", "4"),
    "tp2-dp2": ("--tp-size", "2", "--dp-size", "2"),
}


def environment(num_ranks: int) -> dict[str, str]:
    """Cores by rank, shared in turn; a CUDA build of torch ships an NCCL that SGLang would otherwise try."""
    cores = "|".join(str(rank % 2) for rank in range(num_ranks))
    return {"SGLANG_CPU_OMP_THREADS_BIND": cores, "SGLANG_NCCL_SO_PATH": "none"}


def outputs(server: LocalServer) -> list[Any]:
    """From an empty KV cache: with four ranks, SGLang's own logprobs differ by 1e-5 with what the cache has seen."""
    assert server.post("/flush_cache").status_code == 200
    return [(reply["tokens"], reply["logprobs"]) for reply in server.generate(PROMPTS)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_equals_a_checkpoint_load(layout: str, tmp_path: Path) -> None:
    args, env, model = [*CPU_ARGS, *LAYOUTS[layout]], environment(4), make_model(3, **TWO_KV_HEADS)
    export_checkpoint(model, tmp_path / "checkpoint", hf_config=hf_config(**TWO_KV_HEADS))
    fp8 = sglang_fp8_args(str(write_config(tmp_path / "no_weights", **TWO_KV_HEADS)), FP8BlockConfig())
    with LocalServer([*fp8, *args], tmp_path / "pushed.log", env=env) as pushed:
        pushed.wait(300.0)
        with FP8Sender([pushed.url], bucket_bytes=256 << 10) as sender:
            sender.push(make_model(4, **TWO_KV_HEADS))
            sender.push(model)
        bytes_of_ranks, found = pushed.probe(), outputs(pushed)
    loaded_args = ["--model-path", str(tmp_path / "checkpoint"), *args]
    with LocalServer(loaded_args, tmp_path / "loaded.log", env={**env, "FP8SYNC_PROBE": "1"}) as loaded:
        loaded.wait(300.0)
        assert len(bytes_of_ranks) == 4 and bytes_of_ranks == loaded.probe()
        assert found == outputs(loaded)
