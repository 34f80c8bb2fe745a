"""Two tensor-parallel ranks: each holds, after a push, what it would have loaded from a checkpoint."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8BlockConfig, FP8Sender, export_checkpoint
from shared.launch import sglang_fp8_args
from tests.server_fixtures import CHANGES
from tests.test_server_keep import Asking, cached

# One entry per rank; a CUDA build of torch ships an NCCL that SGLang would otherwise try on the CPU.
ENV = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_NCCL_SO_PATH": "none"}
ARGS = [*CPU_ARGS, "--tp-size", "2"]
PROMPTS = [[11, 12, 13], list(range(3, 40))]


@pytest.mark.server
def test_both_ranks_equal_a_checkpoint_load(tmp_path: Path) -> None:
    model = make_model(3, **CHANGES)
    export_checkpoint(model, tmp_path / "checkpoint", hf_config=hf_config(**CHANGES))
    fp8 = sglang_fp8_args(str(write_config(tmp_path / "no_weights", **CHANGES)), FP8BlockConfig())
    with LocalServer([*fp8, *ARGS], tmp_path / "pushed.log", env=ENV) as pushed:
        pushed.wait()
        with FP8Sender([pushed.url], bucket_bytes=256 << 10) as sender:
            sender.push(make_model(4, **CHANGES))
            assert sender.push(model).num_buckets > 3
        _go_on_across_a_commit(pushed, 3)
        slices = FP8Sender([pushed.url], bucket_bytes=256 << 10, plane="same_host", send_from="holders")
        with slices as sender:  # each rank is written its own
            for weights in (make_model(4, **CHANGES), model):
                assert sender.push(weights).staging == {pushed.url: "reserved"}
        bytes_of_ranks, replies = pushed.probe(), pushed.generate(PROMPTS)
    loaded_args = ["--model-path", str(tmp_path / "checkpoint"), *ARGS]
    with LocalServer(loaded_args, tmp_path / "loaded.log", env={**ENV, "FP8SYNC_PROBE": "1"}) as loaded:
        loaded.wait()
        assert bytes_of_ranks == loaded.probe()
        wanted = loaded.generate(PROMPTS)
    assert len(bytes_of_ranks) == 2 and bytes_of_ranks[0] != bytes_of_ranks[1]
    assert [(r["tokens"], r["logprobs"]) for r in replies] == [(r["tokens"], r["logprobs"]) for r in wanted]


def _go_on_across_a_commit(server: LocalServer, seed: int) -> None:
    """Ends on the weights that it began with: those of `seed`."""
    prompt, num_tokens = PROMPTS[0], 400
    with closing(Asking(server)) as ask, FP8Sender([server.url], in_flight="keep") as sender:
        old = ask.now(prompt, num_tokens)["output_ids"]
        stream, done = ask.stream(prompt, num_tokens)
        for weights in (4, seed):
            stream.until(20)
            sender.push(make_model(weights, **CHANGES))
        done.result()
        first, _, third = stream.spans
        assert stream.tokens[: first["end"]] == old[: first["end"]] and third["end"] == num_tokens
        again = ask.now(prompt, num_tokens)
        assert cached(again) == 0 and again["output_ids"] == old != stream.tokens
