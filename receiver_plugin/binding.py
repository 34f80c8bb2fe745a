"""The binding plan: which bytes of which source tensor go to which bytes of which live parameter.

The model's own `load_weights` is run once on meta tensors under a dispatch mode that records every `copy_` instead of
executing it. Every loader of SGLang, whatever it fuses, shards or renames, ends in copies of views; so the record is
the loader's own answer, for this model, this parallel layout and this rank, and nothing here knows a name.

    plan = trace(model, sources)       # once; nothing is written
    plan.copies, plan.fills            # what an update has to do

A source that anything but a view and a `copy_` touches cannot be replayed and is a problem named in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.coverage import Box, box_of, overlapped, uncovered

# Parameters of the KV cache and attention scales: no checkpoint tensor exists for them in a block-FP8 model.
_OPTIONAL_PARAMETERS = ("k_scale", "v_scale")


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


@dataclass(frozen=True)
class BindingPlan:
    """What one rank does with each source. `problems` is empty exactly if the plan may be used."""

    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    problems: tuple[str, ...]
    destination_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    used_boxes: dict[str, tuple[Box, ...]] = field(default_factory=dict)


def trace(model: nn.Module, sources: Iterable[Source]) -> BindingPlan:
    """Record what `model.load_weights` does with `sources`. Neither parameters nor buffers are written.

    Sources that make the loader raise are taken out one at a time and reported, so that one call names them all.
    """
    wanted = list(sources)
    problems: list[str] = []
    while True:
        recorder = _Recorder(model, wanted)
        failed = recorder.run()
        if failed is None:
            break
        name, why = failed
        problems.append(f"{name}: the model's loader refused it: {why}")
        remaining = [source for source in wanted if source.name != name]
        if len(remaining) == len(wanted) or len(problems) >= 64:
            return BindingPlan((), (), tuple(problems))
        wanted = remaining
    return recorder.plan(problems)


def destinations(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its first name; a shared tensor appears once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, sources: list[Source]) -> None:
        super().__init__()
        self._model = model
        self._sources = sources
        self._tensors = {s.name: torch.empty(s.shape, dtype=s.dtype, device="meta") for s in sources}
        self._source_of = {_storage(t): name for name, t in self._tensors.items()}
        self._parameters = destinations(model)
        self._parameter_of = {_storage(p): name for name, p in self._parameters.items()}
        self._copies: list[Copy] = []
        self._fills: list[Fill] = []
        self._opaque: dict[str, str] = {}
        self._written: dict[str, str] = {}
        self._last = ""

    def run(self) -> tuple[str, str] | None:
        """Trace once; the name of the source that made the loader raise, and why, or None."""
        try:
            with self, torch.no_grad():
                self._model.load_weights(self._feed())  # type: ignore[operator]
        except Exception as error:  # whatever a model's loader raises is a statement about its last source
            return self._last or "(before the first tensor)", f"{type(error).__name__}: {error}"
        return None

    def _feed(self) -> Iterator[tuple[str, torch.Tensor]]:
        for source in self._sources:
            self._last = source.name
            yield source.name, self._tensors[source.name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is torch.ops.aten.copy_ and self._record_copy(args[0], args[1]):
            return args[0]
        if packet in (torch.ops.aten.fill_, torch.ops.aten.zero_) and self._record_fill(packet, args):
            return args[0]
        written = self._note_other(func, args, kwargs)
        if written is not None:
            return written if func._schema.returns else None
        return func(*args, **kwargs)

    def _record_copy(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        name, parameter = self._source_of.get(_storage(source)), self._parameter_of.get(_storage(target))
        if name is None or parameter is None:
            return False
        if target.numel() == 0:  # a rank that holds none of a padded vocabulary's last rows
            return True
        source = source.expand(target.shape) if source.shape != target.shape else source
        self._copies.append(Copy(name, _view(source), parameter, self._view_of(parameter, target)))
        return True

    def _record_fill(self, packet: Any, args: Any) -> bool:
        parameter = self._parameter_of.get(_storage(args[0]))
        if parameter is None or (len(args) > 1 and isinstance(args[1], torch.Tensor)):
            return False
        if args[0].numel() == 0:
            return True
        value = 0.0 if packet is torch.ops.aten.zero_ else float(args[1])
        self._fills.append(Fill(parameter, self._view_of(parameter, args[0]), value))
        return True

    def _note_other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Note what cannot be replayed. A write to a parameter must not happen: its target is returned, else None."""
        tensors = [t for t in (*_flat(args), *_flat(kwargs.values())) if isinstance(t, torch.Tensor)]
        touched = {self._source_of[_storage(t)] for t in tensors if _storage(t) in self._source_of}
        if touched and not _returns_view(func):
            for name in touched:
                self._opaque.setdefault(name, str(func))
        target = None
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in _flat([value]):
                if isinstance(tensor, torch.Tensor) and _storage(tensor) in self._parameter_of:
                    self._written.setdefault(self._parameter_of[_storage(tensor)], str(func))
                    target = value
        return target

    def _view_of(self, parameter: str, window: torch.Tensor) -> View:
        start = self._parameters[parameter].storage_offset()
        return View(int(window.storage_offset()) - int(start), tuple(window.shape), tuple(window.stride()))

    def plan(self, problems: list[str]) -> BindingPlan:
        problems = [
            *problems,
            *(
                f"{name}: the loader computes with it ({op}), which cannot be replayed"
                for name, op in self._opaque.items()
            ),
            *(
                f"{name}: load_weights writes it by {op}, which cannot be replayed"
                for name, op in self._written.items()
            ),
        ]
        boxes: dict[str, list[Box]] = {}
        for copy in self._copies:
            shape = self._tensors[copy.source].shape
            _add_box(boxes, problems, copy.source, shape, copy.source_view)
        problems += self._coverage_problems()
        return BindingPlan(
            tuple(self._copies),
            tuple(self._fills),
            tuple(problems),
            {copy.source: self._parameters[copy.parameter].dtype for copy in self._copies},
            {name: tuple(found) for name, found in boxes.items()},
        )

    def _coverage_problems(self) -> list[str]:
        problems: list[str] = []
        written: dict[str, list[Box]] = {}
        windows: list[Copy | Fill] = [*self._copies, *self._fills]
        for window in windows:
            shape = self._parameters[window.parameter].shape
            _add_box(written, problems, window.parameter, shape, window.parameter_view)
        required = {name for name, _ in self._model.named_parameters() if not name.endswith(_OPTIONAL_PARAMETERS)}
        for name in sorted(required | set(written)):
            parameter, boxes = self._parameters[name], written.get(name, [])
            if parameter.numel() == 0:
                continue
            if not parameter.is_contiguous():
                problems.append(f"{name}: not contiguous in memory, which a byte image cannot bind")
            elif not boxes:
                problems.append(f"{name} {list(parameter.shape)}: the server needs it and got nothing for it")
            elif (hole := uncovered(parameter.shape, boxes)) is not None:
                problems.append(f"{name} {list(parameter.shape)}: nothing arrives for its part {_text(hole)}")
            elif (twice := overlapped(parameter.shape, boxes)) is not None:
                problems.append(f"{name} {list(parameter.shape)}: its part {_text(twice)} would be written twice")
        return problems


def _add_box(found: dict[str, list[Box]], problems: list[str], name: str, shape: torch.Size, view: View) -> None:
    box = box_of(shape, view.offset, view.size, view.stride)
    if box is None:
        problems.append(f"{name}: the loader uses a window of it that is no box ({view})")
    else:
        found.setdefault(name, []).append(box)


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(tensor: torch.Tensor) -> View:
    return View(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _returns_view(func: Callable[..., Any]) -> bool:
    """Whether what `func` returns aliases its input without writing to it (narrow, t, chunk, detach, ...)."""
    infos = [result.alias_info for result in func._schema.returns]  # type: ignore[attr-defined]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
