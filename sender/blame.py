"""Who is to blame for a push that failed: what a quorum leaves out before it tries again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sender.servers import Failed, Servers
from shared import protocol as wire
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


class Blame:
    """Who made the push under way fail, as far as it is known. `owners`: the server of each rank of the data plane."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self.owners: Sequence[str] = ()
        self.named: Failed = {}

    def forget(self) -> None:
        self.named = {}

    @contextmanager
    def of_ranks(self) -> Iterator[None]:
        """What the data plane says of its ranks."""
        try:
            yield
        except TransferError as error:
            self.named = {self.owners[rank]: error for rank in error.ranks}
            if not self.named:
                raise
            raise TransferError(f"{', '.join(self.named)}: {error}", error.ranks) from error

    def own_words(self, verify: wire.Verify) -> ReceiveError | None:
        """Of a server that failed by itself. Whom the plane has named stays to blame, whoever is slow to answer."""
        hurry = self.named or self._servers.quorum is None
        found = self.at_fault(verify, self._servers.goodbye_s if hurry else self._servers.answer_s)
        own = {name: error for name, error in found.items() if isinstance(error, ReceiveError)}
        self.named = (self.named | own) or found
        return next(iter(own.values()), None)

    def at_fault(self, verify: wire.Verify, patience_s: float) -> Failed:
        """Where the data plane broke: the servers that are gone, and those that say that it was they."""
        _, failed = self._servers.try_each(verify, patience_s)
        return to_blame(failed, len(failed))


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
