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

    @property
    def makeup(self) -> object:
        """What `unsafe` found the model to be made of: the same object as long as nothing has changed since, places in
        memory included. None: nobody looked at that."""

    def flush_cache(self) -> bool:
        """Forget the KV cache of the old weights. False, and nothing done, while requests run."""

    def cannot_keep(self) -> list[str]:
        """Why requests cannot go on across a commit here; empty if they can."""

    def renew_cache(self, name: str) -> None:
        """From here on no request begins on KV cache from before; those that run keep theirs. `name`: not used yet."""

    def end_requests(self) -> None:
        """End all requests now, with what they have: no token more is computed. Later ones end as they come."""

    def synchronize(self) -> None:
        """Return when the device has finished all forward passes that read the parameters."""

    def publish(self, version: int) -> None:
        """Tokens that are computed from here on carry `version`."""
