"""A local Ray cluster for a test module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Four logical CPUs, whatever the machine has; without what tests alone have in their environment."""
    import ray

    gone = ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with mock.patch.dict(os.environ, RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1"):
        for name in gone:
            os.environ.pop(name, None)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        ray.init(
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        try:
            yield
        finally:
            ray.shutdown()
