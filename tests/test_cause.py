"""Which failure is told where several ranks have one, and how ranks other than 0 tell theirs."""

from __future__ import annotations

import time
from typing import Any

from sender.cause import the_cause
from sender.ranks import Lead, TrainerRanks
from shared import errors
from tests.test_ranks import caught, run_on_ranks


def test_the_cause_of_several_failures() -> None:
    broken, quoted = errors.TransferError("a plane broke"), errors.ReceiveError("no memory")
    silent, own = errors.RankMissingError("rank 1 said nothing"), errors.PushError("RuntimeError: enough")
    order = [own, quoted, silent, broken]
    for number, cause in enumerate(order):
        assert the_cause([*reversed(order[number:])]) is cause
    assert the_cause([broken, errors.TransferError("later")]) is broken
    nan = the_cause([broken, own, errors.NonFiniteWeightError(("b", "a")), errors.NonFiniteWeightError(("a", "c"))])
    assert isinstance(nan, errors.NonFiniteWeightError) and nan.names == ("b", "a", "c")


def fail_where(rank: int, failing: dict[int, Exception], explained: bool) -> dict[str, Any]:
    """Ranks 1 and 2 of 3 tell rank 0 what they made, or what failed; rank 2 takes a second longer."""
    ranks, noticed = TrainerRanks(20.0), list[str]()
    ranks.meet("push")
    lead = Lead(ranks, lambda error: noticed.append(str(error)))

    def step() -> str:
        if rank in failing:
            raise failing[rank]
        return f"made by {rank}"

    made = lead.run(step, on=rank)
    if rank == 2:
        time.sleep(1.0)
    found = lead.collect(
        made or "", [1, 2], 20.0, lambda error: errors.ReceiveError(f"of {error}") if explained else error
    )
    still_to_run = lead.run(lambda: True, on=0)
    outcome = caught(lead.finish, "fine", 20.0)
    ranks.meet("push")
    return {**outcome, "found": found, "noticed": noticed, "ran": still_to_run}


def test_rank_0_hears_what_the_others_made() -> None:
    for rank, outcome in enumerate(run_on_ranks(fail_where, 3, {}, False)):
        assert outcome["kind"] == "" and outcome["noticed"] == []
        assert outcome["found"] == ({1: "made by 1", 2: "made by 2"} if rank == 0 else {})


def test_what_failed_on_another_rank_is_raised_on_all() -> None:
    failing: dict[int, Exception] = {1: errors.TransferError("broke", (3,)), 2: ValueError("enough")}
    outcomes = run_on_ranks(fail_where, 3, failing, False)
    for rank, outcome in enumerate(outcomes):
        assert outcome["kind"] == "PushError" and outcome["text"] == "trainer rank 2: ValueError: enough"
        assert outcome["noticed"] == [["trainer rank 1: broke"], ["broke"], ["enough"]][rank] and not outcome["ran"]


def test_the_first_that_is_heard_of_is_explained() -> None:
    outcomes = run_on_ranks(fail_where, 3, {1: errors.TransferError("broke", (3,))}, True)
    for rank, outcome in enumerate(outcomes):
        assert outcome["kind"] == "ReceiveError" and outcome["text"] == "of trainer rank 1: broke"
        assert outcome["noticed"] == [["of trainer rank 1: broke"], ["broke"], []][rank]


def die(rank: int) -> Any:
    ranks = TrainerRanks(20.0)
    ranks.meet("push")
    if rank == 1:
        return "silent"
    lead = Lead(ranks)
    lead.collect("", [1], 0.5)
    return caught(lead.finish, "fine", 20.0)


def test_a_rank_that_says_nothing_is_missed() -> None:
    found, _ = run_on_ranks(die, 2)
    assert found["kind"] == "RankMissingError" and "trainer rank 1 said nothing" in found["text"]
