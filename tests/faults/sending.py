"""The sender's side with places for faults: every control message to every server, and every bucket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel

from sender import FP8Sender
from sender.control import ControlClient
from shared import protocol
from shared.planes import SendHalf
from tests.faults.models import BUCKET_BYTES
from tests.faults.tripwire import Tripwire


class Vanished(BaseException):
    """Ends a sender in the middle of what it does, without its cleaning up."""


Call = Callable[[BaseModel, float], protocol.Reply]
OnSend = Callable[[int, torch.Tensor], Sequence[torch.Tensor]]


class WatchedControl:
    """A `ControlClient`. Points: `ask KIND` before a message leaves, `answered KIND` when its reply is here."""

    def __init__(self, index: int, name: str, call: Call, tripwire: Tripwire, gone: threading.Event) -> None:
        self.index, self.name, self._call, self._tripwire, self._gone = index, name, call, tripwire, gone

    def call(self, message: BaseModel, timeout_s: float) -> protocol.Reply:
        kind = str(getattr(message, "kind", ""))
        self._check()
        self._tripwire.at(f"ask {kind}", self.index)
        self._check()
        try:
            return self._call(message, timeout_s)
        finally:
            self._tripwire.at(f"answered {kind}", self.index)

    def _check(self) -> None:
        if self._gone.is_set():
            raise Vanished

    def local_host(self) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        """Nothing is held."""


class WatchedPlane:
    """A `SendHalf`. Point: `send`, before a bucket leaves. `on_send` says what travels in its place."""

    def __init__(self, inner: SendHalf, tripwire: Tripwire) -> None:
        self._inner, self._tripwire, self._num_sent = inner, tripwire, 0
        self.on_send: OnSend = lambda index, bucket: (bucket,)

    def send(self, bucket: torch.Tensor, digest: int) -> None:
        self._tripwire.at("send", 0)
        index, self._num_sent = self._num_sent, self._num_sent + 1
        for travelling in self.on_send(index, bucket):
            self._inner.send(travelling, digest)

    def flush(self) -> None:
        self._inner.flush()

    def close(self) -> None:
        self._inner.close()


class WatchedSender:
    """An `FP8Sender` whose messages and buckets pass a tripwire."""

    def __init__(
        self,
        calls: Sequence[tuple[str, Call]],
        plane: protocol.PlaneName,
        timeout_s: float,
        bucket_bytes: int = BUCKET_BYTES,
        **settings: Any,
    ) -> None:
        self.tripwire, self.gone = Tripwire(), threading.Event()
        self.on_close: list[Callable[[], None]] = []
        controls: list[str | ControlClient] = [
            WatchedControl(index, name, call, self.tripwire, self.gone) for index, (name, call) in enumerate(calls)
        ]
        self.controls = controls
        self.inner = FP8Sender(controls, plane=plane, timeout_s=timeout_s, bucket_bytes=bucket_bytes, **settings)

    def watch_plane(self) -> WatchedPlane:
        """Once it is joined: buckets pass the tripwire from here on, until the next plan."""
        fleet = self.inner._fleet
        assert fleet.half.plane is not None, "prepare first"
        watched = WatchedPlane(fleet.half.plane, self.tripwire)
        fleet.half.plane = watched
        return watched

    def vanish(self, data: torch.Tensor | None = None) -> None:
        """An action: this sender says nothing more to anybody."""
        self.gone.set()
        raise Vanished

    def close(self) -> None:
        """Let go of what is held here. One that vanished tells no server."""
        if not self.gone.is_set():
            self.inner.close()
        else:
            fleet = self.inner._fleet
            if fleet.half.plane is not None:
                fleet.half.plane.close()
            fleet._servers._pool.shutdown(wait=True)
        for close in self.on_close:
            close()
