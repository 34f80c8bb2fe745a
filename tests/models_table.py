"""docs/models.md, made of what the tests recorded: `python -m tests.models_table RESULTS.xml`, by `make models`."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

HEAD = """# Models and layouts

Made by `make models` from real SGLang servers on a CPU; no cell is filled by hand. **identical**: a server that loaded
an FP8 checkpoint the stock way, was pushed other weights and then those of the checkpoint again, holds the same bytes
on every rank (parameters, buffers, derived tensors) and answers with the same tokens and logprobs.
"""


def read(file: Path) -> list[dict[str, str]]:
    """The properties of every test case in a JUnit file, with `outcome`."""
    found = []
    for case in ET.parse(file).getroot().iter("testcase"):
        recorded = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        failed = any(case.find(kind) is not None for kind in ("failure", "error"))
        skipped = case.find("skipped") is not None
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
    layouts = [cell for cell in recorded if "layout" in cell]
    refused = [cell for cell in recorded if "refusal" in cell]
    print(HEAD)
    print("\n".join(table(layouts, "family", "layout")))
    print("\n`-`: this tiny model's sizes do not allow the layout, or it says nothing that another cell does not.")
    print("\n## Refused at start\n\n| asked for | the server ends with |\n|---|---|")
    for cell in refused:
        print(f"| `{cell['refusal']}` | {_result(cell)} |")


if __name__ == "__main__":
    main(sys.argv[1])
