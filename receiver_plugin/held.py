"""The tensors of a model, by names that stay the same while it serves.

A model may register a module a second time later on: MLA puts `kv_b_proj` into its attention when it first computes a
prompt. So of several names the one with the fewest parts counts, which is where the model itself built it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")

_held = attrgetter("_modules", "_parameters", "_buffers")


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once."""
    return _once(model.named_modules(remove_duplicate=False))


def destinations(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once: a shared one appears under one name."""
    parameters = model.named_parameters(remove_duplicate=False)
    return _once(chain(parameters, model.named_buffers(remove_duplicate=False)))


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules hold as plain attributes, neither parameter nor buffer."""
    for prefix, module in modules(model).items():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield _join(prefix, name), value


def _once(named: Iterable[tuple[str, Item]]) -> dict[str, Item]:
    best: dict[int, tuple[str, Item]] = {}
    for name, item in named:
        known = best.get(id(item))
        if known is None or name.count(".") < known[0].count("."):
            best[id(item)] = (name, item)
    return dict(best.values())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


class Places:
    """Where `tensors` of `model`, parameters and buffers, are held and lie. To ask takes a few passes in C."""

    def __init__(self, model: nn.Module, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        wanted = set(map(id, self._tensors))
        self._modules = list(model.modules())
        self._all = list(map(id, chain.from_iterable(map(_held, self._modules))))
        self._mappings: list[dict[str, object]] = []
        self._keys: list[str] = []
        self._items: list[object] = []
        for module in self._modules:
            for mapping in _held(module):
                for key, item in mapping.items():
                    if isinstance(item, nn.Module) or id(item) in wanted:
                        self._mappings.append(mapping)
                        self._keys.append(key)
                        self._items.append(item)
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))

    def hold(self) -> bool:
        """Whether the model still has all of them, at the same addresses."""
        if self._all != list(map(id, chain.from_iterable(map(_held, self._modules)))):
            return False
        found = map(dict.get, self._mappings, self._keys)
        return all(map(is_, found, self._items)) and self._addresses == list(map(torch.Tensor.data_ptr, self._tensors))
