"""Whatever changes in a model is seen without a look at all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from receiver_plugin.makeup import Makeup


@dataclass
class Held:
    values: list[Any] = field(default_factory=lambda: [None, {"a": (1, [2])}])
    cache: torch.Tensor | None = None


def make() -> Any:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    layer = model[1][0]
    layer.quant_method = SimpleNamespace(fused=None)
    layer.cache = None
    layer.parts = {"a": [None, (None,)]}
    layer.held = Held()
    layer.weight.loader = None
    layer.register_buffer("scale", torch.ones(2))
    return model


def wrapped(model: Any) -> None:
    model[1][0] = nn.Sequential(model[1][0])


def other_type(model: Any) -> None:
    model[1][0].weight.data = model[1][0].weight.data.half()


def transposed(model: Any) -> None:
    model[1][0].weight.data = model[1][0].weight.data.t()


CHANGES: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda model: setattr(model[1][0], "cache", torch.ones(3)),
    "a new attribute": lambda model: setattr(model[1][0], "new", torch.ones(3)),
    "one less": lambda model: delattr(model[1][0], "cache"),
    "in a dict": lambda model: model[1][0].parts.update(b=torch.ones(3)),
    "in a list": lambda model: model[1][0].parts["a"].append(torch.ones(3)),
    "in a dataclass": lambda model: setattr(model[1][0].held, "cache", torch.ones(3)),
    "deep in a dataclass": lambda model: model[1][0].held.values[1].update(a=torch.ones(3)),
    "of a parameter": lambda model: setattr(model[1][0].weight, "loader", torch.ones(3)),
    "of the method": lambda model: setattr(model[1][0].quant_method, "fused", True),
    "another method": lambda model: setattr(model[1][0], "quant_method", SimpleNamespace(fused=None)),
    "a buffer": lambda model: model[1][0].register_buffer("scale", torch.ones(2)),
    "a parameter": lambda model: setattr(model[1][0], "weight", nn.Parameter(torch.ones(4, 4))),
    "a layer": wrapped,
    "one more layer": lambda model: model.append(nn.Linear(4, 4)),
    "the type of a parameter": other_type,
    "the strides of a parameter": transposed,
    "the memory of a parameter": lambda model: setattr(model[0].weight, "data", torch.ones(4, 4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[Any], object]) -> None:
    model = make()
    makeup = Makeup(model)
    assert makeup.holds()
    change(model)
    assert not makeup.holds()
    assert Makeup(model).holds()


def test_values_and_gradients_are_no_change() -> None:
    model = make()
    makeup = Makeup(model)
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    model(torch.ones(4))
    assert makeup.holds()
