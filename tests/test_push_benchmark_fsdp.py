"""The sharded trainer of `benchmarks.push --fsdp`: the weights of a seed are those of the one that is whole."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from benchmarks.fsdp import Ranks, ShardedTrainer, job_of
from benchmarks.shapes import MODELS, Trainer
from benchmarks.ways import Way
from tests.test_ranks import run_on_ranks

CPU = torch.device("cpu")


def what_differs(rank: int) -> list[str]:
    wrong = []
    for name in ("tiny", "tiny-moe"):
        whole, sharded = Trainer(MODELS[name], CPU), ShardedTrainer(MODELS[name], CPU)
        assert all(isinstance(parameter, DTensor) for parameter in sharded.model.parameters())
        for seed in (1, 2):
            whole.fill(seed)
            sharded.fill(seed)
            theirs = dict(whole.model.named_parameters())
            for key, parameter in sharded.model.named_parameters():
                assert isinstance(parameter, DTensor)
                if not torch.equal(parameter.full_tensor(), theirs.pop(key)):
                    wrong.append(f"{name} {seed} {key}")
            assert not theirs
    return wrong


def test_sharded_weights_are_those_of_the_whole_model() -> None:
    assert run_on_ranks(what_differs, 2) == [[], []]


def test_a_rank_that_fails_is_told(tmp_path: Path) -> None:
    way = Way("tcp", "in_place", 1 << 20)
    chosen = Namespace(model="no such model", layers=None, experts=None, pushes=1)
    job = job_of(chosen, way, ["http://127.0.0.1:9"], tmp_path / "row.json")
    ranks = Ranks(job, [{}, {}], tmp_path / "log")
    try:
        with pytest.raises(RuntimeError, match=r"rank \d ended with code 1: "):
            ranks.row()
    finally:
        ranks.stop()
    assert not (tmp_path / "row.json").exists()
