"""Rows quantized before the gather on GPUs: the same bytes as whole tensors give, over NCCL, in a few launches."""

from __future__ import annotations

import pytest
import torch

from tests.test_early import check_both_ways, pack_both_ways
from tests.test_ranks import run_on_ranks


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_bucket_has_the_same_bytes_over_nccl() -> None:
    size = torch.cuda.device_count()
    check_both_ways(run_on_ranks(pack_both_ways, size, size, "cuda", timeout_s=300.0, backend="nccl"))
