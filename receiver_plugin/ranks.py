"""The ranks of one server, and how they stay in step: what fails on one of them fails on all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from shared import protocol as wire
from shared.errors import Fp8SyncError, NonFiniteWeightError, PlanError, PushError, error_from_wire

logger = logging.getLogger(__name__)


class Ranks(Protocol):
    """The ranks of this server (one scheduler process each)."""

    index: int
    size: int

    def gather(self, item: Any) -> list[Any]:
        """`item` of every rank, in order, on every rank. A collective."""


class SingleRank:
    """A server of one rank."""

    index, size = 0, 1

    def gather(self, item: Any) -> list[Any]:
        return [item]


class RanksLostError(Exception):
    """A collective failed: nobody knows what the others did. No `Fp8SyncError`: those are said by all ranks alike."""


def gather(ranks: Ranks, item: Any) -> list[Any]:
    """`item` of every rank, on every rank. Raises: RanksLostError."""
    try:
        return ranks.gather(item)
    except Exception as error:
        raise RanksLostError(f"its ranks lost each other: {type(error).__name__}: {error}") from error


def collect(ranks: Ranks, step: Callable[[], Any]) -> list[Any]:
    """The results of `step` of all ranks. If it failed on any, that error is raised on all: none goes on alone.

    Raises: RanksLostError.
    """
    mine: Any = None
    failure: wire.WireError | None = None
    try:
        mine = step()
    except Fp8SyncError as error:
        failure = to_wire(error)
    except Exception as error:
        logger.exception("fp8sync: a step failed on rank %d", ranks.index)
        failure = to_wire(PushError(f"{type(error).__name__}: {error}"))
    outcomes = gather(ranks, (failure, mine))
    failed = [(rank, found) for rank, (found, _) in enumerate(outcomes) if found is not None]
    if failed:
        rank, found = failed[0]
        where = f" (rank {rank} of {ranks.size})" if ranks.size > 1 else ""
        raise error_from_wire(found.kind, found.message + where, found.problems)
    return [result for _, result in outcomes]


def to_wire(error: Fp8SyncError) -> wire.WireError:
    """`error` as it crosses the wire; lists stay lists."""
    problems = error.problems if isinstance(error, PlanError) else ()
    if isinstance(error, NonFiniteWeightError):
        problems = error.names
    message = str(error).split("\n  - ")[0] if problems else str(error)
    return wire.WireError(kind=type(error).__name__, message=message, problems=problems)
