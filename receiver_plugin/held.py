"""The tensors of a model, by names that stay the same while it serves.

A model may register a module a second time later on: MLA puts `kv_b_proj` into its attention when it first computes a
prompt. So of several names the one with the fewest parts counts, which is where the model itself built it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")


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
