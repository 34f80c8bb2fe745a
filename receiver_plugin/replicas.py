"""A server with several replicas of its model (`--dp-size N`), as one server to everybody outside.

Each replica is a receiver of its own, with a tensor-parallel group of its own. A control message goes to all of them:

    HTTP process   message --------------------------------------> every replica
    scheduler      `for_replica`: the part of the message that is meant for this replica
    scheduler      its receiver answers
    HTTP process   `merge` <-------------------------------------- every replica

The server is as far as its last replica, fenced if one of them is, and fenced if they serve different versions: one URL
never serves two of them. It stages as the replica that can do least; the others do with that as well. Ranks of the
server count replica by replica. With one replica both functions change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from receiver_plugin.rooms import WAYS
from shared import protocol as wire

_BETWEEN = "+"  # incarnations of replicas in that of their server


def for_replica(message: Any, replica: int, ranks_per_replica: int) -> Any:
    """`message` to a server, as its `replica` (from 0) of `ranks_per_replica` ranks is to understand it."""
    if not isinstance(message, wire.Open) or _BETWEEN not in message.incarnation:
        return message
    parts = message.incarnation.split(_BETWEEN)
    mine = parts[replica] if replica < len(parts) else ""  # of a server with fewer replicas: it is not this one
    first = message.first_rank + replica * ranks_per_replica
    rendezvous = tuple(meeting.model_copy(update={"first_rank": first}) for meeting in message.rendezvous)
    return message.model_copy(update={"incarnation": mine, "rendezvous": rendezvous})


def merge(message: Any, replies: Sequence[wire.Reply]) -> wire.Reply:
    """The answer of a server to `message`, from `replies` of all its replicas, in order."""
    if len(replies) == 1:
        return replies[0]
    fence = _fence(replies)
    merged = wire.Reply(
        state=_state(replies, fence),
        version=max(reply.version for reply in replies),  # so that the next push is newer than what any of them has
        fence=fence,
        exclusive=any(reply.exclusive for reply in replies),
        error=_error(message, replies, fence),
    )
    if merged.error is not None:
        return merged
    differing = [name for name in ("manifest", "plan_hash") if _differ([getattr(reply, name) for reply in replies])]
    infos = [reply.info for reply in replies if reply.info is not None]
    if differing or _differ([_common(info) for info in infos]) or len(infos) not in (0, len(replies)):
        text = f"its replicas differ in their {' and '.join(differing) or 'description'}: start them all alike"
        return merged.model_copy(update={"error": wire.WireError(kind="IncompatibleServerError", message=text)})
    first = replies[0]
    probes = [rank for reply in replies for rank in reply.probe or ()]
    return merged.model_copy(
        update={
            "info": _info(infos) if infos else None,
            "manifest": first.manifest,
            "plan_hash": first.plan_hash,
            "lands": tuple(way for way in first.lands if all(way in reply.lands for reply in replies)),
            "staging": max((reply.staging for reply in replies if reply.staging), key=WAYS.index, default=None),
            "probe": tuple(probes) if probes else None,
        }
    )


def _state(replies: Sequence[wire.Reply], fence: str | None) -> wire.ServerState:
    """STAGED only where all are; a replica without a stage, beside one that has it, holds the server back. A promise
    of one binds all."""
    states = {reply.state for reply in replies}
    if "PROMISED" in states:
        return "PROMISED"
    if states == {"STAGED"}:
        return "STAGED"
    if states & {"RECEIVING", "STAGED"}:
        return "RECEIVING"
    return "FENCED" if fence else "SERVING"


def _fence(replies: Sequence[wire.Reply]) -> str | None:
    reasons = {replica: reply.fence for replica, reply in enumerate(replies) if reply.fence}
    if len(reasons) == len(replies) and not _differ(list(reasons.values())):
        return reasons[0]
    found = [f"{_name(replica, replies)}: {reason}" for replica, reason in reasons.items()]
    if len({reply.version for reply in replies}) > 1:
        found.append(f"its replicas hold different versions: {[reply.version for reply in replies]}")
    return "; ".join(found) or None


def _error(message: Any, replies: Sequence[wire.Reply], fence: str | None) -> wire.WireError | None:
    errors = {replica: reply.error for replica, reply in enumerate(replies) if reply.error is not None}
    if isinstance(message, wire.Commit) and len(errors) < len(replies) and fence:
        why = [f"{_name(replica, replies)}: {_of_one(error.message)}" for replica, error in errors.items()]
        return wire.WireError(kind="CommitError", message="; ".join([f"the server is fenced: {fence}", *why]))
    if not errors:
        return None
    found = list(errors.values())
    if len(found) == len(replies) and not _differ(found):
        return found[0]
    # A replica that only has to be waited for must not hide one that will never do it.
    kind = next((error.kind for error in found if error.kind != "ServerBusyError"), "ServerBusyError")
    lines = [f"{_name(replica, replies)}: {error.message}" for replica, error in errors.items()]
    problems = tuple(dict.fromkeys(problem for error in found for problem in error.problems))
    return wire.WireError(kind=kind, message="; ".join(lines), problems=problems)


def _of_one(text: str) -> str:
    """What one replica says of itself, where the server as a whole was touched."""
    return text.replace("; nothing was touched", "; this replica was not touched")


def _name(replica: int, replies: Sequence[wire.Reply]) -> str:
    return f"replica {replica} of {len(replies)}"


def _common(info: wire.ServerInfo) -> wire.ServerInfo:
    return info.model_copy(update={"incarnation": "", "places": ()})


def _info(infos: Sequence[wire.ServerInfo]) -> wire.ServerInfo:
    whole = {
        "incarnation": _BETWEEN.join(info.incarnation for info in infos),
        "num_ranks": sum(info.num_ranks for info in infos),
        "num_replicas": len(infos),
        "places": tuple(place for info in infos for place in info.places),
    }
    return infos[0].model_copy(update=whole)


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)
