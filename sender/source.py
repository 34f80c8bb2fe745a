"""Where weights come from: something that lists checkpoint tensors and gathers them whole on one rank.

`ModuleSource` reads a module, sharded or not, under any wrappers (`sender.wrappers`). `ShardSource` reads shards that
the caller names itself. Neither writes to a parameter. What is pushed is what training computes with: fp32 masters are
rounded to BF16, on their own rank before they are gathered (FSDP1: after).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from sender.hf_names import Cut, Cuts, checkpoint_cuts
from sender.ranks import TrainerRanks
from sender.sharding import Sharding, sharding_of
from sender.wrappers import WIRE_DTYPES as _WIRE_DTYPES
from sender.wrappers import Held, TensorHeld, checkpoint_tensors, refuse_foreign, reshard
from shared.buckets import DTYPE_NAMES, DTYPES
from shared.coverage import Box, overlapped, uncovered
from shared.errors import ConfigError, PlanError
from shared.protocol import TensorSpec

T = TypeVar("T")


class WeightSource(Protocol):
    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All checkpoint tensors, the same on every rank, in the order in which they are to be gathered."""

    @property
    def sharding(self) -> Sharding:
        """The parameters of which every rank holds some rows, and this rank's rows of them."""

    @property
    def cuts(self) -> Cuts:
        """The tensors that are made of each parameter in `sharding`."""

    def gather(self, names: Sequence[str], to: int = 0, receivers: Sequence[int] = (0,)) -> Mapping[str, torch.Tensor]:
        """Collective. The whole tensors on rank `to`, in wire precision; what others get is not used.

        `receivers`: the ranks to which tensors of this source go until `release`, `to` among them.
        """

    def release(self) -> None:
        """Drop what `gather` kept for the next call."""


class Weights(Mapping[str, torch.Tensor]):
    """Whole tensors by name, each made (`make`) when it is first asked for, and again after `drop`.

    The same object again stands for the same places in memory, whoever's that is by now.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], torch.Tensor]) -> None:
        self._names, self._make = names, make
        self._made: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def drop(self) -> None:
        """The trainer may want its memory."""
        self._made.clear()


@dataclass(frozen=True)
class _InMemory:
    """Weights that are views of the parameters of `held`, whose memory lies at `places`: addresses and strides."""

    weights: Weights
    held: list[tuple[Held, torch.dtype]]
    places: list[_Place | None]

    @classmethod
    def of(cls, weights: Weights, held: list[tuple[Held, torch.dtype]]) -> _InMemory | None:
        """None if one of them is a copy: of a shard, in another type, or because it is not contiguous."""
        own = [memory for each, dtype in held if (memory := each.own_memory(dtype)) is not None]
        storages = {memory.untyped_storage().data_ptr() for memory in own}
        if len(own) < len(held) or any(w.untyped_storage().data_ptr() not in storages for w in weights.values()):
            return None
        return cls(weights, held, [_place(memory) for memory in own])

    def holds(self) -> bool:
        """Whether all parameters lie where they lay."""
        return [_place(each.own_memory(dtype)) for each, dtype in self.held] == self.places


_Place = tuple[int, tuple[int, ...], torch.device]


def _place(memory: torch.Tensor | None) -> _Place | None:
    return None if memory is None else (memory.data_ptr(), memory.stride(), memory.device)


class ModuleSource:
    """The parameters of a module under their checkpoint names, whatever wraps them.

    `num_ranks`: over how many ranks parameters may be sharded by rows, to be quantized there; with 1 none are.

    Raises:
        NotImplementedError: Megatron-style modules.
        ConfigError: adapters that are not merged; a parameter on the meta device, or of another type than bf16, fp16 or
            fp32; experts stored in a layout that checkpoints do not have.
    """

    def __init__(self, model: nn.Module, num_ranks: int = 1) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"a {type(model).__name__} is no module: for tensors by name there is push_shards")
        refuse_foreign(model)
        reshard(model.modules())
        held = _by_name(checkpoint_tensors(model))
        self.cuts = checkpoint_cuts(model, {name: parameter.shape for name, (parameter, _) in held.items()})
        self._spread = [(name, owner) for name, (owner, _) in held.items() if isinstance(owner, TensorHeld)]
        self.sharding = sharding_of(((name, owner.tensor) for name, owner in self._spread), num_ranks)
        self._sharded = replace(self.sharding, locals=())  # without memory of the model
        self._cuts = _by_name((cut.name, (*held[name], cut)) for name in held for cut in self.cuts[name])
        specs = (
            {"name": cut.name, "shape": cut.shape, "dtype": DTYPE_NAMES[dtype]} for _, dtype, cut in self._cuts.values()
        )
        self._tensors = tuple(TensorSpec.model_validate(spec) for spec in specs)
        self._gathered: tuple[Held | None, torch.Tensor | None] = (None, None)
        self._in_memory: dict[tuple[str, ...], _InMemory] = {}
        self._held = [parameter for parameter, _ in held.values()]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return self._tensors

    def gather(self, names: Sequence[str], to: int = 0, receivers: Sequence[int] = (0,)) -> Mapping[str, torch.Tensor]:
        """On every rank of `receivers`: they may have parts of one parameter each."""
        names = tuple(names)
        known = self._in_memory.get(names)
        if known is not None and known.holds():
            return known.weights
        found = Weights(names, lambda name: self._one(name, receivers))
        for name in names:
            found[name]  # now: it is a collective
        self._in_memory.pop(names, None)
        owners = {id(self._cuts[name][0]): self._cuts[name][:2] for name in names}
        if (lasting := _InMemory.of(found, list(owners.values()))) is not None:
            self._in_memory[names] = lasting
        return found

    def _one(self, name: str, receivers: Sequence[int]) -> torch.Tensor:
        held, dtype, cut = self._cuts[name]
        return cut.of(self._whole(held, dtype, receivers))

    def _whole(self, held: Held, dtype: torch.dtype, receivers: Sequence[int]) -> torch.Tensor:
        """The gathered parameter; kept while its cuts are asked for one after the other."""
        last, whole = self._gathered
        if last is not held or whole is None:
            self._gathered = (None, None)
            with torch.no_grad():
                whole = held.whole(dtype, receivers)
            self._gathered = (held, whole)
        return whole

    def release(self) -> None:
        """Drop all that holds memory of the model."""
        self._gathered = (None, None)
        for lasting in self._in_memory.values():
            lasting.weights.drop()
        self.sharding = Sharding()
        for held in self._held:
            held.release()

    def renew(self) -> None:
        """Once `release` was called: what is read of the model before each push, which is sharded as it was."""
        self.sharding = self._sharded.again({name: owner.tensor for name, owner in self._spread})


def _by_name(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{name}: two tensors of the model have this name once its wrappers are taken off")
        found[name] = value
    return found


@dataclass(frozen=True)
class Shard:
    """A part of a checkpoint tensor that this rank holds.

    `tensor` lies at `offsets` (first element per dimension) of a tensor of `global_shape`.
    """

    name: str
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def box(self) -> Box:
        return tuple((start, start + length) for start, length in zip(self.offsets, self.tensor.shape, strict=True))


class ShardSource:
    """Tensors given as shards: `(HF name, local tensor, global shape, offsets)` on the ranks that hold them.

    A part that several ranks hold alike is taken from the first of them.

    Raises:
        PlanError: shards that disagree, overlap in part, or leave a hole; all of them are listed.
    """

    def __init__(self, shards: Iterable[Shard], ranks: TrainerRanks, timeout_s: float) -> None:
        self._ranks = ranks
        self.sharding, self.cuts = Sharding(), dict[str, tuple[Cut, ...]]()
        shards = list(shards)
        if wrong := {type(shard).__name__ for shard in shards if not isinstance(shard, Shard)}:
            raise ConfigError(f"shards are sender.Shard objects, not {sorted(wrong)}")
        self._mine = {(shard.name, shard.box): shard.tensor.detach() for shard in shards}
        listing = [
            [name, list(tensor.shape), [start for start, _ in box], DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))]
            for (name, box), tensor in self._mine.items()
        ]
        shapes = {shard.name: list(shard.global_shape) for shard in shards}
        told = [json.loads(t) for t in ranks.tell_all(json.dumps({"shards": listing, "shapes": shapes}), timeout_s)]
        self._holders: dict[str, dict[Box, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        problems: list[str] = []
        for rank, said in enumerate(told):
            self._read(rank, said, problems)
        for name, holders in self._holders.items():
            problems += _cover_problems(name, self._shapes[name], list(holders))
        if problems:
            raise PlanError(f"{len(problems)} shard(s) do not make whole tensors", tuple(problems))

    def _read(self, rank: int, said: dict[str, Any], problems: list[str]) -> None:
        for name, shape, offsets, dtype in said["shards"]:
            whole = tuple(said["shapes"][name])
            if self._shapes.setdefault(name, whole) != whole:
                problems.append(f"{name}: rank {rank} says {list(whole)}, another {list(self._shapes[name])}")
            if DTYPES.get(dtype) not in _WIRE_DTYPES or self._dtypes.setdefault(name, DTYPES[dtype]) != DTYPES[dtype]:
                problems.append(f"{name}: rank {rank} holds it as {dtype}, which cannot be pushed or differs")
                continue
            box = tuple((start, start + length) for start, length in zip(offsets, shape, strict=True))
            self._holders.setdefault(name, {}).setdefault(box, rank)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec.model_validate(
                {"name": n, "shape": self._shapes[n], "dtype": DTYPE_NAMES[_WIRE_DTYPES[self._dtypes[n]]]}
            )
            for n in self._holders
        )

    def gather(self, names: Sequence[str], to: int = 0, receivers: Sequence[int] = (0,)) -> Mapping[str, torch.Tensor]:
        return {name: self._whole(name, to) for name in names}

    def release(self) -> None:
        """Nothing is kept."""

    def _whole(self, name: str, to: int) -> torch.Tensor:
        """Every holder sends its parts to rank `to`, in the order that all ranks know."""
        dtype = _WIRE_DTYPES[self._dtypes[name]]
        device = next(iter(self._mine.values())).device if self._mine else torch.device("cpu")
        receives = self._ranks.rank == to
        whole = torch.empty(self._shapes[name] if receives else (0,), dtype=dtype, device=device)
        for box, holder in self._holders[name].items():
            window = tuple(slice(start, stop) for start, stop in box)
            if holder == self._ranks.rank:
                part = self._mine[name, box].to(dtype)
                if receives:
                    whole[window] = part
                else:
                    dist.send(part.contiguous(), dst=to)
            elif receives:
                part = torch.empty([stop - start for start, stop in box], dtype=dtype, device=device)
                dist.recv(part, src=holder)
                whole[window] = part
        return whole


def _cover_problems(name: str, shape: tuple[int, ...], boxes: list[Box]) -> list[str]:
    if any(len(box) != len(shape) or any(b > full for (_, b), full in zip(box, shape, strict=True)) for box in boxes):
        return [f"{name}: a shard lies outside of {list(shape)}"]
    if (hole := uncovered(shape, boxes)) is not None:
        return [f"{name}: no rank holds its part {hole}"]
    if (twice := overlapped(shape, boxes)) is not None:
        return [f"{name}: different shards hold its part {twice}"]
    return []
