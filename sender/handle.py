"""A push under way, as `FP8Sender.push_async` returns it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sender.report import PushReport
from shared.errors import ConfigError


class PushHandle:
    """Runs `transfer` on a thread. `wait()` is collective, and may be called once."""

    def __init__(self, transfer: Callable[[], None], finish: Callable[[], PushReport]) -> None:
        self._finish: Callable[[], PushReport] | None = finish
        self._thread = threading.Thread(target=transfer, name="fp8sync-push", daemon=True)
        self._thread.start()

    def wait(self) -> PushReport:
        """Returns when every server serves the new weights; raises as `FP8Sender.push`, on every rank."""
        self._thread.join()
        finish, self._finish = self._finish, None
        if finish is None:
            raise ConfigError("this push was waited for already")
        return finish()
