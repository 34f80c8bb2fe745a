"""What rank 0 does alone in a push, whoever sends: it talks to the servers.

`sender.sender` has the order of these steps; each runs through `Lead.run`, so that its failure reaches all ranks.
"""

from __future__ import annotations

from sender.fleet import Fleet
from sender.holder import AnyHolder
from sender.plan import PushPlan
from sender.report import PhaseClock, PushReport
from sender.sending_ranks import SendingRanks
from sender.snapshot import Keeper
from sender.source import WeightSource
from sender.turns import Turns
from shared.errors import SessionLostError


class Leader:
    """`holder`: what this rank sends itself; `turns`: its pushes and what may come between them; `keeper`: the snapshot
    of the last one."""

    def __init__(
        self,
        fleet: Fleet,
        holder: AnyHolder,
        sending: SendingRanks,
        bucket_bytes: int,
        turns: Turns,
        keeper: Keeper,
    ) -> None:
        self._fleet, self._holder, self._sending, self._bucket_bytes = fleet, holder, sending, bucket_bytes
        self._turns, self._keeper = turns, keeper
        self._newest = self._version = 0
        self._wanted: int | None = None  # the version that is to begin as soon as it is known that the plan holds
        self._skew_s = 0.0

    def begin_early(self, version: int | None) -> None:
        """Servers that are known hear of the push while the model is looked at, or, where requests have to end for it,
        right after that: `plan`."""
        self._turns.begin_push()
        self._keeper.begin()
        self._wanted = self._fleet.newest + 1 if version is None else version
        self._fleet.begin_early(self._wanted)

    def plan(self, source: WeightSource, planned: PushPlan | None, ask: bool) -> str:
        """The plan as text, "" if `planned` still holds. `ask`: the servers; else `begin` finds out whether it does.

        So it does where they hear of the push while the first bucket is made.
        """
        self._turns.begin_push()
        holds = planned is not None and planned.offered == source.tensors
        wanted, self._wanted = self._wanted, None
        if holds and wanted is not None and self._sending.begins_late:
            self._fleet.begin_early(wanted, looked=True)
            if self._fleet.begins_early:
                self._newest = self._fleet.newest
                return ""
        still_open, self._newest = self._fleet.survey(ask, begin=wanted if holds else None)
        if still_open and holds:
            return ""
        self._holder.forget()
        plan = self._fleet.plan if self._sending.is_rank_0 else self._fleet.offer  # all ranks take part in opening
        return plan(source.tensors, self._bucket_bytes).to_json()

    def plan_again(self, plan: PushPlan, lost: SessionLostError | None = None) -> None:
        """For what is quantized already. `lost`: why, if it is not that servers are left out.

        Raises: SessionLostError: the servers that are left want something else; `lost`, unless one has started again.
        """
        still_there, self._newest = self._fleet.survey()
        if still_there and lost is not None:
            raise lost
        if self._fleet.plan(plan.offered, self._bucket_bytes).layout.plan_hash != plan.layout.plan_hash:
            raise SessionLostError("the servers want other tensors than before: push again")

    def begin(self, version: int | None) -> None:
        self._keeper.begin()
        self._version = self._newest + 1 if version is None else version
        self._fleet.begin(self._version)

    def begin_or_write(self, version: int | None) -> None:
        """`begin`, but where slices may be written meanwhile: then whoever writes knows the version, and `begin` is for
        later."""
        if not self._fleet.writes_before_it_begins:
            self.begin(version)

    def begin_or_plan_again(self, plan: PushPlan, version: int | None) -> None:
        """`begin`, for what is quantized already and was planned without asking. Raises: as `plan_again`."""
        try:
            self.begin(version)
        except SessionLostError as lost:
            self.plan_again(plan, lost)
            self.begin(version)

    def verify(self) -> None:
        self._holder.check_finite()
        self._fleet.verify()

    def commit(self) -> None:
        self._skew_s = self._fleet.commit()

    def report(self, plan: PushPlan, clock: PhaseClock) -> str:
        """After the commit."""
        self._keeper.committed(self._version, plan)
        report = PushReport(
            version=self._version,
            num_tensors=len(plan.layout.tensors),
            num_quantized=plan.num_quantized,
            num_quantized_early=plan.num_quantized_early,
            num_buckets=len(plan.layout.buckets),
            bf16_bytes=plan.bf16_bytes,
            wire_bytes=plan.layout.num_bytes,
            early_bytes=plan.rows.num_bytes if plan.rows is not None else 0,
            seconds=clock.seconds(),
            skew_s=self._skew_s,
            stood_still_s=self._fleet.stood_still_s,
            staging={name: way for name, way in self._fleet.staging.items() if name in self._fleet.names},
            servers=self._fleet.names,
            senders=plan.senders,
            sent_bytes={0: plan.layout.num_bytes} if (sent := self._sending.sent_by) is None else sent.num_bytes,
            busiest_link=None if sent is None else sent.busiest,
            busiest_link_of_rank_0=None if sent is None else sent.busiest_of_rank_0,
            left_out=self._fleet.left_out,
        )
        return report.model_dump_json()

    def fail(self, failure: BaseException) -> None:
        self._wanted = None
        self._keeper.begin()
        self._fleet.fail(failure)
        self.end()

    def end(self) -> None:
        """Servers that were left out are tried again; others may have their turn."""
        self._fleet.end_push()
        self._turns.end_push()
