"""Watch a model's `load_weights` without letting it write: what it copies where, and what it does besides.

A dispatch mode sees every tensor operation of the loader. Copies from a source to a parameter and constants written to
a parameter are recorded and not executed; whatever else touches a source or a parameter is noted by name, and writes
to parameters are never executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_MAX_REFUSALS = 256
_FILLS = (torch.ops.aten.fill_, torch.ops.aten.zero_)


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor as it will be handed to `load_weights`: whole shape, element type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class View:
    """A strided window, in elements, from the first element of its tensor."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Copy:
    source: str
    source_view: View
    parameter: str
    parameter_view: View


@dataclass(frozen=True)
class Fill:
    """A constant that the loader writes itself, such as the zeros of a padded vocabulary."""

    parameter: str
    parameter_view: View
    value: float


def destinations(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its first name; a shared tensor appears once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class Recorder(TorchDispatchMode):
    """What one run of `load_weights` over meta tensors did: `copies`, `fills`, and `problems` with everything else."""

    def __init__(self, model: nn.Module, sources: Iterable[Source]) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.fills: list[Fill] = []
        self._model = model
        self._sources = list(sources)
        self._tensors = {s.name: torch.empty(s.shape, dtype=s.dtype, device="meta") for s in self._sources}
        self._source_of = {_storage(t): name for name, t in self._tensors.items()}
        self._parameters = destinations(model)
        self._parameter_of = {_storage(p): name for name, p in self._parameters.items()}
        self._noted: dict[str, str] = {}
        self._refused: list[str] = []
        self._num_fed = 0

    @property
    def problems(self) -> list[str]:
        return [*self._refused, *(f"{name}: {what}" for name, what in self._noted.items())]

    def run(self) -> None:
        """Run the loader. Where it raises, its last source is noted and it goes on with the next one."""
        feed = self._feed()
        with self, torch.no_grad():
            while len(self._refused) < _MAX_REFUSALS:
                fed_before = self._num_fed
                try:
                    self._model.load_weights(feed)  # type: ignore[operator]
                    return
                except Exception as error:  # whatever a model's loader raises is a statement about its last source
                    if self._num_fed == fed_before and self._refused:
                        return
                    last = self._sources[self._num_fed - 1].name if self._num_fed else "(before the first tensor)"
                    self._refused.append(f"{last}: the model's loader refused it: {type(error).__name__}: {error}")

    def _feed(self) -> Iterator[tuple[str, torch.Tensor]]:
        for source in self._sources:
            self._num_fed += 1
            yield source.name, self._tensors[source.name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is torch.ops.aten.copy_ and self._record_copy(args[0], args[1]):
            return args[0]
        if packet in _FILLS and self._record_fill(packet, args):
            return args[0]
        written = self._note_writes(func, args, kwargs)
        if written is not None:
            return written if func._schema.returns else None
        if not _returns_view(func):
            self._note_reads(func, args, kwargs)
        return func(*args, **kwargs)

    def _record_copy(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        name, parameter = self._source_of.get(_storage(source)), self._parameter_of.get(_storage(target))
        if name is None or parameter is None:
            return False
        if target.numel():  # nothing for a rank that holds none of a padded vocabulary's last rows
            source = source.expand(target.shape) if source.shape != target.shape else source
            self.copies.append(Copy(name, _view(source), parameter, self._view_of(parameter, target)))
        return True

    def _record_fill(self, packet: Any, args: Any) -> bool:
        parameter = self._parameter_of.get(_storage(args[0]))
        if parameter is None or (len(args) > 1 and isinstance(args[1], torch.Tensor)):
            return False
        if args[0].numel():
            value = 0.0 if packet is torch.ops.aten.zero_ else float(args[1])
            self.fills.append(Fill(parameter, self._view_of(parameter, args[0]), value))
        return True

    def _note_writes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The target of a write to a parameter, which must not happen, or None."""
        target = None
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for name in self._names_in([value], self._parameter_of):
                self._noted.setdefault(name, f"load_weights writes it by {func}, which cannot be replayed")
                target = value
        return target

    def _note_reads(self, func: Any, args: Any, kwargs: Any) -> None:
        values = [*args, *kwargs.values()]
        for name in self._names_in(values, self._source_of):
            self._noted.setdefault(name, f"the loader computes with it ({func}), which cannot be replayed")
        for name in self._names_in(values, self._parameter_of):
            self._noted.setdefault(
                name, f"load_weights computes with it ({func}): what it derives would stay that of the old weights"
            )

    def _names_in(self, values: Iterable[Any], names: dict[int, str]) -> list[str]:
        tensors = [value for value in _flat(values) if isinstance(value, torch.Tensor)]
        return [names[_storage(tensor)] for tensor in tensors if _storage(tensor) in names]

    def _view_of(self, parameter: str, window: torch.Tensor) -> View:
        start = self._parameters[parameter].storage_offset()
        return View(int(window.storage_offset()) - int(start), tuple(window.shape), tuple(window.stride()))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(tensor: torch.Tensor) -> View:
    return View(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _returns_view(func: Any) -> bool:
    """Whether what `func` returns aliases its input without writing to it (narrow, t, chunk, detach, ...)."""
    infos = [result.alias_info for result in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
