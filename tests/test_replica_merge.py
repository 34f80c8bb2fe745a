"""`receiver_plugin/replicas.py`: the answers of several replicas as the answer of one server, and the way back."""

from __future__ import annotations

from typing import Any

import pytest

from receiver_plugin.replicas import for_replica, merge
from shared import protocol
from tests.tiny_models import FakeEngine


def test_not_staged_before_both_are() -> None:
    """One replica that still receives, and one that has no stage, hold the server back."""
    staged = protocol.Reply(state="STAGED", version=1, fence=None)
    verify = protocol.Verify(session="s", version=2, digests=())
    for other in ("RECEIVING", "SERVING"):
        late = staged.model_copy(update={"state": other})
        assert merge(verify, (staged, late)).state == merge(verify, (late, staged)).state == "RECEIVING"
    assert merge(verify, (staged, staged)).state == "STAGED"


def test_one_replica_is_merged_to_itself() -> None:
    reply = protocol.Reply(state="RECEIVING", version=3, fence="why", plan_hash="h")
    assert merge(protocol.Describe(), (reply,)) is reply


@pytest.mark.parametrize("field", ["manifest", "plan_hash", "info"])
def test_replicas_that_differ_are_an_error(field: str) -> None:
    tensor = protocol.ManifestTensor(name="w", shape=(1,), dtype="bfloat16", quantized=False)
    info = FakeEngine().info("a")
    values: dict[str, tuple[Any, Any]] = {
        "manifest": ((tensor,), ()),
        "plan_hash": ("a", "b"),
        "info": (info, info.model_copy(update={"device": "another"})),
    }
    replies = [protocol.Reply(state="SERVING", version=0, fence=None, **{field: value}) for value in values[field]]
    error = merge(protocol.Describe(), replies).error
    assert error is not None and error.kind == "IncompatibleServerError" and "differ" in error.message
    nothing = protocol.Reply(state="SERVING", version=0, fence=None)
    assert merge(protocol.Describe(), (replies[0], nothing)).error is not None


def test_the_same_error_of_all_is_said_once() -> None:
    error = protocol.WireError(kind="PlanError", message="they do not fit", problems=("a", "b"))
    reply = protocol.Reply(state="SERVING", version=0, fence=None, error=error)
    assert merge(protocol.Describe(), (reply, reply)).error == error
    other = protocol.WireError(kind="ServerBusyError", message="wait", problems=("b", "c"))
    for replies in ((reply, reply.model_copy(update={"error": other})),):
        found = merge(protocol.Describe(), replies).error
        assert found is not None and found.kind == "PlanError" and found.problems == ("a", "b", "c")
        assert found.message == "replica 0 of 2: they do not fit; replica 1 of 2: wait"


def test_a_replica_sees_its_own_part() -> None:
    rendezvous = protocol.Rendezvous(
        plane="gloo", host="h", port=1, key="k", secret="5e" * 32, world_size=9, first_rank=3, timeout_s=1.0
    )
    opened = protocol.Open(
        sender="s", session="s", incarnation="a+b", plan_hash="p", bucket_bytes=1, rendezvous=(rendezvous,)
    )
    seen = [for_replica(opened, replica, 2) for replica in range(3)]
    assert [part.incarnation for part in seen] == ["a", "b", ""]
    assert [part.first_rank for part in seen[:2]] == [3, 5]
    alone = opened.model_copy(update={"incarnation": "a"})
    assert for_replica(alone, 0, 2) is alone and for_replica(protocol.Describe(), 1, 2) == protocol.Describe()
