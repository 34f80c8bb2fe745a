"""For every family: the names, shapes and bytes that a sender offers are those that `save_pretrained` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sender.source import ModuleSource
from tests.zoo import CASES


@pytest.mark.parametrize("name", CASES)
def test_a_push_offers_what_a_checkpoint_holds(name: str, tmp_path: Path) -> None:
    model: Any = CASES[name].make_model(seed=7)
    model.save_pretrained(tmp_path)
    saved = {key: tensor for file in tmp_path.glob("*.safetensors") for key, tensor in load_file(file).items()}
    source = ModuleSource(model)
    offered = source.gather([tensor.name for tensor in source.tensors])
    assert sorted(offered) == sorted(saved)
    assert [key for key in saved if not torch.equal(offered[key], saved[key])] == []
    assert {tensor.name: tensor.dtype for tensor in source.tensors} == {key: _name(t) for key, t in saved.items()}


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
