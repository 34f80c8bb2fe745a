"""A server of one rank and one of two, in one push: each rank holds what it would have loaded from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import hf_config, make_model, write_config
from sender import FP8BlockConfig, FP8Sender, export_checkpoint
from shared.launch import sglang_fp8_args
from tests.server_fixtures import CHANGES
from tests.test_server_tp import ENV

LAYOUTS: tuple[list[str], ...] = ([], ["--tp-size", "2"])


@pytest.mark.server
def test_servers_of_different_tensor_parallelism_in_one_push(tmp_path: Path) -> None:
    """One of them is fed from the snapshot, after it was fenced by another route."""
    model = make_model(3, **CHANGES)
    export_checkpoint(model, tmp_path / "checkpoint", hf_config=hf_config(**CHANGES))
    fp8 = sglang_fp8_args(str(write_config(tmp_path / "no_weights", **CHANGES)), FP8BlockConfig())
    bytes_of_ranks = []
    with (
        LocalServer([*fp8, *CPU_ARGS], tmp_path / "one.log") as one,
        LocalServer([*fp8, *CPU_ARGS, *LAYOUTS[1]], tmp_path / "two.log", env=ENV) as two,
    ):
        urls = [one.wait().url, two.wait().url]
        with FP8Sender(urls, bucket_bytes=256 << 10, quorum=1, keep_snapshot=True) as sender:
            sender.push(make_model(4, **CHANGES))
            report = sender.push(model)
            assert report.servers == tuple(urls) and report.left_out == {}
            bytes_of_ranks = [one.probe(), two.probe()]
            two.post("/weights_checker", {"action": "reset_tensors"})
            assert two.post("/generate", {"input_ids": [1, 2]}).status_code == 503
            assert sender.catch_up() == (urls[1],)
            assert two.probe() == bytes_of_ranks[1] and two.generate([[11, 12, 13]])
    assert [len(ranks) for ranks in bytes_of_ranks] == [1, 2]
    for layout, ranks in zip(LAYOUTS, bytes_of_ranks, strict=True):
        args = ["--model-path", str(tmp_path / "checkpoint"), *CPU_ARGS, *layout]
        env = {**(ENV if layout else {}), "FP8SYNC_PROBE": "1"}
        with LocalServer(args, tmp_path / f"loaded{len(ranks)}.log", env=env) as loaded:
            loaded.wait()
            assert ranks == loaded.probe()
