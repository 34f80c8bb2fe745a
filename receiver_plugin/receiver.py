"""The receiver of one server rank: one state machine, driven by control messages, safe at every step.

    SERVING(v) --Begin--> RECEIVING --Verify--> STAGED (--Prepare--> PROMISED) --Commit--> SERVING(v+1)
         ^                   |                    |
         +------- Abort, lost connection, expired lease      failed while copying, promise not kept --> FENCED
                                                             FENCED --full push--> SERVING

Requests are served with the old weights up to the commit. Nothing but `_commit` writes to live parameters, and it does
so only after every rank has every byte, with the sender's digests, in its staging image.

`handle` runs on the scheduler's thread, between two batches, on all ranks with the same message; that is what makes
the collectives of `ranks` safe. Bytes arrive on the thread of the session (`receiver_plugin.session`).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from receiver_plugin.binding import BindingPlan, Derived
from receiver_plugin.manifest import plan_offer
from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import Ranks, RanksLostError, collect, gather, to_wire
from receiver_plugin.session import Session
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
)
from shared.planes import ReceiveHalf, open_receiver

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What the receiver asks of the engine around it; SGLang's is in `sglang_engine`."""

    derived: Derived

    def info(self, incarnation: str) -> wire.ServerInfo:
        """`incarnation` comes back with whatever else a plan depends on, such as where the experts lie."""

    def unsafe(self) -> list[str]:
        """Why raw copies into the live parameters would be wrong just now; empty if they are right."""

    def flush_cache(self) -> bool:
        """Forget the KV cache of the old weights. False, and nothing done, while requests run."""

    def synchronize(self) -> None:
        """Return when the device has finished all forward passes that read the parameters."""

    def publish(self, version: int) -> None:
        """From here on replies carry `version`."""


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
        self._fence = next((reason for reason in ranks.gather(fence) if reason), None)
        self._version = 0
        self._manifest: tuple[wire.ManifestTensor, ...] | None = None
        self._plan: BindingPlan | None = None
        self._session: Session | None = None
        self._lost: dict[str, str] = {}  # the last session that was given up, and why
        self._planned_for = ""  # what the session's plan was made for, as `Engine.info` has it
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
    def state(self) -> wire.ServerState:
        transfer = self._session.transfer if self._session else None
        if transfer is not None:
            return "PROMISED" if transfer.promised else "STAGED" if transfer.verified else "RECEIVING"
        return "FENCED" if self._fence else "SERVING"

    def handle(self, message: Any) -> wire.Reply:
        """Answer one control message. Never raises: an error becomes part of the reply."""
        try:
            self._drop_what_is_dead()
            with torch.inference_mode(False), torch.no_grad():
                return self._reply(**self._handlers[type(message)](message))
        except Fp8SyncError as error:
            if self._ranks.index == 0:
                logger.warning("fp8sync: %s refused: %s", message.kind, error)
            return self._reply(error=to_wire(error))
        except RanksLostError as error:  # one of them may have copied, or be dead
            logger.exception("fp8sync: %s failed", message.kind)
            self._fence_for(str(error))
            return self._reply(error=to_wire(CommitError(f"the server is fenced: {error}")))
        except Exception as error:  # an escaping exception would end the server: SGLang does not catch it
            logger.exception("fp8sync: %s failed", message.kind)
            return self._reply(error=to_wire(PushError(f"{message.kind} failed: {type(error).__name__}: {error}")))

    def _reply(self, **fields: Any) -> wire.Reply:
        return wire.Reply(state=self.state, version=self._version, fence=self._fence, **fields)

    # Once

    def _describe(self, message: wire.Describe) -> dict[str, Any]:
        return {"info": self._engine.info(self._incarnation)}

    def _offer(self, message: wire.Offer) -> dict[str, Any]:
        collect(self._ranks, self._check_safe)
        derived = self._engine.derived
        self._manifest, self._plan = plan_offer(self._model, message.tensors, message.config, self._ranks, derived)
        return {"manifest": self._manifest}

    def _check_safe(self) -> None:
        if reasons := self._engine.unsafe():
            raise IncompatibleServerError("in-place binding would be wrong: " + "; ".join(reasons))

    def _open(self, message: wire.Open) -> dict[str, Any]:
        collect(self._ranks, lambda: self._check_incarnation(message.incarnation))
        if self._session is not None and self._session.transfer is not None:
            raise ServerBusyError(f"sender {self._session.sender} is in the middle of a push")
        manifest, plan = self._manifest, self._plan
        if manifest is None or plan is None:
            raise SessionLostError("this server has no plan of yours: offer first")
        layout = make_layout(manifest, message.bucket_bytes)
        if layout.plan_hash != message.plan_hash:
            raise SessionLostError("another sender's plan took the place of yours: offer again")
        self._end_session()
        self._planned_for = message.incarnation

        def start() -> None:
            staging = self._make_staging(self._model, plan, layout)
            rank = message.rendezvous.first_rank + self._ranks.index
            self._session = Session(message, layout, staging, lambda: self._join(message.rendezvous, rank))

        try:
            collect(self._ranks, start)
        except Fp8SyncError:
            self._end_session()  # on the ranks where it succeeded, so that all ranks hold the same
            raise
        return {"plan_hash": layout.plan_hash}

    # Every push

    def _begin(self, message: wire.Begin) -> dict[str, Any]:
        session = self._session_of(message.session)
        again = self._fence is not None and message.version == self._version > 0  # it served that and fell out of it
        if message.version <= self._version and not again:
            raise StaleVersionError(f"version {message.version} is not newer than {self._version}, which is served")
        if session.transfer is not None:
            raise ServerBusyError(f"version {session.transfer.version} is still on its way")

        def check() -> None:
            self._check_safe()
            self._check_incarnation(self._planned_for)
            if moved := session.staging.check_addresses():
                raise SessionLostError(f"{moved} moved in memory since the plan was made: push again")

        collect(self._ranks, check)
        session.begin(message.version, message.deadline_s)
        return {}

    def _verify(self, message: wire.Verify) -> dict[str, Any]:
        transfer = self._session_of(message.session).transfer_of(message.version)
        if not all(gather(self._ranks, transfer.done.is_set())):
            return {}  # still RECEIVING: the sender asks again
        collect(self._ranks, lambda: transfer.verify(message.digests))
        transfer.verified = True  # STAGED is a word about all ranks
        return {}

    def _prepare(self, message: wire.Prepare | wire.Hold | wire.Commit) -> dict[str, Any]:
        session = self._session_of(message.session)
        transfer = session.transfer_of(message.version)
        idle = message.idle if isinstance(message, wire.Prepare) else True
        collect(self._ranks, lambda: self._ready_to_commit(session, transfer, idle))
        if isinstance(message, wire.Commit):
            return {}
        if message.promise:
            transfer.promise(message.hold_s)
        else:
            transfer.hold(message.hold_s)  # between its word and the commit, no deadline passes on one alone
        return {}

    def _release(self, message: wire.Release) -> dict[str, Any]:
        """The door is the matter of the HTTP process; a receiver without one has none to open."""
        return {}

    def _commit(self, message: wire.Commit) -> dict[str, Any]:
        session = self._session_of(message.session)
        self._prepare(message)
        self._fence = f"version {message.version} was copied in part only"  # until every rank says otherwise
        try:
            collect(self._ranks, lambda: self._copy(session))
            collect(self._ranks, lambda: self._engine.publish(message.version))
        except Exception as error:
            self._fence = f"{self._fence}: {error}"
            session.end_transfer(self._fence)
            raise CommitError(f"the server is fenced: {self._fence}") from error
        self._version, self._fence = message.version, None
        session.end_transfer("committed")
        return {}

    def _ready_to_commit(self, session: Session, transfer: Any, idle: bool) -> None:
        self._check_safe()
        self._check_incarnation(self._planned_for)
        if not transfer.verified:
            raise CommitError(f"version {transfer.version} is not staged; nothing was touched")
        if moved := session.staging.check_addresses():
            raise CommitError(
                f"{moved} moved in memory while version {transfer.version} was staged; nothing was touched"
            )
        if idle and not self._engine.flush_cache():
            raise ServerBusyError("requests are still running; nothing was touched")

    def _copy(self, session: Session) -> None:
        staging = session.staging
        self._engine.synchronize()
        with torch.inference_mode():
            staging.commit()
            self._engine.derived.refresh(staging.plan.calls)
        self._engine.synchronize()

    def _abort(self, message: wire.Abort) -> dict[str, Any]:
        transfer = self._session_of(message.session).transfer
        if transfer is None or transfer.version != message.version:
            return {}
        logger.warning("fp8sync: version %d aborted by the sender: %s", message.version, message.reason)
        if message.fence and transfer.promised:
            self._fence_for(f"version {message.version} is served by others and was not taken here: {message.reason}")
        else:
            self._session_of(message.session).end_transfer(f"aborted by the sender: {message.reason}")
        return {}

    # At the end

    def _close(self, message: wire.Close) -> dict[str, Any]:
        if self._session is not None and self._session.id == message.session:
            self._end_session()
        return {}

    def _probe(self, message: wire.Probe) -> dict[str, Any]:
        return {"probe": tuple(collect(self._ranks, lambda: fingerprint(self._model)))}

    # From outside

    def weights_changed(self, by: str) -> None:
        """Another route wrote to the parameters: what is staged is void, and what is served is no version of ours."""
        logger.warning("fp8sync: fenced, the weights were changed by %s", by)
        self._fence_for(f"its weights were changed by {by}")

    # Helpers

    def _fence_for(self, reason: str) -> None:
        self._fence = reason
        if self._session is not None:
            self._session.end_transfer(reason)

    def _session_of(self, session: str) -> Session:
        if self._session is None or self._session.id != session:
            if self._lost.get(session):
                raise SessionLostError(f"this server let go of the session: {self._lost[session]}: push again")
            holder = f"sender {self._session.sender}" if self._session else "another sender"
            raise SessionLostError(f"{holder} took over since this one planned: push again to take it back")
        return self._session

    def _check_incarnation(self, incarnation: str) -> None:
        if incarnation != self._engine.info(self._incarnation).incarnation:
            what = "its experts were moved" if incarnation.startswith(self._incarnation) else "the server restarted"
            raise SessionLostError(f"{what} since this sender planned; nothing was touched: push again")

    def _drop_what_is_dead(self) -> None:
        """A sender that died holds nothing: its stage is void, on all ranks alike, once its connection broke or its
        deadline passed on one of them. A promise outlives the connection: the commit comes another way."""
        session = self._session
        if session is None:
            return
        transfer = session.transfer
        mine = (None, False) if transfer is None else (transfer.dead(), transfer.own_fault)
        found = gather(self._ranks, (*mine, session.lost))
        own = [why for why, own_fault, _ in found if own_fault]
        late = next((why for why in (*own, *(why for why, _, _ in found)) if why is not None), None)
        lost = next((why for _, _, why in found if why is not None), None)
        if transfer is None:
            if lost is not None:
                self._end_session()
                self._lost = {session.id: lost}
        elif transfer.promised:
            if late is not None:
                self._fence_for(f"it promised version {transfer.version} and heard nothing of it in time")
        elif late is not None or lost is not None:
            logger.warning("fp8sync: version %d is given up: %s", transfer.version, late or lost)
            session.end_transfer(str(late or lost), own_fault=bool(own))

    def _end_session(self) -> None:
        if self._session is None:
            return
        if (transfer := self._session.transfer) is not None and transfer.promised:
            self._fence_for(f"it promised version {transfer.version}, and its sender left")
        self._session.close()
        self._session = None
