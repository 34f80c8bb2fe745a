"""One of every control message, whole and valid, for tests that go through all of them."""

from __future__ import annotations

from typing import get_args

from pydantic import BaseModel

from shared import protocol
from shared.config import FP8BlockConfig
from shared.protocol import TensorSpec

SECRET = "5e" * 32
RENDEZVOUS = protocol.Rendezvous(
    plane="memory", host="127.0.0.1", port=9, key="k", secret=SECRET, world_size=2, first_rank=0, timeout_s=0.2
)
MESSAGES: tuple[BaseModel, ...] = (
    protocol.Describe(),
    protocol.Offer(config=FP8BlockConfig(), tensors=(TensorSpec(name="a", shape=(2, 2), dtype="bfloat16"),)),
    protocol.Open(
        sender="who", session="s", incarnation="i", plan_hash="p", bucket_bytes=1 << 20, rendezvous=(RENDEZVOUS,)
    ),
    protocol.Begin(
        session="s", version=1, deadline_s=1.0, shut=protocol.Shut(drain_s=0.1, hold_s=0.2, in_flight="wait")
    ),
    protocol.Verify(session="s", version=1, digests=(1, 2)),
    protocol.Prepare(session="s", version=1),
    protocol.Hold(session="s", version=1, drain_s=0.1, hold_s=0.2, in_flight="wait"),
    protocol.Commit(session="s", version=1, drain_s=0.1),
    protocol.Release(session="s", version=1),
    protocol.Abort(session="s", version=1, reason="why"),
    protocol.Close(session="s"),
    protocol.Probe(),
)
assert {type(message) for message in MESSAGES} == set(get_args(get_args(protocol.ControlMessage)[0]))
