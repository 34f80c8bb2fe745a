"""All servers of a push, as one: prepared on all, then committed on all. Lives on rank 0 of the trainer only."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel

from sender.control import ControlClient
from sender.plan import PushPlan, agree
from shared import protocol as wire
from shared.buckets import make_layout
from shared.digest import digest
from shared.errors import (
    CommitError,
    ConfigError,
    Fp8SyncError,
    IncompatibleServerError,
    PushError,
    ServerUnreachableError,
    SessionLostError,
    StaleVersionError,
    TransferError,
)
from shared.planes import SendHalf
from shared.planes.distributed import GroupSender
from shared.planes.memory import MemoryPlane
from shared.planes.signing import new_secret
from shared.planes.sockets import SocketSender

logger = logging.getLogger(__name__)

_CONTROL_TIMEOUT_S = 60.0
_GOODBYE_S = 10.0  # a server that does not hear that a push failed finds its connection broken, or its deadline passed
_JOIN_TIMEOUT_S = 60.0
_POLL_S, _LONGEST_POLL_S = 0.002, 0.05


def longest_push_s(timeout_s: float) -> float:
    """The most that rank 0 can spend in one push: planning, sending, verifying, committing and cleaning up."""
    return 4 * timeout_s + _JOIN_TIMEOUT_S + 10 * _CONTROL_TIMEOUT_S


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
        make_memory_plane: Callable[[wire.Rendezvous], SendHalf] = MemoryPlane,
    ) -> None:
        self._servers = list(servers)
        self._config, self._plane_name, self._timeout_s = config, plane, timeout_s
        self._in_flight, self._strict = in_flight, strict
        self._answer_s, self._goodbye_s = min(_CONTROL_TIMEOUT_S, timeout_s), min(_GOODBYE_S, timeout_s)
        self._make_memory_plane = make_memory_plane
        self._name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._pool = ThreadPoolExecutor(max_workers=len(self._servers), thread_name_prefix="fp8sync-control")
        self._incarnations: dict[str, str] = {}
        self._plane: SendHalf | None = None
        self._session = self._secret = ""
        self._silent: set[str] = set()  # servers that are not told that the session ends: they did not answer
        self._closed = False
        self._version = self._newest = 0
        self._digests: list[int] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(server.name for server in self._servers)

    # Once

    def survey(self) -> tuple[bool, int]:
        """Whether the servers are still those of the open session, and the newest version seen on any of them."""
        if self._closed:
            raise ConfigError("this sender was closed: make a new one")
        self._version = 0
        replies = self._each(wire.Describe())
        infos = [(name, reply.info) for name, reply in zip(self.names, replies, strict=True)]
        for name, info in infos:
            _check_info(name, info, self._config)
        now = {name: info.incarnation for name, info in infos if info is not None}
        known = self._plane is not None and now == self._incarnations
        self._incarnations = now
        self._num_ranks = [info.num_ranks for _, info in infos if info is not None]
        self._newest = max(self._newest, *(reply.version for reply in replies))
        return known, self._newest

    def plan(self, offered: tuple[wire.TensorSpec, ...], bucket_bytes: int) -> PushPlan:
        """Offer the tensors, check the manifests, open session and data plane. Nothing of a model is touched."""
        self.close_session("a new plan is made")
        replies = self._each(wire.Offer(config=self._config, tensors=offered))
        manifests = {name: reply.manifest for name, reply in zip(self.names, replies, strict=True) if reply.manifest}
        if len(manifests) != len(self._servers):
            raise PushError("a server answered an offer without a manifest")
        agree(offered, manifests, self._config)
        plan = PushPlan(offered, make_layout(next(iter(manifests.values())), bucket_bytes))
        self._open(plan)
        return plan

    def _open(self, plan: PushPlan) -> None:
        self._session, self._secret = secrets.token_hex(16), new_secret()
        hosts = [server.local_host() for server in self._servers]
        host = next((h for h in hosts if not ipaddress.ip_address(h).is_loopback), hosts[0])  # reached from everywhere
        plane: SocketSender | GroupSender | None = None
        if self._plane_name != "memory":
            plane = (GroupSender if self._plane_name == "gloo" else SocketSender)(host, self._timeout_s)
        key = secrets.token_hex(8)
        first_ranks = [sum(self._num_ranks[:index]) for index in range(len(self._servers))]
        rendezvous = [
            wire.Rendezvous(
                plane=self._plane_name,
                host=host,
                port=plane.port if plane else 0,
                key=key,
                secret=self._secret,
                world_size=1 + sum(self._num_ranks),
                first_rank=first,
                timeout_s=min(self._timeout_s, _JOIN_TIMEOUT_S),
            )
            for first in first_ranks
        ]
        self._plane = plane or self._make_memory_plane(rendezvous[0])
        self._each_its_own(
            [
                wire.Open(
                    sender=self._name,
                    session=self._session,
                    incarnation=self._incarnations[name],
                    plan_hash=plan.layout.plan_hash,
                    bucket_bytes=plan.layout.bucket_bytes,
                    rendezvous=mine,
                )
                for name, mine in zip(self.names, rendezvous, strict=True)
            ]
        )
        if plane is not None:
            plane.join(rendezvous[0])

    # Every push

    def begin(self, version: int) -> None:
        if not 0 <= version <= wire.MOST_VERSION:
            raise StaleVersionError(f"{version} is no version: they end at {wire.MOST_VERSION}")
        self._version, self._digests = version, []
        self._each(wire.Begin(session=self._session, version=version, deadline_s=self._timeout_s))

    def send(self, bucket: torch.Tensor, index: int) -> None:
        """Send flat uint8 `bucket`; the buffer may be reused on return."""
        if self._plane is None:
            raise SessionLostError("the data plane is closed: push again")
        self._digests.append(digest(bucket, secret=self._secret, version=self._version, bucket=index))
        self._plane.send(bucket, self._digests[-1])

    def verify(self) -> None:
        """Return when every rank of every server holds every byte as it was sent."""
        deadline, pause = time.monotonic() + self._timeout_s, _POLL_S
        message = wire.Verify(session=self._session, version=self._version, digests=tuple(self._digests))
        while any(reply.state != "STAGED" for reply in self._each(message)):
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
            session=self._session,
            version=self._version,
            drain_s=self._timeout_s,
            in_flight=self._in_flight,
            held=self._strict,
        )
        if not self._strict:
            return self._commit_all(commit)
        try:
            self._hold()
            return self._commit_all(commit)
        finally:
            self._tell(wire.Release(session=self._session, version=self._version))

    def _hold(self) -> None:
        hold = wire.Hold(
            session=self._session,
            version=self._version,
            drain_s=self._timeout_s,
            hold_s=min(self._timeout_s + 3 * self._answer_s, wire.LONGEST_DEADLINE_S),  # others may need all their time
            in_flight=self._in_flight,
        )
        outcomes = self._try_each([hold] * len(self._servers), self._timeout_s + self._answer_s)
        if errors := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise errors[0]

    def _commit_all(self, commit: wire.Commit) -> float:
        answered: dict[str, float] = {}
        outcomes = self._try_each([commit] * len(self._servers), self._timeout_s + self._answer_s, answered)
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
            self._tell(abort)
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
            self._tell(wire.Close(session=self._session))
            self._session = ""
        self._silent.clear()

    def close(self) -> None:
        self.close_session("the sender is closed")
        self._closed = True
        self._pool.shutdown(wait=True)
        for server in self._servers:
            server.close()

    # Helpers

    def _each(self, message: BaseModel) -> list[wire.Reply]:
        return self._each_its_own([message] * len(self._servers))

    def _each_its_own(self, messages: Sequence[BaseModel]) -> list[wire.Reply]:
        outcomes = self._try_each(messages, self._answer_s)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, Exception)]

    def _tell(self, message: BaseModel) -> None:
        """Tell all servers that still answer, whatever they say to it."""

        def tell(server: ControlClient) -> None:
            try:
                server.call(message, self._goodbye_s)
            except ServerUnreachableError:
                self._silent.add(server.name)
            except Fp8SyncError as error:
                logger.debug("fp8sync: %s", error)

        list(self._pool.map(tell, [server for server in self._servers if server.name not in self._silent]))

    def _try_each(
        self, messages: Sequence[BaseModel], timeout_s: float, answered: dict[str, float] | None = None
    ) -> list[wire.Reply | Exception]:
        """Ask all servers at the same time; an error takes the place of its reply. `answered`: when each replied."""

        def ask(server: ControlClient, message: BaseModel) -> wire.Reply | Exception:
            try:
                return server.call(message, timeout_s)
            except Fp8SyncError as error:
                return error
            finally:
                if answered is not None:
                    answered[server.name] = time.monotonic()

        return list(self._pool.map(ask, self._servers, messages))


def _check_info(name: str, info: Any, config: wire.FP8BlockConfig) -> None:
    """Raises: IncompatibleServerError: the server cannot take part in a push of this sender."""
    if info is None:
        raise IncompatibleServerError(f"{name} did not say what it is")
    if info.protocol != wire.PROTOCOL_VERSION:
        raise IncompatibleServerError(
            f"{name} speaks protocol {info.protocol}, this sender {wire.PROTOCOL_VERSION}: install one fp8sync on both"
        )
    try:
        too_old = Version(info.sglang_version) < Version(wire.MIN_SGLANG_VERSION)
    except InvalidVersion as error:
        raise IncompatibleServerError(f"{name} runs an SGLang without a version number: {error}") from error
    if too_old:
        raise IncompatibleServerError(
            f"{name} runs SGLang {info.sglang_version}, older than {wire.MIN_SGLANG_VERSION}, the oldest supported"
        )
    if info.scale_fmt != config.scale_fmt:
        raise IncompatibleServerError(
            f"{name} serves {info.scale_fmt} scales, this sender sends {config.scale_fmt}: one FP8BlockConfig for both"
        )
    if info.block_size != (128, 128):
        blocks = "no block FP8" if info.block_size is None else f"blocks of {list(info.block_size)}"
        raise IncompatibleServerError(
            f"{name} serves {blocks}, this sender sends [128, 128]: start it with the arguments of shared.launch"
        )
