"""Pushes, and what may come between them, one at a time: `catch_up` runs on another thread than training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import ConfigError, ServerBusyError


class Turns:
    """A push takes its turn where it first needs the servers, and ends it with its outcome, maybe on another thread."""

    def __init__(self, patience_s: float) -> None:
        self._lock, self._pushing, self._patience_s = threading.Lock(), False, patience_s
        self._thread = 0

    def begin_push(self) -> None:
        """Nothing if the push has its turn already. Raises: ServerBusyError: what came between does not end."""
        if not self._pushing and not self._lock.acquire(timeout=self._patience_s):
            raise ServerBusyError("a catch_up of this sender is still at work: push again")
        self._pushing, self._thread = True, threading.get_ident()

    @property
    def is_mine(self) -> bool:
        """Whether a push that has its turn began on this thread."""
        return self._pushing and self._thread == threading.get_ident()

    def end_push(self) -> None:
        if self._pushing:
            self._pushing = False
            self._lock.release()

    @contextmanager
    def between_pushes(self, what: str) -> Iterator[None]:
        """Raises: ConfigError: a push is under way, and does not end."""
        if not self._lock.acquire(timeout=self._patience_s):
            raise ConfigError(f"{what}: a push is still under way")
        try:
            yield
        finally:
            self._lock.release()
