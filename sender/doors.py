"""The doors of the servers, held shut from here: where no request may run beside a push, or beside its commit."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sender.servers import Failed, Servers
from shared import protocol as wire


class Doors:
    """Of one push after the other. `stood_still_s`: for how long each server let no new request run."""

    def __init__(self, servers: Servers, timeout_s: float, in_flight: wire.InFlight) -> None:
        self._servers, self._timeout_s, self._in_flight = servers, timeout_s, in_flight
        self.drained_s = timeout_s + servers.answer_s  # for an answer that waits for requests to end
        self._shut_since: dict[str, float] = {}  # of those that may be shut
        self.stood_still_s: dict[str, float] = {}

    def begin(self) -> None:
        self.stood_still_s = {}

    @property
    def shut(self) -> set[str]:
        """The servers whose doors may be shut."""
        return set(self._shut_since)

    def shut_to_begin(self, names: Sequence[str]) -> wire.Shut:
        """What the `Begin` of `names` says of their doors."""
        self._shut_since |= dict.fromkeys(names, time.monotonic())
        return self._shut(arriving_s=2 * self._timeout_s)

    def hold(self, names: Sequence[str], session: str, version: int, promise: bool) -> Failed:
        """Drain `names` and keep their doors shut until the release. `promise`: as that of `Prepare`."""
        shut = self._shut(arriving_s=0.0).model_dump()
        hold = wire.Hold(session=session, version=version, promise=promise, **shut)
        self._shut_since |= dict.fromkeys(names, time.monotonic())
        _, failed = self._servers.try_each(hold, self.drained_s, names=names)
        return failed

    def _shut(self, arriving_s: float) -> wire.Shut:
        assert self._in_flight != "keep"  # `FP8Sender` refuses it
        hold_s = arriving_s + self.drained_s + 2 * self._servers.answer_s  # others may need it all
        hold_s = min(hold_s, wire.LONGEST_DEADLINE_S)
        return wire.Shut(drain_s=self._timeout_s, hold_s=hold_s, in_flight=self._in_flight)

    def release(self, session: str, version: int) -> None:
        if self._shut_since:
            self._servers.tell(wire.Release(session=session, version=version), list(self._shut_since))
        self.opened()

    def opened(self) -> None:
        """All of them, by now."""
        now = time.monotonic()
        self.stood_still_s |= {name: now - since for name, since in self._shut_since.items()}
        self.forget()

    def forget(self) -> None:
        """The session ended, and with it every hold."""
        self._shut_since.clear()
