"""`python -m tests.faults`: the campaign. `--seed N` repeats one case; `--cases N` runs seeds 0 to N-1."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--seed", type=int, action="append", help="repeat this case; may be given several times")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    words = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    from tests.faults.campaign import run_seed, warm_up

    logging.disable(logging.CRITICAL)
    seeds = words.seed or range(words.first, words.first + words.cases)
    warm_up()
    bad = 0
    for seed in seeds:
        outcome = run_seed(seed)
        verdict = "ok" if not outcome.violation else "VIOLATED"
        print(
            f"{seed:4} {outcome.seconds:6.1f} s  {verdict}  {outcome.case}: {outcome.push} {outcome.ends}", flush=True
        )
        if outcome.violation:
            bad += 1
            print(outcome.violation, f"repeat it: python -m tests.faults --seed {seed}", sep="\n", flush=True)
    print(f"{len(seeds)} cases, {bad} violated")
    return int(bad > 0)


if __name__ == "__main__":
    started = time.monotonic()
    sys.exit(main())
