"""Two GPUs, real SGLang servers with `--tp 2`: every rank holds what it would hold after a checkpoint load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.local_server import LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8Sender, export_checkpoint
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from shared.protocol import InFlight
from tests.gpu.test_real_server import GPU_ARGS, PROMPTS, START_S
from tests.server_fixtures import CHANGES

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

TP_ARGS = (*GPU_ARGS, "--fp8-gemm-backend", "triton", "--tp", "2", "--disable-custom-all-reduce")


def test_a_push_to_two_ranks_equals_a_checkpoint_load(tmp_path: Path) -> None:
    model = make_model(seed=2, **CHANGES).cuda()
    export_checkpoint(model, tmp_path / "checkpoint", hf_config=hf_config(**CHANGES))
    args = sglang_fp8_args(str(write_config(tmp_path / "no_weights", **CHANGES)), FP8BlockConfig())
    reference = ["--model-path", str(tmp_path / "checkpoint"), *TP_ARGS]
    ways: tuple[InFlight, ...] = ("wait", "retract", "keep")
    with (
        LocalServer([*args, *TP_ARGS], tmp_path / "tp2-pushed.log") as pushed,
        LocalServer(reference, tmp_path / "tp2-loaded.log", env={"FP8SYNC_PROBE": "1"}) as loaded,
    ):
        pushed.wait(START_S), loaded.wait(START_S)
        wanted, tokens = loaded.probe(), loaded.generate(PROMPTS)
        assert len(wanted) == 2 and wanted[0] != wanted[1]
        for in_flight in ways:
            with FP8Sender([pushed.url], in_flight=in_flight) as sender:
                sender.push(make_model(seed=1, **CHANGES).cuda())
                assert pushed.generate(PROMPTS)[0]["logprobs"] != tokens[0]["logprobs"]
                report = sender.push(model)
            print(in_flight, report)
            assert pushed.probe() == wanted
            for mine, other in zip(pushed.generate(PROMPTS), tokens, strict=True):
                assert (mine["tokens"], mine["logprobs"]) == (other["tokens"], other["logprobs"])
