"""docs/models.md, made of what the tests recorded: `python -m tests.models_table RESULTS.xml`, by `make models`."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

HEAD = """# Models and layouts

Made by `make models` on a CPU; no cell is filled by hand. The models are tiny ones with random weights
(`tests/zoo.py`).

## On real servers

- **identical**: a server that loaded an FP8 checkpoint the stock way, was pushed other weights and then those of the
  checkpoint again, holds the same bytes on every rank (parameters, buffers, derived tensors) and answers with the same
  tokens and logprobs.
- **as dequantized**: SGLang's Llama loader, which serves Mistral too, drops block scales, so that no server of it can
  start on an FP8 checkpoint. After a push, tokens and logprobs are those of a stock BF16 server that loaded the
  dequantized weights.
"""
IN_PROCESS = """
## In one process, rank by rank

The real SGLang model of every rank, loaded from the FP8 checkpoint, and another one bound by a push: the same bytes
(of Llama and Mistral, whose scales no load can tell: those that their rules cut from the checkpoint's).
"""
REFUSED = """
## Refused at start

More, and by which rules: [refusals.md](refusals.md).

| asked for | the server ends with |
|---|---|
"""


def read(file: Path) -> list[dict[str, str]]:
    """The properties of every test case in a JUnit file, with `outcome`."""
    found = []
    for case in ET.parse(file).getroot().iter("testcase"):
        recorded = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        failed = any(case.find(kind) is not None for kind in ("failure", "error"))
        skipped = case.find("skipped") is not None
        if not recorded.get("family") and ": " in (name := case.get("name", "").rpartition("[")[2].removesuffix("]")):
            recorded["family"], recorded["held"] = name.split(": ", 1)  # in process: named by their parameters
        found.append({**recorded, "outcome": "failed" if failed else "not run" if skipped else "passed"})
    return found


def table(cells: list[dict[str, str]], row: str, column: str) -> list[str]:
    """A Markdown table of the results of `cells`; what no test covered is `-`."""
    rows = list(dict.fromkeys(cell[row] for cell in cells))
    columns = list(dict.fromkeys(cell[column] for cell in cells))
    results = {(cell[row], cell[column]): _result(cell) for cell in cells}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    return lines + [f"| {r} | {' | '.join(results.get((r, c), '-') for c in columns)} |" for r in rows]


def _result(cell: dict[str, str]) -> str:
    if cell["outcome"] != "passed":
        return f"**{cell['outcome']}**"
    return cell["result"]


def main(file: str) -> None:
    recorded = read(Path(file))
    on_servers = [cell for cell in recorded if "layout" in cell]
    print(HEAD)
    print("\n".join(table(on_servers, "family", "layout")))
    print("\n`-`: not among the runs. Linear attention has no forward on a CPU; a GPU run is in benchmarks/RESULTS.md.")
    print(IN_PROCESS)
    print("\n".join(table([cell for cell in recorded if "held" in cell], "family", "held")))
    print(REFUSED, end="")
    for cell in recorded:
        if "refusal" in cell:
            print(f"| `{cell['refusal']}` | {_result(cell)} |")


if __name__ == "__main__":
    main(sys.argv[1])
