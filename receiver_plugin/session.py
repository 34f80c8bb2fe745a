"""A session: one sender's plan on this rank, and the thread on which its bytes arrive.

The thread joins the data plane, then waits for pushes. For each it receives every bucket into the bucket buffer, takes
the digest, and leaves the bucket where it is, or scatters it over the staging image, or over the live parameters of a
server that stages in place. Where trainer ranks write what they hold themselves, it tells them where everything goes,
and takes the digest of what they have written. It never talks to other ranks. Once a transfer has ended, its thread
writes nothing more, wherever it is. An error ends the push and is kept for the next control message; the sender makes a
new session after it.

Between pushes the thread looks whether the sender is still there. If it is gone, or no push can come any more, the
thread ends; the next message, whoever sends it, ends the session.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from receiver_plugin.landing import Landing
from receiver_plugin.staging import Staging
from shared.buckets import Layout
from shared.digest import begin_digest
from shared.errors import Fp8SyncError, ReceiveError, TransferError
from shared.planes import ReceiveHalf, TakesSlices, TellsPlaces
from shared.protocol import Open, StagingWay
from shared.turns import frequent_turns

logger = logging.getLogger(__name__)

_LOOK_S = 1.0  # how often an idle session looks whether its sender is there
_INTERRUPT_S = 5.0
_PLACES_AHEAD = 3
_LAND_S = 30.0  # to tell where everything goes
_GRACE_S = 60.0  # for what was staged, after its deadline: a commit that came in time may still be at work


@contextmanager
def _until_done(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """At the end, however it comes, nothing that was asked of `stream` is under way any more."""
    try:
        yield
    finally:
        if stream is not None:
            stream.synchronize()


class Transfer:
    """One push under way. `done` is set when all buckets have arrived or `error` says why not."""

    def __init__(self, version: int, deadline_s: float, staging: Staging) -> None:
        self.version, self.staging = version, staging
        self.deadline = time.monotonic() + deadline_s
        self.done = threading.Event()
        self.writing = threading.Lock()  # held while a bucket is taken: nothing ends a transfer in the middle of that
        self.cancelled = threading.Event()
        self.taken: list[Callable[[], int]] = []  # what waits for the digest of each bucket that has come
        self.digests: list[int] = []
        self.wrong: list[int] = []  # buckets, where trainer ranks told the digests of what they wrote
        self.error: str | None = None
        self.own_fault = False  # of this rank, not of the data plane
        self.verified = False
        self.promised = False

    def dead(self) -> str | None:
        """Why this push can no longer succeed, or None."""
        if self.done.is_set() and self.error is not None:
            return self.error
        return "its deadline passed" if time.monotonic() > self.deadline else None

    def hold(self, seconds: float) -> None:
        """Stay alive for at least `seconds` from now."""
        self.deadline = max(self.deadline, time.monotonic() + seconds)

    def promise(self, seconds: float) -> None:
        """From here on this push ends with a commit, an abort, or a fence, `seconds` from now at the latest."""
        self.promised, self.deadline = True, time.monotonic() + seconds

    def cancel(self) -> None:
        """On return its thread has written the last byte that it ever writes."""
        self.cancelled.set()
        with self.writing:
            pass

    def remaining_s(self) -> float:
        self.check_wanted()
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TransferError("the deadline of the push passed")
        return left

    def check_wanted(self) -> None:
        """Raises: TransferError: the push has ended."""
        if self.cancelled.is_set():
            raise TransferError("the push was aborted")

    def verify(self, digests: tuple[int, ...]) -> None:
        """Raises: TransferError: something did not arrive, or not as it was sent."""
        if self.error is not None:
            raise (ReceiveError if self.own_fault else TransferError)(self.error)
        if len(digests) != len(self.digests):
            raise TransferError(f"{len(self.digests)} buckets arrived, {len(digests)} were sent")
        pairs = enumerate(zip(self.digests, digests, strict=True))
        if wrong := [*self.wrong, *(index for index, (got, sent) in pairs if got != sent)]:
            raise TransferError(f"the bytes of bucket(s) {wrong} are not those that were sent")


class Session:
    """`join` opens this rank's half of the data plane; it may block. `stage` makes the staging, on `device`: once where
    the server stages in memory of its own, else for every transfer, in memory that is lent for as long; it is given
    what the last transfer left of its own.

    Raises:
        PlanError: no memory.
    """

    def __init__(
        self,
        opened: Open,
        layout: Layout,
        way: StagingWay,
        stage: Callable[[Staging | None], Staging],
        join: Callable[[], ReceiveHalf],
        device: torch.device,
    ) -> None:
        self.id, self.sender, self._secret = opened.session, opened.sender, opened.secret
        self.way, self._stage, self._device = way, stage, device
        self.exclusive = way != "reserved"  # its transfers use what requests use
        self.looked_at: object = None  # the makeup of the model with which all of its tensors lay where they should
        self._lands = opened.slices
        self.writes_live = False  # whether trainer ranks may still write to live parameters, after its end, too
        self._staging: Staging | None = None if self.exclusive else stage(None)
        self.writes_from: int | None = None  # the address from which on its thread may still write after its end
        self._left: Staging | None = None  # that of the last transfer, without its memory
        self.transfer: Transfer | None = None
        self.lost: str | None = None  # why no push can come through this session
        self.ended, self._own_fault = "never begun", False
        self._layout = layout
        self._wake = threading.Condition()
        self._pending: Transfer | None = None
        self._closed = False
        self._landing: Landing | None = None  # for all of its transfers
        if way == "in_place" and (device.type == "cuda" or self._lands):  # tables are made while requests go on
            self.make_room()
            self._landing = self.staging.landing
            self.give_room_back()
        elif self._lands:
            self._landing = self.staging.landing
            self.writes_from = self._first_byte  # trainer ranks may write before they are heard of
        self._plane: ReceiveHalf | None = None
        self._thread = threading.Thread(target=self._run, args=(join,), name="fp8sync-receive", daemon=True)
        self._thread.start()

    @property
    def staging(self) -> Staging:
        if self._staging is None:
            raise TransferError("nothing is staged: the transfer ended")
        return self._staging

    @property
    def lingers(self) -> bool:
        """Whether its thread may still receive into the bucket buffer."""
        return self._thread.is_alive()

    def make_room(self) -> None:
        """Take the memory that a transfer needs. Raises: PlanError."""
        if self._staging is None:
            self._staging, self._left = self._stage(self._left), None

    def give_room_back(self) -> None:
        """Let go of memory that was only lent. Bytes of weights do not stay in it."""
        if self._staging is not None and self.exclusive:
            staging, self._staging = self._staging, None
            self._left = staging if staging.leave() else None

    def begin(self, version: int, deadline_s: float) -> None:
        self.transfer = Transfer(version, deadline_s, self.staging)
        self.writes_from = self._first_byte
        self.writes_live = self.staging.room.lands and self.exclusive
        self.staging.will_be_written()
        with self._wake:
            self._pending = self.transfer
            self._wake.notify()

    @property
    def _first_byte(self) -> int:
        """That may be written to while something arrives."""
        room = self.staging.room
        return (room.buffers[0] if room.lands and room.buffers else room.bucket).data_ptr()

    def transfer_of(self, version: int) -> Transfer:
        if self.transfer is None or self.transfer.version != version:
            error = ReceiveError if self._own_fault else TransferError
            raise error(f"version {version} is not on its way to this server: {self.ended}")
        return self.transfer

    def end_transfer(self, why: str, own_fault: bool = False) -> bool:
        """Whether live parameters were written to. On return nothing of this process writes any more; trainer ranks
        that write themselves may, as long as it `lingers`.

        `own_fault`: a rank of this server failed by itself, so that bytes did not arrive elsewhere.
        """
        if self.transfer is None:
            return False
        self.ended, self._own_fault = why, own_fault
        self.transfer.cancel()
        self._interrupt(self.transfer)
        touched = self.transfer.staging.touched
        self.transfer = None
        self.give_room_back()
        return touched

    def _interrupt(self, transfer: Transfer) -> None:
        """No kernel waits for the sender on return: whoever synchronizes the device next would wait with it."""
        if self._plane is not None and not transfer.done.is_set():
            self._plane.interrupt()
            if self._device.type == "cuda" and not transfer.done.wait(_INTERRUPT_S):
                logger.error("fp8sync: the thread that receives did not end: a kernel of it may keep this GPU waiting")

    def lingers_for(self, seconds: float) -> bool:
        """`lingers`, at the end of that time."""
        self._thread.join(max(0.0, seconds))
        return self.lingers

    def close(self) -> None:
        """Free the staging for the next session and stop the thread.

        A thread that waits for its plane (a sender that died) outlives this, without the staging, until the plane's own
        time-out.
        """
        self.end_transfer("the session was closed")
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=0.2)
        self._staging = None

    def _run(self, join: Callable[[], ReceiveHalf]) -> None:
        on_gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_gpu else nullcontext():  # every thread has its own
            self._receive_all(join)

    def _receive_all(self, join: Callable[[], ReceiveHalf]) -> None:
        plane: ReceiveHalf | None = None
        failure: str | None = None
        try:
            plane = self._plane = join()
            if self._landing is not None:
                _taking_slices(plane).land(self._landing.memories, self._landing.slices, _LAND_S)
        except Fp8SyncError as error:
            failure = str(error)
        except Exception as error:
            logger.exception("fp8sync: joining the data plane failed")
            failure = f"{type(error).__name__}: {error}"
        while (transfer := self._next(plane, failure)) is not None:
            if failure is None and plane is not None:
                failure = self._receive(plane, transfer)
            transfer.error = failure
            transfer.done.set()
            if failure is not None:
                break  # not lost: whoever asks after the push is told why it ended
            transfer = None  # and with it the memory that it had
        if plane is not None:
            plane.close()  # the sender learns of it now, not at its deadline

    def _next(self, plane: ReceiveHalf | None, failure: str | None) -> Transfer | None:
        """The next push, or None if there will be none. A sender that comes in time is told why it could not join."""
        given_up_at = time.monotonic() + _GRACE_S
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._pending is not None, _LOOK_S)
                transfer, self._pending = self._pending, None
                if self._closed or transfer is not None:
                    return None if self._closed else transfer
            if failure is not None and time.monotonic() > given_up_at:
                self.lost = failure
            elif plane is not None and not plane.alive():
                self.lost = "its sender is gone"
            if self.lost is not None:
                return None

    def _digest(self, version: int) -> Callable[[torch.Tensor, int], Callable[[], int]]:
        """What begins to take the digest of a bucket, by its index."""
        return lambda data, bucket: begin_digest(data, secret=self._secret, version=version, bucket=bucket)

    def _receive(self, plane: ReceiveHalf, transfer: Transfer) -> str | None:
        """Why it failed, or None."""
        try:
            if self._landing is None:
                self._receive_buckets(plane, transfer)
            else:
                self._receive_slices(_taking_slices(plane), self._landing, transfer)
        except Fp8SyncError as error:
            return str(error)
        except Exception as error:
            transfer.own_fault = True
            logger.exception("fp8sync: receiving version %d failed", transfer.version)
            return f"{type(error).__name__}: {error}"
        return None

    def _receive_slices(self, plane: TakesSlices, landing: Landing, transfer: Transfer) -> None:
        """What trainer ranks write themselves, bucket by bucket, and the digest of it from where it lies."""
        sent = list[int]()
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(stream), frequent_turns(), _until_done(stream):
            digests = landing.digests(self._secret, transfer.version)
            for index, expected in enumerate(landing.num_bytes):
                num_bytes, digest = plane.written(transfer.remaining_s())
                if num_bytes != expected:
                    raise TransferError(f"{num_bytes} bytes of bucket {index} were written, expected {expected}")
                sent.append(digest)
                with transfer.writing:
                    transfer.check_wanted()
                    digests.begin(index)
            found = digests.read()
            transfer.wrong = [index for index, told in enumerate(sent) if found[index] != told]
            self.writes_live = False  # all have ended
            with transfer.writing:
                transfer.check_wanted()
                landing.settle()

    def _receive_buckets(self, plane: ReceiveHalf, transfer: Transfer) -> None:
        staging = transfer.staging
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        coming = deque[tuple[int, int]]()  # buckets that may still be on their way, with their digests
        num_told, num_ahead = 0, max(_PLACES_AHEAD, staging.num_ahead)
        with torch.no_grad(), torch.cuda.stream(stream), frequent_turns(), _until_done(stream):
            for bucket in self._layout.buckets:
                num_told = self._tell_places(plane, transfer, num_told, bucket.index + num_ahead)
                if len(coming) == staging.num_ahead:
                    self._take(plane, transfer, *coming.popleft(), stream)
                sent = plane.receive(staging.bucket(bucket.index), transfer.remaining_s())
                coming.append((bucket.index, sent))
            while coming:
                self._take(plane, transfer, *coming.popleft(), stream)
            transfer.digests = [found() for found in transfer.taken]
            if self.exclusive:
                plane.release(transfer.remaining_s())

    def _tell_places(self, plane: ReceiveHalf, transfer: Transfer, num_told: int, until: int) -> int:
        """How many places the sender knows ahead of their buckets, `until` at most: those that nothing else is in."""
        until = min(until, len(self._layout.buckets))
        if not transfer.staging.room.whole or not isinstance(plane, TellsPlaces):
            return 0
        for index in range(num_told, until):
            plane.expect(transfer.staging.bucket(index), transfer.remaining_s())
        return until

    def _take(
        self, plane: ReceiveHalf, transfer: Transfer, index: int, sent: int, stream: torch.cuda.Stream | None
    ) -> None:
        """Bucket `index`, once it is there. `sent`: its digest, of the sender."""
        plane.arrive(transfer.remaining_s())
        with transfer.writing:
            transfer.check_wanted()
            try:
                transfer.taken.append(transfer.staging.accept(index, sent, self._digest(transfer.version)))
            finally:
                if stream is not None and not transfer.staging.room.whole:
                    stream.synchronize()  # on errors, too: who takes the lock next may free the memory


def _taking_slices(plane: object) -> TakesSlices:
    """Raises: TransferError: it is another kind of plane."""
    if not isinstance(plane, TakesSlices):
        raise TransferError("trainer ranks write slices to memory of their own host: they need plane='same_host'")
    return plane
