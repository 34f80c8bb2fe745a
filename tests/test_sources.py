"""What a sender remembers of a model between pushes, and all that makes it look again: nothing stale is ever sent."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sender.source import ModuleSource
from sender.sources import Sources
from shared.errors import ConfigError
from tests.tiny_models import Trainer


def values(source: ModuleSource) -> dict[str, torch.Tensor]:
    names = tuple(spec.name for spec in source.tensors)
    found = {name: tensor.clone() for name, tensor in source.gather(names).items()}
    source.release()
    return found


def same(mine: dict[str, torch.Tensor], model: nn.Module) -> bool:
    wanted = values(ModuleSource(model))
    return list(mine) == list(wanted) and all(torch.equal(mine[name], wanted[name]) for name in wanted)


def trained(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def other_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)


def not_contiguous(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn_like(parameter).t().contiguous().t()


def other_parameter(model: nn.Module) -> None:
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "trained": trained,
    "other data": other_data,
    "not contiguous": not_contiguous,
    "another parameter": other_parameter,
    "fp32": lambda model: model.float(),
    "fp32 and trained": lambda model: trained(model.float()),
    "fp16": lambda model: model.half(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_remembered_is_what_the_model_holds(change: Callable[[nn.Module], object]) -> None:
    model, sources = Trainer(seed=3), Sources()
    assert same(values(sources.of(model)), model)
    for _ in range(3):
        change(model)
        assert same(values(sources.of(model)), model)
        trained(model)
        assert same(values(sources.of(model)), model)


def test_the_names_of_a_model_are_worked_out_once() -> None:
    model, sources = Trainer(seed=3), Sources()
    source = sources.of(model)
    names = tuple(spec.name for spec in source.tensors)
    weights = source.gather(names)
    trained(model)
    assert sources.of(model) is source and source.gather(names) is weights
    other_parameter(model)
    assert sources.of(model) is not source


def test_copies_are_made_anew() -> None:
    model, sources = Trainer(seed=3).float(), Sources()
    source = sources.of(model)
    names = tuple(spec.name for spec in source.tensors)
    assert source.gather(names) is not source.gather(names)


def test_an_adapter_that_is_no_longer_merged_is_seen() -> None:
    class Adapter(nn.Module):
        merged = True

        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

    model, sources = nn.Sequential(Adapter(nn.Linear(4, 4, bias=False))), Sources()
    sources.of(model)
    setattr(model[0], "merged", False)  # noqa: B010
    with pytest.raises(ConfigError, match="not merged"):
        sources.of(model)


def test_a_model_that_is_gone_is_forgotten() -> None:
    model, sources = Trainer(seed=3), Sources()
    values(sources.of(model))
    tensor = weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    assert tensor() is None


def test_a_model_whose_parts_know_it_is_forgotten() -> None:
    """As the modules of FSDP2 do."""
    model, sources = Trainer(seed=3), Sources()
    next(model.children()).__dict__["root"] = model
    values(sources.of(model))
    tensor = weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    gc.collect()  # what goes with the model goes after it
    assert tensor() is None


def test_between_pushes_no_memory_of_a_model_is_kept() -> None:
    """A trainer that moves its weights to the host has the GPU for itself."""
    model, sources = Trainer(seed=3), Sources()
    source = sources.of(model)
    source.gather(tuple(spec.name for spec in source.tensors))
    source.release()
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    elsewhere = [parameter.data.clone() for parameter in model.parameters()]  # before any of it is free again
    for parameter, copy in zip(model.parameters(), elsewhere, strict=True):
        parameter.data = copy
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert same(values(sources.of(model)), model)


def test_remembered_weights_are_read_from_where_they_are_now() -> None:
    model, sources = Trainer(seed=3), Sources()
    names = tuple(spec.name for spec in sources.of(model).tensors)
    weights = sources.of(model).gather(names)
    sources.of(model).release()
    trained(model)
    again = sources.of(model).gather(names)
    assert again is weights and list(again) == list(names) and len(again) == len(names)
    assert all(torch.equal(again[name], wanted) for name, wanted in values(ModuleSource(model)).items())
