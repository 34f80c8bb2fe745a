"""Every server asked at once: a message goes out to all of them, their replies come back by name.

With a quorum, a push may leave servers out: from then on they are asked nothing until it is over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from packaging.version import InvalidVersion, Version
from pydantic import BaseModel

from sender.control import ControlClient
from shared import protocol as wire
from shared.config import FP8BlockConfig
from shared.errors import ConfigError, Fp8SyncError, IncompatibleServerError, PushError, ServerUnreachableError
from shared.turns import frequent_turns

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 60.0
_GOODBYE_S = 10.0  # a server that does not hear that a push failed finds its connection broken, or its deadline passed
_SUSPECT_S = 5.0  # for the first answer of a server that the last push left out
_MOST_SERVERS_AT_ONCE = 256

Outcome = wire.Reply | Fp8SyncError
Failed = dict[str, Fp8SyncError]
_T = TypeVar("_T")


class Servers:
    """The control connections. `timeout_s` is that of a push: no question is waited for any longer.

    `quorum`: how many servers are enough for a push; None: all of them.
    """

    def __init__(self, clients: Iterable[ControlClient], timeout_s: float, quorum: int | None = None) -> None:
        self._clients = {client.name: client for client in clients}
        self.quorum = quorum
        self.answer_s, self.goodbye_s = min(CONTROL_TIMEOUT_S, timeout_s), min(_GOODBYE_S, timeout_s)
        self._pool = ThreadPoolExecutor(_MOST_SERVERS_AT_ONCE, thread_name_prefix="fp8sync-control")
        self._silent: set[str] = set()  # servers that are not told that the session ends: they did not answer
        self._suspects: set[str] = set()
        self.left_out: dict[str, str] = {}  # of the push under way, and why
        self.failed: dict[str, Fp8SyncError] = {}  # who failed the question that was asked last

    @property
    def clients(self) -> tuple[ControlClient, ...]:
        """Those that have a part in the push."""
        return tuple(client for name, client in self._clients.items() if name not in self.left_out)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(client.name for client in self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    # Coming and going

    def add(self, client: ControlClient) -> None:
        """Raises: ConfigError: there is one of that name."""
        if client.name in self._clients:
            raise ConfigError(f"{client.name} is one of the servers already")
        self._clients[client.name] = client

    def check_removable(self, name: str) -> None:
        """Raises: ConfigError: there is none of that name, or it is the last one."""
        if name not in self._clients:
            raise ConfigError(f"{name} is none of the servers: {list(self._clients)}")
        if len(self._clients) == 1:
            raise ConfigError(f"{name} is the last server: close the sender")
        if self.quorum is not None and len(self._clients) <= self.quorum:
            raise ConfigError(f"{name} is needed for quorum={self.quorum}: add another server first")

    def remove(self, name: str) -> None:
        self._clients.pop(name).close()

    def go_on_without(self, failed: Mapping[str, Fp8SyncError]) -> None:
        """Leave them out of this push, if enough are left. Raises: PushError: there are not; else the first error."""
        if not failed:
            return
        left = len(self) - len(failed)
        if self.quorum is None:
            raise next(iter(failed.values()))
        out = {name: f"{type(error).__name__}: {_first_line(error)}" for name, error in failed.items()}
        if left < self.quorum:
            raise PushError(f"{left} server(s) are left, quorum={self.quorum}: {self.left_out | out}")
        logger.warning("fp8sync: the push goes on without %s", out)
        self.left_out |= out
        self._silent |= {name for name, error in failed.items() if isinstance(error, ServerUnreachableError)}

    def forget_left_out(self) -> None:
        """The push is over: the next one tries them again."""
        self._suspects = set(self.left_out)
        self.left_out, self.failed = {}, {}
        self._silent.clear()

    # Asking

    def each(self, message: BaseModel) -> dict[str, wire.Reply]:
        """Raises: the first error."""
        return self.each_its_own([message] * len(self))

    def each_its_own(self, messages: Sequence[BaseModel], timeout_s: float | None = None) -> dict[str, wire.Reply]:
        """`timeout_s`: None: `answer_s`. Raises: the first error."""
        replies, failed = self.try_each(messages, self.answer_s if timeout_s is None else timeout_s)
        if failed:
            raise next(iter(failed.values()))
        return replies

    def on_a_thread(self, ask: Callable[[], _T]) -> Future[_T]:
        """`ask`, which asks servers, beside what the caller does. No other question may come before its end."""
        turns = ExitStack()
        turns.enter_context(frequent_turns())

        def run() -> _T:
            with turns:
                return ask()

        try:
            return self._pool.submit(run)
        except RuntimeError:  # it is closed
            turns.close()
            raise

    def try_each(
        self,
        messages: Sequence[BaseModel] | BaseModel,
        timeout_s: float,
        answered: dict[str, float] | None = None,
        names: Sequence[str] | None = None,
    ) -> tuple[dict[str, wire.Reply], Failed]:
        """Ask all servers, or `names`, at the same time: replies and errors. `answered`: when each replied."""
        names = self.names if names is None else names
        messages = [messages] * len(names) if isinstance(messages, BaseModel) else messages

        def ask(server: ControlClient, message: BaseModel) -> Outcome:
            suspect = server.name in self._suspects
            try:
                reply = server.call(message, min(timeout_s, _SUSPECT_S) if suspect else timeout_s)
                self._suspects.discard(server.name)
                return reply
            except Fp8SyncError as error:
                return error
            finally:
                if answered is not None:
                    answered[server.name] = time.monotonic()

        asked = [self._clients[name] for name in names]
        outcomes = dict(zip(names, self._pool.map(ask, asked, messages), strict=True))
        self.failed = {name: found for name, found in outcomes.items() if isinstance(found, Fp8SyncError)}
        return {name: found for name, found in outcomes.items() if isinstance(found, wire.Reply)}, self.failed

    def tell(self, message: BaseModel, names: Iterable[str] | None = None, insist: bool = False) -> None:
        """Tell all servers that still answer, also those left out, or those named, whatever they say to it.

        `insist`: also those that have been silent, for a shorter time.
        """
        goodbye_s = min(self.goodbye_s, _SUSPECT_S) if insist else self.goodbye_s

        def tell(server: ControlClient) -> None:
            try:
                server.call(message, goodbye_s)
            except ServerUnreachableError:
                self._silent.add(server.name)
            except Fp8SyncError as error:
                logger.debug("fp8sync: %s", error)

        told = [self._clients[name] for name in (self._clients if names is None else names)]
        list(self._pool.map(tell, [server for server in told if insist or server.name not in self._silent]))

    def forgive(self) -> None:
        """The session is over: servers that were silent are told of the next one again, unless they are left out."""
        self._silent &= self.left_out.keys()

    def close(self, hang_up: bool = True) -> None:
        self._pool.shutdown(wait=True)
        for server in self._clients.values() if hang_up else ():
            server.close()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def check_info(name: str, info: Any, config: FP8BlockConfig, in_flight: wire.InFlight, plane: wire.PlaneName) -> None:
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
    if plane == "nccl" and info.device == "cpu":
        raise IncompatibleServerError(f"{name} has no GPU, which plane='nccl' sends to")
    if in_flight == "keep" and info.cannot_keep:
        raise IncompatibleServerError(
            f"{name} cannot let requests go on across a commit: {'; '.join(info.cannot_keep)}"
        )
