"""The data plane of one host: every server rank exports the memory of its bucket buffer, and the sender writes there.

Ranks join over links (`shared/planes/links.py`), which stay, and carry every message, signed (`same_host_messages.py`).
The bytes of a bucket go straight to where a server takes them from: on GPUs by CUDA IPC (`cuda_ipc.py`), else by shared
memory (`shared_memory.py`).

    once         rank -> sender    meet        my host, and a little memory for you to open
                 sender -> rank    let go      of that: it could be opened
    a bucket     rank -> sender    place(i)    which memory, and where in it; nothing reads there any more. A rank with
                                               room for several says so of several, ahead of the buckets before them
                 sender => ranks   its bytes
                 sender -> ranks   header(i)   size and digest; it is coming
                 sender -> ranks   written(i)  it is there
    or, where trainer ranks write what they hold themselves (`shared/slices.py`)
    once         rank -> sender    map         which memory, and which bytes of every bucket go where in it
    a bucket     sender => ranks   the parts that it has
                 sender -> ranks   header(i)   they are there: how many bytes, and their digest
    memory that is about to be freed
                 rank -> sender    give back
                 sender -> rank    let go      of all of it
    at the end   whoever ends it shuts his direction; the last word of the sender is let go

**Who may write, and until when.** A rank keeps what it has exported, whatever becomes of the push, until the sender
says `let go`, or is dead. The sender says so when every copy that it has begun has ended and the memory is unmapped; a
thread for each rank hears what it says, so that no rank waits for what the trainer does otherwise. A sender that is
stopped keeps that memory for as long as it is stopped: the server goes on without it.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
import torch

from shared.buckets import ALIGNMENT_BYTES
from shared.errors import TransferError
from shared.planes import cuda_ipc, shared_memory
from shared.planes import same_host_messages as messages
from shared.planes.links import Link, Links
from shared.planes.same_host_messages import Said
from shared.planes.signing import TAG_BYTES
from shared.protocol import Rendezvous
from shared.rectangles import DESTINATION, Numbers
from shared.slices import MEMORY, MOST_BYTES, Memory, SliceMap

logger = logging.getLogger(__name__)

_MOST_UNDER_WAY = 2
_POLL_S, _LOOK_S = 50e-6, 0.01
_MOST_AHEAD = 4  # places, and pieces of memory, that a rank may have named
_PROBE_BYTES = 512
_PLACE_S = 0.005
_END_S = 5.0
_SETTLE_S = 1.0  # after the end of a sender's process its GPU may still carry out a copy


class _Mapping(Protocol):
    """Memory of a server rank, in the process of the sender."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def address(self) -> int: ...

    def write(self, bucket: torch.Tensor, offset: int) -> Callable[[], bool]: ...

    def room(self, offset: int, num_bytes: int) -> torch.Tensor | None: ...

    def close(self) -> None: ...


class _Copy(NamedTuple):
    """`keeps`: until all have ended; `tell`: who waits for that."""

    number: int
    keeps: object
    ends: list[Callable[[], bool]]
    tell: Callable[[float], None]

    def ended(self) -> bool:
        return all(end() for end in self.ends)


class SameHostSender:
    """Listens on `bind_host` for links; writes from GPU `gpu`, None if there is none. `timeout_s`: for one bucket."""

    def __init__(self, bind_host: str, timeout_s: float, gpu: int | None = None) -> None:
        self._timeout_s, self.gpu = timeout_s, gpu
        self.links = Links(bind_host)
        self.host, self.port = self.links.host, self.links.port
        self.changed = threading.Condition()  # of what its ranks and their threads say to each other, and its lock
        self._ranks: list[_Rank] = []
        self._under_way: deque[_Copy] = deque()
        self._num_sent, self._closed, self._key = 0, False, ""
        self._lent: set[int] = set()  # buckets, by number, that kernels may yet be asked to make in memory of a GPU

    def join(self, rendezvous: Rendezvous) -> None:
        """Raises: TransferError: not every server rank joined within `rendezvous.timeout_s`, or one is elsewhere."""
        deadline = time.monotonic() + rendezvous.timeout_s
        self.links.join(rendezvous)
        self._key = rendezvous.key
        ranks = [_Rank(self, number) for number in range(rendezvous.world_size - 1)]
        for rank in ranks:
            rank.meet(deadline)
        self._ranks = ranks
        for rank in ranks:
            rank.listen()

    def room(self, num_bytes: int, ahead: int = 0) -> torch.Tensor | None:
        """Where a bucket may be made, so that `send` of that tensor copies nothing to the first rank; or None. `ahead`:
        how many others are sent before it.

        The rank may spoil what lies there once it was sent.
        """
        with self.changed:
            first = self._ranks[0] if self._ranks and not self._closed else None
            if first is None:
                return None
            if first.is_on_gpu:  # the rank is about to say where
                self.changed.wait_for(lambda: self._closed or first.gone or len(first.places) > ahead, _PLACE_S)
            there = first.gone is None and len(first.places) > ahead and not self._closed
            found = first.room(num_bytes, ahead) if there else None
            if found is not None and found.is_cuda:
                self._lent.add(self._num_sent + ahead)
            return found

    def knows_place(self, ahead: int) -> bool:
        with self.changed:
            return bool(self._ranks) and len(self._ranks[0].places) > ahead

    def made(self, ahead: int) -> None:
        """What was asked of the device ends before that memory is unmapped (`CudaMapping.close`)."""
        with self.changed:
            self._lent.discard(self._num_sent + ahead)

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        with self.changed:
            number, self._num_sent = self._num_sent, self._num_sent + 1
            self._lent.discard(number)  # made elsewhere, after all
            self._wait_for_places(number, deadline)
            places = [(rank, rank.places.popleft()) for rank in self._ranks]
            if wrong := tuple(rank.number for rank, place in places if place.num_bytes != bucket.numel()):
                text = f"wait for another size than the {bucket.numel()} bytes of bucket {number}"
                raise TransferError(f"server rank(s) {list(wrong)} {text}", wrong)
            written = messages.told(self.links.signer, messages.WRITTEN, number)
            copy = _Copy(number, bucket, [], lambda until: self._tell(written, until))
            self._under_way.append(copy)
            for rank, place in places:
                copy.ends.append(rank.write(bucket, place))
            self._tell(messages.HEADER + self.links.signer.header(number, bucket.numel(), digest), deadline)
            # Memory that is not of a GPU is used again by whoever sends.
            self._wait_for_copies(_MOST_UNDER_WAY - 1 if bucket.is_cuda else 0, deadline)

    def targets(self, bucket_bytes: Sequence[int], device: torch.device, timeout_s: float) -> list[list[Numbers]]:
        if device.type == "cuda" and device.index != self.gpu:
            raise TransferError(f"its weights are on {device}, and this plane writes from GPU {self.gpu}")
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while silent := tuple(rank.number for rank in self._ranks if rank.map is None):
                self._check()
                if time.monotonic() > deadline:
                    raise TransferError(f"server rank(s) {list(silent)} did not say what goes where", silent)
                self.changed.wait(_LOOK_S)
            self._check()
            return [rank.targets(bucket_bytes, device) for rank in self._ranks]

    def put(
        self, num_bytes: Sequence[int], write: Callable[[], Callable[[], bool]], digests: Callable[[], Sequence[int]]
    ) -> None:
        deadline = time.monotonic() + self._timeout_s
        with self.changed:
            self._check()  # nothing is written to what was unmapped
            ended = write()
            number, self._num_sent = self._num_sent, self._num_sent + 1

            def tell(until: float) -> None:
                for rank, size, digest in zip(self._ranks, num_bytes, digests(), strict=True):
                    header = self.links.signer.header(number, size, digest, _link(self._key, rank.number))
                    self._tell_one(rank.number, messages.HEADER + header, until)

            self._under_way.append(_Copy(number, write, [ended], tell))
            self._wait_for_copies(_MOST_UNDER_WAY, deadline)

    def flush(self) -> None:
        with self.changed:
            self._wait_for_copies(0, time.monotonic() + self._timeout_s)

    def close(self) -> None:
        """No rank hears that its memory was let go before the last copy has ended; if it never does, none hears it."""
        with self.changed:
            if self._closed:
                return
            self._closed = True
            self._lent.clear()
        for rank in self._ranks:
            self.links.stop_hearing(rank.number)
        deadline = time.monotonic() + _END_S
        if not all(rank.ended(deadline) for rank in self._ranks):
            logger.error("fp8sync: copies to servers of this host do not end: their memory is not given back")
            return
        self.links.close()

    def until_quiet(self) -> None:
        """Return when nothing is being written. For a rank that is gone nothing is begun."""
        while True:
            with self.changed:
                if not self._lent and all(copy.ended() for copy in self._under_way):
                    return
            time.sleep(_POLL_S)

    # With the lock

    def _wait_for_places(self, number: int, deadline: float) -> None:
        while self._go_on(deadline) and (late := tuple(rank.number for rank in self._ranks if not rank.places)):
            if time.monotonic() > deadline:
                text = f"had no place for bucket {number} until the deadline passed"
                raise TransferError(f"server rank(s) {list(late)} {text}", late)
            self.changed.wait(_POLL_S if self._under_way else _LOOK_S)

    def _wait_for_copies(self, most: int, deadline: float) -> None:
        """Until no more than `most` are under way."""
        while self._go_on(deadline) and len(self._under_way) > most:
            if time.monotonic() > deadline:
                raise TransferError(f"bucket {self._under_way[0].number} was not copied until the deadline passed")
            self.changed.wait(_POLL_S)

    def _go_on(self, deadline: float) -> bool:
        """Tell ranks what has been written. Raises: TransferError: one is gone."""
        self._check()
        while self._under_way and self._under_way[0].ended():
            self._under_way.popleft().tell(deadline)
        return True

    def _check(self) -> None:
        if self._closed or not self._ranks:
            raise TransferError("the data plane is closed")
        if gone := {rank.number: rank.gone for rank in self._ranks if rank.gone is not None}:
            why = "; ".join(sorted(set(gone.values())))
            raise TransferError(f"server rank(s) {list(gone)} left the data plane: {why}", tuple(gone))

    def _tell(self, message: bytes, deadline: float) -> None:
        self._telling(lambda: self.links.tell(message, deadline=deadline))

    def _tell_one(self, rank: int, message: bytes, deadline: float) -> None:
        self._telling(lambda: self.links.tell_one(rank, message, deadline))

    def _telling(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except TransferError:
            self.changed.wait_for(lambda: any(rank.gone is not None for rank in self._ranks), 1.0)
            self._check()  # it may have said why
            raise


class _Rank:
    """A server rank, as the sender has it. A thread of its own hears what it says, and lets go of its memory."""

    def __init__(self, plane: SameHostSender, number: int) -> None:
        self._plane, self._links, self.number = plane, plane.links, number
        self.places: deque[Said] = deque()  # for the next buckets; with the lock of the plane, like `gone`
        self.gone: str | None = None
        self.map: bytes | None = None  # where everything goes, once it has said so
        self._targets: list[Numbers] | None = None
        self._mapped: dict[bytes, _Mapping] = {}
        self._num_places = self._num_let_go = 0
        self._is_stuck = False
        self._thread = threading.Thread(target=self._hear_all, name=f"fp8sync-hear-{number}", daemon=True)

    def meet(self, deadline: float) -> None:
        """Raises: TransferError: it is not on this host, or its memory cannot be opened."""
        try:
            said = self._hear(deadline)
            if said.what != messages.MEET:
                raise TransferError(said.text if said.what == messages.CANNOT else "it does not say where it is")
            if said.memory != messages.this_host():
                raise TransferError("it is on another host than this trainer rank: use plane='nccl' or plane='tcp'")
            self._open(said.kind, said.where).close()
            self._let_go(deadline)
        except TransferError as error:
            raise TransferError(f"server rank {self.number} cannot join: {error}", (self.number,)) from error

    def listen(self) -> None:
        self._thread.start()

    def ended(self, deadline: float) -> bool:
        """Whether its thread has, by `deadline`, and nothing can be written any more."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive() and not self._is_stuck

    @property
    def is_on_gpu(self) -> bool:
        return any(isinstance(mapping, cuda_ipc.CudaMapping) for mapping in self._mapped.values())

    def room(self, num_bytes: int, ahead: int) -> torch.Tensor | None:
        place = self.places[ahead]
        fits = place.num_bytes == num_bytes and place.memory in self._mapped
        return self._mapped[place.memory].room(place.offset, num_bytes) if fits else None

    def write(self, bucket: torch.Tensor, place: Said) -> Callable[[], bool]:
        return self._mapped[place.memory].write(bucket, place.offset)

    def targets(self, bucket_bytes: Sequence[int], device: torch.device) -> list[Numbers]:
        """Of this rank, as those of `SameHostSender`; with the lock of the plane."""
        if self._targets is None:
            self._targets = self._read_map(bucket_bytes, device)
        return self._targets

    def _read_map(self, bucket_bytes: Sequence[int], device: torch.device) -> list[Numbers]:
        found = SliceMap.read(self.map or b"", bucket_bytes)
        for number, memory in enumerate(found.memories):
            if (memory.kind == messages.ON_GPU) != (device.type == "cuda"):
                where = "on a GPU" if memory.kind == messages.ON_GPU else "on a CPU"
                text = f"its memory is {where}, weights of this trainer rank are on {device}: use send_from='rank_0'"
                raise TransferError(f"server rank {self.number}: {text}", (self.number,))
            name = b"%d" % number
            self._mapped[name] = self._open(memory.kind, memory.where)
            if self._mapped[name].num_bytes != memory.num_bytes:
                raise TransferError("memory of its map is not as large as it says", (self.number,))
        starts = np.array([self._mapped[b"%d" % number].address for number in range(len(found.memories))], np.int64)
        targets = []
        for numbers in found.buckets:
            target = numbers[:, :MEMORY].copy()
            target[:, DESTINATION] += starts[numbers[:, MEMORY]]
            targets.append(target)
        return targets

    def _hear_all(self) -> None:
        try:
            while True:
                self._note(self._hear(None))
        except TransferError as error:
            why = str(error)
        except Exception as error:
            logger.exception("fp8sync: what server rank %d said could not be followed", self.number)
            why = f"{type(error).__name__}: {error}"
        with self._plane.changed:
            self.gone = why
            self._plane.changed.notify_all()
        try:
            with suppress(TransferError):
                self._let_go(time.monotonic() + _END_S)
        except Exception:  # its memory may still be mapped here: it must not hear that we are gone
            logger.exception("fp8sync: the memory of server rank %d cannot be let go", self.number)
            self._is_stuck = True
            return
        self._links.leave(self.number)

    def _note(self, said: Said) -> None:
        if said.what == messages.GIVE_BACK:
            with self._plane.changed:
                if self.places:
                    raise TransferError("it wants memory back in which buckets have their places")
            self._let_go(time.monotonic() + _END_S)
            return
        if said.what == messages.MAP:
            if self.map is not None or said.num_bytes > MOST_BYTES:
                raise TransferError(f"it has said where everything goes already, or in {said.num_bytes} bytes")
            deadline = time.monotonic() + _END_S
            data = self._links.hear(self.number, said.num_bytes + TAG_BYTES, deadline)
            with self._plane.changed:
                self.map = messages.read_map(self._links.signer, self.number, data)
                self._plane.changed.notify_all()
            return
        if said.what != messages.PLACE:
            raise TransferError(said.text if said.what == messages.CANNOT else f"it said {said.what!r}")
        if said.number != self._num_places:
            raise TransferError(f"it has a place for bucket {said.number}, expected bucket {self._num_places}")
        self._num_places += 1
        if max(len(self.places), len(self._mapped)) > _MOST_AHEAD:
            raise TransferError("it has places for more buckets than are ever under way, or in more memory")
        if said.memory not in self._mapped:
            self._mapped[said.memory] = self._open(said.kind, said.where)
        if said.offset % ALIGNMENT_BYTES or said.offset + said.num_bytes > self._mapped[said.memory].num_bytes:
            raise TransferError(f"its place for bucket {said.number} is not in its memory, or not where one may be")
        with self._plane.changed:
            self.places.append(said)
            self._plane.changed.notify_all()

    def _open(self, kind: bytes, where: bytes) -> _Mapping:
        if kind == messages.ON_GPU:
            return cuda_ipc.CudaMapping(where[: cuda_ipc.WHERE_BYTES], self._plane.gpu)
        return shared_memory.SharedMapping(where[: shared_memory.WHERE_BYTES])

    def _let_go(self, deadline: float) -> None:
        """Of all its memory."""
        self._plane.until_quiet()
        for mapping in self._mapped.values():
            mapping.close()
        self._mapped.clear()
        message = messages.told(self._links.signer, messages.LET_GO, self._num_let_go)
        self._num_let_go += 1
        with self._plane.changed:  # one message after the other
            self._links.tell_one(self.number, message, deadline)

    def _hear(self, deadline: float | None) -> Said:
        return Said.read(self._links.hear(self.number, messages.SAID_BYTES, deadline), self._links.signer, self.number)


class _Exported(NamedTuple):
    """Memory that the sender may write to. `memory`: all of it, kept until the sender has let go."""

    memory: torch.Tensor
    name: bytes
    kind: bytes
    where: bytes


class SameHostReceiver:
    """Server rank `rank`: joins the sender and lets it write."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        deadline = time.monotonic() + rendezvous.timeout_s
        self._link, self._rank, self._key = Link(rendezvous, rank), rank, rendezvous.key
        self._exported: dict[int, _Exported] = {}  # by address
        self._told: dict[bytes, deque[bytes]] = {
            what: deque() for what in (messages.HEADER, messages.WRITTEN, messages.LET_GO)
        }
        self._num_expected = self._num_received = self._num_written = self._num_let_go = 0
        self._landed = False
        try:
            self._meet(deadline)
        except BaseException:
            self.close()
            raise

    def receive(self, bucket: torch.Tensor, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        number, self._num_received = self._num_received, self._num_received + 1
        if number == self._num_expected:
            self.expect(bucket, timeout_s)
        size, digest = self._link.signer.read_header(self._hear(messages.HEADER, deadline), number)
        if size != bucket.numel():
            raise TransferError(f"a bucket of {size} bytes arrived, expected {bucket.numel()}")
        return digest

    def expect(self, bucket: torch.Tensor, timeout_s: float) -> None:
        """Say where the next bucket will lie, ahead of `receive`."""
        deadline = time.monotonic() + timeout_s
        number, self._num_expected = self._num_expected, self._num_expected + 1
        found = self._export(bucket, deadline)
        offset = bucket.data_ptr() - found.memory.data_ptr()
        self._say(Said(messages.PLACE, number, bucket.numel(), offset, found.name, found.kind, found.where), deadline)

    def land(self, memories: Sequence[torch.Tensor], slices: Sequence[Numbers], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        found = [self._export(memory, deadline, settled=number > 0) for number, memory in enumerate(memories)]
        told = tuple(Memory(each.kind, each.memory.numel(), each.where) for each in found)
        body = SliceMap(told, tuple(slices)).packed()
        self._say(Said(messages.MAP, num_bytes=len(body)), deadline)
        self._link.say(messages.signed_map(self._link.signer, self._rank, body), deadline)
        self._landed = True

    def written(self, timeout_s: float) -> tuple[int, int]:
        number, self._num_received = self._num_received, self._num_received + 1
        header = self._hear(messages.HEADER, time.monotonic() + timeout_s)
        return self._link.signer.read_header(header, number, _link(self._key, self._rank))

    def arrive(self, timeout_s: float) -> None:
        self._hear_number(messages.WRITTEN, self._num_written, time.monotonic() + timeout_s)
        self._num_written += 1

    def release(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self._say(Said(messages.GIVE_BACK), deadline)
        self._hear_let_go(deadline)

    def interrupt(self) -> None:
        """The sender lets go, and then whoever waits here hears that it is over."""
        self._link.finish()

    def alive(self) -> bool:
        if self._landed:  # what is written for a push may be told before it has begun
            return self._link.is_open()
        return self._link.is_silent()  # all that a sender can say between pushes is that it lets go

    def close(self) -> None:
        """Waits for the sender to let go, for as long as it takes."""
        self._link.finish()
        if self._exported:
            on_gpu = any(found.kind == messages.ON_GPU for found in self._exported.values())
            try:
                self._hear_let_go(None)
            except TransferError:  # it died
                time.sleep(_SETTLE_S if on_gpu else 0.0)
            self._exported.clear()
        self._link.close()

    def _meet(self, deadline: float) -> None:
        """Raises: TransferError: the sender is on another host, or cannot open memory of this process."""
        if torch.cuda.is_initialized():  # that is where the model of this process is
            probe = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device="cuda")
        else:
            probe = shared_memory.allocate(_PROBE_BYTES)
        found = self._export(probe, deadline)
        self._say(Said(messages.MEET, memory=messages.this_host(), kind=found.kind, where=found.where), deadline)
        self._hear_let_go(deadline)

    def _export(self, bucket: torch.Tensor, deadline: float, settled: bool = False) -> _Exported:
        """The memory in which `bucket` lies. `settled`: as of `cuda_ipc.where`.

        Raises: TransferError: it cannot be exported; the sender is told.
        """
        address = bucket.untyped_storage().data_ptr()
        if address in self._exported:
            return self._exported[address]
        memory = bucket.new_empty(0).set_(bucket.untyped_storage())
        try:
            kind = messages.ON_GPU if memory.is_cuda else messages.ON_CPU
            where = cuda_ipc.where(memory, settled) if memory.is_cuda else shared_memory.where(memory)
        except TransferError as error:
            self._say(Said(messages.CANNOT, where=str(error).encode()), deadline)
            raise
        self._exported[address] = _Exported(memory, uuid.uuid4().bytes, kind, where)
        return self._exported[address]

    def _say(self, said: Said, deadline: float) -> None:
        self._link.say(said.signed(self._link.signer, self._rank), deadline)

    def _hear_let_go(self, deadline: float | None) -> None:
        self._hear_number(messages.LET_GO, self._num_let_go, deadline)
        self._num_let_go += 1
        self._exported.clear()

    def _hear_number(self, what: bytes, number: int, deadline: float | None) -> None:
        messages.check_told(what + self._hear(what, deadline), self._link.signer, what, number)

    def _hear(self, what: bytes, deadline: float | None) -> bytes:
        """The next thing of that kind that the sender tells, without the kind; things of other kinds are kept."""
        while not self._told[what]:
            told = self._link.receive_bytes(messages.TOLD_BYTES, deadline)
            kind = told[: messages.WHAT_BYTES]
            if kind not in self._told:
                raise TransferError("the sender told something that is no message of this plane")
            self._told[kind].append(told[messages.WHAT_BYTES :])
        return self._told[what].popleft()


def _link(key: str, rank: int) -> bytes:
    """What tells headers of one sender to one rank from all others of a session."""
    return f"{key}/{rank}".encode()
