"""Whether a model is still made of what it was made of when it was last looked at, told in about a millisecond.

What SGLang's layers hold decides whether raw copies into them would be right (`sglang_refusals`, `sglang_derived`). It
can change: the first request may make a cache, a route may wrap a layer. To look at everything takes longer than the
copies of a push, so it is done again only after something was set, added or taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

_PARTS_OF_METHODS = ("quant_config", "runner")
_DEPTH = 4  # of containers in containers
_TENSORS = ("_parameters", "_buffers", "_modules")
_HOOKS = frozenset(vars(nn.Module())) - {*_TENSORS}  # torch's own; they hold no tensors
_PLACE = (Tensor.data_ptr, Tensor.size, Tensor.stride, attrgetter("dtype"))


class Makeup:
    """All that a look at `model` reads: attributes of modules, of their parameters and quantization methods, what lies
    in lists, dicts and dataclasses of these, and the type and place of tensors.

    It holds on to all of these objects, so that none of their numbers is given to another one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[dict[str, Any]] = []  # what each is made of
        self._own: list[Callable[[dict[str, Any]], tuple[Any, ...]]] = []  # of that, all but the hooks
        self._mappings: list[dict[Any, Any]] = []
        self._sequences: list[list[Any] | tuple[Any, ...]] = []
        self._tensors: list[torch.Tensor] = []
        seen: set[int] = set()
        for module in model.modules():
            held = vars(module)
            own = [name for name in held if name not in _HOOKS]
            self._modules.append(held)
            self._own.append(itemgetter(*own))  # at least `_TENSORS`, so that it gives a tuple
            for name in own:
                self._watch(held[name], seen)
            method = getattr(module, "quant_method", None)
            for part in (method, *(getattr(method, name, None) for name in _PARTS_OF_METHODS)):
                self._watch(getattr(part, "__dict__", None), seen)
        self._names, self._objects, self._places = self._names_now(), self._objects_now(), self._places_now()

    def holds(self) -> bool:
        """Whether nothing has been changed. A few passes in C over some ten thousand objects."""
        try:
            objects = self._objects_now()
        except KeyError:  # an attribute is gone
            return False
        return (
            len(objects) == len(self._objects)
            and all(map(is_, objects, self._objects))
            and self._names_now() == self._names
            and self._places_now() == self._places
        )

    def _watch(self, value: Any, seen: set[int], depth: int = 0) -> None:
        if id(value) in seen or depth > _DEPTH:
            return
        items: Any = ()
        if isinstance(value, torch.Tensor):
            self._tensors.append(value)
            items = [vars(value)]
        elif isinstance(value, dict):
            self._mappings.append(value)
            items = value.values()
        elif isinstance(value, (list, tuple)):
            self._sequences.append(value)
            items = value
        elif is_dataclass(value) and not isinstance(value, type):
            items = [vars(value)] if hasattr(value, "__dict__") else ()
        else:
            return
        seen.add(id(value))
        for item in items:
            self._watch(item, seen, depth + 1)

    def _names_now(self) -> list[Any]:
        return [*map(len, self._modules), *chain.from_iterable(self._mappings)]

    def _objects_now(self) -> list[Any]:
        owned = chain.from_iterable(own(held) for own, held in zip(self._own, self._modules, strict=True))
        mapped: Iterable[Any] = chain.from_iterable(map(dict.values, self._mappings))
        return list(chain(owned, mapped, chain.from_iterable(self._sequences)))

    def _places_now(self) -> list[list[Any]]:
        return [list(map(fact, self._tensors)) for fact in _PLACE]
