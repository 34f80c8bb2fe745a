"""The last push, kept: a server that joins late or fell behind gets that very version, while training goes on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from sender.fleet import Fleet
from sender.plan import PushPlan
from shared.errors import ConfigError, Fp8SyncError, PlanError, PushError, StaleVersionError
from shared.protocol import MEMORY_RELEASED, Describe, Reply


@dataclass(frozen=True)
class Snapshot:
    """Packed buckets (flat uint8, host memory) of a push that was committed: as many bytes as one server is sent."""

    version: int
    plan: PushPlan
    buckets: tuple[torch.Tensor, ...]

    def feed(self, fleet: Fleet) -> None:
        """Push to the one server of `fleet`, and leave it.

        Raises: PlanError: its manifest is another one, so these buckets do not fit; else as a push does.
        """
        try:
            fleet.survey()
            layout = fleet.plan(self.plan.offered, self.plan.layout.bucket_bytes).layout
            if layout.plan_hash != self.plan.layout.plan_hash:
                raise PlanError(
                    f"{fleet.names[0]} wants other tensors than the snapshot of version {self.version} holds: "
                    "the next push brings it up"
                )
            fleet.begin(self.version)
            for index, bucket in enumerate(self.buckets):
                fleet.send(bucket, index)
            fleet.verify()
            fleet.commit()
        except BaseException as error:
            fleet.fail(error)
            raise
        finally:
            fleet.close(hang_up=False)


class Keeper:
    """What rank 0 keeps of its pushes, if it was asked to: that of the last one, and beside it the one under way."""

    def __init__(self, keeps: bool) -> None:
        self._keeps, self._coming = keeps, list[torch.Tensor]()
        self._last: Snapshot | None = None

    def begin(self) -> None:
        self._coming = []

    def note(self, packed: torch.Tensor) -> None:
        if self._keeps:
            self._coming.append(packed.to("cpu", copy=True))

    def committed(self, version: int, plan: PushPlan) -> None:
        if self._keeps:
            self._last, self._coming = Snapshot(version, plan, tuple(self._coming)), []

    def bring_up(self, fleet: Fleet, names: Collection[str] | None = None) -> tuple[str, ...]:
        """Feed every server, or those of `names`, that does not serve the last version, one by one; their names.

        Raises: ConfigError: nothing is kept. StaleVersionError: one has a newer version. PushError, after all were
        tried: what kept one from it, or a list.
        """
        if (last := self._last) is None:
            raise ConfigError("no snapshot to catch up from: FP8Sender(keep_snapshot=True), and a push")
        replies, failed = _ask(fleet)
        newest = max((reply.version for reply in replies.values()), default=0)
        if newest > last.version:  # two versions would be served
            raise StaleVersionError(
                f"version {newest} is served and the snapshot is version {last.version}: the next push reaches all"
            )
        asked = [client for client in fleet.clients if names is None or client.name in names]
        behind = [client for client in asked if _is_behind(replies.get(client.name), last.version)]
        if behind:
            fleet.close_session("a server is fed alone")
        fed = []
        for client in behind:
            try:
                last.feed(fleet.of_one(client))
                fed.append(client.name)
            except Fp8SyncError as error:
                failed[client.name] = error
        if len(failed) == 1:
            raise next(iter(failed.values()))
        if failed:
            raise PushError(f"version {last.version} was brought to {fed or 'no server'} but not to: {failed}")
        return tuple(fed)

    def behind(self, fleet: Fleet) -> tuple[str, ...]:
        """The servers that answer and do not serve the version that is kept; none if nothing is.

        Without those whose memory was released: a push comes when it is resumed, and this version would be in its way.
        """
        if (last := self._last) is None:
            return ()
        replies, _ = _ask(fleet)
        found = {name: reply.fence or "" for name, reply in replies.items() if _is_behind(reply, last.version)}
        return tuple(name for name, fence in found.items() if MEMORY_RELEASED not in fence)


def _ask(fleet: Fleet) -> tuple[dict[str, Reply], dict[str, Fp8SyncError]]:
    replies, failed = dict[str, Reply](), dict[str, Fp8SyncError]()
    for client in fleet.clients:
        try:
            replies[client.name] = client.call(Describe(), fleet.answer_s)
        except Fp8SyncError as error:
            failed[client.name] = error
    return replies, failed


def _is_behind(reply: Reply | None, version: int) -> bool:
    return reply is not None and (reply.fence is not None or reply.version < version)
