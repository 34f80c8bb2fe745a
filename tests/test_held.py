"""Names of tensors that stay the same while a model serves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from receiver_plugin.binding import required_names, trace
from receiver_plugin.held import destinations, modules, plain_tensors
from receiver_plugin.probe import fingerprint
from receiver_plugin.recorder import Source


class Projection(nn.Linear):
    zero_points: torch.Tensor

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.register_buffer("zero_points", torch.zeros(4))
        self.derived = torch.ones(4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Module()
        self.projection = Projection()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        attention = Attention()
        self.layers = nn.ModuleList([attention])
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = attention.projection.weight
        self._projection = (attention.projection,)  # a tuple: no further name

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = {"w": self.head.weight, "z": self._projection[0].zero_points}
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)


NAMES = ["head.weight", "layers.0.projection.zero_points"]


def test_a_later_name_of_a_module_changes_nothing() -> None:
    """As MLA does: kv_b_proj is also attn_mha.kv_b_proj from the first prompt on, and comes first under that name."""
    model = Model()
    sources = [Source("w", (4, 4), torch.float32), Source("z", (4,), torch.float32)]
    before = fingerprint(model), trace(model, sources)
    assert sorted(destinations(model)) == NAMES and before[1].problems == ()
    model.get_submodule("layers.0.core").alias = model.get_submodule("layers.0.projection")
    assert "layers.0.core.alias.zero_points" in dict(model.named_buffers())
    assert (fingerprint(model), trace(model, sources)) == before
    assert sorted(destinations(model)) == sorted(required_names(model)) == NAMES
    assert "layers.0.projection" in modules(model) and "layers.0.core.alias" not in modules(model)
    assert [name for name, _ in plain_tensors(model)] == ["layers.0.projection.derived"]
