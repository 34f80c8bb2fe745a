"""One case: servers and a sender, the push that the fault strikes, and what the servers are afterwards.

Of every server it is known what it held `before`, and which weights every version stands for; so its end is told from
its bytes: OLD, NEW, FENCED (it refuses requests and says why) or GONE (its process was killed). Anything else, such as
bytes of one version under the number of another, is a `Violation`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shared import errors
from tests.faults.case import PLANNING, Case
from tests.faults.models import Trainer, reference
from tests.faults.processes import ServerProcess
from tests.faults.sending import Vanished, WatchedPlane, WatchedSender
from tests.faults.server import Look, Server
from tests.faults.tripwire import Action, Place, Tripwire

OLD, NEW, FENCED, GONE = "old", "new", "fenced", "gone"
SLACK_S = 2.5
_PATIENT_S, _SHORT_S = 6.0, 2.0
# In these a push waits until its deadline.
_WAITING = ("bucket dropped", "bucket repeated", "sender frozen", "sender killed", "sender vanished", "server frozen")


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Ends:
    """What a fault may leave behind. `push`: how the struck push may end."""

    victim: tuple[str, ...] = (OLD,)
    others: tuple[str, ...] = (OLD,)
    push: tuple[str, ...] = ("failed",)


@dataclass
class Pushed:
    """How a push ended: `error` is the class of what it raised, "" if it returned."""

    error: str = ""
    text: str = ""
    seconds: float = 0.0
    version: int | None = None
    how: str = field(init=False)

    def __post_init__(self) -> None:
        self.how = "failed" if self.error else "succeeded"


class Run:
    """`pace`: how much longer than on an idle machine everything takes here; deadlines and slack grow with it."""

    def __init__(self, case: Case, pace: float = 1.0) -> None:
        self.case, self.tripwire, self.slack_s = case, Tripwire(), SLACK_S * pace
        waits = (
            case.kind in (*_WAITING, "commit after its promise")
            or case.kind.startswith(("sender killed", "sender vanished"))
            or case.stage == "join"
        )
        short = waits or case.kind == "requests that never end"
        self.timeout_s = pace * (_SHORT_S if short else _PATIENT_S)
        self.own_process = case.kind in ("server killed", "server frozen", "killed with a quorum")
        self.servers: list[Server | ServerProcess] = []
        self.seeds: dict[int, int] = {}  # the weights that a version stands for
        self.before: list[Look] = []
        self.senders: list[WatchedSender] = []
        self.reusable = True  # whether the sender of the fault may push again
        self.give_up_at = 0.0
        self.ends: list[str] = []
        self._num_seeds = 0

    # Its parts

    def start(self) -> None:
        """Servers, on the weights of a first push if the case is a warm one, and a sender with a plan."""
        case = self.case
        for index in range(case.num_servers):
            apart = self.own_process and index == case.server
            tp = case.tp_size
            self.servers.append(ServerProcess(index, tp) if apart else Server(index, tp, self.tripwire))
        self.new_sender()
        if case.warm:
            self.push(self.new_seed())
        if case.stage.split()[-1] in ("describe", *PLANNING, "open"):  # a session that is open needs none
            self.sender.close()
            self.new_sender()
        else:
            self.sender.inner.prepare(Trainer(0))
        self.before = [server.look() for server in self.servers]

    @property
    def sender(self) -> WatchedSender:
        return self.senders[-1]

    @property
    def promise_s(self) -> float:
        """How long a promise holds, at the deadlines of this run."""
        return 2 * self.timeout_s

    @property
    def victim(self) -> Server:
        found = self.servers[self.case.server]
        assert isinstance(found, Server)
        return found

    @property
    def calls(self) -> list[tuple[str, Any]]:
        return [(server.name, server.call) for server in self.servers]

    def new_sender(self) -> WatchedSender:
        settings: dict[str, Any] = {"quorum": self.case.quorum, "keep_snapshot": self.case.kind == "joiner"}
        self.senders.append(WatchedSender(self.calls, self.case.plane, self.timeout_s, **settings))
        return self.sender

    def new_seed(self) -> int:
        self._num_seeds += 1
        return 100 + self._num_seeds

    def watch_plane(self) -> WatchedPlane:
        return self.sender.watch_plane()

    @property
    def num_buckets(self) -> int:
        plan = self.sender.inner._planned
        assert plan is not None
        return len(plan.layout.buckets)

    def bucket(self) -> int:
        """The number of the bucket that the stage names; the middle one where it names none."""
        return {"first": 0, "last": self.num_buckets - 1}.get(self.case.stage.split()[0], self.num_buckets // 2)

    # Pushing

    def push(self, seed: int, **settings: Any) -> None:
        """A push that has to succeed."""
        pushed = self.try_push(seed, **settings)
        if pushed.error:
            raise Violation(f"a push without a fault failed: {pushed.error}: {pushed.text}")

    def try_push(self, seed: int, allow_s: float = 0.0, **settings: Any) -> Pushed:
        """Push `Trainer(seed)`. It may take its deadline, a little slack, and the `allow_s` of the fault."""
        version = self.next_version()
        self.seeds[version] = seed
        pushed = self.bounded(lambda: self.sender.inner.push(Trainer(seed), **settings), allow_s)
        if pushed.version is not None and pushed.version != version:
            raise Violation(f"version {pushed.version} was published, {version} was expected")
        return pushed

    def next_version(self) -> int:
        """Of a push that gets as far as to choose one."""
        seen = [0, self.sender.inner._fleet._newest]
        for server in self.servers:
            with contextlib.suppress(errors.ServerUnreachableError):
                seen.append(server.look().reply.version)
        return 1 + max(seen)

    def bounded(self, call: Callable[[], Any], allow_s: float = 0.0) -> Pushed:
        found, limit = Pushed(), self.timeout_s + self.slack_s + allow_s

        def run() -> None:
            nonlocal found
            try:
                report = call()
                found = Pushed(version=getattr(report, "version", None))
            except Vanished:
                found = Pushed("Vanished")
            except Exception as error:
                found = Pushed(type(error).__name__, str(error))

        started = time.monotonic()
        self.give_up_at = started + limit
        thread = threading.Thread(target=run, name="faults-push", daemon=True)
        thread.start()
        thread.join(limit)
        if thread.is_alive():
            where = "".join(traceback.format_stack(sys._current_frames()[thread.ident or 0])[-6:])
            raise Violation(
                f"a push still runs {limit:.1f} s after it began; its deadline is {self.timeout_s} s:\n{where}"
            )
        found.seconds = time.monotonic() - started
        return found

    # Arming

    def arm(self, place: Place, action: Action) -> None:
        self.tripwire.arm(place, action)
        self.sender.tripwire.arm(place, action)

    def on_rank(self, stage: str, action: Action) -> None:
        case = self.case
        nth = case.seed % 3 if stage in ("receive", "received", "scatter") else 0
        self.arm(Place(stage, case.server, case.rank, nth), action)

    def alone(self, stage: str, action: Action, victim: int | None = None) -> None:
        """At `stage` on the sender, for the victim, while the messages to the other servers are held back."""
        victim = self.case.server if victim is None else victim
        done = threading.Event()

        def act(data: Any) -> None:
            try:
                action(data)
            finally:
                done.set()

        self.sender.tripwire.arm(Place(stage, victim), act)
        for server in self.servers:
            if server.index != victim:
                held = Place(f"ask {stage.split()[-1]}", server.index)
                self.sender.tripwire.arm(held, lambda data: _require(done.wait(10.0)))

    @property
    def struck(self) -> bool:
        return bool(self.tripwire.struck or self.sender.tripwire.struck)

    # Checking

    def settle(self) -> None:
        """Wait until no server holds anything of the push that was struck; it has until its deadline."""
        for server in self.servers:
            while (state := self._state(server)) in ("RECEIVING", "STAGED", "PROMISED"):
                if time.monotonic() > self.give_up_at:
                    raise Violation(f"{server.name} is still {state}, after the deadline of the push")
                time.sleep(0.02)

    def _state(self, server: Server | ServerProcess) -> str:
        try:
            return server.look().reply.state
        except errors.ServerUnreachableError:
            return GONE

    def check(self, ends: Ends, pushed: Pushed) -> None:
        if pushed.how not in ends.push:
            raise Violation(f"the push {pushed.how} ({pushed.error}: {pushed.text}), expected: {ends.push}")
        self.settle()
        self.ends = [self.end_of(server) for server in self.servers]
        for server, end in zip(self.servers, self.ends, strict=True):
            allowed = ends.victim if server.index == self.case.server else ends.others
            if end not in allowed and not (end == OLD and FENCED in allowed and not self.case.warm):
                raise Violation(f"{server.name} is {end}, may be {allowed}; the push: {pushed}")

    def end_of(self, server: Server | ServerProcess) -> str:
        try:
            look = server.look()
        except errors.ServerUnreachableError:
            return GONE
        before = self.before[server.index]
        if not look.in_step:
            raise Violation(f"the ranks of {server.name} gave different answers")
        if look.serves is None:
            if not look.reason or (look.reply.error is None and not look.reply.fence):
                raise Violation(f"{server.name} refuses requests and does not say why: {look}")
            return OLD if look.prints == before.prints and before.serves is None else FENCED
        if look.reply.fence is not None or (look.reply.error is None and look.reply.version != look.serves):
            raise Violation(f"{server.name} serves version {look.serves} and says otherwise: {look.reply}")
        if look.prints != reference(self.seeds.get(look.serves, -1), server.tp_size):
            raise Violation(f"{server.name} serves version {look.serves} with other weights than those of that version")
        return OLD if look.serves == before.serves else NEW

    def heal(self) -> None:
        """A clean push reaches all servers. Those whose ranks or process are gone are started again first."""
        self.tripwire.disarm()
        for server in self.servers:
            if self._state(server) == GONE or (isinstance(server, Server) and any(rank.lost for rank in server.ranks)):
                server.restart()
        if not (self.reusable and self.case.seed % 2):
            self.new_sender()
        for sender in self.senders:
            sender.tripwire.disarm()  # an error that an action holds holds the frames that it went through
        newest = max(server.look().reply.version for server in self.servers)
        seed, version = self.new_seed(), self.next_version()
        self.push(seed)
        for server in self.servers:
            look = server.look()
            if look.serves != version or version <= newest or look.prints != reference(seed, server.tp_size):
                raise Violation(f"{server.name} does not serve version {version} after a clean push: {look.reply}")

    def close(self) -> None:
        for sender in self.senders:
            sender.close()
        for server in self.servers:
            server.stop()


def _require(condition: bool) -> None:
    if not condition:
        raise Violation("a fault never struck, and others waited for it")
