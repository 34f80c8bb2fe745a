"""The binding plan: which bytes of which source tensor go to which bytes of which live parameter.

The model's own `load_weights` is run once on meta tensors while `receiver_plugin.recorder` watches. Every loader of
SGLang, whatever it fuses, shards or renames, ends in copies of views; so the record is the loader's own answer, for
this model, this parallel layout and this rank, and nothing here knows a name.

    plan = trace(model, sources)       # once; nothing is written
    plan.copies, plan.fills            # what an update has to do
    plan.calls                         # what it has to derive from the parameters afterwards

Parameters and persistent buffers have to be covered by copies and constants exactly once. Whatever cannot be replayed,
and whatever stays uncovered, is a problem named in the plan.

One thing is mended: where a loader binds a weight's FP8 codes and drops their block scales (that of Llama does, in
SGLang 0.5.16 to 0.5.23, and serves garbage from any block-FP8 checkpoint), the scales go where the codes went, block by
block. The plan names them in `rescued`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from receiver_plugin.recorder import Call, Copy, Fill, Recorder, Source, destinations
from receiver_plugin.windows import View
from shared.coverage import Box, box_of, overlapped, uncovered
from shared.naming import scale_name
from shared.numerics import BLOCK

# Scales of the KV cache: no checkpoint tensor exists for them in a block-FP8 model.
_OPTIONAL_PARAMETERS = ("k_scale", "v_scale")


class Derived(Protocol):
    """What a model computes from its parameters when it has loaded them."""

    buffers: tuple[str, ...]  # their names; no checkpoint holds them
    deferred: tuple[str, ...]  # methods that compute such tensors

    def refresh(self, calls: Iterable[Call]) -> None:
        """Compute all of it again from the parameters as they are now, in place; `calls` as the plan has them."""


class NothingDerived:
    buffers: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()

    def refresh(self, calls: Iterable[Call]) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class BindingPlan:
    """What one rank does with each source. `problems` is empty exactly if the plan may be used."""

    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    calls: tuple[Call, ...]
    problems: tuple[str, ...]
    rescued: tuple[str, ...] = ()
    destination_dtypes: dict[str, frozenset[torch.dtype]] = field(default_factory=dict)
    used_boxes: dict[str, tuple[Box, ...]] = field(default_factory=dict)


def trace(model: nn.Module, sources: Iterable[Source], derived: Derived | None = None) -> BindingPlan:
    """Record what `model.load_weights` does with `sources`. Neither parameters nor buffers are written."""
    sources, derived = list(sources), derived or NothingDerived()
    recorder = Recorder(model, sources, derived.buffers, derived.deferred)
    recorder.run()
    held = destinations(model)
    problems = recorder.problems
    shapes = {source.name: source.shape for source in sources}
    rescued = _rescue_scales(recorder.copies, held, shapes)
    copies = [*recorder.copies, *rescued]
    used: dict[str, list[Box]] = {}
    landed: dict[str, set[torch.dtype]] = {}
    for copy in copies:
        _add_box(used, problems, copy.source, shapes[copy.source], copy.source_view)
        landed.setdefault(copy.source, set()).add(held[copy.parameter].dtype)
    problems += _coverage_problems(model, held, [*copies, *recorder.fills], frozenset(derived.buffers))
    return BindingPlan(
        tuple(copies),
        tuple(recorder.fills),
        tuple(recorder.calls),
        tuple(problems),
        tuple(dict.fromkeys(copy.source for copy in rescued)),
        {name: frozenset(dtypes) for name, dtypes in landed.items()},
        {name: tuple(boxes) for name, boxes in used.items()},
    )


def _rescue_scales(copies: list[Copy], held: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[Copy]:
    """Copies of the block scales that the loader dropped, taken from where it put the codes.

    Only for a scale parameter that got nothing at all, from scales that went nowhere, by windows of whole blocks.
    """
    filled, used = {copy.parameter for copy in copies}, {copy.source for copy in copies}
    found = []
    for copy in copies:
        scale, parameter = scale_name(copy.source), scale_name(copy.parameter)
        if held[copy.parameter].dtype != torch.float8_e4m3fn or parameter not in held or parameter in filled:
            continue
        if scale not in shapes or scale in used:
            continue
        of = _blocks(shapes[copy.source], shapes[scale], copy.source_view)
        to = _blocks(tuple(held[copy.parameter].shape), tuple(held[parameter].shape), copy.parameter_view)
        if of is not None and to is not None and of.size == to.size:
            found.append(Copy(scale, of, parameter, to))
    return found


def _blocks(shape: tuple[int, ...], scale_shape: tuple[int, ...], view: View) -> View | None:
    """The window of a scale that belongs to window `view` of a 2-D weight; None where it cuts through a block."""
    box = box_of(shape, view.offset, view.size, view.stride)
    if box is None or len(box) != 2 or len(scale_shape) != 2:
        return None
    if any(start % BLOCK or (stop % BLOCK and stop != full) for (start, stop), full in zip(box, shape, strict=True)):
        return None
    whole = View(0, scale_shape, (scale_shape[1], 1))
    return whole.window(tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in box))


def required_names(model: nn.Module) -> set[str]:
    """The parameters and persistent buffers that a checkpoint of `model` has to fill."""
    names = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] not in _OPTIONAL_PARAMETERS}
    for prefix, module in model.named_modules():
        persistent = set(module._buffers) - module._non_persistent_buffers_set
        names |= {f"{prefix}.{name}" if prefix else name for name in persistent if module._buffers[name] is not None}
    return names & set(destinations(model))


def _coverage_problems(
    model: nn.Module, held: dict[str, torch.Tensor], windows: list[Copy | Fill], derived: frozenset[str]
) -> list[str]:
    problems: list[str] = []
    written: dict[str, list[Box]] = {}
    for window in windows:
        _add_box(written, problems, window.parameter, tuple(held[window.parameter].shape), window.parameter_view)
    for name in sorted((required_names(model) - derived) | set(written)):
        tensor, boxes = held[name], written.get(name, [])
        text = f"{name} {list(tensor.shape)}"
        if tensor.numel() == 0:
            continue
        if not tensor.is_contiguous():
            problems.append(f"{text}: not contiguous in memory, which a byte image cannot bind")
        elif not boxes:
            problems.append(f"{text}: the server needs it and got nothing for it")
        elif (hole := uncovered(tensor.shape, boxes)) is not None:
            problems.append(f"{text}: nothing arrives for its part {_text(hole)}")
        elif (twice := overlapped(tensor.shape, boxes)) is not None:
            problems.append(f"{text}: its part {_text(twice)} would be written twice")
    return problems


def _add_box(found: dict[str, list[Box]], problems: list[str], name: str, shape: tuple[int, ...], view: View) -> None:
    box = box_of(shape, view.offset, view.size, view.stride)
    if box is None:
        problems.append(f"{name}: the loader uses a window of it that is no box ({view})")
    else:
        found.setdefault(name, []).append(box)


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
