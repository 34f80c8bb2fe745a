"""The receiver of one server rank: one state machine, driven by control messages, safe at every step.

    SERVING(v) --Begin--> RECEIVING --Verify--> STAGED (--Prepare--> PROMISED) --Commit--> SERVING(v+1)
         ^                   |                    |
         +------- Abort, lost connection, expired lease      failed while copying, promise not kept --> FENCED
                                                             FENCED --full push--> SERVING

Requests are served with the old weights up to the commit, or wait for it where a push arrives in memory that they use.
Nothing but `_commit` writes to live parameters, after every rank has every byte in its staging memory; a server that
stages in place (`receiver_plugin.rooms`) is fenced where a transfer has written something and ends without its commit,
or may have, because trainer ranks write there themselves.

`handle` runs on the scheduler's thread, between two batches, on all ranks with the same message; that is what makes
the collectives of `ranks` safe. Bytes arrive on the thread of the session (`receiver_plugin.session`).

Each push is preceded by a look at the model, which takes milliseconds. Where the scheduler idles it is taken then
(`idle`), and holds until anything else runs on that thread (`busy`).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from receiver_plugin.binding import BindingPlan
from receiver_plugin.engine_protocol import Engine
from receiver_plugin.manifest import plan_offer
from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import Ranks, RanksLostError, collect, gather, to_wire
from receiver_plugin.rooms import WAYS, Need
from receiver_plugin.session import Session, Transfer
from receiver_plugin.sessions import Sessions
from receiver_plugin.staging import Staging
from shared import protocol as wire
from shared.buckets import make_layout
from shared.errors import (
    CommitError,
    Fp8SyncError,
    IncompatibleServerError,
    PushError,
    ServerBusyError,
    SessionLostError,
    StaleVersionError,
    StillComingError,
)
from shared.place import place_of
from shared.planes import ReceiveHalf, open_receiver
from shared.planes.several import open_receivers

logger = logging.getLogger(__name__)

_LAST_BUCKET_S = 0.01  # from the sender to its place in the staging
_CALM_S = 0.02  # without a request, until an idle server looks at its model
_LOOK_EVERY_S = 0.25  # at most, between pushes: a look takes milliseconds, for which a request may have to wait


class Receiver:
    """One per rank and model. `fence` is why the start-up weights must not be served, or None.

    `make_staging` and `join` are a test's way to put faults on the staging and on the data plane of one rank.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        ranks: Ranks,
        fence: str | None = None,
        *,
        make_staging: Callable[..., Staging] = Staging,
        join: Callable[[wire.Rendezvous, int], ReceiveHalf] = open_receiver,
    ) -> None:
        self._model, self._engine, self._ranks = model, engine, ranks
        self._make_staging, self._join = make_staging, join
        self._incarnation = ranks.gather(uuid.uuid4().hex)[0]
        self._places = tuple(ranks.gather(place_of(next(model.parameters()).device)))
        self._fence = next((reason for reason in ranks.gather(fence) if reason), None)
        self._version, self._nothing_to_keep = 0, False
        self._manifest: tuple[wire.ManifestTensor, ...] | None = None
        self._plan: BindingPlan | None = None
        self._sessions = Sessions(ranks, engine.memory, engine.synchronize)
        self._planned_for = ""  # what the session's plan was made for, as `Engine.info` has it
        self._calm = False  # the model was found to be as it was planned for, and nothing has run since
        self._busy_at = self._looked_at = 0.0
        self._looked_for: int | None = None  # the version that was on its way, at the last look beside one
        self._looks_help = True  # no idle look has failed since the last message
        self._handlers: dict[type, Callable[[Any], dict[str, Any]]] = {
            wire.Describe: self._describe,
            wire.Offer: self._offer,
            wire.Open: self._open,
            wire.Begin: self._begin,
            wire.Verify: self._verify,
            wire.Prepare: self._prepare,
            wire.Hold: self._prepare,
            wire.Commit: self._commit,
            wire.Release: self._release,
            wire.Abort: self._abort,
            wire.Close: self._close,
            wire.Probe: self._probe,
        }

    @property
    def _session(self) -> Session | None:
        return self._sessions.current

    @property
    def has_session(self) -> bool:
        """Whether a sender may push."""
        return self._session is not None

    @property
    def is_receiving(self) -> bool:
        """Whether bytes are on their way, which a thread of this process takes in."""
        transfer = self._session.transfer if self._session else None
        return transfer is not None and not transfer.done.is_set()

    @property
    def fence(self) -> str | None:
        """Why requests must be refused, or None."""
        return self._fence

    @property
    def lacks_memory(self) -> bool:
        """Whether memory that requests use is released just now."""
        return bool(self._engine.memory.released)

    @property
    def state(self) -> wire.ServerState:
        transfer = self._session.transfer if self._session else None
        if transfer is not None:
            return "PROMISED" if transfer.promised else "STAGED" if transfer.verified else "RECEIVING"
        return "FENCED" if self._fence else "SERVING"

    def busy(self) -> None:
        """To be called after everything that runs on this thread and may change the model, messages included."""
        self._calm, self._busy_at = False, time.monotonic()

    def idle(self) -> None:
        """To be called again and again while nothing does: looks at the model, so that the next message need not.

        Once while bytes of a push arrive, and between pushes when nothing has run for a little while. What speaks
        against a push is told by the message that comes next, which looks again; until then no idle look does.
        """
        session, now = self._session, time.monotonic()
        if self._calm or session is None or session.lost is not None or not self._looks_help:
            return
        if self.is_receiving:
            version = session.transfer.version if session.transfer is not None else None
            if version == self._looked_for:
                return
            self._looked_for = version
        elif now < max(self._busy_at + _CALM_S, self._looked_at + _LOOK_EVERY_S):
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._check_safe()
                self._check_incarnation(self._planned_for)
            self._calm = True
        except Exception as error:  # it would end the server
            self._looks_help = False
            logger.warning("fp8sync: found between two messages, and told to the next push if it lasts: %s", error)
        self._looked_at = time.monotonic()

    def handle(self, message: Any) -> wire.Reply:
        """Answer one control message. Never raises: an error becomes part of the reply."""
        try:
            self._fence_if(self._sessions.give_up_dead())
            with torch.inference_mode(False), torch.no_grad():
                return self._reply(**self._handlers[type(message)](message))
        except Fp8SyncError as error:
            if self._ranks.index == 0:
                logger.warning("fp8sync: %s refused: %s", message.kind, str(error))  # its frames hold the staging
            return self._reply(error=to_wire(error))
        except RanksLostError as error:  # one of them may have copied, or be dead
            logger.exception("fp8sync: %s failed", message.kind)
            self._fence_for(str(error))
            return self._reply(error=to_wire(CommitError(f"the server is fenced: {error}")))
        except Exception as error:  # an escaping exception would end the server: SGLang does not catch it
            logger.exception("fp8sync: %s failed", message.kind)
            return self._reply(error=to_wire(PushError(f"{message.kind} failed: {type(error).__name__}: {error}")))
        finally:
            self._looks_help = True
            self.busy()

    def _reply(self, **fields: Any) -> wire.Reply:
        # Nothing may run beside such a push, nor without weights, KV cache or CUDA graphs.
        fields["exclusive"] = self._sessions.exclusive or self.lacks_memory
        return wire.Reply(state=self.state, version=self._version, fence=self._fence, **fields)

    # Once

    def _describe(self, message: wire.Describe) -> dict[str, Any]:
        return {"info": self._engine.info(self._incarnation).model_copy(update={"places": self._places})}

    def _offer(self, message: wire.Offer) -> dict[str, Any]:
        collect(self._ranks, self._check_safe)
        derived = self._engine.derived
        self._manifest, self._plan = plan_offer(self._model, message.tensors, message.config, self._ranks, derived)
        plan = self._plan
        found = collect(self._ranks, lambda: list(self._sessions.obstacles(Need.to_land(self._model, plan))))
        return {"manifest": self._manifest, "lands": tuple(way for way in WAYS if not any(way in had for had in found))}

    def _check_safe(self) -> None:
        if reasons := self._engine.unsafe():
            raise IncompatibleServerError("in-place binding would be wrong: " + "; ".join(reasons))

    def _open(self, message: wire.Open) -> dict[str, Any]:
        def look() -> None:
            self._check_incarnation(message.incarnation)
            self._check_safe()  # to plan has touched the model: what is known of it is found anew, before a push

        collect(self._ranks, look)
        self._fence_if(self._sessions.make_way(message))
        manifest, plan = self._manifest, self._plan
        if manifest is None or plan is None:
            raise SessionLostError("this server has no plan of yours: offer first")
        layout = make_layout(manifest, message.bucket_bytes)
        if layout.plan_hash != message.plan_hash:
            raise SessionLostError("another sender's plan took the place of yours: offer again")
        self._sessions.close()
        self._planned_for = message.incarnation
        rank, num_senders = message.first_rank + self._ranks.index, len(message.rendezvous)
        session = self._sessions.open(
            message,
            layout,
            Need.of(self._model, plan, layout, message.plane == "same_host", num_senders, message.slices),
            lambda room: self._make_staging(self._model, plan, layout, room),
            lambda: open_receivers(message.rendezvous, rank, len(layout.buckets), self._join),
            lambda: self._nothing_to_keep,
        )
        return {"plan_hash": layout.plan_hash, "staging": session.way}

    # Every push

    def _begin(self, message: wire.Begin) -> dict[str, Any]:
        session = self._sessions.of(message.session)
        if session.exclusive and message.shut is None:
            raise CommitError(f"its staging is {session.way}, so that its door must be shut first; nothing was touched")
        self._prepare_to_begin(session, message.version, idle=True, look=session.exclusive)
        try:
            collect(self._ranks, lambda: self._make_room(session, looked=session.exclusive))
        except Fp8SyncError:
            session.give_room_back()
            raise
        try:
            collect(self._ranks, lambda: session.begin(message.version, message.deadline_s))
        except Fp8SyncError as error:
            self._fence_if(self._sessions.give_up(str(error)))
            raise
        return {"staging": session.staging.room.way}

    def _prepare_to_begin(self, session: Session, version: int, idle: bool, look: bool) -> None:
        """`look`: at the layers; where nothing is touched before the commit, that does."""
        again = self._fence is not None and version == self._version > 0  # it served that and fell out of it
        if version <= self._version and not again:
            served = f"version {version} is not newer than {self._version}, which is served"
            raise StaleVersionError(f"{served}: give a larger one, or none, and the sender takes the next")
        if session.transfer is not None:
            raise ServerBusyError(f"version {session.transfer.version} is still on its way")

        def check() -> None:
            if not self._calm:
                if look:
                    self._check_safe()
                self._check_incarnation(self._planned_for)
            if idle and session.exclusive and not self._engine.flush_cache():
                raise ServerBusyError("requests are still running; nothing was touched")

        collect(self._ranks, check)

    def _make_room(self, session: Session, looked: bool) -> None:
        if session.exclusive:
            self._engine.synchronize()  # forward passes that use the memory
        session.make_room()
        if session.exclusive:
            self._engine.synchronize()  # the zeroing of what was lent, before another stream writes there
        if moved := self._moved(session, looked):
            raise SessionLostError(f"{moved} moved in memory since the plan was made: push again")

    def _verify(self, message: wire.Verify) -> dict[str, Any]:
        transfer = self._sessions.of(message.session).transfer_of(message.version)
        if not all(gather(self._ranks, transfer.done.is_set())):
            return {}  # still RECEIVING: the sender asks again
        collect(self._ranks, lambda: transfer.verify(message.digests))
        transfer.verified = True  # STAGED is a word about all ranks
        return {}

    def _prepare(self, message: wire.Prepare | wire.Hold) -> dict[str, Any]:
        session = self._sessions.of(message.session)
        idle = message.idle if isinstance(message, wire.Prepare) else True
        if isinstance(message, wire.Prepare) and message.before == "begin":
            self._prepare_to_begin(session, message.version, idle, look=not idle)  # Begin looks, with the door shut
            return {}
        transfer = session.transfer_of(message.version)
        self._check_staged(transfer)
        collect(self._ranks, lambda: self._ready_to_commit(session, message.in_flight, idle))
        if message.promise:
            transfer.promise(message.hold_s)
        else:
            transfer.hold(message.hold_s)  # between its word and the commit, no deadline passes on one alone
        return {}

    def _release(self, message: wire.Release) -> dict[str, Any]:
        """Requests come again: a transfer that uses what they use is over, if it was not committed."""
        session = self._sessions.of(message.session)
        if session.exclusive and session.transfer is not None and session.transfer.version == message.version:
            self._fence_if(self._sessions.give_up("its door was opened before its commit"))
        return {}

    def _commit(self, message: wire.Commit) -> dict[str, Any]:
        session = self._sessions.of(message.session)
        transfer = session.transfer_of(message.version)
        digests = None if transfer.verified else message.digests

        def arrived() -> bool:
            self._ready_to_commit(session, message.in_flight, idle=True)
            if digests is None:
                return True
            if there := transfer.done.wait(_LAST_BUCKET_S):  # the last bucket may have come meanwhile
                transfer.verify(digests)
            return there

        if not all(collect(self._ranks, arrived)):
            raise StillComingError(f"version {message.version} is still on its way; nothing was touched")
        transfer.verified |= digests is not None
        self._check_staged(transfer)
        self._fence = f"version {message.version} was copied in part only"  # until every rank says otherwise
        try:
            if message.in_flight == "keep":
                cache = f"{self._incarnation}/{message.version}"
                collect(self._ranks, lambda: self._engine.renew_cache(cache))
            collect(self._ranks, lambda: self._copy(session))
            collect(self._ranks, lambda: self._engine.publish(message.version))
            self._sessions.end_transfer("committed")
        except Exception as error:
            self._fence = f"{self._fence}: {error}"
            self._sessions.give_up(self._fence)
            self._engine.end_requests()
            raise CommitError(f"the server is fenced: {self._fence}") from error
        self._version, self._fence, self._nothing_to_keep = message.version, None, False
        return {}

    def _check_staged(self, transfer: Transfer) -> None:
        if not transfer.verified:
            raise CommitError(f"version {transfer.version} is not staged; nothing was touched")

    def _ready_to_commit(self, session: Session, in_flight: wire.InFlight, idle: bool) -> None:
        if not self._calm:
            self._check_safe()
            self._check_incarnation(self._planned_for)
        if moved := self._moved(session, looked=True):
            raise CommitError(f"{moved} moved in memory since the push began; nothing was touched")
        if in_flight == "keep":
            if session.exclusive:
                raise CommitError(f"its staging is {session.way}, beside which no request can go on")
            if reasons := self._engine.cannot_keep():
                raise IncompatibleServerError(f"no request can go on here: {'; '.join(reasons)}; nothing was touched")
        elif idle and not self._engine.flush_cache():
            raise ServerBusyError("requests are still running; nothing was touched")

    def _copy(self, session: Session) -> None:
        staging = session.staging
        self._engine.synchronize()
        with torch.inference_mode():
            staging.commit()
            self._engine.derived.refresh(staging.plan.calls)
        self._engine.synchronize()

    def _abort(self, message: wire.Abort) -> dict[str, Any]:
        transfer = self._sessions.of(message.session).transfer
        if transfer is None or transfer.version != message.version:
            return {}
        logger.warning("fp8sync: version %d aborted by the sender: %s", message.version, message.reason)
        if not message.fence:
            transfer.promised = False  # by the one that it was given to
        self._fence_if(self._sessions.give_up(f"aborted by the sender: {message.reason}"))
        return {}

    # At the end

    def _close(self, message: wire.Close) -> dict[str, Any]:
        if self._session is not None and self._session.id == message.session:
            self._fence_if(self._sessions.give_up("the session was closed"))
            self._sessions.close()
        return {}

    def _probe(self, message: wire.Probe) -> dict[str, Any]:
        return {"probe": tuple(collect(self._ranks, lambda: fingerprint(self._model)))}

    # From outside

    def memory_leaves(self, tags: Collection[str]) -> None:
        """Memory of the engine is about to be released: `weights`, `kv_cache`. Nothing may write there any more."""
        self.busy()  # a message may follow in the same turn
        try:
            self._fence_if(self._sessions.give_up_memory(tags))
        except RanksLostError as error:
            self._fence_for(str(error))

    def weights_changed(self, by: str) -> None:
        """Another route wrote to the parameters: what is staged is void, and what is served is no version of ours."""
        self.busy()
        logger.warning("fp8sync: fenced, the weights were changed by %s", by)
        self._fence_for(f"its weights were changed by {by}")

    def weights_lost(self) -> None:
        """Their memory was released, and what it holds when it comes back is undefined: the next push has nothing to
        keep, and goes straight into it where it would be staged in memory that is lent.
        """
        self._nothing_to_keep = True
        self.weights_changed(wire.MEMORY_RELEASED)

    # Helpers

    def _fence_if(self, reason: str | None) -> None:
        self._fence = reason or self._fence

    def _fence_for(self, reason: str) -> None:
        self._fence = reason
        if self._session is not None:
            self._session.end_transfer(reason)  # of this rank alone: its others may be gone

    def _moved(self, session: Session, looked: bool) -> str | None:
        """A parameter that lies elsewhere than when the plan was made. `looked`: at what the model is made of, with
        this message; as long as that is what it was when nothing had moved, nothing has."""
        if not looked and not self._calm:
            return session.staging.check_addresses()
        makeup = self._engine.makeup
        if makeup is None or makeup is not session.looked_at:
            session.looked_at = None
            if moved := session.staging.check_addresses():
                return moved
            session.looked_at = makeup
        return None

    def _check_incarnation(self, incarnation: str) -> None:
        if incarnation != self._engine.info(self._incarnation).incarnation:
            what = "its experts were moved" if incarnation.startswith(self._incarnation) else "the server restarted"
            raise SessionLostError(f"{what} since this sender planned; nothing was touched: push again")
