"""What all tests share. Triton runs under its interpreter where there is no GPU; GPU tests are marked here only."""

from __future__ import annotations

import os

import pytest
import torch

pytest_plugins = ["tests.server_fixtures", "tests.ray_fixtures"]
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton; servers are started without it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail unless a GPU test ran and passed")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that was meant for a GPU is no success if every GPU test was skipped."""
    if not session.config.getoption("--require-gpu") or exitstatus != 0:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = reporter.stats.get("passed", []) if reporter is not None else []
    if not any("tests/gpu/" in report.nodeid for report in passed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if not HAS_GPU:
                item.add_marker(pytest.mark.skip(reason="no GPU"))
