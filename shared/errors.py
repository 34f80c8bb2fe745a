"""Every error that fp8sync raises on purpose, in one tree.

A message says what happened, to which tensor, bucket, version or server, and what to do about it.
`ValueError`-like mistakes of the caller are `ConfigError`; everything that a push can end with is a `PushError`.
Errors cross the wire by their class name (see `error_from_wire`), so that a receiver's refusal is raised on the
trainer as the class that it was.
"""

from __future__ import annotations


class Fp8SyncError(Exception):
    """Base of all errors raised by fp8sync."""


class ConfigError(Fp8SyncError, ValueError):
    """A setting or an argument is wrong; nothing was started."""


class IncompatibleServerError(Fp8SyncError):
    """A server cannot take part: no plugin, unsupported SGLang, other protocol, other block size, unsafe backend."""


class PushError(Fp8SyncError):
    """A push ended without publishing its version. Base of what follows."""


class PlanError(PushError):
    """The model of the trainer and the model of a server do not fit; `problems` lists every mismatch."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        self.problems = problems
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"{message}{lines}")


class NonFiniteWeightError(PushError):
    """A weight holds inf or NaN; `names` lists every such tensor of the push."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(
            f"inf or NaN in {len(names)} weight(s): {', '.join(names)}. "
            "Nothing was published; the servers keep the version that they had."
        )

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.names,)  # pickled by Ray and multiprocessing on their way to the driver


class RankMissingError(PushError):
    """Not every trainer rank called the collective function before the deadline."""


class ServerUnreachableError(PushError):
    """A server did not answer on its control route."""


class UnauthorizedError(PushError):
    """A server refused the admin key."""


class ServerBusyError(PushError):
    """Another sender is in the middle of a push to this server."""


class StillComingError(PushError):
    """A server was to commit what has not all arrived yet. The sender waits and asks again; no push ends with it."""


class SessionLostError(PushError):
    """The server restarted, or another sender took over, since this sender planned. The next push plans anew."""


class StaleVersionError(PushError):
    """The version offered is not newer than the one that the server holds."""


class TransferError(PushError):
    """Bytes did not arrive whole: connection lost, deadline passed, or the digest of a bucket differs.

    `ranks`: those of the data plane that are known to be the cause, from 0, the first rank of the first server.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        self.ranks = ranks
        super().__init__(message)


class ReceiveError(TransferError):
    """A server failed by itself while it took the bytes in; the message is its own."""


class CommitError(PushError):
    """A server failed while it committed. It is fenced unless the message says that nothing was touched."""


class ServerFencedError(Fp8SyncError):
    """A request to an engine of this process met weights that must not be served; the next full push heals that."""


class VersionMismatchError(Fp8SyncError, ValueError):
    """Another version is served than a request demands: try again later. Over HTTP this is status 409."""

    status_code = 409  # where SGLang's routes turn a ValueError into a reply or an event of a stream


_BY_NAME: dict[str, type[Fp8SyncError]] = {
    cls.__name__: cls
    for cls in (
        ConfigError,
        IncompatibleServerError,
        PushError,
        PlanError,
        NonFiniteWeightError,
        RankMissingError,
        ServerUnreachableError,
        UnauthorizedError,
        ServerBusyError,
        StillComingError,
        SessionLostError,
        StaleVersionError,
        TransferError,
        ReceiveError,
        CommitError,
        ServerFencedError,
        VersionMismatchError,
    )
}


def error_from_wire(kind: str, message: str, problems: tuple[str, ...] = ()) -> Fp8SyncError:
    """The error of class `kind` that a peer reported; an unknown class becomes a `PushError` that names it."""
    cls = _BY_NAME.get(kind)
    if cls is PlanError:
        return PlanError(message, problems)
    if cls is NonFiniteWeightError:
        return NonFiniteWeightError(problems)
    if cls is None:
        return PushError(f"{kind}: {message}")
    return cls(message)
