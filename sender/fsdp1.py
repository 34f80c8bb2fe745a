"""Parameters of FSDP1 (`FullyShardedDataParallel`), gathered one of its units at a time.

A unit keeps its parameters flat, cut across ranks without regard to rows, so that no rank can say which part of which
tensor it holds. Names and shapes are read from the unit's own description; values come from `summon_full_params`, which
gathers a whole unit in the precision of its masters. What the last unit gave is kept, in wire precision, until another
one is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from shared.errors import ConfigError


class Fsdp1Unit:
    """The parameters that one `FullyShardedDataParallel` module holds itself, those of nested ones left out."""

    def __init__(self, module: FullyShardedDataParallel, root: FullyShardedDataParallel, flat: Any) -> None:
        self._module, self._root = module, root
        self.names: tuple[str, ...] = tuple(flat._fqns)
        self.shapes = [tuple(shape) for shape in flat._shapes]
        self.dtype: torch.dtype = flat.dtype
        self._gathered: dict[str, torch.Tensor] = {}

    def gather(self, name: str, dtype: torch.dtype, receivers: Sequence[int]) -> torch.Tensor:
        """Collective, the first time after `release`. On other ranks than `receivers` a tensor without values."""
        if name not in self._gathered:
            self._begin_at_root()
            self._reshard()
            summon, to_one = FullyShardedDataParallel.summon_full_params, tuple(receivers) == (0,)
            with summon(self._module, recurse=False, writeback=False, rank0_only=to_one):
                has_values = self._module.rank == 0 if to_one else dist.get_rank() in receivers
                for found, shape in zip(self.names, self.shapes, strict=True):
                    self._gathered[found] = self._take(found, shape, dtype, has_values)
        return self._gathered[name]

    def _begin_at_root(self) -> None:
        """The first unit that FSDP1 is asked for becomes the root of what it holds, for good."""
        if self._root._is_root is None:
            with FullyShardedDataParallel.summon_full_params(self._root, recurse=False, writeback=False):
                pass

    def _reshard(self) -> None:
        """Drop what the last forward gathered: the root keeps it, and an optimizer's step does not reach it."""
        handle: Any = self._module._handle
        started = self._module._is_root is not None  # nothing is gathered, nor can be dropped, before the first use
        if started and handle.uses_sharded_strategy and handle._training_state.name == "IDLE":
            handle.reshard(True)
            handle.post_reshard()
            handle._prefetched = False

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, has_values: bool) -> torch.Tensor:
        if not has_values:
            return torch.empty(shape, dtype=dtype, device="meta")
        held: Any = self._module.module
        for part in name.split("."):
            held = getattr(held, part)
        if tuple(held.shape) != shape:
            raise ConfigError(f"{name}: FSDP1 gathered {list(held.shape)} where it described {list(shape)}")
        return held.detach().to(dtype, copy=True)  # its memory goes back to FSDP1 at the end

    def release(self) -> None:
        self._gathered = {}


class Fsdp1Parameter:
    """One parameter of a unit (`sender.wrappers.Held`)."""

    def __init__(self, unit: Fsdp1Unit, name: str, shape: tuple[int, ...], units: list[Fsdp1Unit]) -> None:
        self._unit, self._name, self._units = unit, name, units
        self.shape, self.dtype = shape, unit.dtype

    def whole(self, dtype: torch.dtype, receivers: Sequence[int] = (0,)) -> torch.Tensor:
        for unit in self._units:
            if unit is not self._unit:
                unit.release()
        return self._unit.gather(self._name, dtype, receivers)

    def release(self) -> None:
        self._unit.release()

    def own_memory(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None


def fsdp1_parameters(model: nn.Module) -> tuple[list[tuple[str, Fsdp1Parameter]], set[int]]:
    """The parameters that FSDP1 holds, by their names in `model`, and the ids of what stands for them there."""
    units: list[Fsdp1Unit] = []
    found: list[tuple[str, Fsdp1Parameter]] = []
    stand_ins: set[int] = set()
    root: tuple[str, FullyShardedDataParallel] | None = None  # of the modules that follow, down to its path
    for path, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) and (root is None or not f"{path}.".startswith(root[0])):
            root = (f"{path}." if path else "", module)
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is None:  # no FSDP1, or a module whose parameters are all in nested ones
            continue
        assert isinstance(module, FullyShardedDataParallel) and root is not None
        flat: Any = handle.flat_param
        unit = Fsdp1Unit(module, root[1], flat)
        units.append(unit)
        stand_ins |= {id(flat), *(id(parameter) for parameter in flat._params or ())}
        start = f"{path}._fsdp_wrapped_module." if path else "_fsdp_wrapped_module."
        found += [
            (start + name, Fsdp1Parameter(unit, name, shape, units))
            for name, shape in zip(unit.names, unit.shapes, strict=True)
        ]
    return found, stand_ins
