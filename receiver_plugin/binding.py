"""The binding plan: which bytes of which source tensor go to which bytes of which live parameter.

The model's own `load_weights` is run once on meta tensors while `receiver_plugin.recorder` watches. Every loader of
SGLang, whatever it fuses, shards or renames, ends in copies of views; so the record is the loader's own answer, for
this model, this parallel layout and this rank, and nothing here knows a name.

    plan = trace(model, sources)       # once; nothing is written
    plan.copies, plan.fills            # what an update has to do
    plan.calls                         # what it has to derive from the parameters afterwards

Parameters and persistent buffers have to be covered by copies and constants exactly once. Whatever cannot be replayed,
and whatever stays uncovered, is a problem named in the plan.

Block scales go where the codes of their weight went, block by block (`scales_follow`): it halves the time of a trace,
and it is right where a loader drops them, as that of Llama does in SGLang 0.5.16 to 0.5.23.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from receiver_plugin.held import destinations
from receiver_plugin.recorder import Call, Copy, Fill, Recorder, Source
from receiver_plugin.scales import Placed, follow
from receiver_plugin.windows import View
from shared.coverage import Box, box_of, overlapped, tiles, uncovered
from shared.naming import scale_name

# Scales of the KV cache: no checkpoint tensor exists for them in a block-FP8 model.
_OPTIONAL_PARAMETERS = ("k_scale", "v_scale")


class Derived(Protocol):
    """What a model computes from its parameters when it has loaded them."""

    buffers: tuple[str, ...]  # their names; no checkpoint holds them
    deferred: tuple[str, ...]  # methods that compute such tensors

    def tracing(self) -> AbstractContextManager[None]:
        """Entered while a load is traced."""

    def refresh(self, calls: Iterable[Call]) -> None:
        """Compute all of it again from the parameters as they are now, in place; `calls` as the plan has them."""


class NothingDerived:
    buffers: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()

    def tracing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def refresh(self, calls: Iterable[Call]) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class BindingPlan:
    """What one rank does with each source. `problems` is empty exactly if the plan may be used."""

    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    calls: tuple[Call, ...]
    problems: tuple[str, ...]
    destination_dtypes: dict[str, frozenset[torch.dtype]] = field(default_factory=dict)
    used_boxes: dict[str, tuple[Box, ...]] = field(default_factory=dict)


def trace(
    model: nn.Module, sources: Iterable[Source], derived: Derived | None = None, *, scales_follow: bool = False
) -> BindingPlan:
    """Record what `model.load_weights` does with `sources`. Neither parameters nor buffers are written.

    With `scales_follow`, `sources` hold no block scales; each FP8 source has one, which goes where its codes go.
    """
    sources, derived = list(sources), derived or NothingDerived()
    recorder = Recorder(model, sources, derived.buffers, derived.deferred)
    with derived.tracing():
        recorder.run()
    held, problems = destinations(model), recorder.problems
    shapes = {source.name: source.shape for source in sources}
    placed = _place(recorder, shapes, held, problems)
    used: dict[str, list[Box]] = {}
    landed: dict[str, set[torch.dtype]] = {}
    written: dict[str, list[Box]] = {}
    for copy, source_box, parameter_box in placed:
        used.setdefault(copy.source, []).append(source_box)
        landed.setdefault(copy.source, set()).add(held[copy.parameter].dtype)
        written.setdefault(copy.parameter, []).append(parameter_box)
    for fill in recorder.fills:
        if (box := _box(fill.parameter, held[fill.parameter].shape, fill.parameter_view, problems)) is not None:
            written.setdefault(fill.parameter, []).append(box)
    required, scales = required_names(model) - set(derived.buffers), []
    if scales_follow:
        scales = follow(placed, {fill.parameter for fill in recorder.fills}, shapes, held, problems)
        required -= {scale_name(name) for name in written}  # covered as their codes are, or named
    problems += _coverage_problems(held, required, written)
    return BindingPlan(
        (*(copy for copy, _, _ in placed), *scales),
        tuple(recorder.fills),
        tuple(recorder.calls),
        tuple(problems),
        {name: frozenset(dtypes) for name, dtypes in landed.items()},
        {name: tuple(boxes) for name, boxes in used.items()},
    )


def required_names(model: nn.Module) -> set[str]:
    """The parameters and persistent buffers that a checkpoint of `model` has to fill."""
    persistent = {
        id(module._buffers[name])
        for module in model.modules()
        for name in set(module._buffers) - module._non_persistent_buffers_set
    }
    return {
        name
        for name, tensor in destinations(model).items()
        if id(tensor) in persistent
        or (isinstance(tensor, nn.Parameter) and name.rpartition(".")[2] not in _OPTIONAL_PARAMETERS)
    }


def _coverage_problems(held: dict[str, torch.Tensor], required: set[str], written: dict[str, list[Box]]) -> list[str]:
    problems: list[str] = []
    for name in sorted(required | set(written)):
        tensor, boxes = held[name], written.get(name, [])
        text = f"{name} {list(tensor.shape)}"
        if tensor.numel() == 0:
            continue
        if not tensor.is_contiguous():
            problems.append(f"{text}: not contiguous in memory, which a byte image cannot bind")
        elif not boxes:
            problems.append(f"{text}: the server needs it and got nothing for it")
        elif tiles(tensor.shape, tuple(boxes)):
            continue
        elif (hole := uncovered(tensor.shape, boxes)) is not None:
            problems.append(f"{text}: nothing arrives for its part {_text(hole)}")
        elif (twice := overlapped(tensor.shape, boxes)) is not None:
            problems.append(f"{text}: its part {_text(twice)} would be written twice")
    return problems


def _place(
    recorder: Recorder, shapes: dict[str, tuple[int, ...]], held: dict[str, torch.Tensor], problems: list[str]
) -> list[Placed]:
    """The recorded copies with the boxes that they read and write."""
    placed, parameter_shapes = [], {name: tuple(tensor.shape) for name, tensor in held.items()}
    for copy in recorder.copies:
        of = _box(copy.source, shapes[copy.source], copy.source_view, problems)
        to = _box(copy.parameter, parameter_shapes[copy.parameter], copy.parameter_view, problems)
        if of is not None and to is not None:
            placed.append(Placed(copy, of, to))
    return placed


def _box(name: str, shape: tuple[int, ...], view: View, problems: list[str]) -> Box | None:
    box = box_of(shape, *view)
    if box is None:
        problems.append(f"{name}: the loader uses a window of it that is no box ({view})")
    return box


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
