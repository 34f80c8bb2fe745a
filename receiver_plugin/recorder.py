"""Watch a model's `load_weights` without letting it write: what it copies where, and what it does besides.

A dispatch mode sees every tensor operation of the loader. Copies from a source to a parameter and constants written to
a parameter are recorded and not executed; whatever else touches a source or a parameter is noted by name, and writes
to parameters are never executed. What a model derives from its parameters at the end of a load is put off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from receiver_plugin.held import destinations
from receiver_plugin.windows import Assembled, Part, View

_MAX_REFUSALS = 256
_COPY, _CAT, _ITEM = torch.ops.aten.copy_, torch.ops.aten.cat, torch.ops.aten._local_scalar_dense
_FILLS = (torch.ops.aten.fill_, torch.ops.aten.zero_)
_MAKERS = (_CAT, torch.ops.aten.clone, torch.ops.aten._to_copy)


def _slice(tensor: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if step == 1 and start is not None and end is not None and 0 <= start <= end <= tensor.shape[dim]:
        return tensor.narrow(dim, start, end - start)
    return torch.ops.aten.slice.Tensor(tensor, dim, start, end, step)


# Operators that only make views, by id (they live for ever), and what to call for each; more are found as they come.
# The methods of a tensor do the same as their operators in a third of the time.
_VIEWS: dict[int, Any] = {
    id(torch.ops.aten.detach.default): torch.Tensor.detach,
    id(torch.ops.aten.select.int): torch.Tensor.select,
    id(torch.ops.aten.slice.Tensor): _slice,
}


class Source(NamedTuple):
    """A checkpoint tensor as it will be handed to `load_weights`: whole shape, element type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Copy(NamedTuple):
    source: str
    source_view: View
    parameter: str
    parameter_view: View


class Fill(NamedTuple):
    """A constant that the loader writes itself, such as the zeros of a padded vocabulary."""

    parameter: str
    parameter_view: View
    value: float


@dataclass(frozen=True)
class Call:
    """A call of a method that derives tensors from parameters, which the loader made and the recorder put off."""

    module: nn.Module
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> None:
        getattr(self.module, self.method)(*self.args, **self.kwargs)


class Recorder(TorchDispatchMode):
    """What one run of `load_weights` over meta tensors did: `copies`, `fills`, and `problems` with everything else.

    A loader may put sources together (`cat`) or clone them before it copies; such tensors are followed back to the
    sources that they are made of. `derived` names tensors that the model computes from its parameters while it loads,
    and `deferred` methods that do so: neither is run here. `calls` are the calls of those methods, in order.
    """

    def __init__(
        self, model: nn.Module, sources: Iterable[Source], derived: Iterable[str] = (), deferred: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.fills: list[Fill] = []
        self.calls: list[Call] = []
        self._model = model
        self._sources = list(sources)
        self._deferred = tuple(deferred)
        self._tensors = {s.name: torch.empty(s.shape, dtype=s.dtype, device="meta") for s in self._sources}
        self._source_of = {_storage(t): name for name, t in self._tensors.items()}
        self._parameters = destinations(model)
        self._parameter_of = {_storage(p): name for name, p in self._parameters.items()}
        self._starts = {name: p.storage_offset() for name, p in self._parameters.items()}
        self._derived = {_storage(self._parameters[name]) for name in derived}
        self._assembled: dict[int, Assembled] = {}
        self._scalars: dict[float, tuple[str, View]] = {}
        self._written_scalars: set[float] = set()
        self._noted: dict[str, str] = {}
        self._refused: list[str] = []
        self._num_fed = 0

    @property
    def problems(self) -> list[str]:
        read = [f"{name}: the loader reads its value, which cannot be replayed" for name in self._read_only()]
        return [*self._refused, *read, *(f"{name}: {what}" for name, what in self._noted.items())]

    def _read_only(self) -> list[str]:
        return [name for marker, (name, _) in self._scalars.items() if marker not in self._written_scalars]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every call below in a guard against its compiler, at a third of all time

    def run(self) -> None:
        """Run the loader. Where it raises, its last source is noted and it goes on with the next one."""
        feed = self._feed()
        with self._deferring(), self, torch.no_grad():
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

    @contextmanager
    def _deferring(self) -> Iterator[None]:
        """Note calls of the deferred methods in place of running them."""
        with ExitStack() as undo:
            for module in self._model.modules():
                for name in self._deferred:
                    if callable(getattr(module, name, None)) and name not in vars(module):
                        vars(module)[name] = partial(self._defer, module, name)
                        undo.callback(vars(module).pop, name)
            yield

    def _defer(self, module: nn.Module, method: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append(Call(module, method, args, kwargs))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = _VIEWS.get(id(func))  # most of what a loader does
        if view is not None:
            return view(*args, **kwargs) if kwargs else view(*args)
        return self._watch(func, args, kwargs or {})

    def _watch(self, func: Any, args: Any, kwargs: Any) -> Any:
        packet = func.overloadpacket
        if packet is _COPY and self._record_copy(args[0], args[1]):
            return args[0]
        if packet in _FILLS and self._record_fill(packet, args):
            return args[0]
        if packet is _ITEM and (parts := self._parts(args[0])) is not None:
            return self._scalar(parts[0])
        if packet in _MAKERS and (made := self._assemble(func, args, kwargs)) is not None:
            return made
        written = self._note_writes(func, args, kwargs)
        if written is not None:
            return written if func._schema.returns else None
        if _returns_view(func):
            _VIEWS[id(func)] = func
        else:
            self._note_reads(func, args, kwargs)
        return func(*args, **kwargs)

    def _record_copy(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        parameter = self._parameter_of.get(_storage(target))
        if parameter is None:
            return False
        if target.dtype != self._parameters[parameter].dtype or source.is_neg() or source.is_conj():
            return False
        if target.numel() and source.shape != target.shape:
            source = source.expand(target.shape)
        window = self._view_of(parameter, target)
        name = self._source_of.get(_storage(source))
        if name is not None and source.dtype == self._tensors[name].dtype:
            if target.numel():  # nothing for a rank that holds none of a padded vocabulary's last rows
                self.copies.append(Copy(name, _view(source), parameter, window))
            return True
        parts = self._parts(source)
        if parts is None:
            return False
        self.copies += [Copy(part.source, part.view, parameter, window.window(part.box)) for part in parts]
        return True

    def _record_fill(self, packet: Any, args: Any) -> bool:
        parameter = self._parameter_of.get(_storage(args[0]))
        if parameter is None or (len(args) > 1 and isinstance(args[1], torch.Tensor)):
            return False
        if not args[0].numel():
            return True
        value = 0.0 if packet is torch.ops.aten.zero_ else float(args[1])
        window = self._view_of(parameter, args[0])
        if value not in self._scalars:
            self.fills.append(Fill(parameter, window, value))
        elif args[0].numel() == 1:
            name, view = self._scalars[value]
            self._written_scalars.add(value)
            self.copies.append(Copy(name, View(view.offset, window.size, (1,) * len(window.size)), parameter, window))
        else:
            return False
        return True

    def _scalar(self, part: Part) -> float:
        """A number that stands for the one element of a source: it is looked for when a parameter is filled.

        Negative, of ordinary size and with all digits in use: what a loader computes of it is another number.
        """
        marker = -(1.2345678901234567 + len(self._scalars) * 2.0**-40)
        self._scalars[marker] = (part.source, part.view)
        return marker

    def _parts(self, tensor: torch.Tensor) -> list[Part] | None:
        """The windows of sources that `tensor` is made of, or None if it holds anything else."""
        storage = _storage(tensor)
        if (name := self._source_of.get(storage)) is not None:
            whole = tuple((0, length) for length in tensor.shape)
            return [Part(name, _view(tensor), whole)] if tensor.dtype == self._tensors[name].dtype else None
        made = self._assembled.get(storage)
        return None if made is None or tensor.dtype != made.tensor.dtype else made.parts_of(tensor)

    def _assemble(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        """A tensor that `func` makes of nothing but sources, value for value; its own meta tensor stands for it."""
        of = list(args[0]) if func.overloadpacket is _CAT else [args[0]]
        found = [self._parts(tensor) for tensor in of]
        if any(parts is None for parts in found) or kwargs.get("dtype", of[0].dtype) != of[0].dtype:
            return None
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) if func.overloadpacket is _CAT else 0
        made = torch.cat(of, dim) if func.overloadpacket is _CAT else torch.empty_like(of[0])
        if not made.is_contiguous():
            return None
        parts, start = [], 0
        for tensor, pieces in zip(of, found, strict=True):
            parts += [piece.shifted(dim, start) for piece in pieces or ()]
            start += tensor.shape[dim] if tensor.dim() else 0
        self._assembled[_storage(made)] = Assembled(made, tuple(parts))
        return made

    def _note_writes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The target of a write to a parameter, which must not happen, or None."""
        target = None
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in _tensors_in([value]):
                name = self._parameter_of.get(_storage(tensor))
                if name is not None:
                    target = value
                    if _storage(tensor) not in self._derived:
                        self._noted.setdefault(name, f"load_weights writes it by {func}, which cannot be replayed")
        return target

    def _note_reads(self, func: Any, args: Any, kwargs: Any) -> None:
        for tensor in _tensors_in([*args, *kwargs.values()]):
            storage = _storage(tensor)
            if (name := self._parameter_of.get(storage)) is not None:
                text = f"load_weights computes with it ({func}): what it derives would stay that of the old weights"
                self._noted.setdefault(name, text)
            for source in self._names_of(storage):
                self._noted.setdefault(source, f"the loader computes with it ({func}), which cannot be replayed")

    def _names_of(self, storage: int) -> list[str]:
        """The sources in `storage`."""
        if storage in self._assembled:
            return [part.source for part in self._assembled[storage].parts]
        return [self._source_of[storage]] if storage in self._source_of else []

    def _view_of(self, parameter: str, window: torch.Tensor) -> View:
        start = self._starts[parameter]
        return View(window.storage_offset() - start, tuple(window.shape), window.stride())  # type: ignore[arg-type]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(tensor: torch.Tensor) -> View:
    return View(tensor.storage_offset(), tuple(tensor.shape), tensor.stride())  # type: ignore[arg-type]


def _returns_view(func: Any) -> bool:
    """Whether what `func` returns aliases its input without writing to it (narrow, t, chunk, detach, ...)."""
    infos = [result.alias_info for result in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value
