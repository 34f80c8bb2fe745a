"""A copy of this checkout with timers in it says where the time of a push went."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.timeline import STEPS, copy_with_timers

PUSH = """
from sender import FP8Sender
from tests.test_push_memory import Server
from tests.tiny_models import Trainer
server = Server()
with FP8Sender([server.control], plane="memory", timeout_s=20.0, bucket_bytes=64 << 10) as sender:
    sender.push(Trainer(seed=1))
    print("== later")
    sender.push(Trainer(seed=2))
"""


def test_steps_of_both_sides_are_timed(tmp_path: Path) -> None:
    copy = tmp_path / "timed"
    copy_with_timers(copy)
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    ran = subprocess.run(
        [sys.executable, "-c", PUSH], cwd=copy, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    later = [line for line in ran.stdout.partition("== later")[2].splitlines() if line.startswith("timer ")]
    steps = {line.partition(": ")[2] for line in later}
    assert {"FP8Sender.push", "Leader.commit", "Receiver.handle begin", "Receiver.handle commit"} <= steps
    assert len([line for line in later if line.endswith("FP8Sender.push")]) == 1


def test_every_step_is_there(tmp_path: Path) -> None:
    """Also those that only a server or a GPU takes."""
    copy_with_timers(tmp_path / "timed")
    modules = [path.removesuffix(".py").replace("/", ".") for path in STEPS if "sglang" not in path]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "timed")}
    words = [sys.executable, "-c", f"import {', '.join(modules)}"]
    ran = subprocess.run(words, cwd=tmp_path / "timed", env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
