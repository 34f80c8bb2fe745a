"""`FP8Sender`: a trainer's weights into running SGLang servers, as block FP8.

    with FP8Sender(servers=["http://127.0.0.1:30000"]) as sender:    # on every trainer rank
        for batch in batches:
            train(batch)
            report = sender.push(model)        # collective; returns when every server serves the new weights

Once (`prepare`, or the first push): the servers are asked what they hold, a plan is made, the data plane is joined.
Every push: gather, quantize, send, bucket by bucket; verify on all servers; commit on all servers. Rank 0 talks to the
servers; the other ranks take part in the gathers and learn the outcome. An error is raised on every rank, and leaves
the servers serving what they served (see the errors in `shared.errors`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import get_args

import torch
from torch import nn

from sender.control import ControlClient, HttpControl
from sender.fleet import Fleet, longest_push_s
from sender.handle import PushHandle
from sender.packer import Packer
from sender.plan import PushPlan
from sender.ranks import Lead, TrainerRanks
from sender.report import PhaseClock, PushReport
from sender.source import ModuleSource, Shard, ShardSource, WeightSource
from shared.buckets import DEFAULT_BUCKET_BYTES, Bucket
from shared.errors import ConfigError, Fp8SyncError
from shared.protocol import FP8BlockConfig, InFlight, PlaneName


class FP8Sender:
    """Pushes weights to `servers`. Make it on every trainer rank, after `init_process_group`.

    Args:
        servers: URLs of SGLang servers started with `--load-plugin fp8sync`, or `ControlClient` objects.
        config: how to quantize; must agree with the servers.
        admin_key: SGLang's `--admin-api-key` (or `--api-key` where only that is set).
        bucket_bytes: size of the flat buckets that are sent.
        meeting_timeout_s: how long ranks wait for each other before a push; then `RankMissingError`.
        timeout_s: how long a push may take on the servers, from its first message to its commit.
        in_flight: what a commit does to requests under way. `wait` lets them end, `retract` puts them back and they
            start over on the new weights from what they have generated so far, `abort` ends them.
        strict: of several servers none commits unless all have drained and said that they can, and none admits a
            request before all have committed.
        plane: the data plane: `tcp`, `gloo` (a tree of copies, on a network of your own), or `memory` for tests.
        ca_file: certificates (PEM) that `https` servers are checked against, in place of the system's.
    """

    def __init__(
        self,
        servers: Sequence[str | ControlClient],
        *,
        config: FP8BlockConfig | None = None,
        admin_key: str | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        meeting_timeout_s: float = 60.0,
        timeout_s: float = 300.0,
        in_flight: InFlight = "wait",
        strict: bool = False,
        plane: PlaneName = "tcp",
        ca_file: str | None = None,
    ) -> None:
        if isinstance(servers, str) or not servers:
            raise ConfigError("servers is a list with at least one server URL")
        names = [server.rstrip("/") if isinstance(server, str) else server.name for server in servers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"named twice in servers: {sorted(twice)}")
        self._config = config or FP8BlockConfig()
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._patience_s = longest_push_s(timeout_s)  # the other ranks wait for rank 0, all of its deadlines added up
        self._ranks = TrainerRanks(meeting_timeout_s)
        clients = [HttpControl(s, admin_key, ca_file) if isinstance(s, str) else s for s in servers]
        if in_flight not in get_args(InFlight):
            raise ConfigError(f"in_flight={in_flight!r}: it is one of {list(get_args(InFlight))}")
        self._fleet = Fleet(clients, self._config, plane, timeout_s, in_flight=in_flight, strict=strict)
        self._planned: PushPlan | None = None
        self._packer: Packer | None = None
        self._newest = self._version = 0
        self._skew_s = 0.0
        self._pending: PushHandle | None = None

    # The interface

    def prepare(self, model: nn.Module) -> PushPlan:
        """Collective. Plan and connect now, so that the first push is like the others. Optional."""
        source = ModuleSource(model)
        same_plan = self._meet("prepare")
        return self._plan(source, Lead(self._ranks), same_plan)

    def push(self, model: nn.Module, *, version: int | None = None) -> PushReport:
        """Collective. Returns when every server serves the weights of `model` as `version`.

        Versions are whole numbers that grow. Default: one more than the newest that this sender or a server has seen.

        A rank that does not call it is an error on the others after `meeting_timeout_s`. A rank that is lost later,
        inside a gather, is reported by the trainer's process group, within that group's own time-out.

        Raises:
            PushError: one of its kinds, on every rank; the servers keep the version that they had.
            NotImplementedError: Megatron-style modules.
        """
        return self._push(lambda: ModuleSource(model), version)

    def push_shards(self, shards: Iterable[Shard], *, version: int | None = None) -> PushReport:
        """Collective. `push` for trainers whose modules it cannot read: each rank names the shards that it holds."""
        return self._push(lambda: ShardSource(shards, self._ranks, self._timeout_s), version)

    def push_async(self, model: nn.Module, *, version: int | None = None) -> PushHandle:
        """Collective. Returns when the weights are quantized into a buffer of rank 0; `wait()` ends the push.

        Training may change the weights at once. No other call of this sender may come before `wait()`.
        """
        _check_version(version)
        source = ModuleSource(model)
        same_plan = self._meet("push_async")
        clock, lead = PhaseClock(), Lead(self._ranks)
        plan = self._plan(source, lead, same_plan)
        snapshot: list[torch.Tensor] = []
        for bucket in plan.layout.buckets:
            with clock.phase("gather"), self._failing_loudly():
                weights = source.gather(bucket.names)
            with clock.phase("quantize"):
                lead.run(self._keep, plan, bucket, weights, snapshot)
        source.release()
        self._pending = PushHandle(
            lambda: self._transfer(plan, lead, clock, snapshot, version), lambda: self._finish(plan, lead, clock)
        )
        return self._pending

    def close(self) -> None:
        """Leave the servers; they keep serving. Not collective. Idempotent."""
        self._pending = None
        if self._ranks.is_leader:
            self._fleet.close()

    def __enter__(self) -> FP8Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The way of a push

    def _push(self, make_source: Callable[[], WeightSource], version: int | None) -> PushReport:
        _check_version(version)
        same_plan = self._meet("push")
        clock, lead = PhaseClock(), Lead(self._ranks)
        source = make_source()
        with clock.phase("plan"):
            plan = self._plan(source, lead, same_plan)
            lead.run(self._begin, plan, version)
        for bucket in plan.layout.buckets:
            with clock.phase("gather"), self._failing_loudly():
                weights = source.gather(bucket.names)
            with clock.phase("quantize"):
                packed = lead.run(self._pack, plan, bucket, weights)
            with clock.phase("send"):
                lead.run(self._fleet.send, packed, bucket.index)
        source.release()
        self._publish(lead, clock)
        return self._finish(plan, lead, clock)

    def _publish(self, lead: Lead, clock: PhaseClock) -> None:
        with clock.phase("verify"):
            lead.run(self._check_finite)
            lead.run(self._fleet.verify)
        with clock.phase("commit"):
            self._skew_s = lead.run(self._fleet.commit) or 0.0

    def _transfer(
        self, plan: PushPlan, lead: Lead, clock: PhaseClock, snapshot: list[torch.Tensor], version: int | None
    ) -> None:
        """The rest of `push_async`, on a thread of its own."""
        lead.run(self._check_finite)
        lead.run(self._begin, plan, version)
        for index, packed in enumerate(snapshot):
            with clock.phase("send"):
                lead.run(self._fleet.send, packed, index)
        snapshot.clear()
        self._publish(lead, clock)

    # Its steps

    def _meet(self, what: str) -> bool:
        """Whether all ranks hold the same plan."""
        if self._pending is not None:
            raise ConfigError("a push_async is still under way: wait() for it first")
        return self._ranks.meet(what, self._planned.layout.plan_hash if self._planned is not None else "")

    @contextmanager
    def _failing_loudly(self) -> Iterator[None]:
        """A gather that raises leaves the other ranks to their group's time-out; the servers need not wait as well."""
        try:
            yield
        except BaseException as error:
            if self._ranks.is_leader:
                self._fail(error)
            raise

    def _plan(self, source: WeightSource, lead: Lead, same_plan: bool) -> PushPlan:
        """The plan of the last push if it still holds, else a new one; rank 0 decides for all ranks."""
        found = lead.run(self._plan_on_leader, source, same_plan)
        try:
            text = lead.finish(found, self._patience_s, self._fail)
        except Fp8SyncError:
            self._planned = None
            raise
        if text or self._planned is None:
            self._planned = PushPlan.from_json(text, source.tensors, self._bucket_bytes)
            self._packer = None
        return self._planned

    def _plan_on_leader(self, source: WeightSource, same_plan: bool) -> str:
        still_open, self._newest = self._fleet.survey()
        if same_plan and still_open and self._planned is not None and self._planned.offered == source.tensors:
            return ""
        return self._fleet.plan(source.tensors, self._bucket_bytes).to_json()

    def _begin(self, plan: PushPlan, version: int | None) -> None:
        self._version = self._newest + 1 if version is None else version
        self._fleet.begin(self._version)

    def _pack(self, plan: PushPlan, bucket: Bucket, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        if self._packer is None:
            self._packer = Packer(plan.layout, self._config, next(iter(weights.values())).device)
        if bucket.index == 0:
            self._packer.begin()
        return self._packer.pack(bucket, weights)

    def _keep(
        self, plan: PushPlan, bucket: Bucket, weights: dict[str, torch.Tensor], snapshot: list[torch.Tensor]
    ) -> None:
        """Quantize into a buffer of its own, complete on return: another thread reads it, on another stream."""
        snapshot.append(self._pack(plan, bucket, weights).clone())
        if snapshot[-1].is_cuda:
            torch.cuda.current_stream(snapshot[-1].device).synchronize()

    def _check_finite(self) -> None:
        assert self._packer is not None
        self._packer.check_finite()

    def _finish(self, plan: PushPlan, lead: Lead, clock: PhaseClock) -> PushReport:
        self._pending = None
        report = ""
        if self._ranks.is_leader and lead.failure is None:
            report = PushReport(
                version=self._version,
                num_tensors=len(plan.layout.tensors),
                num_quantized=plan.num_quantized,
                num_buckets=len(plan.layout.buckets),
                bf16_bytes=plan.bf16_bytes,
                wire_bytes=plan.layout.num_bytes,
                seconds=clock.seconds(),
                skew_s=self._skew_s,
                servers=self._fleet.names,
            ).model_dump_json()
        return PushReport.model_validate_json(lead.finish(report, self._patience_s, self._fail))

    def _fail(self, failure: BaseException) -> None:
        """On rank 0: tell the servers, and plan anew next time."""
        self._planned = None
        self._fleet.fail(failure)


def _check_version(version: object) -> None:
    if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
        raise ConfigError(f"version={version!r}: versions are whole numbers")
