"""Which of several failures of one push is to be told: the one that the others followed from."""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import NonFiniteWeightError, RankMissingError, ReceiveError, TransferError


def the_cause(failures: Sequence[Exception]) -> Exception:
    """Of one or more, in the order in which they were heard of; of equals the first.

    A rank that fails leaves its data plane, and the servers then leave those of all others: a plane that broke says
    least, a rank that was not heard of little more. Inf and NaN are named of all ranks together.
    """
    names = [name for error in failures if isinstance(error, NonFiniteWeightError) for name in error.names]
    if names:
        return NonFiniteWeightError(tuple(dict.fromkeys(names)))
    return min(failures, key=_says_little)


def _says_little(error: Exception) -> int:
    """0 for what nothing else in the push leads to."""
    if isinstance(error, ReceiveError):  # a server that failed by itself
        return 1
    if isinstance(error, RankMissingError):
        return 2
    return 3 if isinstance(error, TransferError) else 0
