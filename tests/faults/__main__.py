"""`python -m tests.faults`: the campaign against all data planes. `--seed N` repeats one case.

`make faults` runs it after the cases on real servers, whose results it puts into docs/faults.md beside its own.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.campaign import Outcome

NUM_CASES = 600  # every kind at every stage on every plane, and some of them once more


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, action="append", help="run this case only; may be given several times")
    parser.add_argument("--cases", type=int, default=NUM_CASES, help="run seeds 0 to CASES - 1")
    parser.add_argument("--document", type=Path, help="write the table here")
    parser.add_argument("--real", type=Path, help="JUnit results of the cases on real servers, for the table")
    words = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    logging.disable(logging.CRITICAL)
    outcomes = run(words.seed or range(words.cases))
    from tests.faults.report import by_kind, document, summary

    print("\n".join(["", *by_kind(outcomes), summary(outcomes)]))
    if words.document is not None:
        real = words.real if words.real is not None and words.real.exists() else None
        words.document.write_text(document(outcomes, real), encoding="utf-8")
    return int(any(outcome.violation for outcome in outcomes))


def run(seeds: Iterable[int]) -> list[Outcome]:
    from tests.faults.campaign import repeat_with, run_seed, warm_up

    pace, outcomes = warm_up(), []
    for seed in seeds:
        outcome = run_seed(seed, pace)
        outcomes.append(outcome)
        verdict = "ok" if not outcome.violation else "VIOLATED"
        ended = f"{outcome.push}; servers: {', '.join(outcome.ends)}"
        print(f"{seed:4} {outcome.seconds:5.1f} s  {verdict}  {outcome.case}: {ended}", flush=True)
        if outcome.violation:
            print(outcome.violation, f"repeat it: {repeat_with(seed)}", sep="\n", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
