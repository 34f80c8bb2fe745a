"""The commit of a push on several servers: on all of them or on none; who cannot keep up with the others is fenced.

    STAGED on all     Prepare: each promises to commit, or to be fenced, unless it hears Abort   (strict: Hold)
    all promised      decided, once, here: these servers take part
    the decision      Commit; who fails it beside one that has committed is told to fence itself
    nobody told it    a promise that hears nothing until its deadline fences its server

So no server goes on with the old version beside one with the new one, whoever dies when. A single server needs no
promise. If no server has committed, and none may have, all go back to what they served.
"""

from __future__ import annotations

import logging
import time

from sender.doors import Doors
from sender.servers import Failed, Servers
from shared import protocol as wire
from shared.errors import CommitError, ServerUnreachableError

logger = logging.getLogger(__name__)

_TO_DECIDE_S = 10.0  # between the last promise and the moment when every server has its commit


class Transaction:
    """One push, from STAGED on. `decided`: whether a server has committed, or may have."""

    def __init__(
        self,
        servers: Servers,
        doors: Doors,
        session: str,
        version: int,
        timeout_s: float,
        in_flight: wire.InFlight,
        strict: bool,
    ) -> None:
        self._servers, self._doors, self._session, self._version = servers, doors, session, version
        self._timeout_s, self._in_flight, self._strict = timeout_s, in_flight, strict
        self.decided = False

    def commit(self, digests: tuple[int, ...] | None = None) -> float:
        """Publish; the seconds between the first and the last server that said so, as seen from here.

        `digests`: of all buckets, for a single server that was not asked yet whether it is STAGED.

        Raises: CommitError: names the servers that committed and those that did not.
        """
        left_out = self._promise()
        alone = len(self._servers) == 1 and self._doors.shut <= set(self._servers.names)
        opens = alone and not self._strict  # which others would be waited for
        skew_s = self._publish(digests, opens)
        # Not where it failed: there `Abort` goes first, because a door that opens before it breaks a promise.
        if opens:  # and has
            self._doors.opened()
        else:
            self._doors.release(self._session, self._version)
        self._servers.tell(self.abort("left out", fence=False), left_out, insist=True)  # a promise may stand there
        return skew_s

    def _promise(self) -> Failed:
        """With a quorum, servers that cannot promise are left out, and returned: nothing is decided yet."""
        several, failed = len(self._servers) > 1, Failed()
        to_hold = [name for name in self._servers.names if self._strict and name not in self._doors.shut]
        if to_hold:
            failed |= self._doors.hold(to_hold, self._session, self._version, promise=several)
        others = [name for name in self._servers.names if name not in to_hold]
        if several and others:
            promise = wire.Prepare(
                session=self._session,
                version=self._version,
                hold_s=self._servers.answer_s + min(self._servers.answer_s, _TO_DECIDE_S),
                in_flight=self._in_flight,
                idle=False,
                promise=True,
            )
            failed |= self._servers.try_each(promise, self._servers.answer_s, names=others)[1]
        if failed:
            self._servers.go_on_without(failed)
            self._servers.tell(self.abort("left out of this push"), failed)
        logger.debug("fp8sync: decided: %s take version %d", self._servers.names, self._version)
        return failed

    def _publish(self, digests: tuple[int, ...] | None, opens: bool) -> float:
        """`opens`: the commit opens the door of the only server."""
        commit = wire.Commit(
            session=self._session,
            version=self._version,
            drain_s=self._timeout_s,
            in_flight=self._in_flight,
            digests=digests,
        )
        shut = self._doors.shut
        commits = [
            commit.model_copy(update={"held": name in shut, "opens": name in shut and opens})
            for name in self._servers.names
        ]
        self.decided = True  # whatever interrupts this from here on: some may have committed
        asked, answered = time.monotonic(), dict[str, float]()
        _, failed = self._servers.try_each(commits, self._doors.drained_s, answered)
        if self._in_flight != "keep":
            self._doors.stood_still_s = {name: at - asked for name, at in answered.items()}
        if len(self._servers) == 1 and failed:
            raise next(iter(failed.values()))  # nobody is asked again
        if failed:
            self._sort_out(dict(failed))
        return max(answered.values()) - min(answered.values())

    def _sort_out(self, failed: Failed) -> None:
        """Not all have confirmed. Returns if all have committed after all, or a quorum has.

        Those that were silent may have committed, or be about to. They are asked by an Abort that fences, which a
        server that has committed ignores.
        """
        silent = [name for name, error in failed.items() if isinstance(error, ServerUnreachableError)]
        replies, unheard = self._servers.try_each(
            self.abort("it did not confirm its commit"), self._servers.answer_s, names=silent
        )
        for name, reply in replies.items():
            if reply.version == self._version and reply.fence is None:
                del failed[name]  # its answer was lost, and not its commit
            elif reply.fence is not None:
                failed[name] = CommitError(f"{name}: the server is fenced: {reply.fence}")
        if not failed:
            return
        done = [name for name in self._servers.names if name not in failed]
        self.decided = bool(done or unheard)
        if not self.decided:
            raise CommitError(f"version {self._version} is served by no server: {failed}")
        self._servers.tell(self.abort("it did not confirm its commit"), failed)
        if self._servers.quorum is not None and len(done) >= self._servers.quorum:
            self._servers.go_on_without(failed)
            return
        raise CommitError(
            f"version {self._version} is served by {done or 'no server'} but not by these, which are fenced, or "
            f"will be when their promise runs out, if they hear nothing: {failed}"
        )

    def abort(self, reason: str, fence: bool | None = None) -> wire.Abort:
        """What ends the push on a server that has not committed; it fences one that promised, if that is `decided`."""
        fence = self.decided if fence is None else fence
        return wire.Abort(session=self._session, version=self._version, reason=reason[:500], fence=fence)
