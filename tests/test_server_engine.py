"""A real `sgl.Engine` under the plugin: pushes, demands and fences in one process, from one thread and from two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.local_server import _clean_environment

ROOT = Path(__file__).resolve().parent.parent

ENGINE = """
import asyncio, sys
from pathlib import Path
import torch
from examples.local_server import CPU_ARGS
from examples.tiny_qwen3 import hf_config, make_model, write_config
from receiver_plugin import engine as fp8
from sender import FP8BlockConfig, FP8Sender, export_checkpoint
from shared import errors
from shared.launch import sglang_fp8_args
from tests.server_fixtures import CHANGES

def expect(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")

def main():
    folder = write_config(Path(sys.argv[1]) / "no_weights", **CHANGES)
    control = fp8.start(sglang_fp8_args(str(folder), FP8BlockConfig(), user_args=CPU_ARGS))
    engine, sampling = control.engine, {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    ask = lambda **more: engine.generate(input_ids=[1, 2, 3], sampling_params=sampling, **more)
    assert "--load-format dummy" in expect(errors.ServerFencedError, ask)
    with FP8Sender([control], timeout_s=60.0) as sender:
        assert sender.push(make_model(1, **CHANGES)).version == 1
        first = ask()
        assert first["meta_info"]["weight_version"] == "1", first
        with fp8.requires_version(minimum=2) as versions:
            assert "version 1 is served" in expect(errors.VersionMismatchError, ask)
            batch = lambda: engine.generate(input_ids=[[1, 2], [3, 4]], sampling_params=sampling)
            assert "version 1 is served" in expect(errors.VersionMismatchError, batch)
            assert "version 1 is served" in expect(errors.VersionMismatchError, lambda: list(ask(stream=True)))
            assert versions.start is None
        with fp8.requires_version(exact=1) as versions:
            assert ask()["output_ids"] == first["output_ids"]
        assert (versions.start, versions.end) == (1, 1)
        assert sender.push(make_model(2, **CHANGES)).version == 2
        with fp8.requires_version(minimum=2) as versions:
            chunks = list(ask(stream=True))
        assert (versions.start, versions.end) == (2, 2) and chunks[-1]["meta_info"]["weight_version"] == "2"
        second = ask()
        assert second["output_ids"] != first["output_ids"]

        async def together():
            replies = [asyncio.create_task(engine.async_generate(input_ids=[1, 2, 3], sampling_params=sampling))
                       for _ in range(4)]
            report = await asyncio.to_thread(sender.push, make_model(1, **CHANGES))
            with fp8.requires_version(exact=3) as versions:
                after = await engine.async_generate(input_ids=[1, 2, 3], sampling_params=sampling)
            return report, await asyncio.gather(*replies), after

        report, before, after = engine.loop.run_until_complete(together())
        assert report.version == 3 and after["output_ids"] == first["output_ids"]
        assert after["meta_info"]["weight_version"] == "3"
        tokens = {"2": second["output_ids"], "3": first["output_ids"]}
        assert all(reply["output_ids"] == tokens[reply["meta_info"]["weight_version"]] for reply in before)

        export_checkpoint(make_model(5, **CHANGES), Path(sys.argv[1]) / "checkpoint", hf_config=hf_config(**CHANGES))
        ok, message, *_ = engine.update_weights_from_disk(str(Path(sys.argv[1]) / "checkpoint"), "safetensors")
        assert ok, message
        assert "UpdateWeightFromDisk" in expect(errors.ServerFencedError, ask)
        assert sender.push(make_model(2, **CHANGES)).version == 4
        assert ask()["output_ids"] == second["output_ids"]
    engine.shutdown()
    print("the engine did all that")

if __name__ == "__main__":
    main()
"""


@pytest.mark.server
def test_a_real_engine(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0 and "the engine did all that" in done.stdout, done.stderr[-6000:]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**_clean_environment(), "PYTHONPATH": path}
