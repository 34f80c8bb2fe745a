"""The binding plan: which bytes of which source tensor go to which bytes of which live parameter.

The model's own `load_weights` is run once on meta tensors while `receiver_plugin.recorder` watches. Every loader of
SGLang, whatever it fuses, shards or renames, ends in copies of views; so the record is the loader's own answer, for
this model, this parallel layout and this rank, and nothing here knows a name.

    plan = trace(model, sources)       # once; nothing is written
    plan.copies, plan.fills            # what an update has to do

Parameters and persistent buffers have to be covered by copies and constants exactly once. Whatever cannot be replayed,
and whatever stays uncovered, is a problem named in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from receiver_plugin.recorder import Copy, Fill, Recorder, Source, View, destinations
from shared.coverage import Box, box_of, overlapped, uncovered

# Scales of the KV cache: no checkpoint tensor exists for them in a block-FP8 model.
_OPTIONAL_PARAMETERS = ("k_scale", "v_scale")


@dataclass(frozen=True)
class BindingPlan:
    """What one rank does with each source. `problems` is empty exactly if the plan may be used."""

    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    problems: tuple[str, ...]
    destination_dtypes: dict[str, frozenset[torch.dtype]] = field(default_factory=dict)
    used_boxes: dict[str, tuple[Box, ...]] = field(default_factory=dict)


def trace(model: nn.Module, sources: Iterable[Source]) -> BindingPlan:
    """Record what `model.load_weights` does with `sources`. Neither parameters nor buffers are written."""
    sources = list(sources)
    recorder = Recorder(model, sources)
    recorder.run()
    held = destinations(model)
    problems = recorder.problems
    shapes = {source.name: source.shape for source in sources}
    used: dict[str, list[Box]] = {}
    landed: dict[str, set[torch.dtype]] = {}
    for copy in recorder.copies:
        _add_box(used, problems, copy.source, shapes[copy.source], copy.source_view)
        landed.setdefault(copy.source, set()).add(held[copy.parameter].dtype)
    problems += _coverage_problems(model, held, [*recorder.copies, *recorder.fills])
    return BindingPlan(
        tuple(recorder.copies),
        tuple(recorder.fills),
        tuple(problems),
        {name: frozenset(dtypes) for name, dtypes in landed.items()},
        {name: tuple(boxes) for name, boxes in used.items()},
    )


def required_names(model: nn.Module) -> set[str]:
    """The parameters and persistent buffers that a checkpoint of `model` has to fill."""
    names = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] not in _OPTIONAL_PARAMETERS}
    for prefix, module in model.named_modules():
        persistent = set(module._buffers) - module._non_persistent_buffers_set
        names |= {f"{prefix}.{name}" if prefix else name for name in persistent if module._buffers[name] is not None}
    return names & set(destinations(model))


def _coverage_problems(model: nn.Module, held: dict[str, torch.Tensor], windows: list[Copy | Fill]) -> list[str]:
    problems: list[str] = []
    written: dict[str, list[Box]] = {}
    for window in windows:
        _add_box(written, problems, window.parameter, tuple(held[window.parameter].shape), window.parameter_view)
    for name in sorted(required_names(model) | set(written)):
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
