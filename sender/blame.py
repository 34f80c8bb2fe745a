"""Who is to blame for a push that failed: what a quorum leaves out before it tries again."""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import (
    ConfigError,
    Fp8SyncError,
    NonFiniteWeightError,
    PlanError,
    RankMissingError,
    ReceiveError,
    SessionLostError,
    StaleVersionError,
    TransferError,
)

Failed = dict[str, Fp8SyncError]  # by the name of the server


def to_blame(failed: Mapping[str, Fp8SyncError], num_asked: int) -> Failed:
    """Those of `failed` that did not fail because of others.

    A server that dies takes the transfer away from its peers, so bytes that did not arrive are blamed on a server only
    where others have them. One that lost the session was not asked for anything wrong: it may have a new one.
    """
    of_others = TransferError | SessionLostError
    own = {n: e for n, e in failed.items() if isinstance(e, ReceiveError) or not isinstance(e, of_others)}
    if own or len(failed) == num_asked:
        return own
    return {name: error for name, error in failed.items() if isinstance(error, TransferError)}


def by_the_trainer(failure: Exception) -> bool:
    """Whether no choice of servers would help. A `PlanError` without a list is that of a server without memory."""
    if isinstance(failure, PlanError):
        return bool(failure.problems)
    trainers = NonFiniteWeightError | StaleVersionError | RankMissingError | ConfigError
    return not isinstance(failure, Fp8SyncError) or isinstance(failure, trainers)
