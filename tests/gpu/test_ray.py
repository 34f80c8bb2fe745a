"""Under Ray on GPUs: the example as a user runs it. Without Ray: memory that an engine gives back and takes again."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.gpu.test_real_server import GPU_ARGS
from tests.test_server_engine import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed on this host")
def test_the_example_ends_with_equality() -> None:
    """A trainer on each of the first two GPUs, or on the only one, and the engine on the first, over CUDA IPC."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.ray_colocated", "--rounds", "5"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=580,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert f"on {min(torch.cuda.device_count(), 2)} GPU(s)" in done.stdout and "engine is FENCED" in done.stdout
    assert done.stdout.splitlines()[-1] == "ray ok: every byte and every token agrees"


DANCE = """
import sys
from pathlib import Path
import torch
from examples.tiny_qwen3 import make_model, write_config
from receiver_plugin import engine as fp8
from sender import FP8BlockConfig, FP8Sender
from shared import errors
from shared.launch import sglang_fp8_args

CHANGES = {"hidden_size": 256}

def refused(call, why):
    try:
        call()
    except errors.ServerFencedError as error:
        assert why in str(error), error
        return
    raise AssertionError("it was served")

def main():
    folder = write_config(Path(sys.argv[1]) / "no_weights", **CHANGES)
    args = [*sys.argv[2:], "--enable-memory-saver", "--fp8sync-staging", "0"]
    control = fp8.start(sglang_fp8_args(str(folder), FP8BlockConfig(), user_args=args))
    engine, sampling = control.engine, {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    ask = lambda: engine.generate(input_ids=[11, 12, 13], sampling_params=sampling)["output_ids"]
    models = {seed: make_model(seed, **CHANGES).cuda() for seed in (1, 2)}
    with FP8Sender([control], plane="same_host", timeout_s=120.0) as sender:
        tokens = {}
        for seed, model in models.items():
            print(sender.push(model).staging)
            tokens[seed] = ask()
        assert tokens[1] != tokens[2], tokens
        for seed in (1, 2, 1):
            while not engine.flush_cache().success:  # SGLang ends its schedulers if they are not yet idle
                pass
            engine.release_memory_occupation(["weights", "kv_cache"])
            refused(ask, "a release of their memory")
            engine.resume_memory_occupation(["weights"])
            refused(ask, "a release of their memory")
            report = sender.push(models[seed])
            assert set(report.staging.values()) == {"in_place"}, report
            refused(ask, "KV cache was released")
            engine.resume_memory_occupation(["kv_cache"])
            assert ask() == tokens[seed]
            print("resumed, pushed in", report.seconds["total"], "s")
    engine.shutdown()
    print("the engine did all that")

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(find_spec("torch_memory_saver") is None, reason="torch_memory_saver is not installed on this host")
def test_memory_is_released_and_resumed(tmp_path: Path) -> None:
    """Weights, push, KV cache, three times: straight into weights in memory of torch_memory_saver."""
    script = tmp_path / "dance.py"
    script.write_text(DANCE)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *GPU_ARGS],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=580,
    )
    print(done.stdout)
    assert done.returncode == 0 and "the engine did all that" in done.stdout, done.stderr[-6000:]
