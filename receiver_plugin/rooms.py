"""Where the bytes of a push lie until they are committed: three ways, chosen by the memory of a server, best first.

    reserved   set apart before SGLang sizes its KV cache (`receiver_plugin/reserve.py`); requests run on meanwhile
    kv_pool    the KV cache itself, which nothing uses while no request runs; zeroed before and after
    in_place   nowhere: each bucket goes straight into the live parameters, once its digest was checked

The last two need the door shut from before the first byte until the commit, and give all back when a transfer ends.
All ranks of a server take the same way; the one that can do least decides.

In reserved memory a rank that needs all that is sent keeps the buckets themselves, each in a place of its own, and
spreads them over its parameters when it commits. One that needs its slices only spreads each bucket, as it comes, over
an image of its parameters.

Where trainer ranks write what they hold themselves (`Need.lands`), no bucket comes: it goes straight to the image in
reserved memory, or to the live parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import torch
from torch import nn

from receiver_plugin.binding import BindingPlan
from receiver_plugin.held import destinations
from shared.buckets import ALIGNMENT_BYTES, DEFAULT_BUCKET_BYTES, Layout
from shared.errors import PlanError, TransferError
from shared.planes import shared_memory
from shared.protocol import StagingChoice, StagingWay

WAYS: tuple[StagingWay, ...] = ("reserved", "kv_pool", "in_place")


class CannotLendError(Exception):
    """Why memory of the engine cannot be used for staging. It never leaves this rank."""


class Memory(Protocol):
    """What the engine of this rank lends."""

    @property
    def reserved(self) -> torch.Tensor | None:
        """Flat uint8 that nothing else ever uses, or None."""

    @property
    def released(self) -> Collection[str]:
        """Which memory of the engine is given back to the GPU just now, by its own tags: `weights`, `kv_cache`."""

    def kv_pool(self) -> list[torch.Tensor]:
        """The KV cache as flat uint8 tensors; to be written while no request runs. Raises: CannotLendError."""


@dataclass(frozen=True)
class Need:
    """What a push takes on this rank: an image of `sizes` (bytes by parameter) and `Layout.window_bytes`, or
    `whole_bytes` for all `num_buckets` buckets.

    `exported`: buckets lie in memory that another process of this host can open. `num_at_once`: as of `Layout`.
    `lands`: trainer ranks write the image, or the parameters.
    """

    sizes: dict[str, int]
    bucket_bytes: int
    device: torch.device
    exported: bool = False
    num_at_once: int = 1
    whole_bytes: int = 1 << 62
    num_buckets: int = 0
    lands: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        plan: BindingPlan,
        layout: Layout,
        exported: bool = False,
        num_senders: int = 1,
        lands: bool = False,
    ) -> Need:
        sizes, device = _touched(model, plan)
        num = 1 if lands else _buckets_at_once(device, layout, num_senders)
        sizes_of_buckets = layout.window_bytes(num), device, exported, num, layout.num_bytes, len(layout.buckets)
        return cls(sizes, *sizes_of_buckets, lands=lands)

    @classmethod
    def to_land(cls, model: nn.Module, plan: BindingPlan) -> Need:
        """Of trainer ranks that write it themselves, whatever the buckets."""
        sizes, device = _touched(model, plan)
        return cls(sizes, 0, device, exported=True, lands=True)

    @property
    def image_bytes(self) -> int:
        return sum(aligned(size) for size in self.sizes.values())

    @property
    def is_shared(self) -> bool:
        """Whether buckets lie in shared memory; what PyTorch has on a GPU can be exported as it is."""
        return self.exported and self.device.type == "cpu"

    def can_lie_in(self, reserved: torch.Tensor) -> bool:
        """Whether buckets can."""
        return not self.is_shared or shared_memory.holds(reserved)

    def is_whole_in(self, reserved: torch.Tensor) -> bool:
        """Whether `reserved` can keep all buckets."""
        return self.whole_bytes <= reserved.numel() and self.can_lie_in(reserved)


def _touched(model: nn.Module, plan: BindingPlan) -> tuple[dict[str, int], torch.device]:
    """Bytes of each parameter that a push changes, and where they are."""
    parameters = destinations(model)
    touched = dict.fromkeys([*(c.parameter for c in plan.copies), *(f.parameter for f in plan.fills)])
    return {name: parameters[name].nbytes for name in touched}, next(iter(parameters.values())).device


@dataclass
class Room:
    """Memory for one transfer or more. `buffers` (flat uint8) hold the image; none if there is no image.

    `bucket`: what `Layout.windows` lays buckets into, `num_at_once` at a time; None: as `num_at_once` says. `whole`:
    all of them, until the commit. `num_ahead`: how many may be on their way at a time; None: as many as have places.
    `lands`: nothing comes in `bucket`, which has addresses and no memory; trainer ranks write where it goes.
    """

    way: StagingWay
    buffers: list[torch.Tensor]
    bucket: torch.Tensor
    num_at_once: int | None = None
    whole: bool = False
    num_ahead: int | None = None
    lands: bool = False

    def leave(self) -> None:
        """Give back what was lent. The padded slots of a KV cache are read: what lies there must be numbers."""
        if self.way == "kv_pool":
            for buffer in self.buffers:
                buffer.zero_()


def num_at_once(device: torch.device) -> int:
    """Buckets that are there at a time: a GPU takes one while the next comes and the one after has its place."""
    return 3 if device.type == "cuda" else 1


def _buckets_at_once(device: torch.device, layout: Layout, num_senders: int) -> int:
    """Where several send, one more than they are, so that all are at work while a bucket is taken; as many as fit into
    the memory of those that are usual."""
    usual = num_at_once(device)
    if usual == 1:
        return usual
    room = max(usual * DEFAULT_BUCKET_BYTES, layout.window_bytes(usual))
    return next((num for num in range(num_senders + 1, usual, -1) if layout.window_bytes(num) <= room), usual)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def free_of(memory: Memory, taken: Iterable[int]) -> torch.Tensor | None:
    """The reserved memory before the first of the addresses `taken`, from which on earlier sessions may still write."""
    if (reserved := memory.reserved) is None:
        return None
    starts = [address - reserved.data_ptr() for address in taken]
    inside = [start for start in starts if 0 <= start < reserved.numel()]
    return reserved[: min(inside)] if inside else reserved


def obstacles(
    need: Need, memory: Memory, wanted: StagingChoice, free: torch.Tensor | None = None
) -> dict[StagingWay, str]:
    """Why this rank cannot take a way, and what helps. A way that is not named can be taken, if it comes to that.

    `free`: of the reserved memory, as `free_of` has it; None: all of it.
    """
    if need.lands:
        return _obstacles_to_landing(need, memory, free)
    found: dict[StagingWay, str] = {}
    held = 0 if memory.reserved is None else memory.reserved.numel()
    total, least = need.image_bytes + need.bucket_bytes, need.image_bytes
    if memory.reserved is None or need.can_lie_in(memory.reserved):
        total, least = min(total, need.whole_bytes), min(least, need.whole_bytes)
    if held < total:
        found["reserved"] = _too_little(held, total)
    elif free is not None and free.numel() < least:
        found["reserved"] = _STILL_WRITTEN
    try:
        lent = sum(buffer.numel() for buffer in _lent(memory))
        if lent < need.image_bytes:
            text = f"the KV cache has {lent / 1e9:.2f} GB of {need.image_bytes / 1e9:.2f} GB"
            found["kv_pool"] = f"{text}: start the server with a higher --mem-fraction-static or --max-total-tokens"
    except CannotLendError as error:
        found["kv_pool"] = str(error)
    if "reserved" not in found and wanted in ("auto", "reserved"):
        return found  # no memory is taken from an engine for an answer that nobody needs
    try:
        _own(need.bucket_bytes, need.device)
    except PlanError as error:
        for way in ("kv_pool", "in_place"):
            found.setdefault(way, str(error))
    return found


_STILL_WRITTEN = "an earlier sender may still write to the reserved memory: it has to go on, or to end"


def _too_little(held: int, total: int) -> str:
    text = f"{held / 1e9:.2f} GB are reserved of {total / 1e9:.2f} GB"
    return f"{text}: start the server with --fp8sync-staging {ceil(total / 1e7) / 100}"


def _obstacles_to_landing(need: Need, memory: Memory, free: torch.Tensor | None) -> dict[StagingWay, str]:
    found: dict[StagingWay, str] = {"kv_pool": "trainer ranks that write what they hold write to no KV cache"}
    held = 0 if memory.reserved is None else memory.reserved.numel()
    if held < need.image_bytes:
        found["reserved"] = _too_little(held, need.image_bytes)
    elif memory.reserved is not None and not need.can_lie_in(memory.reserved):
        found["reserved"] = "the reserved memory cannot be opened by another process"
    elif free is not None and free.numel() < need.image_bytes:
        found["reserved"] = _STILL_WRITTEN
    if need.device.type == "cpu":
        found["in_place"] = "parameters on a CPU lie in memory that no other process can open"
    return found


def choose(wanted: StagingChoice, found: Sequence[dict[StagingWay, str]]) -> StagingWay:
    """The way that all ranks can take; `found` are the obstacles of each.

    Raises:
        PlanError: there is none, or not the one that is `wanted`; says what helps.
    """
    ways = WAYS if wanted == "auto" else (wanted,)
    for way in ways:
        if not any(way in obstacle for obstacle in found):
            return way
    lines = [f"rank {rank}: {way}: {had[way]}" for way in ways for rank, had in enumerate(found) if way in had]
    raise PlanError(f"no room for staging={wanted!r} on this server", tuple(lines))


def enter(way: StagingWay, need: Need, memory: Memory, free: torch.Tensor | None = None) -> Room:
    """Take the memory. `free`: as of `obstacles`.

    Raises:
        PlanError: it is gone, or there is none for the bucket.
    """
    if need.lands:
        return _landing(way, need, memory.reserved if free is None else free)
    if way == "reserved" and memory.reserved is not None:
        return _reserved(need, memory.reserved if free is None else free)
    bucket = _own_bucket(need)
    if way == "in_place":
        return Room(way, [], bucket, need.num_at_once)
    try:
        room = Room(way, _first(_lent(memory), need.image_bytes), bucket, need.num_at_once)
    except CannotLendError as error:
        raise PlanError(f"the KV cache cannot be used for staging any more: {error}") from error
    room.leave()
    return room


def _landing(way: StagingWay, need: Need, free: torch.Tensor | None) -> Room:
    addresses = torch.empty(need.bucket_bytes, dtype=torch.uint8)  # the system gives it memory when it is written to
    if way == "in_place":
        return Room(way, [], addresses, 1, lands=True)
    if free is None or free.numel() < need.image_bytes:
        raise PlanError("the reserved memory is no longer free: an earlier sender may still write there")
    return Room(way, [free[: need.image_bytes]], addresses, 1, lands=True)


def _reserved(need: Need, free: torch.Tensor) -> Room:
    if need.is_whole_in(free):
        return Room("reserved", [], free[: need.whole_bytes], need.num_buckets, True, need.num_at_once)
    if free.numel() < need.image_bytes:
        raise PlanError("the reserved memory is no longer free: an earlier sender may still write there")
    image, bucket = free[: need.image_bytes], free[need.image_bytes :]
    fits = bucket.numel() >= need.bucket_bytes and need.can_lie_in(free)
    return Room("reserved", [image], bucket[: need.bucket_bytes] if fits else _own_bucket(need), need.num_at_once)


def own_room(need: Need) -> Room:
    """A room of its own, of memory that nobody lends."""
    image, bucket = _own(need.image_bytes, need.device), _own(need.bucket_bytes, need.device)
    return Room("reserved", [image], bucket, need.num_at_once)


def _own_bucket(need: Need) -> torch.Tensor:
    if not need.is_shared:
        return _own(need.bucket_bytes, need.device)
    try:
        return shared_memory.allocate(need.bucket_bytes)
    except TransferError as error:
        raise PlanError(str(error)) from error


def _own(num_bytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU
        raise PlanError(
            f"no memory for {num_bytes / 1e9:.2f} GB on {device}: give FP8Sender a smaller bucket_bytes, "
            f"or start the server with a lower --mem-fraction-static ({error})"
        ) from error


def _lent(memory: Memory) -> list[torch.Tensor]:
    """The KV cache, in pieces that begin and end at whole multiples of the alignment."""
    found = []
    for buffer in memory.kv_pool():
        skipped = -buffer.data_ptr() % ALIGNMENT_BYTES
        size = (buffer.numel() - skipped) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if size > 0:
            found.append(buffer[skipped : skipped + size])
    return found


def _first(buffers: Sequence[torch.Tensor], num_bytes: int) -> list[torch.Tensor]:
    """Of `buffers`, in order, as much as makes `num_bytes`."""
    found = []
    for buffer in buffers:
        if num_bytes > 0:
            found.append(buffer[:num_bytes])
            num_bytes -= found[-1].numel()
    if num_bytes > 0:
        raise CannotLendError("it is smaller than it was")
    return found
