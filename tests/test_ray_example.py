"""The example of trainers and an engine under Ray, as a user runs it on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_server_engine import environment

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "ray_colocated.py"


def test_it_stays_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 120


@pytest.mark.server
def test_the_example_ends_with_equality() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.ray_colocated", "--rounds", "3"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "before the first push the engine is FENCED" in done.stdout
    assert all(f"version {version}: loss" in done.stdout for version in (1, 2, 3))
    assert done.stdout.splitlines()[-1] == "ray ok: every byte and every token agrees"
