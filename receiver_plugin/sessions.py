"""The one session that a rank has at a time, and how its transfers end: on all ranks of the server alike.

A transfer that ends without its commit leaves what is served as it is. Where a server stages in place that is so only
as long as no rank has written anything; else `give_up` says why the server must be fenced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

import torch

from receiver_plugin.ranks import Ranks, collect, gather
from receiver_plugin.rooms import Memory, Need, choose, enter, free_of, obstacles
from receiver_plugin.session import Session
from receiver_plugin.staging import Staging
from shared import digest
from shared import protocol as wire
from shared.buckets import Layout
from shared.errors import Fp8SyncError, ServerBusyError, SessionLostError
from shared.planes import ReceiveHalf
from shared.protocol import StagingWay

logger = logging.getLogger(__name__)

# Memory of the engine, by its own tags, without which a transfer under way cannot go on.
_USES: dict[StagingWay, set[str]] = {"reserved": set(), "kv_pool": {"kv_cache", "weights"}, "in_place": {"weights"}}


_LINGER_S = 2.0  # a sender that died may still have a copy under way on its GPU


class Sessions:
    """`synchronize` returns when the device has done what was asked of it."""

    def __init__(self, ranks: Ranks, memory: Memory, synchronize: Callable[[], None]) -> None:
        self._ranks, self._memory, self._synchronize = ranks, memory, synchronize
        self.current: Session | None = None
        self._closed: list[Session] = []  # those that may still receive into reserved memory
        self._lost: dict[str, str] = {}  # the last session that was given up, and why

    @property
    def exclusive(self) -> bool:
        """Whether a transfer is under way that no request may run beside."""
        session = self.current
        return session is not None and session.transfer is not None and session.exclusive

    def of(self, session: str) -> Session:
        """Raises: SessionLostError: another one took its place."""
        if self.current is None or self.current.id != session:
            if session in self._lost:
                raise SessionLostError(f"this server let go of the session: {self._lost[session]}: push again")
            holder = f"sender {self.current.sender}" if self.current else "another sender"
            raise SessionLostError(f"{holder} took over since this one planned: push again to take it back")
        return self.current

    def open(
        self,
        message: wire.Open,
        layout: Layout,
        need: Need,
        make_staging: Callable[..., Staging],
        join: Callable[[], ReceiveHalf],
        nothing_to_keep: Callable[[], bool] = lambda: False,
    ) -> Session:
        """A new session; `make_staging(room)`. `nothing_to_keep`: whether live parameters hold no version, so that
        lent memory is better left alone: they are written directly.

        Raises: PlanError: no memory on some rank; there is no session then.
        """
        patience_s = _LINGER_S if message.staging in ("auto", "reserved") else 0.0
        collect(self._ranks, self._check_quiet)
        found = collect(self._ranks, lambda: obstacles(need, self._memory, message.staging, self._free(patience_s)))
        way = choose(message.staging, found)

        def stage(left: Staging | None) -> Staging:
            direct = way == "kv_pool" and message.staging == "auto" and nothing_to_keep()
            room = enter("in_place" if direct else way, need, self._memory, self._free())
            same = left is not None and left.room.way == room.way
            return left if left is not None and same and left.enter(room) else make_staging(room)

        def join_warm() -> ReceiveHalf:
            digest.warm(message.secret, need.device)  # the first push is like the others
            return join()

        def start() -> None:
            self.current = Session(message, layout, way, stage, join_warm, need.device)

        try:
            collect(self._ranks, start)
        except Fp8SyncError:
            self.close()  # on the ranks where it succeeded, so that all ranks hold the same
            raise
        assert self.current is not None
        return self.current

    def obstacles(self, need: Need) -> dict[StagingWay, str]:
        """Of a session for `need`, were it opened now, and did not wait for earlier ones: `rooms.obstacles`."""
        return obstacles(need, self._memory, "auto", self._free())

    def _check_quiet(self) -> None:
        """Raises: ServerBusyError: trainer ranks of an earlier session may still write to live parameters."""
        end = time.monotonic() + _LINGER_S
        for session in self._closed:
            if session.writes_live and session.lingers_for(end - time.monotonic()):
                raise ServerBusyError(
                    f"sender {session.sender} may still write to its parameters: it has to go on, or end"
                )

    def _free(self, patience_s: float = 0.0) -> torch.Tensor | None:
        """What no earlier session may write to of the reserved memory; those that are about to end are waited for."""
        end, reserved = time.monotonic() + patience_s, self._memory.reserved
        self._closed = [session for session in self._closed if session.lingers_for(0.0)]
        for session in self._closed if reserved is not None else ():
            if free_of(self._memory, [session.writes_from or 0]) is not reserved:
                session.lingers_for(end - time.monotonic())
        free = free_of(self._memory, [session.writes_from or 0 for session in self._closed if session.lingers])
        if patience_s and free is not reserved:
            logger.warning("fp8sync: an earlier sender may still write to reserved memory: less of it is used")
        return free

    def make_way(self, message: wire.Open) -> str | None:
        """End the push of a sender that is gone, or begins anew: a promise waits for nothing else but its deadline.

        Raises: ServerBusyError: a push is under way.
        """
        session = self.current
        if session is None or session.transfer is None:
            return None
        again = session.sender == message.sender and session.id != message.session
        if not again and not any(gather(self._ranks, session.lost is not None)):
            raise ServerBusyError(f"sender {session.sender} is in the middle of a push")
        return self.give_up("its sender opened another session" if again else "its sender is gone")

    def close(self) -> None:
        """End the session, which has no transfer."""
        if self.current is not None:
            self.current.close()
            self._closed.append(self.current)
            self.current = None

    # How transfers end; what they return is why the server must be fenced, None if it need not

    def give_up(self, why: str, own_fault: bool = False) -> str | None:
        """End the transfer under way, if there is one, on all ranks at once. `own_fault`: of a rank of this server."""
        session = self.current
        if session is None or session.transfer is None:
            return None
        version = session.transfer.version
        fence = f"it promised version {version}: {why}" if session.transfer.promised else None
        try:
            if any(self.end_transfer(why, own_fault)):
                fence = f"version {version} was written in part only: {why}"
        except Fp8SyncError as error:
            fence = f"the memory that version {version} was lent was not given back whole: {error}"
        if fence is not None:
            session.ended = f"the server is fenced: {fence}"
        return fence

    def end_transfer(self, why: str, own_fault: bool = False) -> list[bool]:
        """Of each rank, whether it has written to live parameters. Raises: PushError: something was not given back."""
        session = self.current
        assert session is not None

        def end() -> bool:
            touched = session.end_transfer(why, own_fault)
            if session.exclusive:
                self._synchronize()
            return touched

        return collect(self._ranks, end) if session.exclusive else [end()]

    def give_up_dead(self) -> str | None:
        """A sender that died holds nothing: its stage is void, on all ranks alike, once its connection broke or its
        deadline passed on one of them. A promise outlives the connection: the commit comes another way.

        All ranks take part, with a session or without one, and go by what all of them said.
        """
        session = self.current
        transfer = session.transfer if session is not None else None
        mine = (None, False) if transfer is None else (transfer.dead(), transfer.own_fault)
        where = (session.id if session is not None else None, transfer.version if transfer is not None else None)
        found = gather(self._ranks, (where, *mine, session.lost if session is not None else None))
        if any(other != where for other, *_ in found):
            return self._end_out_of_step()
        if session is None:
            return None
        own = [why for _, why, own_fault, _ in found if own_fault]
        late = next((why for why in (*own, *(why for _, why, _, _ in found)) if why is not None), None)
        lost = next((why for *_, why in found if why is not None), None)
        if transfer is None:
            if lost is not None:
                self.close()
                self._lost = {session.id: lost}
            return None
        reason = late if transfer.promised else late or lost
        if reason is None:
            return None
        logger.warning("fp8sync: version %d is given up: %s", transfer.version, reason)
        return self.give_up(reason, own_fault=bool(own))

    def _end_out_of_step(self) -> str:
        """On every rank by itself: no step that all of them take could be trusted to be the same one."""
        why = "its ranks are out of step with each other"
        if self.current is not None:
            self._lost = {self.current.id: f"the server is fenced: {why}"}
            self.current.end_transfer(why)
            self.close()
        return why

    def give_up_memory(self, tags: Collection[str]) -> str | None:
        """Memory of the engine is about to be released: nothing may write there any more."""
        if self.current is None or not _USES[self.current.way] & set(tags):
            return None
        return self.give_up("memory that it needs was released")
