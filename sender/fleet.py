"""All servers of a push, as one: prepared on all, then committed on all. Lives on rank 0 of the trainer only."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from sender.control import ControlClient
from sender.plan import PushPlan, agree
from sender.servers import CONTROL_TIMEOUT_S, Servers, check_info
from shared import protocol as wire
from shared.buckets import make_layout
from shared.digest import digest
from shared.errors import CommitError, ConfigError, PushError, SessionLostError, TransferError
from shared.planes import SendHalf
from shared.planes.distributed import GroupSender
from shared.planes.memory import MemoryPlane

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 60.0
_POLL_S, _LONGEST_POLL_S = 0.002, 0.05


def longest_push_s(timeout_s: float) -> float:
    """The most that rank 0 can spend in one push: planning, holding, sending, verifying, committing, cleaning up."""
    return 5 * timeout_s + _JOIN_TIMEOUT_S + 10 * CONTROL_TIMEOUT_S


class Fleet:
    """The servers, the data plane to them, and the push under way.

    `make_memory_plane` is a test's way to put faults on the in-memory plane.
    """

    def __init__(
        self,
        servers: Sequence[ControlClient],
        config: wire.FP8BlockConfig,
        plane: wire.PlaneName,
        timeout_s: float,
        *,
        in_flight: wire.InFlight = "wait",
        strict: bool = False,
        staging: wire.StagingChoice = "auto",
        make_memory_plane: Callable[[wire.Rendezvous], SendHalf] = MemoryPlane,
    ) -> None:
        self._servers = Servers(servers, timeout_s)
        self._drained_s = timeout_s + self._servers.answer_s  # an answer that waits for requests to end
        self._config, self._plane_name, self._timeout_s = config, plane, timeout_s
        self._in_flight, self._strict, self._wanted = in_flight, strict, staging
        self._make_memory_plane = make_memory_plane
        self._name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._incarnations: dict[str, str] = {}
        self._plane: SendHalf | None = None
        self._session = ""
        self.staging: dict[str, wire.StagingWay] = {}  # of each server, since the session was opened
        self._shut_since: dict[str, float] = {}  # servers whose doors may be shut, and since when
        self.stood_still_s: dict[str, float] = {}
        self._closed = False
        self._version = self._newest = 0
        self._digests: list[int] = []

    @property
    def names(self) -> tuple[str, ...]:
        return self._servers.names

    @property
    def checks_first(self) -> bool:
        """Whether a bucket must be known to be right before it is sent: some server writes it where it is served."""
        return "in_place" in self.staging.values()

    # Once

    def survey(self) -> tuple[bool, int]:
        """Whether the servers are still those of the open session, and the newest version seen on any of them."""
        if self._closed:
            raise ConfigError("this sender was closed: make a new one")
        self._version = 0
        replies = self._servers.each(wire.Describe())
        infos = [(name, reply.info) for name, reply in zip(self.names, replies, strict=True)]
        for name, info in infos:
            check_info(name, info, self._config)
        now = {name: info.incarnation for name, info in infos if info is not None}
        known = self._plane is not None and now == self._incarnations
        self._incarnations = now
        self._num_ranks = [info.num_ranks for _, info in infos if info is not None]
        self._newest = max(self._newest, *(reply.version for reply in replies))
        return known, self._newest

    def plan(self, offered: tuple[wire.TensorSpec, ...], bucket_bytes: int) -> PushPlan:
        """Offer the tensors, check the manifests, open session and data plane. Nothing of a model is touched."""
        self.close_session("a new plan is made")
        replies = self._servers.each(wire.Offer(config=self._config, tensors=offered))
        manifests = {name: reply.manifest for name, reply in zip(self.names, replies, strict=True) if reply.manifest}
        if len(manifests) != len(self._servers):
            raise PushError("a server answered an offer without a manifest")
        agree(offered, manifests, self._config)
        plan = PushPlan(offered, make_layout(next(iter(manifests.values())), bucket_bytes))
        self._open(plan)
        return plan

    def _open(self, plan: PushPlan) -> None:
        self._session = secrets.token_hex(16)
        hosts = [server.local_host() for server in self._servers.clients]
        host = next((h for h in hosts if not ipaddress.ip_address(h).is_loopback), hosts[0])  # reached from everywhere
        plane = GroupSender(host, self._timeout_s) if self._plane_name == "gloo" else None
        first_ranks = [sum(self._num_ranks[:index]) for index in range(len(self._servers))]
        rendezvous = [
            wire.Rendezvous(
                plane=self._plane_name,
                host=host,
                port=plane.port if plane else 0,
                key=f"fp8sync/{self._session}",
                world_size=1 + sum(self._num_ranks),
                first_rank=first,
                timeout_s=min(self._timeout_s, _JOIN_TIMEOUT_S),
            )
            for first in first_ranks
        ]
        self._plane = plane or self._make_memory_plane(rendezvous[0])
        replies = self._servers.each_its_own(
            [
                wire.Open(
                    sender=self._name,
                    session=self._session,
                    incarnation=self._incarnations[name],
                    plan_hash=plan.layout.plan_hash,
                    bucket_bytes=plan.layout.bucket_bytes,
                    staging=self._wanted,
                    rendezvous=mine,
                )
                for name, mine in zip(self.names, rendezvous, strict=True)
            ]
        )
        if plane is not None:
            plane.join(rendezvous[0])
        self.staging = {name: reply.staging for name, reply in zip(self.names, replies, strict=True) if reply.staging}
        if len(self.staging) != len(self._servers):
            raise PushError("a server did not say where it stages")

    # Every push

    def begin(self, version: int) -> None:
        """From here on every server receives. Those that stage where requests run are drained first, and stay shut."""
        self._version, self._digests, self.stood_still_s = version, [], {}
        held = [name for name in self.names if self.staging[name] != "reserved"]
        if held:
            self._hold(held, "begin")
        begin = wire.Begin(session=self._session, version=version, deadline_s=self._timeout_s)
        self._servers.each_its_own([begin.model_copy(update={"held": name in held}) for name in self.names])

    def send(self, bucket: torch.Tensor, index: int) -> None:
        """Send flat uint8 `bucket`; the buffer may be reused on return."""
        if self._plane is None:
            raise SessionLostError("the data plane is closed: push again")
        self._digests.append(digest(bucket, key=index))
        self._plane.send(bucket, self._digests[-1])

    def verify(self) -> None:
        """Return when every rank of every server holds every byte as it was sent."""
        deadline, pause = time.monotonic() + self._timeout_s, _POLL_S
        message = wire.Verify(session=self._session, version=self._version, digests=tuple(self._digests))
        while any(reply.state != "STAGED" for reply in self._servers.each(message)):
            if time.monotonic() > deadline:
                raise TransferError(f"not every server was staged within {self._timeout_s:.0f} s")
            time.sleep(pause)  # every question is a message through the event loop of a busy server
            pause = min(2 * pause, _LONGEST_POLL_S)

    def commit(self) -> float:
        """Publish on every server; the seconds between the first and the last that said so, as seen from here.

        With `strict` no server admits a request before all have answered, and none commits unless all have said that
        they can. Raises: CommitError: names the servers that committed and those that did not.
        """
        commit = wire.Commit(
            session=self._session, version=self._version, drain_s=self._timeout_s, in_flight=self._in_flight
        )
        try:
            if self._strict and (open_doors := [name for name in self.names if name not in self._shut_since]):
                self._hold(open_doors, "commit")
            return self._commit_all(commit)
        finally:
            self._release()

    def _hold(self, names: Sequence[str], before: Literal["begin", "commit"]) -> None:
        """Shut the doors of `names` until the release."""
        arriving_s = 2 * self._timeout_s if before == "begin" else 0.0
        hold_s = arriving_s + self._drained_s + 2 * self._servers.answer_s  # others may need it all
        hold = wire.Hold(
            session=self._session,
            version=self._version,
            drain_s=self._timeout_s,
            hold_s=min(hold_s, wire.LONGEST_DEADLINE_S),
            in_flight=self._in_flight,
            before=before,
        )
        self._shut_since |= dict.fromkeys(names, time.monotonic())
        outcomes = self._servers.try_each([hold] * len(names), self._drained_s, names=names)
        if errors := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise errors[0]

    def _release(self) -> None:
        if self._shut_since:
            self._servers.tell(wire.Release(session=self._session, version=self._version), list(self._shut_since))
        now = time.monotonic()
        self.stood_still_s |= {name: now - since for name, since in self._shut_since.items()}
        self._shut_since.clear()

    def _commit_all(self, commit: wire.Commit) -> float:
        asked, answered = time.monotonic(), dict[str, float]()
        commits = [commit.model_copy(update={"held": name in self._shut_since}) for name in self.names]
        outcomes = self._servers.try_each(commits, self._drained_s, answered)
        self.stood_still_s = {name: at - asked for name, at in answered.items()}
        failed = {name: found for name, found in zip(self.names, outcomes, strict=True) if isinstance(found, Exception)}
        if len(failed) == len(outcomes) == 1:
            raise next(iter(failed.values()))
        if failed:
            done = [name for name in self.names if name not in failed]
            raise CommitError(f"version {self._version} is served by {done or 'no server'} but not by: {failed}")
        self._newest = self._version
        return max(answered.values()) - min(answered.values())

    def fail(self, reason: BaseException) -> None:
        """After any failure: every server forgets the push, and the next push opens a new session."""
        which = f" of version {self._version}" if self._digests or self._version else ""
        logger.warning("fp8sync: push%s failed: %s", which, str(reason).splitlines()[0] if str(reason) else reason)
        if self._session:
            abort = wire.Abort(session=self._session, version=self._version, reason=str(reason)[:500])
            self._servers.tell(abort)
        self.close_session(str(reason))

    # At the end

    def close_session(self, reason: str) -> None:
        if self._plane is None and not self._session:
            return
        logger.debug("fp8sync: closing session: %s", reason)
        if self._plane is not None:
            self._plane.close()
            self._plane = None
        if self._session:
            self._servers.tell(wire.Close(session=self._session))
            self._session = ""
        self._servers.forgive()
        self._shut_since.clear()

    def close(self) -> None:
        self.close_session("the sender is closed")
        self._closed = True
        self._servers.close()
