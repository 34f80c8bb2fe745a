"""What `benchmarks.push` proves about a server. Each returns what it found, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from benchmarks.expected import compare
from benchmarks.ways import SEEDS, Trains, Way
from examples.local_server import LocalServer
from shared.config import FP8BlockConfig

PROMPTS = [[11, 12, 13], list(range(3, 40))]
NEW_TOKENS = 64  # a server tells of one step in 40
GRAPH = "a captured graph serves what was pushed"


def check(server: LocalServer, *wanted: Mapping[str, str]) -> str:
    """What each rank of a server holds, against `wanted`. Raises: AssertionError: another byte; a missing tensor."""
    num, num_beside = 0, 0
    for rank, (held, of_rank) in enumerate(zip(server.probe(), wanted, strict=True)):
        wrong, beside = compare(held, of_rank)
        if wrong:
            what = f"{len(wrong)} of {len(of_rank)} tensors differ from the reference"
            where = f" on rank {rank}" if len(wanted) > 1 else ""
            raise AssertionError(f"{what}{where}: {wrong[:3]}; has {beside[:3]}")
        num, num_beside = num + len(of_rank), num_beside + len(beside)
    return f"{num} tensors are bit for bit the reference's ({num_beside} hold no weights)"


def graph_serves(way: Way, server: LocalServer, trainer: Trains, config: FP8BlockConfig) -> str:
    """Push weights, others, and the first ones again; what is generated, one request at a time, has to follow.

    Raises: AssertionError: it does not, bit for bit; or there are graphs, and a step went without one.
    """
    log_bytes = server.log.stat().st_size
    with way.sender(server.url, config) as sender:

        def answers(seed: int) -> list[dict[str, Any]]:
            trainer.fill(seed)
            sender.push(trainer.model)
            replies = server.generate(PROMPTS, NEW_TOKENS)
            return [{what: reply[what] for what in ("tokens", "logprobs")} for reply in replies]

        told = follows(*(answers(seed) for seed in (SEEDS[0], SEEDS[1], SEEDS[0])))
    log = server.log.read_bytes()
    return f"{told}; {steps_in_graphs(log[log_bytes:].decode(errors='replace'), has_graphs(server))}"


def follows(first: list[dict[str, Any]], other: list[dict[str, Any]], again: list[dict[str, Any]]) -> str:
    """Raises: AssertionError: a reply is the same from other weights, or another from the same, or no numbers."""
    for number, replies in enumerate(zip(first, other, again, strict=True)):
        for reply in replies:
            if not reply["logprobs"] or not all(math.isfinite(logprob) for logprob in reply["logprobs"]):
                raise AssertionError(f"prompt {number}: log-probabilities {reply['logprobs']}")
        if replies[0] == replies[1]:
            raise AssertionError(f"prompt {number}: the same reply after a push of other weights: {replies[0]}")
        if replies[0] != replies[2]:
            raise AssertionError(f"prompt {number}: {replies[0]}, and of the same weights again {replies[2]}")
    num = sum(len(reply["tokens"]) for reply in first)
    return f"{num} tokens and log-probabilities follow the weights, and come back with them bit for bit"


def has_graphs(server: LocalServer) -> bool:
    return re.search(r"capture .*cuda graph end", server.log.read_text(errors="replace").lower()) is not None


def steps_in_graphs(log: str, graphs: bool) -> str:
    """Of the decoding that a server tells of in `log`. Raises: AssertionError: `graphs`, and not all of it in them."""
    told = re.findall(r"Decode batch.*graph: (True|False)", log)
    if graphs and (not told or "False" in told):
        raise AssertionError(f"CUDA graphs were captured, and steps used them: {told}")
    return f"all of {len(told)} decoding steps in its log ran in a CUDA graph" if graphs else "the server has no graphs"
