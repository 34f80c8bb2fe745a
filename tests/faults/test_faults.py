"""A reduced campaign (`make faults` runs all of it), and that the campaign would find what it looks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TextIO

import pytest
import torch

from receiver_plugin.receiver import Receiver
from shared import protocol
from tests.faults import kinds
from tests.faults.campaign import STAGED, repeat_with, run_case, run_seed, warm_up
from tests.faults.case import KINDS, SLOW, Case, draw, places, reduced
from tests.faults.run import Ends, Pushed, Run
from tests.faults.server import Server
from tests.faults.tripwire import Place


@pytest.fixture(scope="module", autouse=True)
def pace() -> Iterator[float]:
    num_threads = torch.get_num_threads()
    yield warm_up()
    torch.set_num_threads(num_threads)


NUM_REDUCED = 36  # every kind that starts no process, and some twice


def test_every_kind_is_staged_and_drawn() -> None:
    assert set(STAGED) == set(KINDS)
    assert {(c.kind, c.stage, c.plane) for c in map(draw, range(len(places())))} == set(places())
    assert draw(7) == draw(7)
    assert {draw(seed).kind for seed in reduced(NUM_REDUCED)} == set(KINDS) - set(SLOW)


@pytest.mark.parametrize("seed", reduced(NUM_REDUCED), ids=lambda seed: f"{seed}: {draw(seed)}")
def test_a_fault(seed: int, pace: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")  # a logged error is kept by pytest, and with it the frames and sockets it came from
    outcome = run_seed(seed, pace)
    assert not outcome.violation, f"{outcome.violation}\n{outcome.case}\nrepeat it: {repeat_with(seed)}"


# ---- a campaign that finds nothing proves nothing: these faults break the rules on purpose


CASE = Case(0, "bucket dropped", "first bucket", "memory", 1, 2, 0, 1, True)


def mixed(run: Run) -> tuple[Ends, Pushed]:
    """One rank keeps the old weights under the new version."""
    model = run.victim.models[1]
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pushed = run.try_push(run.new_seed())
    for name, parameter in model.named_parameters():
        parameter.detach().copy_(old[name])
    return Ends(("new",), (), ("succeeded",)), pushed


def hanging(run: Run) -> tuple[Ends, Pushed]:
    return Ends(), run.bounded(lambda: run.sender.gone.wait(20.0))


def forgotten(run: Run) -> tuple[Ends, Pushed]:
    """A push that was begun and that nobody ends before its deadline, which is far away."""
    fleet = run.sender.inner._fleet
    begin = protocol.Begin(session=fleet._session, version=2, deadline_s=600.0)
    pushed = run.bounded(lambda: run.victim.call(begin, 5.0))
    return Ends(("old",), (), ("succeeded",)), pushed


KEPT: list[TextIO] = []


def leaking(run: Run) -> tuple[Ends, Pushed]:
    KEPT.append(open(__file__))  # noqa: SIM115
    return kinds.stale_version(run)


@pytest.mark.parametrize(
    ("stage", "verdict"),
    [
        (mixed, "other weights than those of that version"),
        (hanging, "still runs"),
        (forgotten, "is still RECEIVING"),
        (leaking, "left behind: files"),
        (lambda run: (Ends(), run.try_push(run.new_seed())), "the push succeeded"),
    ],
)
def test_a_broken_rule_is_found(
    stage: Callable[[Run], tuple[Ends, Pushed]], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGED, CASE.kind, struck(stage))
    assert verdict in run_case(CASE).violation


def struck(stage: Callable[[Run], tuple[Ends, Pushed]]) -> Callable[[Run], tuple[Ends, Pushed]]:
    def staged(run: Run) -> tuple[Ends, Pushed]:
        ended = stage(run)
        run.tripwire.struck.append(Place("ask begin"))
        return ended

    return staged


def test_a_server_that_starts_again_is_another_one() -> None:
    run = Run(CASE)
    run.start()
    first: Receiver = run.victim.receivers[0]
    run.victim.restart()
    assert isinstance(run.victim, Server) and run.victim.receivers[0]._incarnation != first._incarnation
    run.close()
