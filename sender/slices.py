"""What a trainer rank does where every rank writes what it holds itself (`send_from="holders"`): nothing is gathered.

    once          every server rank says which bytes of every bucket go where in its memory (`shared.slices`)
    a new plan    this rank cuts out what it holds of them: tables, for each bucket
    every bucket  quantize its rows; a launch that writes them where they go, on all server ranks; their digest

A bucket numbers the bytes of some tensors; no rank has one. What cannot be quantized where it lies is gathered whole on
one rank, which writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sender.gather import Gathered
from sender.holder import Holder
from sender.packer import Packer
from sender.plan import PushPlan
from sender.rows_plan import Run
from sender.sending import SendingHalf
from shared import digest, raw
from shared.buckets import Bucket
from shared.config import FP8BlockConfig
from shared.errors import SessionLostError, TransferError
from shared.planes import PutsSlices
from shared.rectangle_digest import Keys, RectangleDigest
from shared.rectangles import DESTINATION, DESTINATION_STEP, SOURCE, SOURCE_STEP, Numbers, clip, num_bytes

_TOLD_S = 60.0  # for servers to say where everything goes
_PROGRAMS_OF_EACH = 2  # multiprocessor


class WayOut(Protocol):
    """On rank 0 `sender.fleet.Fleet`; elsewhere a `SendingHalf`."""

    @property
    def checks_first(self) -> bool: ...

    def put(self, step: Callable[[], None], later: bool) -> None: ...

    def put_all(self) -> None: ...


class Made(NamedTuple):
    """What this rank has of a bucket: flat uint8, by where it lies. `ready` on a GPU: when it is complete."""

    bucket: Bucket
    sources: tuple[tuple[_Part, Tensor], ...]
    ready: torch.cuda.Event | None


class SliceHolder:
    """Of trainer rank `rank`, as `sender.holder.Holder`. `half`: its own data plane."""

    def __init__(self, way_out: WayOut, half: SendingHalf, config: FP8BlockConfig, rank: int) -> None:
        self._way_out, self._half, self._config, self._rank = way_out, half, config, rank
        self._made_for: PushPlan | None = None
        self._tables: _Tables | None = None
        self._packer: Packer | None = None
        self._keys: Keys | None = None  # of the push under way

    def forget(self) -> None:
        """A new plan is made: addresses of the last one are nobody's."""
        self._made_for = self._tables = self._packer = self._keys = None

    def rehearse(self, plan: PushPlan, bucket: Bucket, gathered: Gathered) -> None:
        """A push without servers: kernels are compiled and tables made."""
        self._begin_digests(self.pack(plan, bucket, gathered), version=0)()
        self._keys = None

    def pack(self, plan: PushPlan, bucket: Bucket, gathered: Gathered) -> Made:
        """What of `bucket` this rank has to write."""
        tables, packer = self._prepared(plan, gathered.device)
        if bucket.index == 0:
            packer.begin()
        sources = list[tuple[_Part, Tensor]]()
        if gathered.rows is not None:
            packer.note(gathered.rows)
            sources.append((tables.rows[bucket.index], gathered.rows.chunks))
        if bucket.index in tables.packed:
            sources.append((tables.packed[bucket.index], packer.pack(bucket, gathered.weights)))
        return Made(bucket, tuple(sources), _now(tables.device))

    def send(self, made: Made, index: int) -> None:
        """Begin to write it; on a GPU with the next call, so that the device has something to do meanwhile."""
        digests = self._begin_digests(made, self._half.version)
        packer = self._packer
        check = packer.begin_check() if packer is not None and self._way_out.checks_first and made.sources else None
        self._way_out.put(lambda: self._put(made, digests, check), made.ready is not None)

    def check_finite(self) -> None:
        """Raises: NonFiniteWeightError: what this rank has written had inf or NaN."""
        self._way_out.put_all()
        if self._packer is not None:
            self._packer.check_finite()

    def _put(self, made: Made, digests: Callable[[], Sequence[int]], check: Callable[[], None] | None) -> None:
        if check is not None:
            check()
        tables = self._opened
        total = [sum(part.num_bytes[rank] for part, _ in made.sources) for rank in range(tables.num_ranks)]
        _plane_of(self._half).put(total, lambda: tables.write(made), digests)

    def _begin_digests(self, made: Made, version: int) -> Callable[[], Sequence[int]]:
        """Of what goes to each server rank."""
        # One on every 16 bytes: a kernel is compiled for those that are, and for others again.
        tables, keys = self._opened, self._keys
        if keys is None or keys.version != version:
            keys = self._keys = Keys(self._half.secret, version, tables.bucket_bytes, tables.device)
        out = torch.zeros(tables.num_ranks, 2, dtype=torch.int64, device=tables.device)
        for part, source in made.sources:
            part.add_digests(out, source, keys, made.bucket.index)
        return digest.read(out[:, 0])

    def _prepared(self, plan: PushPlan, device: torch.device) -> tuple[_Tables, Packer]:
        """Raises: TransferError: servers did not say where everything goes."""
        if self._made_for is not plan or self._tables is None or self._packer is None:
            self.forget()
            sizes = [bucket.num_bytes for bucket in plan.layout.buckets]
            targets = _plane_of(self._half).targets(sizes, device, _TOLD_S)
            self._tables = _Tables(plan, targets, self._rank, device)
            mine = [bucket for bucket in plan.layout.buckets if bucket.index in self._tables.packed]
            self._packer = Packer(plan.layout, self._config, device, plan.early, mine, whole=False)
            self._made_for = plan
        return self._tables, self._packer

    @property
    def _opened(self) -> _Tables:
        if self._tables is None:
            raise SessionLostError("the data plane is closed: push again")
        return self._tables


class Holders:
    """Both ways of a trainer rank to send what it has, of which a plan has one: `whole` buckets, `slices` of them."""

    def __init__(self, whole: Holder, slices: SliceHolder) -> None:
        self.whole, self.slices = whole, slices

    def of(self, plan: PushPlan) -> Holder | SliceHolder:
        return self.slices if plan.slices else self.whole

    def forget(self) -> None:
        self.whole.forget()
        self.slices.forget()

    def check_finite(self) -> None:
        """Raises: NonFiniteWeightError: what was sent in this push, whichever way, had inf or NaN."""
        self.whole.check_finite()
        self.slices.check_finite()


class _Part:
    """What one source of a bucket has for the servers: `runs` of it. `targets`: of each server rank; `first`: to which
    it is written first, another one for every trainer rank, so that not all of them write into one link at a time."""

    def __init__(self, runs: Sequence[Run], targets: Sequence[Numbers], first: int, device: torch.device) -> None:
        found = [_cut(runs, target) for target in targets]
        self.num_bytes = [num_bytes(of_rank) for of_rank, _ in found]
        in_turn = [found[(first + number) % len(found)][0] for number in range(len(found))]
        self._copy = _copier(np.concatenate(in_turn), device)
        self._digests: dict[bytes, tuple[RectangleDigest, list[int]]] = {}  # once for servers that get the same
        for rank, (_, places) in enumerate(found):
            if len(places):
                same = self._digests.setdefault(places.tobytes(), (RectangleDigest(places, device, True), []))
                same[1].append(rank)

    def write(self, source: Tensor) -> None:
        """On a GPU on the current stream, without waiting for it."""
        self._copy(source)

    def add_digests(self, out: Tensor, source: Tensor, keys: Keys, bucket: int) -> None:
        """out: [server ranks, 2] int64, of which the first ones are added to."""
        for found, ranks in self._digests.values():
            where = out[ranks[0], :1] if len(ranks) == 1 else torch.zeros_like(out[0, :1])
            found.add_to(where, keys, bucket, source)
            for rank in ranks if len(ranks) > 1 else ():
                out[rank, :1] += where


class _Tables:
    """Of one plan: `rows` of every bucket, as this rank makes them; `packed`: what it packs of those that were gathered
    whole, by the number of the bucket."""

    def __init__(self, plan: PushPlan, targets: Sequence[Sequence[Numbers]], rank: int, device: torch.device) -> None:
        self.num_ranks, self.device = len(targets), device
        self.bucket_bytes = [bucket.num_bytes for bucket in plan.layout.buckets]
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.rows, self.packed = list[_Part](), dict[int, _Part]()
        for bucket in plan.layout.buckets:
            of_bucket = [of_rank[bucket.index] for of_rank in targets]
            rows = plan.rows.buckets[bucket.index] if plan.rows is not None else None
            self.rows.append(_Part(rows.runs if rows is not None else (), of_bucket, rank, device))
            late = [entry for entry in bucket.entries if entry.tensor.name not in plan.early]
            if late and plan.sender_of(bucket) == rank:
                slots = [slot for entry in late for slot in (entry.values, entry.scale) if slot is not None]
                runs = [Run(slot.offset_bytes, slot.offset_bytes, slot.num_bytes) for slot in slots]
                self.packed[bucket.index] = _Part(runs, of_bucket, rank, device)

    def write(self, made: Made) -> Callable[[], bool]:
        """Begin to; what is returned says whether that has ended."""
        if self._stream is None or made.ready is None:
            for part, source in made.sources:
                part.write(source)
            return lambda: True
        self._stream.wait_event(made.ready)
        with torch.cuda.stream(self._stream):
            for part, source in made.sources:
                part.write(source)
            ended = torch.cuda.Event()
            ended.record(self._stream)
        return ended.query


def _cut(runs: Sequence[Run], target: Numbers) -> tuple[Numbers, Numbers]:
    """Of `target`, which counts from the start of the bucket, what lies in `runs`, counted from the start of what they
    lie in; and the same with the place in the bucket in place of the destination, for the digest."""
    copies, places = [target[:0]], [target[:0]]
    for run in runs:
        found = clip(target, run.to_byte, run.to_byte + run.num_bytes)
        here = found.copy()
        here[:, SOURCE] += run.from_byte - run.to_byte
        copies.append(here)
        places.append(here.copy())
        places[-1][:, DESTINATION] = found[:, SOURCE]
        places[-1][:, DESTINATION_STEP] = found[:, SOURCE_STEP]
    return np.concatenate(copies), np.concatenate(places)


def _copier(found: Numbers, device: torch.device) -> Callable[[Tensor], None]:
    if not len(found):
        return lambda source: None
    if device.type != "cuda":
        return lambda source: raw.copy(found, source.data_ptr())
    from shared.grouped_copy import RectangleCopy

    # As few as keep a link, or the memory of this GPU, at work: what is quantized meanwhile finds room beside them.
    most = _PROGRAMS_OF_EACH * torch.cuda.get_device_properties(device).multi_processor_count
    return RectangleCopy(found, device, relative=True, most_programs=most).run


def _now(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _plane_of(half: SendingHalf) -> PutsSlices:
    """Raises: TransferError: it cannot write to memory of servers; SessionLostError: it is closed."""
    plane: object = half.plane
    if plane is None:
        raise SessionLostError("the data plane is closed: push again")
    if not isinstance(plane, PutsSlices):
        raise TransferError("slices are written to memory of servers of this host: use plane='same_host'")
    return plane
