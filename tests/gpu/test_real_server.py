"""One GPU, real SGLang servers: a push over HTTP and gloo, then byte and token equality with a checkpoint load.

Trainer and both servers share the GPU. CUDA graphs are captured on the dummy weights of the start, so equal tokens mean
that the captured graphs read the pushed weights at their old addresses. The hidden size is a multiple of the block:
SGLang's CUDA kernels quantize activations in whole groups of 128.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from examples.local_server import LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8Sender, export_checkpoint
from sender.quantize import backend_name
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args

CHANGES = {"hidden_size": 256}
PROMPTS = [[11, 12, 13], [100, 200, 300, 400, 500], list(range(3, 40)), [999, 3, 999]]
GPU_ARGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--skip-tokenizer-init", "--max-total-tokens", "4096", "--mem-fraction-static", "0.1"),
    *("--max-running-requests", "8", "--random-seed", "1"),
)
START_S = 240.0


@pytest.fixture(scope="module", params=["triton", "deep_gemm"])
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalServer, LocalServer, torch.nn.Module]]:
    """The server to push to (fenced), one that loaded the export of the second model, and that model."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(seed=2, **CHANGES).cuda()
    export_checkpoint(model, folder / "checkpoint", hf_config=hf_config(**CHANGES))
    gpu = [*GPU_ARGS, "--fp8-gemm-backend", request.param]
    args = sglang_fp8_args(str(write_config(folder / "no_weights", **CHANGES)), FP8BlockConfig())
    reference = ["--model-path", str(folder / "checkpoint"), *gpu]
    with (
        LocalServer([*args, *gpu], folder / f"{request.param}-pushed.log") as pushed,
        LocalServer(reference, folder / f"{request.param}-loaded.log", env={"FP8SYNC_PROBE": "1"}) as loaded,
    ):
        yield pushed.wait(START_S), loaded.wait(START_S), model
        for server in (pushed, loaded):
            print(f"== {server.log}\n{server.log_end(15)}")


def test_a_push_equals_a_checkpoint_load(servers: tuple[LocalServer, LocalServer, torch.nn.Module]) -> None:
    pushed, loaded, model = servers
    assert pushed.post("/generate", {"input_ids": [1, 2, 3]}).status_code == 503
    assert "Capture" in pushed.log.read_text() or "cuda graph" in pushed.log.read_text().lower()
    assert backend_name("cuda") == "triton"
    with FP8Sender([pushed.url]) as sender:
        first = sender.push(make_model(seed=1, **CHANGES).cuda())
        others = pushed.generate(PROMPTS)
        second = sender.push(model)
        print(first, second, sep="\n")
    assert (first.version, second.version) == (1, 2)
    assert pushed.probe() == loaded.probe()
    tokens, wanted = pushed.generate(PROMPTS), loaded.generate(PROMPTS)
    assert [reply["tokens"] for reply in tokens] == [reply["tokens"] for reply in wanted]
    assert [reply["logprobs"] for reply in tokens] == [reply["logprobs"] for reply in wanted]
    assert {reply["weight_version"] for reply in tokens} == {"2"}
    assert [reply["logprobs"] for reply in others] != [reply["logprobs"] for reply in tokens]
    checksums = pushed.checksums()
    assert checksums["success"] and checksums == loaded.checksums()
