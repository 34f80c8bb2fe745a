"""`FP8Sender`: a trainer's weights into running SGLang servers, as block FP8.

    with FP8Sender(servers=["http://127.0.0.1:30000"]) as sender:    # on every trainer rank
        for batch in batches:
            train(batch)
            report = sender.push(model)        # collective; returns when every server serves the new weights

Once (`prepare`, or the first push): the servers are asked what they hold, a plan is made, the data plane is joined.
Every push: quantize, gather, send, bucket by bucket; verify on all servers; commit on all servers. Each rank quantizes
the rows that it holds; rank 0 quantizes what has to be gathered whole, sends and talks to servers; the others learn the
outcome. Several ranks may send in its place, each its share of the buckets (`send_from`). An error is raised on
every rank, and leaves the servers serving what they served (see `shared.errors`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType

import torch
from torch import nn

from sender.checks import (
    check_deadlines,
    check_plane,
    check_quantize,
    check_send_from,
    check_servers,
    check_version,
    check_ways,
)
from sender.control import ControlClient, HttpControl
from sender.fleet import Fleet, longest_push_s
from sender.gather import Gathered, Gatherer
from sender.handle import PushHandle
from sender.holder import Holder
from sender.leader import Leader
from sender.plan import PushPlan, QuantizeWhen
from sender.ranks import Lead, TrainerRanks, TryAgain
from sender.report import PhaseClock, PushReport
from sender.sending_ranks import SendFrom, SendingRanks
from sender.slices import Holders, SliceHolder
from sender.snapshot import Keeper
from sender.source import Shard, ShardSource, WeightSource
from sender.sources import Sources
from sender.turns import Turns
from shared.buckets import DEFAULT_BUCKET_BYTES, Bucket
from shared.config import FP8BlockConfig
from shared.errors import ConfigError, Fp8SyncError
from shared.protocol import InFlight, PlaneName, StagingChoice


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
            start over on the new weights from what they have generated so far, `abort` ends them. `keep` lets them go
            on, the next token by the new weights on KV cache of the old ones: a reply is off-policy within itself, and
            `meta_info.weight_versions` says where. Later requests reuse no KV cache of the old weights.
        strict: of several servers none commits unless all have drained and said that they can, and none admits a
            request before all have committed. Not with `keep`, which drains nothing.
        staging: where servers keep what arrives until they commit. `auto` takes the best that each has memory for:
            `reserved` (see `--fp8sync-staging`; they serve meanwhile), `kv_pool` or `in_place` (they stand still, and
            with `in_place` a push that fails on the way fences them). Naming one of them forces it, or is an error.
            With `keep` it is `reserved`.
        quorum: how many servers are enough for a push. Those that fail before the commit is decided are then left out
            and named in the report; the next push tries them again. None: all servers or none.
        quantize: `before_gather`: each trainer rank quantizes the rows that it holds, where it holds rows (FSDP2 on a
            mesh of all ranks), and codes and scales are gathered: half the bytes, a share of the work, the same bits.
            What is not quantized goes with them. All tensors that lie in another way, and with `after_gather` all of
            them, are gathered whole and quantized on rank 0. It has to be the same on every rank.
        keep_snapshot: keep what the last push sent in host memory of rank 0 (`wire_bytes` of its report; twice that
            during a push), for `catch_up`.
        plane: the data plane: `tcp`; on a network of your own `nccl`, from the current GPU of rank 0 to other GPUs, or
            `gloo`, a tree of copies; `same_host`, where rank 0 and all servers are on one host: rank 0 writes straight
            into memory of the servers; `memory` for tests.
        send_from: which trainer ranks send, in turn a bucket each, over planes of their own: `rank_0`; a tuple of them,
            `(1,)` or `(0, 1, 2, 3)`. `holders`, over `same_host`: every rank writes the rows that it holds straight to
            where each server rank keeps its slices of them; nothing is gathered. `auto`: of rank 0, any other rank, up
            to eight of its host or of all, and holders, those with the fewest bytes on the busiest link; holders only
            from FSDP2 on GPUs to servers that stage in reserved memory. Bytes are the same whoever sends. It has to be
            the same on every rank, and so have `servers`. Not with `push_async`, `keep_snapshot` and `quorum`, nor over
            `memory`.
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
        staging: StagingChoice = "auto",
        quorum: int | None = None,
        quantize: QuantizeWhen = "before_gather",
        keep_snapshot: bool = False,
        plane: PlaneName = "tcp",
        send_from: SendFrom = "rank_0",
        ca_file: str | None = None,
    ) -> None:
        check_servers(servers, quorum)
        staging = check_ways(in_flight, strict, staging)
        check_plane(plane)
        check_quantize(quantize)
        check_deadlines(timeout_s=timeout_s, meeting_timeout_s=meeting_timeout_s)
        self._config = config or FP8BlockConfig()
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._patience_s = longest_push_s(timeout_s)  # the other ranks wait for rank 0, all of its deadlines added up
        self._ranks = TrainerRanks(meeting_timeout_s)
        check_send_from(send_from, self._ranks.size, plane, quorum, keep_snapshot)
        self._connect = lambda s: HttpControl(s, admin_key, ca_file) if isinstance(s, str) else s
        self._fleet = Fleet(
            [self._connect(server) for server in servers],
            self._config,
            plane,
            timeout_s,
            in_flight=in_flight,
            strict=strict,
            staging=staging,
            quorum=quorum,
            gpu=torch.cuda.current_device() if plane in ("nccl", "same_host") and torch.cuda.is_available() else None,
        )
        self._quorum, self._turns, self._keeper = quorum, Turns(timeout_s), Keeper(keep_snapshot)
        way_out = self._fleet if self._ranks.is_leader else self._fleet.half
        self._holder = Holders(
            Holder(way_out, self._config, self._ranks.rank, self._keeper),
            SliceHolder(way_out, self._fleet.half, self._config, self._ranks.rank),
        )
        self._sending = SendingRanks(
            send_from, plane, self._ranks, self._fleet, self._holder, timeout_s, self._patience_s
        )
        self._leader = Leader(self._fleet, self._holder, self._sending, bucket_bytes, self._turns, self._keeper)
        self._sources = Sources(self._ranks.size if quantize == "before_gather" else 1)
        self._gatherer = Gatherer(self._config)
        self._planned: PushPlan | None = None
        self._pending: PushHandle | None = None

    # The interface

    def prepare(self, model: nn.Module) -> PushPlan:
        """Collective. Plan, connect and quantize now, so that the first push is like the others. Optional."""
        with self._ending_its_turn():
            clock = PhaseClock()
            source, plan, lead = self._meet_and_plan("prepare", lambda: self._sources.of(model), clock, ask=True)
            for bucket, gathered in self._gathered(source, plan, clock):
                lead.run(self._holder.of(plan).rehearse, plan, bucket, gathered, on=self._maker_of(plan, bucket))
            source.release()
            self._sending.hear_of_failures(plan, lead, self._timeout_s)
            lead.finish("", self._patience_s, self._fail)
            self._leader.end()
            return plan

    def push(self, model: nn.Module, *, version: int | None = None) -> PushReport:
        """Collective. Returns when every server serves the weights of `model` as `version`.

        Versions are whole numbers that grow. Default: one more than the newest that this sender or a server has seen.

        A rank that does not call it is an error on the others after `meeting_timeout_s`. A rank that is lost later,
        inside a gather, is reported by the trainer's process group, within that group's own time-out.

        Raises:
            PushError: one of its kinds, on every rank; the servers keep the version that they had.
            NotImplementedError: Megatron-style modules.
        """
        return self._push(lambda: self._sources.of(model), version)

    def push_shards(self, shards: Iterable[Shard], *, version: int | None = None) -> PushReport:
        """Collective. `push` for trainers whose modules it cannot read: each rank names the shards that it holds."""
        shards = list(shards)
        return self._push(lambda: ShardSource(shards, self._ranks, self._timeout_s), version)

    def push_async(self, model: nn.Module, *, version: int | None = None) -> PushHandle:
        """Collective. Returns when the weights are quantized into a buffer of rank 0; `wait()` ends the push.

        Training may change the weights at once. No other call of this sender may come before `wait()`.
        """
        check_version(version)
        if not self._sending.is_rank_0:
            raise ConfigError("push_async sends from rank 0 alone: push, or FP8Sender(send_from='rank_0')")
        clock, snapshot = PhaseClock(), list[torch.Tensor]()
        with self._ending_its_turn():
            source, plan, lead = self._meet_and_plan("push_async", lambda: self._sources.of(model), clock)
            for bucket, gathered in self._gathered(source, plan, clock):
                with clock.phase("quantize"):
                    lead.run(self._holder.whole.pack_into, snapshot, plan, bucket, gathered)
            with clock.phase("quantize"):
                lead.run(self._holder.whole.until_packed, snapshot)
            source.release()
        self._pending = PushHandle(
            lambda: self._transfer(plan, lead, clock, snapshot, version),
            lambda: self._finish(plan, lead, clock, self._num_tries),
        )
        return self._pending

    def add_server(self, server: str | ControlClient) -> None:
        """Between pushes: the next push reaches this server, too (`catch_up` does at once). Rank 0 alone talks to
        servers; on other ranks this changes nothing but how long they wait, so all may call it.

        Raises: ConfigError: it is one of the servers already.
        """
        with self._between_pushes("add_server"):
            self._fleet.add(self._connect(server))

    def remove_server(self, server: str) -> None:
        """Between pushes: leave the server of that URL or name; it keeps serving. On other ranks as `add_server`.

        Raises: ConfigError: it is none of the servers, or the last one.
        """
        with self._between_pushes("remove_server"):
            self._fleet.remove(server.rstrip("/"))

    def catch_up(self, names: Collection[str] | None = None) -> tuple[str, ...]:
        """Not collective: on rank 0, from any thread, while training goes on. Waits for a push under way.

        Brings the version of the last push, from the snapshot (`keep_snapshot`), to every server that does not serve
        it: one that joined, started again, is fenced, or was left out. Their names; on other ranks it does nothing.

        `names`: of the servers that are meant, such as those that `behind` gave. None: all of them.

        Raises:
            ConfigError: there is no snapshot, or a `push_async` is under way.
            PushError: a server that could not be brought up; `PlanError` where the snapshot does not fit it. The others
                were, and the next push reaches all.
        """
        if not self._ranks.is_leader:
            return ()
        with self._between_pushes("catch_up"):
            return self._keeper.bring_up(self._fleet, names)

    def behind(self) -> tuple[str, ...]:
        """Not collective, from any thread: on rank 0 the names of servers that answer and do not serve the version that
        is kept (`keep_snapshot`), so that `catch_up` would bring it to them; () elsewhere, or while nothing is kept.
        Servers whose memory of weights was released are left out: they wait for the push that follows its return.
        """
        return self._keeper.behind(self._fleet) if self._ranks.is_leader else ()

    def close(self) -> None:
        """Leave the servers; they keep serving. Not collective. Idempotent."""
        self._pending = None
        if self._ranks.is_leader:
            self._fleet.close()
        else:
            self._sending.close()

    def __enter__(self) -> FP8Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The way of a push

    def _push(self, make_source: Callable[[], WeightSource], version: int | None) -> PushReport:
        """All ranks try again as often as rank 0 finds servers to leave out (`quorum`)."""
        check_version(version)
        clock = PhaseClock()
        with self._ending_its_turn():
            while True:
                with suppress(TryAgain):
                    return self._push_to_those_left(make_source, version, clock)

    def _push_to_those_left(
        self, make_source: Callable[[], WeightSource], version: int | None, clock: PhaseClock
    ) -> PushReport:
        source, plan, lead = self._meet_and_plan("push", make_source, clock, lambda: self._leader.begin_early(version))
        if not self._sending.begins_late:
            self._begin(plan, lead, clock, version)
        holder = self._holder.of(plan)
        try:
            for bucket, gathered in self._gathered(source, plan, clock):
                with clock.phase("quantize"):
                    packed = lead.run(holder.pack, plan, bucket, gathered, on=self._maker_of(plan, bucket))
                if bucket.index == 0 and self._sending.begins_late:  # servers have heard of the push meanwhile
                    self._begin(plan, lead, clock, version)
                with clock.phase("send"):
                    lead.run(holder.send, packed, bucket.index, on=self._maker_of(plan, bucket))
        finally:
            source.release()
        if plan.slices:
            with clock.phase("plan"):
                lead.run(self._leader.begin, version)
        self._publish(plan, lead, clock)
        return self._finish(plan, lead, clock)

    def _begin(self, plan: PushPlan, lead: Lead, clock: PhaseClock, version: int | None) -> None:
        with clock.phase("plan"):
            lead.run(self._leader.begin_or_write, version)
            self._sending.begin(plan, lead, self._fail, self._fleet.leave_out_the_guilty)

    def _gathered(self, source: WeightSource, plan: PushPlan, clock: PhaseClock) -> Iterator[tuple[Bucket, Gathered]]:
        """Collective. Each bucket as it comes to the rank that sends it; it is valid until the next one."""
        with clock.phase("quantize"), self._failing_loudly():
            gathering = self._gatherer.begin(source, plan)
        for bucket in plan.layout.buckets:
            with clock.phase("quantize"), self._failing_loudly():
                gathering.quantize(bucket)
            with clock.phase("gather"), self._failing_loudly():
                gathered = gathering.gather(bucket)
            yield bucket, gathered

    def _publish(self, plan: PushPlan, lead: Lead, clock: PhaseClock) -> None:
        with clock.phase("verify"):
            self._sending.end(plan, lead)
            lead.run(self._leader.verify)
        with clock.phase("commit"):
            lead.run(self._leader.commit)

    def _transfer(
        self, plan: PushPlan, lead: Lead, clock: PhaseClock, snapshot: list[torch.Tensor], version: int | None
    ) -> None:
        """The rest of `push_async`, on a thread of its own. It tries again without a word to the other ranks."""
        lead.run(self._holder.check_finite)
        while True:
            lead.run(self._leader.begin_or_plan_again, plan, version)
            for index, packed in enumerate(snapshot):
                with clock.phase("send"):
                    lead.run(self._holder.whole.send, packed, index)
            self._publish(plan, lead, clock)
            if not lead.take_back(self._fleet.leave_out_the_guilty):
                break
            lead.run(self._leader.plan_again, plan)
        snapshot.clear()

    # Its steps

    def _meet(self, what: str) -> bool:
        """Whether all ranks hold the same plan."""
        if self._pending is not None:
            raise ConfigError("a push_async is still under way: wait() for it first")
        known = None if self._sending.lost_its_plane else self._planned
        return self._ranks.meet(what, known.layout.plan_hash if known is not None else "")

    def _meet_and_plan(
        self,
        what: str,
        make_source: Callable[[], WeightSource],
        clock: PhaseClock,
        first: Callable[[], None] | None = None,
        ask: bool = False,
    ) -> tuple[WeightSource, PushPlan, Lead]:
        """`first`: what rank 0 does once all ranks are there."""
        while True:
            same_plan = self._meet(what)
            lead = Lead(self._ranks, None if self._sending.is_rank_0 else self._sending.stop)
            with suppress(TryAgain), clock.phase("plan"):
                if first is not None:
                    lead.run(first)
                source = make_source()
                return source, self._plan(source, lead, same_plan, ask or first is not None), lead

    def _maker_of(self, plan: PushPlan, bucket: Bucket) -> int:
        """Which rank makes something of `bucket`, and sends it: where slices are written each does, so this one."""
        return self._ranks.rank if plan.slices else plan.sender_of(bucket)

    @contextmanager
    def _ending_its_turn(self) -> Iterator[None]:
        """Whatever a push ends with, on the thread that began it: others have their turn, servers are told."""
        under_way = self._turns.is_mine  # of a `push_async`, which a second push does not end
        try:
            yield
        except BaseException as error:
            if self._turns.is_mine and not under_way:
                self._fail(error)
            elif not self._ranks.is_leader:
                self._sending.close()
            raise

    @contextmanager
    def _failing_loudly(self) -> Iterator[None]:
        """A gather that raises leaves the other ranks to their group's time-out; the servers need not wait as well."""
        try:
            yield
        except BaseException as error:
            if self._ranks.is_leader:
                self._fail(error)
            raise

    def _plan(self, source: WeightSource, lead: Lead, same_plan: bool, ask: bool) -> PushPlan:
        """The plan of the last push if it still holds, else a new one; rank 0 decides for all ranks."""
        lead.agree("how the model is sharded", self._sending.named + source.sharding.text)
        found = lead.run(self._leader.plan, source, self._planned if same_plan else None, ask)
        try:
            text = lead.finish(found, self._patience_s, self._fail, self._fleet.leave_out_the_guilty)
            if text or self._planned is None:
                plan = PushPlan.from_json(text, source.tensors, self._bucket_bytes)
                _ = plan.layout.plan_hash  # of thousands of tensors: worked out now, not when ranks meet for a push
                alone = self._sending.is_rank_0
                self._planned = plan if alone else self._sending.open(plan, source, lead, self._fail)
        except (Fp8SyncError, TryAgain):
            self._planned = None
            raise
        self._planned = self._planned.sharded(source.sharding, source.cuts, self._ranks.rank, self._ranks.size)
        return self._planned

    def _finish(self, plan: PushPlan, lead: Lead, clock: PhaseClock, num_tries: int = 1) -> PushReport:
        """`num_tries`: how many rank 0 had for itself. TryAgain is raised where the other ranks are needed for one."""
        self._pending = None
        report, again = "", self._fleet.leave_out_the_guilty if num_tries == 1 else None
        if self._ranks.is_leader and lead.failure is None:
            report = self._leader.report(plan, clock)
            self._sending.note(None)
        found = lead.finish(report, self._patience_s * num_tries, self._fail, again)
        self._leader.end()
        return PushReport.model_validate_json(found)

    def _fail(self, failure: BaseException) -> None:
        """On rank 0: tell the servers, and plan anew next time."""
        self._planned = None
        self._sending.note(failure)
        self._leader.fail(failure)

    @property
    def _num_tries(self) -> int:
        return 1 if self._quorum is None else len(self._fleet.names) - self._quorum + 2

    @contextmanager
    def _between_pushes(self, what: str) -> Iterator[None]:
        if self._pending is not None:
            raise ConfigError(f"{what}: a push_async is still under way: wait() for it first")
        with self._turns.between_pushes(what):
            yield
