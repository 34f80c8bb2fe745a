"""The source of a model from one push to the next: no name is worked out twice while the model is made of the same.

A push asks for it first, and every millisecond of that is one that the push takes longer; so what a source depends on
is compared in a few passes in C, whatever the number of tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor

from sender.source import ModuleSource
from sender.wrappers import reshard

_held = attrgetter("_modules", "_parameters", "_buffers")
_TENSOR_FACTS = (attrgetter("dtype"), attrgetter("shape"), attrgetter("device"))


class Sources:
    """The last source of every model, as long as the model is made of the same tensors.

    `num_ranks`: as of `ModuleSource`.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self._num_ranks = num_ranks
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[_Look, ModuleSource]] = weakref.WeakKeyDictionary()

    def of(self, model: nn.Module) -> ModuleSource:
        """Raises: as `ModuleSource`."""
        known = self._known.get(model) if isinstance(model, nn.Module) else None
        if known is not None:
            look, source = known
            look.reshard()
            if look.holds():
                source.renew()
                return source
        source = ModuleSource(model, self._num_ranks)
        look = _Look(model)
        if not look.in_fsdp1:
            self._known[model] = look, source
        return source


class _Look:
    """What a source depends on: names, types and identities of modules and tensors, and where shards lie.

    It holds neither the model nor its tensors. Numbers of tensors stay theirs: the source holds what it was made of.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.in_fsdp1 = any(isinstance(module, FSDP1) for module in modules)
        self._sharded = [weakref.ref(module) for module in modules if isinstance(module, FSDPModule)]
        self._adapters = [weakref.ref(module) for module in modules if hasattr(module, "merged")]
        self._modules = list(map(weakref.ref, modules))
        self._then = self._now()

    def reshard(self) -> None:
        """As `sender.wrappers.reshard`, before anything is compared."""
        reshard(_alive(self._sharded))

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self._then == self._now()

    def _now(self) -> list[Any]:
        modules = _alive(self._modules)
        mappings = list(chain.from_iterable(map(_held, modules)))
        items = list(chain.from_iterable(map(dict.values, mappings)))
        tensors = [item for item in items if isinstance(item, torch.Tensor)]
        shards = [(tensor._local_tensor, tensor.placements) for tensor in tensors if isinstance(tensor, DTensor)]
        return [
            list(map(len, mappings)),
            list(chain.from_iterable(mappings)),
            list(map(id, items)),
            list(map(type, chain(modules, tensors))),
            [list(map(fact, tensors)) for fact in _TENSOR_FACTS],
            [(s.data_ptr(), s.shape, s.stride(), s.dtype, placements) for s, placements in shards],
            [getattr(module, "merged", None) for module in _alive(self._adapters)],
        ]


def _alive(references: Iterable[weakref.ref[Any]]) -> list[Any]:
    return [found for reference in references if (found := reference()) is not None]
