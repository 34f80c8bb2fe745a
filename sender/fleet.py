"""All servers of a push, as one: prepared on all, then committed on all. Lives on rank 0 of the trainer only.

The data plane is one group over the ranks of all servers, so a server that dies takes a transfer away from all. With a
quorum the push is then made again without the servers that are to blame (`leave_out_the_guilty`).

Where other trainer ranks send beside rank 0, or in its place, each has a plane of its own (`sender.sending_ranks`). The
servers are asked and told from here all the same.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress

import torch

from sender.blame import Blame, by_the_trainer, to_blame
from sender.control import ControlClient
from sender.doors import Doors
from sender.plan import PushPlan, agree
from sender.rendezvous import JOIN_TIMEOUT_S
from sender.sending import SendingHalf
from sender.servers import CONTROL_TIMEOUT_S, Failed, Servers, check_info
from sender.transaction import Transaction
from shared import protocol as wire
from shared.buckets import make_layout
from shared.config import FP8BlockConfig
from shared.errors import (
    ConfigError,
    Fp8SyncError,
    PushError,
    ReceiveError,
    ServerUnreachableError,
    SessionLostError,
    StaleVersionError,
    StillComingError,
    TransferError,
)
from shared.planes import SendHalf
from shared.planes.memory import MemoryPlane
from shared.planes.signing import new_secret

logger = logging.getLogger(__name__)

_POLL_S, _LONGEST_POLL_S = 0.002, 0.05


def longest_push_s(timeout_s: float) -> float:
    """The most that rank 0 can spend in one push: planning, holding, sending, verifying, committing, cleaning up."""
    return 5 * timeout_s + JOIN_TIMEOUT_S + 14 * CONTROL_TIMEOUT_S


def _is_version(version: int) -> bool:
    return 0 <= version <= wire.MOST_VERSION


def _last_ones(sizes: Sequence[int]) -> int:
    """From which bucket on, and with it the one before, they wait for the commit to go out ahead of them: two, or
    three where the last is so small that it would come before the server has understood the commit.
    """
    return max(len(sizes) - (2 if 2 * sizes[-1] < max(sizes) else 1), 0)


class Fleet:
    """The servers, the data plane to them, and the push under way.

    `gpu`: from which the plane `nccl` sends.
    `make_memory_plane` is a test's way to put faults on the in-memory plane.
    """

    def __init__(
        self,
        servers: Sequence[ControlClient],
        config: FP8BlockConfig,
        plane: wire.PlaneName,
        timeout_s: float,
        *,
        in_flight: wire.InFlight = "wait",
        strict: bool = False,
        staging: wire.StagingChoice = "auto",
        quorum: int | None = None,
        gpu: int | None = None,
        make_memory_plane: Callable[[wire.Rendezvous], SendHalf] = MemoryPlane,
    ) -> None:
        self._servers = Servers(servers, timeout_s, quorum)
        self._config, self._plane_name, self._timeout_s = config, plane, timeout_s
        self._in_flight, self._strict, self._wanted = in_flight, strict, staging
        self._make_memory_plane, self._gpu = make_memory_plane, gpu
        self.half = SendingHalf(plane, timeout_s, gpu, lambda meeting: self._make_memory_plane(meeting))  # of this rank
        self._name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._incarnations: dict[str, str] = {}
        self._session = ""
        self._senders: tuple[int, ...] = (0,)
        self._slices = False  # whether trainer ranks write what they hold of every bucket
        self._replicas: list[int] = []
        self._lands: list[tuple[wire.StagingWay, ...]] = []  # how they could, for each server
        self._doors = Doors(self._servers, timeout_s, in_flight)
        self.staging: dict[str, wire.StagingWay] = {}  # of each server, since the session was opened
        self._in_session: frozenset[str] = frozenset()  # the servers of the session
        self._blame = Blame(self._servers)
        self._closed = False
        self._version = self._newest = 0
        self._early: Future[None] | None = None  # the beginning of this push
        self._lost: Exception | None = None  # why that failed, if the servers are to be asked what they are now
        self._begun = False
        self._digests: dict[int, int] = {}  # of what other ranks have sent, by the number of the bucket
        self._last_ones = 0  # the first bucket that waits for the commit to go out ahead of it
        self._transaction: Transaction | None = None
        self._tried_again = False  # with all servers, because nobody was to blame

    @property
    def names(self) -> tuple[str, ...]:
        """Of the servers that have a part in the push."""
        return self._servers.names

    @property
    def checks_first(self) -> bool:
        """Whether a bucket must be known to be right before it is sent: some server writes it where it is served."""
        return "in_place" in self.staging.values()

    @property
    def stood_still_s(self) -> dict[str, float]:
        """For how long each server let no new request run for this push, as seen from here."""
        return {name: self._doors.stood_still_s.get(name, 0.0) for name in self.names}

    @property
    def left_out(self) -> dict[str, str]:
        """The servers that this push went on without, and why."""
        return dict(self._servers.left_out)

    @property
    def version(self) -> int:
        """Of the push under way."""
        return self._version

    # Coming and going, between pushes

    @property
    def answer_s(self) -> float:
        return self._servers.answer_s

    @property
    def clients(self) -> tuple[ControlClient, ...]:
        return self._servers.clients

    def of_one(self, client: ControlClient) -> Fleet:
        """The same settings for that server alone. Closing it must not hang up."""
        return Fleet(
            [client],
            self._config,
            self._plane_name,
            self._timeout_s,
            in_flight=self._in_flight,
            strict=self._strict,
            staging=self._wanted,
            gpu=self._gpu,
            make_memory_plane=self._make_memory_plane,
        )

    def add(self, client: ControlClient) -> None:
        """The next push plans anew, as for any server that it does not know."""
        self._servers.add(client)

    def remove(self, name: str) -> None:
        """Its ranks have a part in the data plane of all, so the session ends. Raises: ConfigError."""
        self._servers.check_removable(name)
        self.close_session(f"{name} is no longer one of the servers")
        self._servers.remove(name)

    # Once

    def survey(self, ask: bool = True, begin: int | None = None) -> tuple[bool, int]:
        """Whether the servers are still those of the open session, and the newest version seen on any of them.

        `begin`: the version that is to begin if they are. `begin_early` has begun it, or it does now: whoever begins
        has been asked. `ask`: else; if not, a session that is open counts as theirs, and `begin` finds out.
        """
        lost, self._lost = self._lost, None
        try:
            if lost is None and (self._early is not None or (begin is not None and self.is_open)):
                self.begin(self._version if begin is None else begin)
                return True, self._newest
        except (SessionLostError, ServerUnreachableError) as error:
            lost, self._lost = error, None  # a server that has started again is a new one, and no loss
        self._forget_push()
        if not ask and self.is_open:
            return True, self._newest
        replies, failed = self._servers.try_each(wire.Describe(), self._servers.answer_s)
        for name, reply in replies.items():
            try:
                check_info(name, reply.info, self._config, self._in_flight, self._plane_name)
            except Fp8SyncError as error:
                failed[name] = error
        self._servers.go_on_without(failed)
        infos = {name: replies[name].info for name in self._servers.names}
        now = {name: info.incarnation for name, info in infos.items() if info is not None}
        known = self._session != "" and now == self._incarnations
        if known and lost is not None:
            raise lost
        self._incarnations = now
        self.num_ranks = [info.num_ranks for info in infos.values() if info is not None]
        self._replicas = [info.num_replicas for info in infos.values() if info is not None]
        self.places = [place for info in infos.values() if info is not None for place in info.places]
        self._newest = max(self._newest, *(reply.version for reply in replies.values()))
        return known, self._newest

    def _forget_push(self) -> None:
        if self._closed:
            raise ConfigError("this sender was closed: make a new one")
        self._version, self._transaction, self._begun = 0, None, False
        self._blame.forget()

    def plan(self, offered: tuple[wire.TensorSpec, ...], bucket_bytes: int) -> PushPlan:
        """Offer the tensors, check the manifests, open session and data plane. Nothing of a model is touched."""
        plan = self.offer(offered, bucket_bytes)
        self.draw_session()
        self.open(plan)
        self.join()
        return plan

    def offer(self, offered: tuple[wire.TensorSpec, ...], bucket_bytes: int) -> PushPlan:
        """The plan for these tensors; without a session of it."""
        self.close_session("a new plan is made")
        replies = self._servers.each(wire.Offer(config=self._config, tensors=offered))
        manifests = {name: reply.manifest for name, reply in replies.items() if reply.manifest}
        if len(manifests) != len(self._servers):
            raise PushError("a server answered an offer without a manifest")
        agree(offered, manifests, self._config)
        self._lands = [reply.lands for reply in replies.values()]
        plan = PushPlan(offered, make_layout(next(iter(manifests.values())), bucket_bytes))
        self._last_ones = _last_ones([bucket.num_bytes for bucket in plan.layout.buckets])
        return plan

    @property
    def shares(self) -> list[float]:
        """Of what is sent, the part that each rank of the servers takes, as if all of a replica were alike."""
        found = zip(self.num_ranks, self._replicas, strict=True)
        return [replicas / num for num, replicas in found for _ in range(num)]

    @property
    def takes_slices(self) -> bool:
        """Whether trainer ranks can write what they hold to reserved memory of all servers."""
        return self._wanted in ("auto", "reserved") and all("reserved" in ways for ways in self._lands)

    def draw_session(self) -> str:
        """The secret of a session that is to be opened."""
        self._session, self._in_session = secrets.token_hex(16), frozenset(self.names)
        self.half.secret = new_secret()
        return self.half.secret

    def local_hosts(self) -> list[str]:
        """By which address of this machine each server is reached."""
        return [server.local_host() for server in self._servers.clients]

    def open(
        self,
        plan: PushPlan,
        others: Mapping[int, Sequence[wire.Rendezvous]] | None = None,
        only: wire.StagingChoice | None = None,
    ) -> None:
        """Open the session that was drawn, and tell the servers where to join whom.

        `others`: for each server, where the ranks of `plan.senders` other than 0 wait for its ranks. `only`: the way of
        staging, if it has to be another one than this sender was told.
        """
        meetings = dict(others or {})
        if 0 in plan.senders:
            meetings[0] = self.half.listen(self.local_hosts(), self.num_ranks, self.half.secret)
        self._senders, self._slices = plan.senders, plan.slices
        self._blame.owners = [name for name, num in zip(self.names, self.num_ranks, strict=True) for _ in range(num)]
        replies = self._servers.each_its_own(
            [
                wire.Open(
                    sender=self._name,
                    session=self._session,
                    incarnation=self._incarnations[name],
                    plan_hash=plan.layout.plan_hash,
                    bucket_bytes=plan.layout.bucket_bytes,
                    staging=only or self._wanted,
                    slices=plan.slices,
                    rendezvous=tuple(meetings[rank][number] for rank in plan.senders),
                )
                for number, name in enumerate(self.names)
            ]
        )
        self.staging = {name: reply.staging for name, reply in replies.items() if reply.staging}

    def join(self) -> None:
        """Return when the ranks of all servers have come to the plane of this rank, if it sends, and stage so."""
        if 0 in self._senders:
            with self._blame.of_ranks():
                self.half.join()
        if len(self.staging) != len(self._servers):
            raise PushError("a server did not say where it stages")
        if self._wanted != "auto" and set(self.staging.values()) != {self._wanted}:
            raise PushError(f"a server stages in another way than {self._wanted!r}: {self.staging}")

    # Every push

    @property
    def is_open(self) -> bool:
        """Whether there is a session of all servers, as far as it is known here."""
        return self._session != "" and self._in_session == set(self.names)

    @property
    def newest(self) -> int:
        """The newest version that was seen on any of the servers."""
        return self._newest

    @property
    def begins_early(self) -> bool:
        """Whether servers hear of the push just now, and `begin` waits for them."""
        return self._early is not None and not self._early.done()

    def begin_early(self, version: int, looked: bool = False) -> None:
        """`begin`, if a session is open, on a thread of its own, unless that was done already.

        `looked`: whether the trainer has looked at its own model. Before that no request has to end for it.
        """
        if self._early is not None or self._begun:
            return
        self._forget_push()
        may_begin = looked or set(self.staging.values()) == {"reserved"}
        if self._lost is None and self.is_open and may_begin and _is_version(version):
            self._take_version(version)
            self._early = self._servers.on_a_thread(lambda: self._begin(version))

    def begin(self, version: int) -> None:
        """From here on every server receives. Those that stage where requests run are drained first, and stay shut.

        Nothing, where this push has begun.
        """
        early, self._early = self._early, None
        try:
            if early is not None:
                early.result()
        except Fp8SyncError as error:
            if isinstance(error, (SessionLostError, ServerUnreachableError)):
                self._lost = error
            if len(self._servers) > 1:  # those that have begun wait no longer, while trainer ranks end their gathers
                self._servers.tell(self._abort(str(error)))
            raise
        if not self._begun:
            self._take_version(version)
            self._begin(version)
        assert version == self._version

    @property
    def writes_before_it_begins(self) -> bool:
        """Whether servers hear of the push just now, and what is written to them meanwhile harms nothing: it goes to
        memory that is reserved for this session, as long as that is open, and counts once they have begun."""
        begins = self._early is not None and not self._early.done()
        return self._slices and begins and set(self.staging.values()) == {"reserved"}

    def _take_version(self, version: int) -> None:
        """What is sent from here on is of that version."""
        if not _is_version(version):
            raise StaleVersionError(f"{version} is no version: they are whole numbers from 0 to {wire.MOST_VERSION}")
        self._version, self._digests = version, {}
        self.half.begin(version)

    def _begin(self, version: int) -> None:
        self._doors.begin()
        exclusive = [name for name in self.names if self.staging[name] != "reserved"]
        # Who begins at once waits for bytes until requests have ended on the others.
        deadline_s = self._timeout_s * (2 if exclusive and len(self.names) > 1 else 1)
        deadline_s = min(deadline_s, wire.LONGEST_DEADLINE_S)
        begin = wire.Begin(session=self._session, version=version, deadline_s=deadline_s)
        begins, wait_s = dict.fromkeys(self.names, begin), self._servers.answer_s
        if exclusive:
            shut, wait_s = self._doors.shut_to_begin(exclusive), self._doors.drained_s
            begins |= {name: begin.model_copy(update={"shut": shut}) for name in exclusive}
        replies = self._servers.each_its_own(list(begins.values()), wait_s)
        self.staging |= {name: reply.staging for name, reply in replies.items() if reply.staging}
        self._begun = True

    def send(self, bucket: torch.Tensor, index: int, check: Callable[[], None] | None = None) -> None:
        """Send flat uint8 `bucket`. From a GPU it leaves with the next call of this, or later, so that nobody waits for
        what was only just begun; elsewhere its memory may be used again on return.

        `check`: raises if it must not leave.

        Raises: TransferError: it did not go out; where a server knows why, its `ReceiveError`.
        """
        waits = index >= self._last_ones and self._commits_unasked and self._senders == (0,)
        self._with_blame(lambda: self.half.send(bucket, index, check, waits))

    def put(self, step: Callable[[], None], later: bool) -> None:
        """Begin to write slices of a bucket; `later`: with the next call. Raises: as `send`, or, where it goes out
        ahead of that, as `begin`."""

        def write() -> None:
            try:
                self.half.put(step, later)
            except TransferError:
                if self._early is not None:
                    self.begin(self._version)  # who has started again has left the plane, too
                raise

        self._with_blame(write)

    def put_all(self) -> None:
        """What waits for the next call, now. Raises: as `send`."""
        self._with_blame(self.half.put_all)

    def room(self, num_bytes: int) -> torch.Tensor | None:
        """Where the bucket that comes next may be made, on whatever device that is; or None."""
        if self._early is not None and len(self._servers) > 1:  # memory of one is not kept for the answers of others
            return None
        return self.half.room(num_bytes)

    def rehearse(self, bucket: torch.Tensor) -> None:
        """What `send` does on the device, to no effect."""
        self.half.rehearse(bucket)

    def flush(self) -> None:
        """Return when all that this rank sends has left."""
        if 0 in self._senders:
            self._with_blame(self.half.flush)

    def take_digests(self, digests: Mapping[int, int]) -> None:
        """Of what other trainer ranks have sent in this push, by the number of the bucket."""
        self._digests |= digests

    def explain(self, failure: Exception) -> Exception:
        """`failure`, met by a trainer rank that is not the only one to send, with the name of the server to blame.

        Servers leave the planes of all senders as soon as one breaks, so it is they who say which one it was.
        """
        if isinstance(failure, ReceiveError) or not isinstance(failure, TransferError):
            return failure
        found = self._blame.at_fault(self._question(), self._servers.goodbye_s)
        if own := next((error for error in found.values() if isinstance(error, ReceiveError)), None):
            return ReceiveError(str(own))
        return TransferError(f"{', '.join(found)}: {failure}", failure.ranks) if found else failure

    def _with_blame(self, step: Callable[[], None]) -> None:
        try:
            with self._blame.of_ranks() if self._senders == (0,) else nullcontext():
                step()
            return
        except TransferError as error:
            if (own := self._in_own_words(error)) is error:
                raise
        raise own  # anew: the failure of the plane has frames that hold it

    def _in_own_words(self, error: TransferError) -> TransferError:
        """Those of the server that knows why, if there is one."""
        if self._senders != (0,):
            explained = self.explain(error)
            assert isinstance(explained, TransferError)
            return explained
        own = self._blame.own_words(self._question())
        return error if own is None else ReceiveError(str(own))

    def verify(self) -> None:
        """Return when every rank of every server holds every byte as it was sent, or of every server that is left.

        A single server is not asked unless its door is shut first (`strict`): its commit looks by itself.
        """
        if self.half.is_ahead and self._commits_unasked:
            return
        self.flush()
        if not self._commits_unasked:
            self._until_staged()

    def _until_staged(self) -> None:
        deadline, pause = time.monotonic() + self._timeout_s, _POLL_S
        message = self._question()
        while True:
            replies, failed = self._servers.try_each(message, self._servers.answer_s)
            staged = all(reply.state == "STAGED" for reply in replies.values())
            if failed:
                self._leave_out_unstaged(failed, staged)
            if staged:
                return
            if time.monotonic() > deadline:
                raise TransferError(f"not every server was staged within {self._timeout_s:.0f} s")
            time.sleep(pause)  # every question is a message through the event loop of a busy server
            pause = min(2 * pause, _LONGEST_POLL_S)

    @property
    def _commits_unasked(self) -> bool:
        return len(self._servers) == 1 and not self._strict

    def _question(self) -> wire.Verify:
        return wire.Verify(session=self._session, version=self._version, digests=self._all_digests)

    @property
    def _all_digests(self) -> tuple[int, ...]:
        """In the order of the buckets, of all that have been sent as far as it is known here."""
        known = self._digests | self.half.digests
        return tuple(known[index] for index in sorted(known))

    def _leave_out_unstaged(self, failed: Failed, others_staged: bool) -> None:
        """Raises: a server's own error, or the first one, unless all others are staged, and are enough."""
        if self._servers.quorum is None or not others_staged or to_blame(failed, len(self._servers)) != failed:
            own = (error for error in failed.values() if isinstance(error, ReceiveError))
            raise next(own, next(iter(failed.values())))
        self._servers.go_on_without(failed)
        self._servers.tell(self._abort("it was left out of this push"), failed)

    def commit(self) -> float:
        """Publish; the seconds between the first and the last server that said so (`sender.transaction`)."""
        self._transaction = Transaction(
            self._servers, self._doors, self._session, self._version, self._timeout_s, self._in_flight, self._strict
        )
        try:
            skew_s = self._commit_unasked() if self._commits_unasked else self._transaction.commit()
        except StillComingError as early:
            early.with_traceback(None)  # its frames hold the bucket that was sent last
            self._transaction.decided = False
            self._until_staged()
            skew_s = self._transaction.commit()
        except TransferError:  # of a commit that verifies: before anything was copied
            self._transaction.decided = False
            raise
        self._newest = self._version
        return skew_s

    def _commit_unasked(self) -> float:
        """The commit of a single server goes out ahead of the last buckets of a GPU: it waits for them there."""
        transaction = self._transaction
        assert transaction is not None
        is_ahead = self.half.is_ahead
        self.half.take_digests_ahead()
        digests = self._all_digests
        if not is_ahead:
            return transaction.commit(digests)
        broken: Exception | None = None
        committing = self._servers.on_a_thread(lambda: transaction.commit(digests))
        try:
            with self._blame.of_ranks():
                self.half.flush()
        except Exception as error:
            broken = error.with_traceback(None)  # its frames hold a bucket
        except BaseException:  # what a server is told last must not pass its commit
            with suppress(Exception):
                committing.result(self._servers.answer_s)
            raise
        try:
            skew_s = committing.result()
        except StillComingError:
            if broken is not None:
                raise self._in_own_words(broken) if isinstance(broken, TransferError) else broken from None
            raise
        if broken is not None:
            self.close_session(f"the data plane broke after all had arrived: {broken}")
        return skew_s

    # When it fails

    def leave_out_the_guilty(self, failure: Exception) -> bool:
        """Whether the push is to be made again: without the servers that made it fail, if a quorum is left.

        It is what the trainer did wrong, or decided already: then it is not. Where servers that began early have lost
        the session, they are asked what they are now, whatever the quorum. If nobody can be named, all get one more
        try. Raises: PushError: too few servers are left.
        """
        if self._lost is not None and failure is self._lost:
            logger.warning("fp8sync: servers are asked anew, and version %d starts over: %s", self._version, failure)
            return True
        decided = self._transaction is not None and self._transaction.decided
        if self._servers.quorum is None or decided or by_the_trainer(failure):
            return False
        guilty = self._blame.named or to_blame(self._servers.failed, len(self._servers))
        guilty = guilty or self._blame.at_fault(self._question(), self._servers.answer_s)
        if not guilty and self._tried_again:
            return False
        self._tried_again = self._tried_again or not guilty
        self._servers.go_on_without(guilty)
        self.fail(failure)
        return True

    def fail(self, reason: BaseException) -> None:
        """After any failure: every server forgets the push, and the next push opens a new session."""
        self.stop(reason)
        which = f" of version {self._version}" if self._version else ""
        logger.warning("fp8sync: push%s failed: %s", which, str(reason).splitlines()[0] if str(reason) else reason)

    def stop(self, reason: BaseException) -> None:
        """End the push at the servers now, while other trainer ranks may still be in it: none of them is sent to."""
        self.half.forget()
        self._wait_for_early()  # what a server is told last has to be that the push has failed
        if self._session:
            self._servers.tell(self._abort(str(reason)))
        self.close_session(str(reason))

    def _wait_for_early(self) -> None:
        if self._early is not None:
            with suppress(Exception):  # it is not the first
                self._early.result()
            self._early = None

    def _abort(self, reason: str) -> wire.Abort:
        decided = self._transaction is not None and self._transaction.decided
        return wire.Abort(session=self._session, version=self._version, reason=reason[:500], fence=decided)

    # At the end

    def end_push(self) -> None:
        """Servers that were left out are tried again by the next push."""
        if self._servers.left_out.keys() & self._in_session:
            self.close_session("a server was left out, which has a part in the data plane of all")
        self._servers.forget_left_out()
        self._tried_again = self._begun = False

    def close_session(self, reason: str) -> None:
        self._begun = False
        if not self._session:
            return
        logger.debug("fp8sync: closing session: %s", reason)
        self.half.close()
        self._servers.tell(wire.Close(session=self._session))
        self._session = ""
        self._servers.forgive()
        self._doors.forget()

    def close(self, hang_up: bool = True) -> None:
        """`hang_up`: the control connections are closed, too."""
        self._wait_for_early()
        self.close_session("the sender is closed")
        self._closed = True
        self._servers.close(hang_up)
