"""From the trainer's offer to the receiver's manifest: the live model says which tensors it holds in FP8.

The loader is traced with the tensors as `should_quantize_param` expects them to travel, scales included. Where each of
them lands, the element type is read from the live parameter. If all ranks agree with the rule, that trace is the plan;
if not, it is made again with what the ranks found. Every mismatch on any rank is collected.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from receiver_plugin.binding import BindingPlan, Derived, trace
from receiver_plugin.held import destinations
from receiver_plugin.ranks import Ranks, collect
from receiver_plugin.recorder import Source
from shared.buckets import DTYPE_NAMES, DTYPES
from shared.config import FP8BlockConfig
from shared.coverage import Box, uncovered
from shared.errors import PlanError
from shared.naming import scale_name, should_quantize_param
from shared.protocol import ManifestTensor, TensorSpec

_FP8 = torch.float8_e4m3fn
# A copy_ between these changes no value, so the live parameter equals what a checkpoint load would have left there.
_EXACT_CASTS = {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}


@dataclass(frozen=True)
class RankFindings:
    """What one rank found; exchanged between the ranks of a server, so plain data only."""

    quantized: tuple[str, ...]  # the tensors that landed in FP8 here
    problems: tuple[str, ...]
    used_boxes: dict[str, tuple[Box, ...]]


def plan_offer(
    model: nn.Module, tensors: Sequence[TensorSpec], config: FP8BlockConfig, ranks: Ranks, derived: Derived
) -> tuple[tuple[ManifestTensor, ...], BindingPlan]:
    """The manifest for an offer, and how this rank binds it. A collective of `ranks`.

    Raises:
        PlanError: lists all that does not fit, of all ranks.
    """
    with _no_garbage_collection():
        expected = expected_in_fp8(tensors, config)
        manifest = manifest_of(tensors, expected)
        plan, findings = _plan_on_all(model, manifest, ranks, derived)
        if (held := frozenset().union(*(rank.quantized for rank in findings))) != expected:
            manifest = manifest_of(tensors, held)
            plan, findings = _plan_on_all(model, manifest, ranks, derived)
        problems = [problem for rank in findings for problem in rank.problems]
        problems += unused_problems(manifest, findings)
        if ranks.size == 1:
            problems = with_shapes(problems, tensors, model)
    raise_problems(problems, ranks.size)
    return manifest, plan


def _plan_on_all(
    model: nn.Module, manifest: Sequence[ManifestTensor], ranks: Ranks, derived: Derived
) -> tuple[BindingPlan, list[RankFindings]]:
    plans: list[BindingPlan] = []

    def plan_here() -> RankFindings:
        plan, findings = plan_rank(model, manifest, derived)
        plans.append(plan)
        return findings

    findings = collect(ranks, plan_here)
    return plans[0], findings


def plan_rank(
    model: nn.Module, tensors: Sequence[ManifestTensor], derived: Derived | None = None
) -> tuple[BindingPlan, RankFindings]:
    """Trace `tensors` as they would travel, name all that does not fit on this rank, and say what it holds in FP8."""
    sources = [Source(tensor.name, tensor.shape, DTYPES[tensor.dtype]) for tensor in tensors]
    plan = trace(model, sources, derived, scales_follow=True)
    problems = (*plan.problems, *cast_problems(sources, plan))
    landed = plan.destination_dtypes
    quantized = tuple(tensor.name for tensor in tensors if _FP8 in landed.get(tensor.name, ()))
    return plan, RankFindings(quantized, problems, plan.used_boxes)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A plan makes 100,000 small objects and no cycles; looking for cycles in them takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def expected_in_fp8(tensors: Sequence[TensorSpec], config: FP8BlockConfig) -> frozenset[str]:
    """The names of the tensors that a checkpoint of `config` holds in FP8."""
    return frozenset(t.name for t in tensors if should_quantize_param(t.name, t.shape, config))


def manifest_of(tensors: Sequence[TensorSpec], quantized: frozenset[str]) -> tuple[ManifestTensor, ...]:
    """The offer with the server's decision on each tensor."""
    return tuple(
        ManifestTensor(name=t.name, shape=t.shape, dtype="float8_e4m3fn", quantized=True)
        if t.name in quantized
        else ManifestTensor(name=t.name, shape=t.shape, dtype=t.dtype, quantized=False)
        for t in tensors
    )


def cast_problems(sources: Sequence[Source], plan: BindingPlan) -> list[str]:
    """Copies that would change values: the loaders' own `copy_` casts in silence."""
    problems = []
    for source in sources:
        for landed in plan.destination_dtypes.get(source.name, ()):
            if landed != source.dtype and (source.dtype, landed) not in _EXACT_CASTS:
                mine, theirs = DTYPE_NAMES.get(source.dtype, source.dtype), DTYPE_NAMES.get(landed, landed)
                hint = f" (start it with --dtype {mine})" if landed in (torch.bfloat16, torch.float16) else ""
                problems.append(f"{source.name}: arrives as {mine}, the server holds {theirs}{hint}")
    return problems


def unused_problems(tensors: Sequence[TensorSpec], findings: Sequence[RankFindings]) -> list[str]:
    """Tensors, or parts of them, for which no rank of the server has a place."""
    problems = []
    for tensor in tensors:
        boxes = {box for rank in findings for box in rank.used_boxes.get(tensor.name, ())}
        if not boxes:
            problems.append(f"{tensor.name} {list(tensor.shape)}: the server has no place for it")
        elif (left := uncovered(tensor.shape, boxes)) is not None:
            part = ", ".join(f"{start}:{stop}" for start, stop in left)
            problems.append(f"{tensor.name} {list(tensor.shape)}: the server has no place for its part [{part}]")
    return problems


def with_shapes(problems: Sequence[str], tensors: Sequence[TensorSpec], model: nn.Module) -> list[str]:
    """`problems`, where what a wrong shape led to is replaced by the two shapes.

    Only for tensors that this rank holds whole and under their own name; others keep what the loader said.
    """
    held = {name: tuple(tensor.shape) for name, tensor in destinations(model).items()}
    found = list(problems)
    for tensor in tensors:
        about = (f"{tensor.name}:", f"{tensor.name} [", f"{scale_name(tensor.name)} [")
        mine = [problem for problem in found if problem.startswith(about) and "arrives as" not in problem]
        if mine and held.get(tensor.name, tensor.shape) != tensor.shape:
            found = [problem for problem in found if problem not in mine]
            found.append(f"{tensor.name}: the trainer has {list(tensor.shape)}, the server {list(held[tensor.name])}")
    return found


def raise_problems(problems: Sequence[str], num_ranks: int) -> None:
    """Raises: PlanError listing `problems` once each, or nothing if there are none."""
    unique = tuple(dict.fromkeys(problems))
    if unique:
        raise PlanError(f"{len(unique)} tensor(s) do not fit the server's model ({num_ranks} rank(s))", unique)
