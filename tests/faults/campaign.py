"""A case from its seed to its verdict: start, strike, check, heal, and look at what is left behind.

After each: every server serves exactly one version, byte for byte the old or the new one on all its ranks, or it is
fenced and says so; nothing took longer than its deadline; the next push reaches all servers; and when all is closed, no
thread, file, socket, shared memory or process is left.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tests.faults import kinds, kinds_many, kinds_peers, kinds_ways
from tests.faults.case import Case, draw
from tests.faults.kinds import Staged
from tests.faults.leaks import held, left_behind
from tests.faults.run import Run, Violation
from tests.test_ranks import PROCESSES

STAGED: dict[str, Staged] = {
    "exception": kinds.exception,
    "exception while requests go on": kinds.exception_with_keep,
    "rank lost": kinds.rank_lost,
    "request lost": kinds.request_lost,
    "reply lost": kinds.reply_lost,
    "byte flipped": kinds.byte_flipped,
    "byte flipped on one rank": kinds.byte_flipped_on_one_rank,
    "bucket short": kinds.bucket_short,
    "bucket repeated": kinds.bucket_repeated,
    "bucket dropped": kinds.bucket_dropped,
    "buckets swapped": kinds.buckets_swapped,
    "sender killed": kinds_peers.sender_killed,
    "sender killed in mid-bucket": kinds_peers.sender_killed_in_mid_bucket,
    "sender vanished": kinds_peers.sender_vanished,
    "sender frozen": kinds_peers.sender_frozen,
    "server killed": kinds_peers.server_killed,
    "server frozen": kinds_peers.server_frozen,
    "server restarted": kinds.server_restarted,
    "stock update": kinds.stock_update,
    "memory released": kinds.memory_released,
    "model moved": kinds.model_moved,
    "model changed": kinds.model_changed,
    "second sender": kinds.second_sender,
    "second push of one sender": kinds.second_push,
    "requests that never end": kinds.requests_never_end,
    "generation paused": kinds.generation_paused,
    "left out by a quorum": kinds_many.left_out,
    "unheard with a quorum": kinds_many.unheard,
    "killed with a quorum": kinds_many.killed,
    "commit after its promise": kinds_many.commit_after_its_promise,
    "joiner": kinds_many.joiner,
    "late message": kinds.late_message,
    "stale version": kinds.stale_version,
    "exception, staged in place": kinds_ways.exception_in_place,
    "exception, staged in the KV cache": kinds_ways.exception_in_the_kv_cache,
    "byte flipped, staged in place": kinds_ways.byte_flipped_in_place,
    "sender vanished, staged in place": kinds_ways.sender_vanished_in_place,
}


_IDLE_S, _LONGEST_PACE = 0.5, 4.0  # one case of the warm-up on an idle machine


@dataclass(frozen=True)
class Outcome:
    """`violation` is empty if all invariants hold. `push` is how the struck push ended, `ends` what servers became."""

    case: Case
    violation: str
    push: str = ""
    ends: tuple[str, ...] = ()
    seconds: float = 0.0


def run_case(case: Case, pace: float = 1.0) -> Outcome:
    torch.set_num_threads(1)
    before, started = held(), time.monotonic()
    run, push, violation = Run(case, pace), "", ""
    try:
        try:
            run.start()
            ends, pushed = STAGED[case.kind](run)
            push = pushed.error or "succeeded"
            if not run.struck:
                raise Violation(f"the fault never struck; the push: {pushed}")
            run.check(ends, pushed)
            run.heal()
        finally:
            run.close()
        # A thread that waits for the data plane of a sender that died outlives its session: a store is tried twice.
        if left := left_behind(before, 2 * run.timeout_s + run.slack_s):
            raise Violation("left behind: " + "; ".join(left))
    except Violation as error:
        violation = str(error)
    except Exception:
        violation = traceback.format_exc()
    return Outcome(case, violation, push, tuple(run.ends), time.monotonic() - started)


def run_seed(seed: int, pace: float = 1.0) -> Outcome:
    return run_case(draw(seed), pace)


def warm_up() -> float:
    """What is made once in a process is no leak of the first case. Returns the pace of this machine just now."""
    process = PROCESSES.Process(target=int)  # starts the server that forks all others
    process.start()
    process.join(60.0)
    dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # its library keeps a pipe for good
    seconds = [run_seed(seed, _LONGEST_PACE).seconds for seed in (0, 1, 0, 1, 0)]
    return min(_LONGEST_PACE, max(1.0, max(seconds[2:]) / _IDLE_S))


def repeat_with(seed: int) -> str:
    """The command that repeats a case."""
    return f"python -m tests.faults --seed {seed}"
