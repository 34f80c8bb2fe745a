"""The rows of `benchmarks.push --load`: pushes while requests generate (`benchmarks.rounds` has what is counted)."""

from __future__ import annotations

import re
import time

from benchmarks.rounds import MARGIN_S, Round, Times, compare_rounds
from benchmarks.streams import Streams
from benchmarks.table import Row
from benchmarks.ways import Trains, Way, fill_for, phases, timed
from examples.local_server import LocalServer
from shared.config import FP8BlockConfig

SLACK_S = 0.2  # so that a round without a push is not shorter than one with it
QUIET_ROUNDS = 2


def load_row(
    way: Way,
    server: LocalServer,
    trainer: Trains,
    config: FP8BlockConfig,
    num_pushes: int,
    num_streams: int,
    new_tokens: int,
) -> Row:
    """The first push and `num_pushes` more, each in a round of `num_streams` requests of `new_tokens`."""
    if (most := kv_tokens(server)) < num_streams * new_tokens:
        raise RuntimeError(f"{most} tokens of KV cache are too few for {num_streams} requests of {new_tokens}")
    pushes, rounds, longest_s = [], [], 0.0  # of the rounds
    with way.sender(server.url, config) as sender, Streams(server.url, num_streams, new_tokens) as streams:
        sender.prepare(trainer.model)
        for number in range(1 + num_pushes):
            fill_for(trainer, number, 1 + num_pushes)
            began = streams.begin()
            time.sleep(MARGIN_S + SLACK_S)
            pushed, report = timed(lambda: sender.push(trainer.model))
            ended = time.monotonic()
            time.sleep(MARGIN_S)
            rounds.append((_round(streams, began), _times(ended, pushed.total_s, report.seconds["commit"])))
            pushes.append(pushed.model_copy(update={"phases": phases(report)}))
            longest_s = max(longest_s, ended + MARGIN_S - began)
        quiet = []
        for _ in range(QUIET_ROUNDS):
            began = streams.begin()
            time.sleep(longest_s + SLACK_S)
            quiet.append(_round(streams, began))
    name = f"{way}, {way.in_flight}, {num_streams} streams"
    return Row(
        way=name,
        num_bytes=report.wire_bytes,
        pushes=pushes,
        load=compare_rounds(way.in_flight, rounds, quiet),
    )


def kv_tokens(server: LocalServer) -> int:
    """How many the server has room for, as it says in its log."""
    found = re.findall(r"max_total_num_tokens=(\d+)", server.log.read_text(errors="replace"))
    if not found:
        raise RuntimeError(f"{server.log} does not say max_total_num_tokens")
    return int(found[-1])


def _round(streams: Streams, began: float) -> Round:
    ended = time.monotonic()
    return Round(began, ended, streams.end())


def _times(ended: float, total_s: float, commit_s: float) -> Times:
    return Times(began=ended - total_s, committing=ended - commit_s, ended=ended)
