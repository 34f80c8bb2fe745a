"""Real SGLang servers on the CPU, shared by all tests that need one (about 25 s each)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8BlockConfig, export_checkpoint
from shared.launch import sglang_fp8_args

ADMIN_KEY = "an admin key of the tests"
# Whole blocks, because SGLang's own /weights_checker judges no others; the demo has the ragged sizes.
CHANGES = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512}
REFERENCE_SEED = 5


@pytest.fixture(scope="session")
def server_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def pushed_server(server_logs: Path) -> Iterator[LocalServer]:
    """Started with `--load-plugin fp8sync` and an admin key, on a folder without weights."""
    folder = write_config(server_logs / "no_weights", **CHANGES)
    args = [*sglang_fp8_args(str(folder), FP8BlockConfig()), *CPU_ARGS, "--admin-api-key", ADMIN_KEY]
    with LocalServer(args, server_logs / "pushed.log", key=ADMIN_KEY) as server:
        yield server.wait()


@pytest.fixture(scope="session")
def loaded_server(server_logs: Path) -> Iterator[LocalServer]:
    """Started without the plugin, on the exported FP8 checkpoint of `make_model(REFERENCE_SEED)`."""
    model = make_model(REFERENCE_SEED, **CHANGES)
    export_checkpoint(model, server_logs / "checkpoint", hf_config=hf_config(**CHANGES))
    args = ["--model-path", str(server_logs / "checkpoint"), *CPU_ARGS]
    with LocalServer(args, server_logs / "loaded.log", env={"FP8SYNC_PROBE": "1"}) as server:
        yield server.wait()
