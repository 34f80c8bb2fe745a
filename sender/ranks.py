"""The trainer's ranks: where they meet before a collective, and how rank 0 leads.

Meetings use the trainer's own store, with a deadline of ours, so that a rank that never comes is an error with its
number in it instead of a hang inside a collective. A meeting ends in one way for all: `go` or `abandoned`, decided by
one compare-and-set; who comes late to an abandoned meeting goes on to the next one.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sender.cause import the_cause
from shared.errors import (
    ConfigError,
    Fp8SyncError,
    NonFiniteWeightError,
    PlanError,
    PushError,
    RankMissingError,
    TransferError,
    error_from_wire,
)

_LOOK_S = 0.5

_instances = itertools.count()  # senders are made in the same order on all ranks, as process groups are


class TrainerRanks:
    """All ranks of the default process group, or this process alone if there is none."""

    def __init__(self, meeting_timeout_s: float) -> None:
        self._timeout_s = meeting_timeout_s
        number = next(_instances)
        self._step = 0
        self._shares = 0
        self._mine: list[str] = []  # what this rank has said, before the last meeting and since
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            store = dist.distributed_c10d._get_default_store()
            self._store: Any = dist.PrefixStore(f"fp8sync/{number}", store)
        else:
            self.rank, self.size, self._store = 0, 1, None

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def meet(self, what: str, holding: str = "") -> bool:
        """Return when every rank has called `meet(what)`; whether all of them were `holding` the same.

        Raises:
            RankMissingError: a rank did not come before the deadline, or called another function.
        """
        if self._store is None:
            return True
        num_said = len(self._mine)
        while True:
            step, self._step, self._shares = self._step, self._step + 1, 0
            if self._outcome(step) != "abandoned":
                break
        self._say(f"{step}/here/{self.rank}", json.dumps([what, holding]))
        deadline = time.monotonic() + self._timeout_s
        if self.is_leader:
            self._decide(step, what)
        outcome = self._await_outcome(step, deadline)
        if outcome.startswith("abandoned"):
            raise RankMissingError(f"{what}: {outcome.removeprefix('abandoned: ')}")
        for key in self._mine[:num_said]:  # all ranks are here, and need nothing that was said before
            self._store.delete_key(key)
        del self._mine[:num_said]
        return outcome == "go"

    def _decide(self, step: int, what: str) -> None:
        places, missing = [f"{step}/here/{rank}" for rank in range(self.size)], list[int]()
        deadline = time.monotonic() + self._timeout_s
        while not self._are_there(places, deadline):
            if time.monotonic() >= deadline or self._outcome(step) is not None:
                missing = [rank for rank, place in enumerate(places) if not self._store.check([place])]
                break
        here = [rank for rank in range(self.size) if rank not in missing]
        told = self._store.multi_get([places[rank] for rank in here])
        others = {rank: json.loads(bytes(said)) for rank, said in zip(here, told, strict=True)}
        strangers = {rank: call for rank, (call, _) in others.items() if call != what}
        verdict = "go" if len({holding for _, holding in others.values()}) <= 1 else "go, but they hold different plans"
        if missing:
            verdict = f"abandoned: rank(s) {missing} of {self.size} did not call it within {self._timeout_s:.0f} s"
        elif strangers:
            verdict = f"abandoned: other ranks called something else: {strangers}"
        self._store.compare_set(f"{step}/outcome", "", verdict)
        self._mine.append(f"{step}/outcome")

    def _await_outcome(self, step: int, deadline: float) -> str:
        deadline += 1.0  # the leader's own deadline comes first
        while not self._are_there([f"{step}/outcome"], deadline):
            if time.monotonic() >= deadline:
                gone = f"abandoned: rank 0 did not call it within {self._timeout_s:.0f} s"
                self._store.compare_set(f"{step}/outcome", "", gone)
        return self._text(f"{step}/outcome")

    def _are_there(self, keys: list[str], deadline: float) -> bool:
        """Whether all of `keys` have been said by `deadline`, or for a look in between: others may decide meanwhile."""
        left_s = max(0.001, min(deadline - time.monotonic(), _LOOK_S))
        try:
            self._store.wait(keys, timedelta(seconds=left_s))
        except dist.DistStoreError:
            return False
        return True

    def _outcome(self, step: int) -> str | None:
        key = f"{step}/outcome"
        return self._text(key).split(":")[0] if self._store.check([key]) else None

    def _say(self, key: str, text: str) -> None:
        self._store.set(key, text)
        self._mine.append(key)

    def _text(self, key: str) -> str:
        return bytes(self._store.get(key)).decode()

    def share(self, text: str | None, timeout_s: float) -> str:
        """The text that rank 0 gave, on all ranks. Call it in the same order everywhere, between two meetings.

        Raises:
            RankMissingError: rank 0 gave nothing before the deadline.
        """
        if self._store is None:
            assert text is not None
            return text
        key, self._shares = f"{self._step - 1}/shared/{self._shares}", self._shares + 1
        if self.is_leader:
            assert text is not None
            self._say(key, text)
            return text
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            raise RankMissingError(f"rank 0 said nothing for {timeout_s:.0f} s: it died or hangs") from error
        return self._text(key)

    def tell_all(self, text: str, timeout_s: float) -> list[str]:
        """The text of every rank, in order, on all ranks."""
        if self._store is None:
            return [text]
        number, self._shares = self._shares, self._shares + 1
        keys = [f"{self._step - 1}/shared/{number}/{rank}" for rank in range(self.size)]
        self._say(keys[self.rank], text)
        try:
            self._store.wait(keys, timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            raise RankMissingError(f"a rank said nothing for {timeout_s:.0f} s: it died or hangs") from error
        return [bytes(said).decode() for said in self._store.multi_get(keys)]

    def tell_leader(self, text: str) -> list[str]:
        """The text of every rank, in order, on rank 0; nothing elsewhere. Call it in the same order everywhere.

        Raises:
            RankMissingError: on rank 0: a rank said nothing before the deadline of a meeting.
        """
        if self._store is None:
            return [text]
        if self.is_leader:
            return self.tell_all(text, self._timeout_s)
        number, self._shares = self._shares, self._shares + 1
        self._say(f"{self._step - 1}/shared/{number}/{self.rank}", text)
        return []

    def tell_leader_in_turn(self, text: str, of: Sequence[int], timeout_s: float) -> Iterator[tuple[int, str]]:
        """On rank 0 the text of each of ranks `of`, other than 0, as it is asked for; nothing elsewhere. Call it, and
        take all that it yields, in the same order everywhere.

        Raises:
            RankMissingError: on rank 0: one of them said nothing for `timeout_s`.
        """
        if self._store is None:
            return
        number, self._shares = self._shares, self._shares + 1
        if self.rank in of:
            self._say(f"{self._step - 1}/shared/{number}/{self.rank}", text)
        deadline = time.monotonic() + timeout_s
        for rank in of if self.is_leader else ():
            key = f"{self._step - 1}/shared/{number}/{rank}"
            try:
                self._store.wait([key], timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except dist.DistStoreError as error:
                raise RankMissingError(
                    f"trainer rank {rank} said nothing for {timeout_s:.0f} s: it died or hangs"
                ) from error
            yield rank, self._text(key)


class TryAgain(Exception):
    """All ranks start this call over, with fewer servers, or with servers that are not what they were."""


class Lead:
    """Steps that only one rank takes, mostly rank 0, within a function that all ranks run.

    The first failure is kept and later steps are left out, while all ranks go on with their collectives; `finish`
    then raises the same error on every rank, so that none is left waiting in a collective for one that gave up. What
    failed on another rank than 0 is to come to it by `collect` first.

    `on_failure`: what a rank does at once when something fails on it.
    """

    def __init__(self, ranks: TrainerRanks, on_failure: Callable[[Exception], None] | None = None) -> None:
        self._ranks, self._on_failure = ranks, on_failure
        self.failure: Exception | None = None

    def run(self, step: Callable[..., Any], *args: Any, on: int = 0) -> Any:
        """`step(*args)` on rank `on` if nothing failed there before; None otherwise."""
        if self._ranks.rank != on or self.failure is not None:
            return None
        try:
            return step(*args)
        except Exception as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        self.failure = error
        if self._on_failure is not None:
            self._on_failure(error)

    def collect(
        self, result: str, of: Sequence[int], timeout_s: float, explain: Callable[[Exception], Exception] | None = None
    ) -> dict[int, str]:
        """The `result` of each of ranks `of`, other than 0, on rank 0; nothing elsewhere. A collective.

        What failed on any of them is a failure of rank 0 from here on, in place of its own if it is the cause of that
        (`sender.cause`). `explain`: what rank 0 makes of the first that it hears of, if nothing failed here.
        """
        mine = json.dumps({"result": result}) if self.failure is None else _describe(self.failure)
        found, failures = dict[int, str](), list[Exception]()
        try:
            for rank, text in self._ranks.tell_leader_in_turn(mine, of, timeout_s):
                if "result" in (said := json.loads(text)):
                    found[rank] = str(said["result"])
                    continue
                failures.append(_failure_of(rank, said))
                if self.failure is None:
                    self._fail(failures.pop() if explain is None else explain(failures.pop()))
        except Fp8SyncError as error:
            failures.append(error)
        if not self._ranks.is_leader:
            self.failure = None  # rank 0 says what becomes of it
        elif failures:
            self.failure = the_cause([*filter(None, [self.failure]), *failures])
        return found

    def agree(self, what: str, text: str) -> None:
        """Every rank says its `text`; a failure unless they are the same."""
        try:
            told = self._ranks.tell_leader(text)
        except Fp8SyncError as error:
            self.failure = self.failure or error
            return
        others = {rank: said for rank, said in enumerate(told) if said != told[0]}
        if others and self.failure is None:
            text = f"{what} is another one on rank(s) {sorted(others)} than on rank 0, which says {told[0]!r}: {others}"
            self.failure = ConfigError(text)

    def take_back(self, again: Callable[[Exception], bool]) -> bool:
        """Whether there was a failure, and `again` says that another try is worth it. Another error takes its place."""
        try:
            if self.failure is None or not again(self.failure):
                return False
        except Exception as worse:
            self.failure = worse
            return False
        self.failure = None
        return True

    def finish(
        self,
        result: str | None,
        timeout_s: float,
        on_failure: Callable[[Exception], None] | None = None,
        again: Callable[[Exception], bool] | None = None,
    ) -> str:
        """`result` of rank 0 on all ranks, or its failure raised on all ranks.

        `on_failure` is called on rank 0, after the others were told, so that they do not wait for its cleaning up.

        Raises:
            TryAgain: on all ranks, where `again` says on rank 0 that its failure can be got over.
        """
        if again is not None and self.take_back(again):
            self._ranks.share(json.dumps({"again": True}), timeout_s)
            raise TryAgain
        if self.failure is None:
            message = self._ranks.share(json.dumps({"result": result}), timeout_s)
        else:
            message = self._ranks.share(_describe(self.failure), timeout_s)
        if self.failure is not None:
            failure, self.failure = self.failure, None  # else its traceback, which holds `self`, never goes
            try:
                if on_failure is not None:
                    on_failure(failure)
                raise failure
            finally:
                del failure
        found = json.loads(message)
        if "again" in found:
            raise TryAgain
        if "result" not in found:
            raise error_from_wire(found["kind"], found["message"], tuple(found["problems"]))
        return str(found["result"])


def _describe(failure: Exception) -> str:
    problems: tuple[str, ...] = ()
    if isinstance(failure, PlanError):
        problems = failure.problems
    elif isinstance(failure, NonFiniteWeightError):
        problems = failure.names
    known = failure if isinstance(failure, Fp8SyncError) else PushError(f"{type(failure).__name__}: {failure}")
    text, ranks = str(known).split("\n  - ")[0], known.ranks if isinstance(known, TransferError) else ()
    return json.dumps({"kind": type(known).__name__, "message": text, "problems": problems, "ranks": ranks})


def _failure_of(rank: int, said: dict[str, Any]) -> Exception:
    """What `_describe` told of a failure on trainer rank `rank`."""
    message = f"trainer rank {rank}: {said['message']}"
    failure = error_from_wire(str(said["kind"]), message, tuple(map(str, said["problems"])))
    if isinstance(failure, TransferError):
        failure.ranks = tuple(map(int, said["ranks"]))
    return failure
