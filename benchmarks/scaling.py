"""How pushes grow with a model: one table of the figures that several runs of `benchmarks.push` wrote.

python -m benchmarks.scaling out/push/*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits
from benchmarks.table import Row

COLUMNS = ("model", "layers", "experts", "way", "GB", "first, ms", "later, ms", "GB/s", "to the wire")


def summary(runs: Iterable[Mapping[str, Any]]) -> str:
    """Rows that were pushed more than once, the smallest model first. `runs`: what `benchmarks.table.as_json` gave."""
    found: list[tuple[tuple[str, str, int], str]] = []
    for run in runs:
        about, limits = run["about"], None if run["limits"] is None else Limits.model_validate(run["limits"])
        for row in map(Row.model_validate, run["rows"]):
            if row.failed or row.later_s is None:
                continue
            wire_s = None if limits is None else limits.wire_s(row.num_bytes)
            wire = "" if wire_s is None else f"{row.later_s / wire_s:.2f}"
            cells = [
                *(about["chosen"]["model"], str(about["num_layers"]), str(about["num_experts"]), row.way),
                *(f"{row.num_bytes / 1e9:.3g}", f"{1e3 * row.pushes[0].total_s:.1f}", f"{1e3 * row.later_s:.1f}"),
                *(f"{row.num_bytes / 1e9 / row.later_s:.1f}", wire),
            ]
            found.append(((about["chosen"]["model"], row.way, row.num_bytes), f"| {' | '.join(cells)} |"))
    lines = [line for _, line in sorted(found, key=lambda each: each[0])]
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *lines])


if __name__ == "__main__":
    print(summary(json.loads(Path(name).read_text()) for name in sys.argv[1:]))
