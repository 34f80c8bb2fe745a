"""A case of the campaign: what strikes where. Drawn from a seed, so that a number is all it takes to repeat it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from shared.protocol import PlaneName

# Points on a rank of a server, in the order of a push (`parts.py`, `server.py`).
PLANNING = ("offer", "allocate", "join")
RECEIVING = ("begin", "receive", "received", "scatter")
CHECKS = ("check", "flush")
COPYING = ("drain", "copy", "refresh", "settle", "publish")
# Points on the sender (`sending.py`); the last: one server has committed and the others have not.
MESSAGES = ("describe", "offer", "open", "begin", "verify", "prepare", "commit")
BETWEEN = "between commits"
SENDING = ("ask offer", "ask open", "ask begin", "send", "ask verify", "ask prepare", "ask commit", BETWEEN)
OF_SEVERAL = (BETWEEN, "prepare", "ask prepare")  # what only a push to several servers passes
BUCKETS = ("first bucket", "middle bucket", "last bucket")
MOMENTS = ("between pushes", "while receiving", "while staged")

ALL: tuple[PlaneName, ...] = ("memory", "tcp", "gloo", "same_host")
BETWEEN_PROCESSES: tuple[PlaneName, ...] = ("tcp", "gloo", "same_host")
# Kind of fault -> where it may strike, and on which planes.
KINDS: dict[str, tuple[tuple[str, ...], tuple[PlaneName, ...]]] = {
    "exception": ((*PLANNING, *RECEIVING, *CHECKS, *COPYING), ALL),
    "exception while requests go on": (COPYING, ALL),
    "rank lost": (("begin", "check", "copy", "publish"), ALL),
    "request lost": (MESSAGES, ALL),
    "reply lost": (MESSAGES, ALL),
    "byte flipped": (BUCKETS, ALL),
    "byte flipped on one rank": (BUCKETS, ALL),
    "bucket short": (BUCKETS, ALL),
    "bucket repeated": (BUCKETS, ALL),
    "bucket dropped": (BUCKETS, ALL),
    "buckets swapped": (BUCKETS[:2], ALL),
    "sender killed": (SENDING, BETWEEN_PROCESSES),
    "sender killed in mid-bucket": (BUCKETS, BETWEEN_PROCESSES),
    "sender vanished": (SENDING, ("memory",)),
    "sender frozen": (SENDING, ALL),
    "server killed": (("offer", "allocate", *RECEIVING, *CHECKS, *COPYING), BETWEEN_PROCESSES),
    "server frozen": (("offer", "begin", "received", "check", "copy"), BETWEEN_PROCESSES),
    "server restarted": (MOMENTS, ALL),
    "stock update": (MOMENTS, ALL),
    "memory released": (MOMENTS, ALL),
    "model moved": (MOMENTS, ALL),
    "model changed": (("between pushes",), ALL),
    "second sender": (("while receiving", "while staged"), ALL),
    "second push of one sender": (("while receiving",), ALL),
    "requests that never end": (("ask commit",), ALL),
    "generation paused": (("ask commit",), ALL),
    "left out by a quorum": (("allocate", *RECEIVING), ALL),
    "unheard with a quorum": (MESSAGES, ALL),
    "killed with a quorum": (("allocate", *RECEIVING, *CHECKS, *COPYING), BETWEEN_PROCESSES),
    "commit after its promise": (("ask commit",), ALL),
    "joiner": (("while receiving", "while staged"), ALL),
    "late message": (("begin", "verify", "prepare", "commit", "abort", "close"), ALL),
    "stale version": (("ask begin",), ALL),
    "exception, staged in place": ((*RECEIVING[1:], *COPYING[1:3], "publish"), ALL),
    "exception, staged in the KV cache": ((*RECEIVING[1:], *COPYING[1:3]), ALL),
    "byte flipped, staged in place": (BUCKETS, ALL),
    "sender vanished, staged in place": (("send", "ask verify", "ask commit"), ("memory",)),
}
# They start processes.
SLOW = ("sender killed", "sender killed in mid-bucket", "server killed", "server frozen", "killed with a quorum")


@dataclass(frozen=True)
class Case:
    """`warm`: the servers serve a version already, and the sender has its plan. Else they start fenced."""

    seed: int
    kind: str
    stage: str
    plane: PlaneName
    num_servers: int
    tp_size: int
    server: int
    rank: int
    warm: bool

    @property
    def quorum(self) -> int | None:
        return self.num_servers - 1 if self.kind.endswith("quorum") else None

    def __str__(self) -> str:
        place = f"server {self.server} of {self.num_servers}, rank {self.rank} of {self.tp_size}"
        return f"{self.kind}, {self.stage} ({self.plane}, {place}, {'warm' if self.warm else 'first push'})"


def places() -> list[tuple[str, str, PlaneName]]:
    """Every kind at every stage on every plane."""
    return [(kind, stage, plane) for kind, (stages, planes) in KINDS.items() for stage in stages for plane in planes]


def draw(seed: int) -> Case:
    """Seeds in a row go through all places; the rest of the case is drawn."""
    every = places()
    kind, stage, plane = every[seed % len(every)]
    dice = random.Random(seed)
    num_servers, tp_size = dice.choice((1, 2, 3)), dice.choice((1, 1, 2))
    if kind == "rank lost":
        tp_size = 2
    if stage in (*OF_SEVERAL, "verify") or kind in ("commit after its promise", "joiner"):  # one alone hears no verify
        num_servers = max(2, num_servers)
    if kind.endswith("quorum"):
        num_servers = 3
    warm = dice.random() < 0.8 or kind in ("late message", "stale version", "model moved", "model changed")
    return Case(
        seed, kind, stage, plane, num_servers, tp_size, dice.randrange(num_servers), dice.randrange(tp_size), warm
    )


def reduced(num_cases: int) -> list[int]:
    """Seeds for a short run: spread over all kinds that start no process, each kind before one comes again."""
    every = places()
    by_kind = {kind: [s for s, place in enumerate(every) if place[0] == kind] for kind in KINDS if kind not in SLOW}
    dice, found = random.Random(0), list[int]()
    while len(found) < num_cases:
        found += [seeds.pop(dice.randrange(len(seeds))) for seeds in by_kind.values() if seeds]
    return found[:num_cases]
