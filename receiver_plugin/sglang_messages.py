"""The one request type that fp8sync adds between SGLang's HTTP process and its schedulers.

Module-level and importable, because SGLang's own messages between its processes are pickled.
"""

from __future__ import annotations

from sglang.srt.managers.io_struct import BaseReq


class Fp8SyncReqInput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """A control message on its way to the schedulers. `nonce` pairs it with its answer."""

    nonce: str
    message: str


class Fp8SyncReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """The answer of one replica, by its first rank."""

    nonce: str
    replica: int
    reply: str
