"""`sender/ranks.py` with real processes: ranks that come, come late, never come, or want something else."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from sender.ranks import Lead, TrainerRanks
from shared import errors

Body = Callable[..., Any]

# ---- trainer processes; tests/test_distributed.py uses them too

PROCESSES = multiprocessing.get_context("forkserver")  # one process imports torch, all others are forked from it
PROCESSES.set_forkserver_preload(["torch.distributed.fsdp", "sender", "receiver_plugin.receiver"])


def run_on_ranks(body: Body, size: int, *args: Any, timeout_s: float = 60.0, backend: str = "gloo") -> list[Any]:
    """What `body(rank, *args)` returned in each of `size` processes of one group; with NCCL each has a GPU."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(size)]
    processes = [
        PROCESSES.Process(target=_be_rank, args=(rank, size, store.port, writer, body, args, backend), daemon=True)
        for rank, (_, writer) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()
        deadline = time.monotonic() + timeout_s
        return _results([reader for reader, _ in pipes], deadline)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _be_rank(
    rank: int, size: int, port: int, writer: Connection, body: Body, args: Sequence[Any], backend: str
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    try:
        writer.send((True, body(rank, *args)))
    except Exception as error:
        writer.send((False, f"{type(error).__name__}: {error}"))
    time.sleep(60.0)  # a rank that is done must not close connections that others still use


def _results(readers: list[Connection], deadline: float) -> list[Any]:
    """A rank that fails is named at once: others may wait for it until the end."""
    found, waiting = dict[int, Any](), dict(enumerate(readers))
    while waiting:
        ready = wait(waiting.values(), max(0.0, deadline - time.monotonic()))
        assert ready, f"rank(s) {sorted(waiting)} hang"
        for rank in [rank for rank, reader in waiting.items() if reader in ready]:
            try:
                good, found[rank] = waiting.pop(rank).recv()
            except EOFError:
                good, found[rank] = True, "died"
            assert good, f"rank {rank}: {found[rank]}"
    return [found[rank] for rank in range(len(readers))]


def caught(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The error of a call in words that fit through a pipe, and how long it took."""
    started, found = time.monotonic(), {"kind": "", "text": "", "problems": ()}
    try:
        function(*args, **kwargs)
    except Exception as error:
        found = {"kind": type(error).__name__, "text": str(error)}
        found["problems"] = getattr(error, "problems", getattr(error, "names", ()))
    return {**found, "seconds": time.monotonic() - started}


def wait_for(key: str) -> None:
    dist.distributed_c10d._get_default_store().wait([key], timedelta(seconds=30))


def tell(key: str) -> None:
    dist.distributed_c10d._get_default_store().set(key, "")


# ---- meetings


def meet_and_talk(rank: int) -> list[Any]:
    ranks, other = TrainerRanks(20.0), TrainerRanks(20.0)
    heard: list[Any] = []
    assert (ranks.rank, ranks.size, ranks.is_leader) == (rank, 3, rank == 0)
    for push in range(4):
        ranks.meet("push")
        heard.append(ranks.share(f"plan {push}" if rank == 0 else None, 20.0))
        heard.append(ranks.tell_all(f"{push} from {rank}", 20.0))
        heard.append(ranks.share(f"done {push}" if rank == 0 else None, 20.0))
        if push % 2:
            other.meet("push of another sender")
            heard.append(other.share(f"other {push}" if rank == 0 else None, 20.0))
    return heard


def test_ranks_meet_and_hear_the_same() -> None:
    heard = run_on_ranks(meet_and_talk, 3)
    assert heard[0] == heard[1] == heard[2]
    assert heard[0][:4] == ["plan 0", ["0 from 0", "0 from 1", "0 from 2"], "done 0", "plan 1"]
    assert heard[0][6] == "other 1" and len(heard[0]) == 14


def one_is_late(rank: int, late: int) -> list[Any]:
    ranks = TrainerRanks(1.0 if rank != late else 20.0)
    others = [other for other in range(3) if other != late]
    found = {"kind": "late"}
    if rank == late:
        for other in others:
            wait_for(f"failed/{other}")
    else:
        found = caught(ranks.meet, "push")
        tell(f"failed/{rank}")
        ranks._timeout_s = 20.0
    ranks.meet("push")  # the retry
    text = ranks.share("together again" if rank == 0 else None, 20.0)
    ranks.meet("push")
    return [found, text]


@pytest.mark.parametrize("late", [0, 2])
def test_a_missing_rank_is_named_and_meets_the_others_at_the_retry(late: int) -> None:
    for rank, (found, text) in enumerate(run_on_ranks(one_is_late, 3, late)):
        assert text == "together again"
        if rank != late:
            assert found["kind"] == "RankMissingError" and 0.9 < found["seconds"] < 5.0
            named = "rank(s) [2] of 3 did not call it" if late else "rank 0 did not call it"
            assert found["text"].startswith("push: ") and named in found["text"]


def call_different_functions(rank: int) -> list[Any]:
    ranks = TrainerRanks(20.0)
    found = caught(ranks.meet, "prepare" if rank == 1 else "push")
    ranks.meet("push")
    return [found, ranks.tell_all(str(rank), 20.0)]


def test_ranks_that_call_different_functions_are_told_at_once() -> None:
    for rank, (found, heard) in enumerate(run_on_ranks(call_different_functions, 3)):
        assert found["kind"] == "RankMissingError" and found["seconds"] < 5.0
        assert found["text"].startswith("prepare: " if rank == 1 else "push: ")
        assert "{1: 'prepare'}" in found["text"]
        assert heard == ["0", "1", "2"]


def one_dies(rank: int, dead: int) -> Any:
    ranks = TrainerRanks(20.0)
    ranks.meet("push")
    if rank == dead:
        os._exit(1)
    if dead == 0:
        return caught(ranks.share, None, 0.5)
    return caught(ranks.tell_all, "here", 0.5)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_after_the_meeting_leaves_no_one_waiting(dead: int) -> None:
    found = run_on_ranks(one_dies, 2, dead)
    assert found[dead] == "died"
    assert found[1 - dead]["kind"] == "RankMissingError" and found[1 - dead]["seconds"] < 5.0


# ---- the lead of rank 0

FAILURES: list[Exception] = [
    errors.PlanError("no fit", ("a: missing", "b: too small")),
    errors.NonFiniteWeightError(("a.weight", "b.weight")),
    errors.SessionLostError("server-1: restarted"),
    errors.ConfigError("wrong"),
    ValueError("not one of ours"),
]


def lead_into(rank: int) -> list[Any]:
    ranks, results = TrainerRanks(20.0), []
    for number in range(len(FAILURES)):
        ranks.meet("push")
        lead = Lead(ranks)
        steps: list[str] = []

        def fail(failure: Exception = FAILURES[number]) -> None:
            raise failure

        given = lead.run(lambda done=steps: done.append("before") or "result")
        lead.run(fail)
        lead.run(steps.append, "after")
        results.append((caught(lead.finish, "report", 20.0), steps, given))
    ranks.meet("push")
    lead = Lead(ranks)
    return [results, lead.finish(lead.run(str.upper, "all went well"), 20.0)]


def test_a_failure_of_rank_0_is_raised_on_all_ranks() -> None:
    for rank, (results, text) in enumerate(run_on_ranks(lead_into, 3)):
        assert text == "ALL WENT WELL"
        for failure, (found, steps, given) in zip(FAILURES, results, strict=True):
            assert (steps, given) == ((["before"], "result") if rank == 0 else ([], None))
            foreign = rank != 0 and not isinstance(failure, errors.Fp8SyncError)
            assert found["kind"] == ("PushError" if foreign else type(failure).__name__)
            assert found["text"] == ("ValueError: not one of ours" if foreign else str(failure))
            assert found["problems"] == getattr(failure, "problems", getattr(failure, "names", ()))


def agree_thrice(rank: int) -> list[Any]:
    """On the same, on different words, and without rank 2."""
    ranks, results = TrainerRanks(1.0), []
    for number in range(3):
        ranks.meet("push")
        if number == 2 and rank == 2:
            break
        lead = Lead(ranks)
        lead.agree("the colour", "blue" if number == 0 or rank == 0 else f"green{rank}")
        results.append(caught(lead.finish, lead.run(str, "agreed"), 20.0))
    return results


def test_ranks_that_do_not_agree_are_named() -> None:
    for rank, (same, different, *missing) in enumerate(run_on_ranks(agree_thrice, 3)):
        assert same["kind"] == "" and different["kind"] == "ConfigError"
        wanted = "the colour is another one on rank(s) [1, 2] than on rank 0, which says 'blue': "
        assert different["text"] == wanted + "{1: 'green1', 2: 'green2'}"
        assert [found["kind"] for found in missing] == ["RankMissingError"] * (rank != 2)
        assert all(found["seconds"] < 10.0 for found in missing)


def test_a_trainer_of_one_process_needs_no_group() -> None:
    ranks = TrainerRanks(0.1)
    ranks.meet("push")
    assert (ranks.rank, ranks.size, ranks.is_leader) == (0, 1, True)
    assert ranks.share("text", 0.1) == "text" and ranks.tell_all("text", 0.1) == ["text"]
    lead = Lead(ranks)
    lead.agree("the colour", "blue")
    lead.run(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        lead.finish("", 0.1)


def meet_many_times(rank: int) -> list[int]:
    ranks, found = TrainerRanks(10.0), list[int]()
    store = dist.distributed_c10d._get_default_store()
    for number in range(40):
        assert ranks.meet("push", "a plan")
        assert ranks.tell_all(f"{rank}", 10.0) == ["0", "1", "2"]
        assert ranks.share("said" if rank == 0 else None, 10.0) == "said"
        assert ranks.tell_leader(f"{rank}") == (["0", "1", "2"] if rank == 0 else [])
        in_turn = ranks.tell_leader_in_turn(f"{rank}", [2], 10.0)
        assert list(in_turn) == ([(2, "2")] if rank == 0 else [])
        dist.barrier()
        if number % 10 == 9:
            found.append(store.num_keys())
        dist.barrier()
    return found


def test_what_was_said_is_forgotten() -> None:
    """A run of weeks fills no store, and no rank does the work of all others for that."""
    for found in run_on_ranks(meet_many_times, 3):
        assert len(set(found)) == 1, found


def test_a_meeting_is_over_as_soon_as_all_are_there() -> None:
    for took_s in run_on_ranks(meet_quickly, 3):
        assert took_s < 0.5, "nobody waits for a look"


def meet_quickly(rank: int) -> float:
    ranks, longest = TrainerRanks(10.0), 0.0
    for number in range(5):
        dist.barrier()
        time.sleep(0.05 * ((rank + number) % 3))
        started = time.monotonic()
        ranks.meet("push")
        longest = max(longest, time.monotonic() - started)
    return longest
