"""What a receiver asks of the engine around it."""

from __future__ import annotations

from typing import Protocol

from receiver_plugin.binding import Derived
from receiver_plugin.rooms import Memory
from shared import protocol as wire


class Engine(Protocol):
    """What the receiver asks of the engine around it; SGLang's is in `sglang_engine`."""

    derived: Derived

    @property
    def memory(self) -> Memory:
        """Where a push may be staged."""

    def info(self, incarnation: str) -> wire.ServerInfo:
        """`incarnation` comes back with whatever else a plan depends on, such as where the experts lie."""

    def unsafe(self) -> list[str]:
        """Why raw copies into the live parameters would be wrong just now; empty if they are right."""

    def flush_cache(self) -> bool:
        """Forget the KV cache of the old weights. False, and nothing done, while requests run."""

    def synchronize(self) -> None:
        """Return when the device has finished all forward passes that read the parameters."""

    def publish(self, version: int) -> None:
        """From here on replies carry `version`."""
