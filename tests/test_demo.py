"""`make demo`, as a user runs it: the ragged model, FSDP2 under torchrun, two servers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.server
def test_the_demo_ends_with_equality() -> None:
    command = [sys.executable, "-m", "examples.demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "before the first push it answers 503" in done.stdout
    assert all(f"(weight_version {version})" in done.stdout for version in (1, 2, 3))
    assert done.stdout.splitlines()[-1] == "demo ok: 28 of 28 tensors identical, 64 of 64 tokens identical"
