"""Every server asked at once: a message goes out to all of them, their replies come back in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from packaging.version import Version
from pydantic import BaseModel

from sender.control import ControlClient
from shared import protocol as wire
from shared.errors import Fp8SyncError, IncompatibleServerError, ServerUnreachableError

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 60.0
_GOODBYE_S = 10.0  # a server that does not hear that a push failed finds its connection broken, or its deadline passed


class Servers:
    """The control connections. `timeout_s` is that of a push: no question is waited for any longer."""

    def __init__(self, clients: Sequence[ControlClient], timeout_s: float) -> None:
        self.clients = tuple(clients)
        self.answer_s, self._goodbye_s = min(CONTROL_TIMEOUT_S, timeout_s), min(_GOODBYE_S, timeout_s)
        self._pool = ThreadPoolExecutor(max_workers=len(self.clients), thread_name_prefix="fp8sync-control")
        self._silent: set[str] = set()  # servers that are not told that the session ends: they did not answer

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(server.name for server in self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    def each(self, message: BaseModel) -> list[wire.Reply]:
        return self.each_its_own([message] * len(self.clients))

    def each_its_own(self, messages: Sequence[BaseModel]) -> list[wire.Reply]:
        outcomes = self.try_each(messages, self.answer_s)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, Exception)]

    def try_each(
        self,
        messages: Sequence[BaseModel],
        timeout_s: float,
        answered: dict[str, float] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[wire.Reply | Exception]:
        """Ask all servers (or `names`) at the same time; an error takes the place of its reply.

        `answered`: when each replied.
        """

        def ask(server: ControlClient, message: BaseModel) -> wire.Reply | Exception:
            try:
                return server.call(message, timeout_s)
            except Fp8SyncError as error:
                return error
            finally:
                if answered is not None:
                    answered[server.name] = time.monotonic()

        return list(self._pool.map(ask, self._named(names), messages))

    def tell(self, message: BaseModel, names: Sequence[str] | None = None) -> None:
        """Tell all servers (or `names`) that still answer, whatever they say to it."""

        def tell(server: ControlClient) -> None:
            try:
                server.call(message, self._goodbye_s)
            except ServerUnreachableError:
                self._silent.add(server.name)
            except Fp8SyncError as error:
                logger.debug("fp8sync: %s", error)

        list(self._pool.map(tell, [server for server in self._named(names) if server.name not in self._silent]))

    def _named(self, names: Sequence[str] | None) -> list[ControlClient]:
        return [server for server in self.clients if names is None or server.name in names]

    def forgive(self) -> None:
        """The session is over: servers that were silent are told of the next one again."""
        self._silent.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        for server in self.clients:
            server.close()


def check_info(name: str, info: Any, config: wire.FP8BlockConfig, in_flight: wire.InFlight) -> None:
    """Raises: IncompatibleServerError: the server cannot take part in a push of this sender."""
    if info is None:
        raise IncompatibleServerError(f"{name} did not say what it is")
    if info.protocol != wire.PROTOCOL_VERSION:
        raise IncompatibleServerError(
            f"{name} speaks protocol {info.protocol}, this sender {wire.PROTOCOL_VERSION}: install one fp8sync on both"
        )
    if Version(info.sglang_version) < Version(wire.MIN_SGLANG_VERSION):
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
    if in_flight == "keep" and info.cannot_keep:
        raise IncompatibleServerError(
            f"{name} cannot let requests go on across a commit: {'; '.join(info.cannot_keep)}"
        )
