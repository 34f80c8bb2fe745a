"""One SGLang release, end to end on a CPU: a pushed server against one that loaded the exported checkpoint.

The release is the one that `import sglang` finds; `make compat` runs this file once for each supported one, and makes
docs/compat.md of what is recorded. The two servers of a case run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from examples.local_server import CPU_ARGS, LocalServer
from sender import FP8BlockConfig, FP8Sender, export_checkpoint
from shared.launch import sglang_fp8_args
from tests.zoo import CASES, Case

pytestmark = [pytest.mark.server, pytest.mark.models]

PROMPTS = [[11, 12, 13], [100, 200, 300, 400, 500], list(range(3, 40)), [999, 3, 999]]
FAMILIES = ("qwen3", "glm4_moe", "deepseek_v3")  # dense; what a forward keeps; what a load derives
START_S = 240.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_push_equals_a_checkpoint_load(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("model", family)
    record_property("torch", torch.__version__.split("+")[0])
    record_property("transformers", transformers.__version__)
    case = CASES[family]
    with start_fenced(case, tmp_path) as server:
        record_property("sglang", server.http.get("/fp8sync/info").json()["info"]["sglang_version"])
        assert_fenced(server)
        pushed, replies = push_twice(server, case)
        assert "Traceback" not in server.log.read_text()
    loaded, wanted = load(case, tmp_path)
    assert pushed == loaded
    for key in ("tokens", "logprobs"):
        assert [reply[key] for reply in replies] == [reply[key] for reply in wanted]
    num_tokens = sum(len(reply["tokens"]) for reply in replies)
    assert num_tokens >= 4 * len(PROMPTS)
    record_property("proved", f"raw bytes of {len(pushed[0])} tensors, {num_tokens} tokens and their logprobs")


def start_fenced(case: Case, folder: Path) -> LocalServer:
    """A server with the plugin, on a folder without weights."""
    without_weights = case.write_config(folder / "no_weights")
    args = [*sglang_fp8_args(str(without_weights), FP8BlockConfig()), *CPU_ARGS, *case.server_args]
    server = LocalServer(args, folder / "pushed.log", env=dict(case.server_env))
    try:
        return server.wait(START_S)
    except BaseException:
        server.stop()
        raise


def assert_fenced(server: LocalServer) -> None:
    assert server.http.get("/fp8sync/info").json()["state"] == "FENCED"
    refused = server.post("/generate", {"input_ids": [1, 2]})
    assert refused.status_code == 503 and "--load-format dummy" in refused.json()["error"]["message"]
    assert server.http.get("/health").status_code == 503


def push_twice(server: LocalServer, case: Case) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """What the server holds and answers after two pushes, whose versions its replies have to name."""
    with FP8Sender([server.url], timeout_s=120.0) as sender:
        assert sender.push(case.make_model(1)).version == 1
        first = server.generate(PROMPTS)
        assert sender.push(case.make_model(2)).version == 2
    second = server.generate(PROMPTS)
    assert {reply["weight_version"] for reply in first} == {"1"}
    assert {reply["weight_version"] for reply in second} == {"2"}
    assert [reply["logprobs"] for reply in first] != [reply["logprobs"] for reply in second]
    assert server.http.get("/fp8sync/info").json()["state"] == "SERVING"
    return server.probe(), second


def load(case: Case, folder: Path) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The same of a server without the plugin that loaded the checkpoint of the second push."""
    export_checkpoint(case.make_model(2), folder / "checkpoint", hf_config=case.hf_config())
    args = ["--model-path", str(folder / "checkpoint"), *CPU_ARGS, *case.server_args]
    env = {**case.server_env, "FP8SYNC_PROBE": "1"}
    with LocalServer(args, folder / "loaded.log", env=env) as server:
        server.wait(START_S)
        replies = server.generate(PROMPTS)
        assert {reply["weight_version"] for reply in replies} == {"default"}
        return server.probe(), replies
