"""The trainer ranks that send, where it is not rank 0 alone: what they tell each other, and when.

Each has a data plane of its own to the ranks of all servers; rank 0 alone asks and tells the servers anything.

    a new plan    every rank -> 0    where it is
                  0 -> every rank    who sends; what it takes to listen for the servers
                  sender -> 0        where it listens                    0 -> servers   Open
                  0 -> every rank    the servers were told               all senders join
                  sender -> 0        its servers have come
                  0 -> every rank    the session is open
    every push    0 -> every rank    which version has begun
                  sender -> 0        the digests of what it sent, or why it failed

All of it goes through the trainer's store, with deadlines. A sender that fails leaves its plane at once, so that the
servers leave those of all others, and no rank waits in `send` for one that gave up; rank 0 tells the servers as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter

from sender.control import ControlClient
from sender.fleet import Fleet
from sender.holder import AnyHolder
from sender.links_plan import BusiestLink, Links
from sender.plan import PushPlan
from sender.ranks import Lead, TrainerRanks
from sender.rendezvous import JOIN_TIMEOUT_S
from sender.rows_plan import held_bytes
from sender.source import WeightSource
from shared import protocol as wire
from shared.errors import ConfigError, NonFiniteWeightError, PlanError, ReceiveError, TransferError
from shared.place import place_of

logger = logging.getLogger(__name__)

OnFailure = Callable[[Exception], None]
SendFrom = Literal["rank_0", "auto", "holders"] | tuple[int, ...]
_OF_THE_WAY = (TransferError, ReceiveError, PlanError)  # that bytes take
_TOLD_S = 30.0  # for what a rank has to say at once, after it has joined
_MEETINGS = TypeAdapter(tuple[wire.Rendezvous, ...])
_DIGESTS = TypeAdapter(dict[int, int])
_BEGUN = TypeAdapter(tuple[int, bool])


class _Told(BaseModel):
    """From each rank: where it is; whether rows of the model lie on the GPU that it would write from."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    place: wire.Place
    holds_rows: bool


class _Invitation(BaseModel):
    """From rank 0: who sends, and what it takes to listen. `hosts`: how rank 0 is reached by each of `servers`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    senders: tuple[int, ...]
    slices: bool
    place: wire.Place
    servers: tuple[str, ...]
    hosts: tuple[str, ...]
    num_ranks: tuple[int, ...]
    secret: wire.Secret


@dataclass(frozen=True)
class SentBy:
    """For the report. `busiest` link of a push, and what it would be if rank 0 sent alone."""

    num_bytes: dict[int, int]
    busiest: BusiestLink
    busiest_of_rank_0: BusiestLink


class SendingRanks:
    """Of this rank's sender. Nothing of it is used where `send_from` is `rank_0`."""

    def __init__(
        self,
        send_from: SendFrom,
        plane: wire.PlaneName,
        ranks: TrainerRanks,
        fleet: Fleet,
        holder: AnyHolder,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        self._are_holders = send_from == "holders"
        self.slices = self._are_holders  # with "auto", as the last plan has it
        self.wanted: Literal["auto"] | tuple[int, ...] = _ranks_of(send_from, ranks.size)
        self._plane, self._ranks, self._fleet, self._holder = plane, ranks, fleet, holder
        self._timeout_s, self._patience_s = timeout_s, patience_s
        on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._is_sender = False
        self._slices_work: bool | None = None  # on rank 0, where `auto` has chosen them: None before the first push
        self.sent_by: SentBy | None = None  # on rank 0, since the plan was made

    @property
    def is_rank_0(self) -> bool:
        """Whether it was never a question who sends, and what."""
        return self.wanted == (0,) and not self._are_holders

    @property
    def begins_late(self) -> bool:
        """Whether it is time enough for servers to have begun when the first bucket was made: where several gather for
        themselves, each has to know before that."""
        return self.is_rank_0 or self.slices

    @property
    def named(self) -> str:
        """For ranks to see whether they all mean the same; "" for rank 0."""
        wanted = "holders" if self._are_holders else self.wanted
        return "" if self.is_rank_0 else f"send_from={wanted!r}, "

    @property
    def lost_its_plane(self) -> bool:
        """Whether this rank is to send over a plane that is closed: the next push has to open another one."""
        return self._is_sender and self._fleet.half.plane is None

    # A new plan

    def open(self, plan: PushPlan, source: WeightSource, lead: Lead, on_failure: OnFailure) -> PushPlan:
        """Collective. `plan` with those who send, who have joined the ranks of all servers.

        Raises: on all ranks what failed on any.
        """
        self._holder.forget()
        self._is_sender = False
        if not self._ranks.is_leader:
            self._fleet.half.close()
        here = source.sharding.locals and source.sharding.device == self._device
        mine = _Told(place=place_of(self._device), holds_rows=bool(here))
        others = range(1, self._ranks.size)
        told_by_others = lead.collect(mine.model_dump_json(), others, self._patience_s)
        everybody = [mine, *map(_Told.model_validate_json, told_by_others.values())]
        invited = lead.run(self._invite, plan, source, everybody)
        told = _Invitation.model_validate_json(lead.finish(invited, self._patience_s, on_failure))
        plan, self.slices = replace(plan, senders=told.senders, slices=told.slices), told.slices
        self._is_sender = self._ranks.rank in told.senders

        listens = lead.run(self._listen, told, on=self._ranks.rank) if self._sends_beside_rank_0 else None
        meetings = lead.collect(listens or "", _others(plan), self._patience_s)
        lead.run(self._open, plan, meetings)
        lead.finish("", self._patience_s, on_failure, self._goes_without_slices)
        if self._is_sender or self._ranks.is_leader:
            lead.run(self._join, len(plan.senders), on=self._ranks.rank)
        self.hear_of_failures(plan, lead, JOIN_TIMEOUT_S)
        lead.finish("", self._patience_s, on_failure, self._goes_without_slices)
        return plan

    def _goes_without_slices(self, failure: Exception) -> bool:
        """On rank 0: whether `auto` had chosen to let every rank write what it holds, and chooses again, others."""
        if self._are_holders or not self.slices:
            return False
        logger.warning("fp8sync: what ranks hold is not written by themselves from here on: %s", failure)
        self._slices_work = False
        self._fleet.close_session("who sends is chosen again")
        return True

    @property
    def _sends_beside_rank_0(self) -> bool:
        return self._is_sender and not self._ranks.is_leader

    def _invite(self, plan: PushPlan, source: WeightSource, told: Sequence[_Told]) -> str:
        """On rank 0: who sends. Raises: ConfigError: one that was named cannot."""
        places = [each.place for each in told]
        links = Links(
            plane=self._plane,
            trainers=places,
            servers=self._fleet.places,
            held=held_bytes(plan.layout, source.sharding, source.cuts, self._ranks.size),
            buckets=[bucket.num_bytes for bucket in plan.layout.buckets],
            shares=self._fleet.shares,
            on_one_host=any(ip_address(host).is_loopback for host in self._fleet.local_hosts()),
        )
        slices, senders = self._are_holders, self.wanted
        if senders == "auto":
            can = self._slices_work is not False and self._fleet.takes_slices and all(each.holds_rows for each in told)
            slices = can and links.holders_are_quicker
            senders = tuple(range(self._ranks.size)) if slices else links.choose()
        if why := links.obstacles(senders):
            raise ConfigError(f"send_from={self.wanted!r}: {why}")
        if slices:
            sharded = replace(plan, senders=senders).sharded(source.sharding, source.cuts, 0, self._ranks.size)
            self.sent_by = SentBy(_written(sharded, links.held), links.of_holders(), links.busiest((0,)))
        else:
            self.sent_by = SentBy(links.sent_bytes(senders), links.busiest(senders), links.busiest((0,)))
        logger.info(
            "fp8sync: trainer rank(s) %s send %s bytes%s; the busiest link has %s, from rank 0 alone it would have %s",
            senders,
            list(self.sent_by.num_bytes.values()),
            ", each what it holds" if slices else "",
            self.sent_by.busiest,
            self.sent_by.busiest_of_rank_0,
        )
        return _Invitation(
            senders=senders,
            slices=slices,
            place=places[0],
            servers=self._fleet.names,
            hosts=tuple(self._fleet.local_hosts()),
            num_ranks=tuple(self._fleet.num_ranks),
            secret=self._fleet.draw_session(),
        ).model_dump_json()

    def _listen(self, told: _Invitation) -> str:
        """On another rank that sends: where the ranks of each server are to come."""
        known = {client.name: client for client in self._fleet.clients}
        near = told.place.host == place_of(self._device).host != ""
        hosts = [
            self._host(name, known.get(name), host if near else None)
            for name, host in zip(told.servers, told.hosts, strict=True)
        ]
        try:
            return _MEETINGS.dump_json(self._fleet.half.listen(hosts, told.num_ranks, told.secret)).decode()
        except OSError as error:
            raise TransferError(f"it cannot listen for the servers: {error}") from error

    def _host(self, name: str, client: ControlClient | None, near: str | None) -> str:
        """By which address of this machine the server is reached. `near`: that of rank 0, if this is its host."""
        if near is not None:
            return near if client is None else client.local_host()
        if client is None:
            raise ConfigError(f"{name} is no server of this rank: give the same servers to FP8Sender on every rank")
        if ip_address(found := client.local_host()).is_loopback:
            raise ConfigError(f"{name} is named by an address that only rank 0's host knows: name it as all hosts do")
        return found

    def _open(self, plan: PushPlan, meetings: dict[int, str]) -> None:
        """On rank 0: the servers are told where to join whom. By choice slices are written to reserved memory only."""
        only: wire.StagingChoice | None = "reserved" if plan.slices and not self._are_holders else None
        self._fleet.open(plan, {rank: _MEETINGS.validate_json(text) for rank, text in meetings.items()}, only)

    def _join(self, num_senders: int) -> None:
        # Over `same_host` a GPU tells that a bucket is there with its next one, many turns later, while a server that
        # has no room for so many takes none of the others'.
        self._fleet.half.settles = not self.slices and self._plane == "same_host" and num_senders > 2
        if self._ranks.is_leader:
            self._fleet.join()
        else:
            self._fleet.half.join()

    # Every push

    def begin(self, plan: PushPlan, lead: Lead, on_failure: OnFailure, again: Callable[[Exception], bool]) -> None:
        """Collective. Every rank that sends knows the version that has begun, and whether a server writes it where it
        is served, which may be another way with every push. Raises: on all ranks: it has not begun; TryAgain.
        """
        if plan.senders == (0,):
            return
        begun = _BEGUN.dump_json((self._fleet.version, self._fleet.checks_first)).decode()
        failure = None
        if not self._ranks.is_leader:  # rank 0 hears of it in `end`, and this rank raises what all raise
            failure, lead.failure = lead.failure, None
        version, checks_first = _BEGUN.validate_json(lead.finish(begun, self._patience_s, on_failure, again))
        lead.failure = lead.failure or failure
        if self._sends_beside_rank_0:
            self._fleet.half.begin(version)
            self._fleet.half.checks_first = checks_first

    def end(self, plan: PushPlan, lead: Lead) -> None:
        """Collective. Rank 0 has the digests of all that was sent, or the failure of whoever failed."""
        if plan.senders == (0,):
            return
        digests = lead.run(self._finish, on=self._ranks.rank) if self._is_sender else None
        text = _DIGESTS.dump_json(digests or {}).decode()
        told = lead.collect(text, _others(plan), self._timeout_s + _TOLD_S, self._fleet.explain)
        lead.run(self._take_digests, told)

    def _finish(self) -> dict[int, int]:
        """All that this rank sends has left, and was finite; its digests."""
        if self._ranks.is_leader:
            self._fleet.flush()
        else:
            self._fleet.half.flush()
        self._holder.check_finite()
        return self._fleet.half.digests

    def _take_digests(self, told: dict[int, str]) -> None:
        for text in told.values():
            self._fleet.take_digests(_DIGESTS.validate_json(text))

    def hear_of_failures(self, plan: PushPlan, lead: Lead, patience_s: float) -> None:
        """Collective. What failed on a rank that sends is a failure of rank 0."""
        if plan.senders != (0,):
            lead.collect("", _others(plan), patience_s + _TOLD_S)

    # When it fails

    def stop(self, failure: Exception) -> None:
        """Something failed on this rank: nobody waits for its buckets. Inf and NaN in what was sent wait for nobody, so
        that the names of all ranks are told."""
        way_out = self._fleet if self._ranks.is_leader else self._fleet.half
        if isinstance(failure, NonFiniteWeightError) and not way_out.checks_first:
            return
        if self._ranks.is_leader:
            self._fleet.stop(failure)
        else:
            self._fleet.half.close()

    def note(self, failure: BaseException | None) -> None:
        """On rank 0: how a push ended. Slices that `auto` has chosen are not chosen again if they never got there."""
        if self.slices and not self._slices_work and (failure is None or isinstance(failure, _OF_THE_WAY)):
            self._slices_work = failure is None

    def close(self) -> None:
        """On another rank than 0: leave its plane."""
        self._fleet.half.close()


def _ranks_of(send_from: SendFrom, num_ranks: int) -> Literal["auto"] | tuple[int, ...]:
    if send_from == "holders":
        return tuple(range(num_ranks))
    return (0,) if send_from == "rank_0" else send_from


def _written(plan: PushPlan, held: Sequence[int]) -> dict[int, int]:
    """What each rank writes where all write what they hold, and one of them what was gathered whole."""
    found = dict(enumerate(held))
    for bucket in plan.layout.buckets:
        late = [entry for entry in bucket.entries if entry.tensor.name not in plan.early]
        slots = [slot for entry in late for slot in (entry.values, entry.scale) if slot is not None]
        found[plan.sender_of(bucket)] += sum(slot.num_bytes for slot in slots)
    return found


def _others(plan: PushPlan) -> list[int]:
    return [rank for rank in plan.senders if rank != 0]
