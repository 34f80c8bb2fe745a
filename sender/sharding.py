"""Which rows of a model's parameters each trainer rank holds, where a rank can say so without asking the others.

That is so for FSDP2 on a mesh of all ranks: a parameter is cut along its first dimension into parts of one size, the
last of which may be short, or empty. A parameter counts as rows of its last dimension: [E, 2I, H] has E * 2I rows. One
of a single dimension has rows of one element.
What FSDP1 holds, HSDP and tensor-parallel meshes, parts cut along another dimension, parameters offloaded to the CPU of
a mesh of GPUs, and whole ones are not described here; they are gathered first and quantized afterwards.

All of it but `Sharding.problem` is a fact of the whole model, and so the same on every rank.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from shared.numerics import WEIGHT_DTYPES


@dataclass(frozen=True)
class ShardedRows:
    """A parameter of [num_rows, num_cols]; rank r holds `rows_per_rank` from row `r * rows_per_rank` on, if so many
    are left."""

    name: str
    dtype: str
    num_rows: int
    num_cols: int
    rows_per_rank: int

    def of(self, rank: int) -> tuple[int, int]:
        """First row of `rank`, and the one after its last."""
        first = min(rank * self.rows_per_rank, self.num_rows)
        return first, min(first + self.rows_per_rank, self.num_rows)


@dataclass(frozen=True)
class Sharding:
    """The parameters of a model that are sharded by rows over all ranks.

    `locals`: [rows of this rank, num_cols] of each, in its own memory. `group`: a process group of all ranks in order,
    with collectives for tensors where these lie. `problem`: what this rank holds other than `parameters` says, or "".
    `facts`: a hash of `parameters`, if it was taken.
    """

    parameters: tuple[ShardedRows, ...] = ()
    locals: tuple[torch.Tensor, ...] = field(default=(), compare=False)
    group: Any = field(default=None, compare=False)
    problem: str = field(default="", compare=False)
    facts: str = field(default="", compare=False)

    @property
    def device(self) -> torch.device:
        return self.locals[0].device

    @property
    def text(self) -> str:
        """The same on ranks that agree and hold what they should."""
        return self.problem or self.facts or _hash_of(self.parameters)

    def again(self, tensors: Mapping[str, Any]) -> Sharding:
        """With the memory of `tensors`, by name, which are sharded as those were that this was made of."""
        held = [(tensors[rows.name]._local_tensor.detach(), rows.num_cols) for rows in self.parameters]
        return replace(self, locals=tuple(local.view(local.numel() // cols, cols) for local, cols in held))


def _hash_of(parameters: tuple[ShardedRows, ...]) -> str:
    return hashlib.sha256(repr(parameters).encode()).hexdigest()


def sharding_of(tensors: Iterable[tuple[str, torch.Tensor]], num_ranks: int) -> Sharding:
    """`tensors`: the parameters of a model, by name, in an order that is the same on every rank."""
    parameters, parts, meshes, problems = [], list[torch.Tensor](), list[Any](), []
    spans_all = functools.cache(lambda mesh: mesh.ndim == 1 and mesh.mesh.tolist() == list(range(num_ranks)))
    for name, tensor in tensors:
        if num_ranks == 1 or not isinstance(tensor, DTensor) or not spans_all(tensor.device_mesh):
            continue
        mesh: Any = tensor.device_mesh
        if not _is_sharded_by_rows(tensor, mesh.device_type):
            continue
        if meshes and mesh.device_type != meshes[0].device_type:
            continue  # the collectives of a push are those of one device
        shape, whole = tuple(tensor.shape), prod(tensor.shape[1:-1])
        num_cols = shape[-1] if len(shape) > 1 else 1
        rows_per_rank = -(-shape[0] // num_ranks) * whole  # as torch.chunk cuts
        found = ShardedRows(name, str(tensor.dtype), shape[0] * whole, num_cols, rows_per_rank)
        first, end = found.of(mesh.get_local_rank())
        local = tensor._local_tensor.detach()
        if tuple(local.shape) != ((end - first) // whole, *shape[1:]) or not local.is_contiguous():
            what = f"{list(local.shape)}, strides {list(local.stride())}, of {list(shape)} of {name}"
            problems.append(f"rank {mesh.get_local_rank()} holds {what}; {_LATE}")
            continue
        parameters.append(found)
        parts.append(local.view(end - first, num_cols))
        meshes.append(mesh)
    group = meshes[0].get_group() if meshes else None
    return Sharding(tuple(parameters), tuple(parts), group, "; ".join(problems), _hash_of(tuple(parameters)))


_LATE = "FP8Sender(quantize='after_gather') can push it"


def _is_sharded_by_rows(tensor: DTensor, device_type: str) -> bool:
    (placement,) = tensor.placements
    return (
        type(placement) is ShardPlacement
        and placement.dim == 0
        and tensor.dim() >= 1
        and tensor.numel() > 0
        and tensor.dtype in WEIGHT_DTYPES
        and tensor.is_contiguous()
        and tensor.device.type == device_type
    )
