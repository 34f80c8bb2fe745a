"""What a campaign found, as text for a terminal and as docs/faults.md."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults.campaign import Outcome, repeat_with
from tests.faults.case import KINDS

HEAD = """# Faults

Made by `make faults` on a CPU; no cell is filled by hand. After every case: each server serves exactly one version,
byte for byte the old or the new one on all its ranks, or it refuses requests and says why (*fenced*); nothing took
longer than its deadline; a clean push then reached all servers; no thread, file, socket, shared memory or process was
left.

## Without SGLang

{summary}

One to three servers of one or two ranks (threads), the product's own control route, gate, receiver and sender between
them; for signals, sender or server in a process of its own. *Struck* is the server that the fault hit, *others* those
beside it. Points that are passed on a rank: `tests/faults/case.py`. One case again: `{repeat}`.

| fault | where | memory | tcp | gloo | same_host | violated | the struck push | struck | others |
|---|---|---|---|---|---|---|---|---|---|
"""
REAL = """
## Against real SGLang servers

Two servers over HTTP and sockets; senders in processes of their own where a signal ends or freezes them.

| case | | result |
|---|---|---|
"""


def rows(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each kind at each stage."""
    found = []
    for kind, (stages, _) in KINDS.items():
        for stage in stages:
            these = [o for o in outcomes if (o.case.kind, o.case.stage) == (kind, stage)]
            if these:
                found.append(_row(kind, stage, these))
    return found


def _row(kind: str, stage: str, these: Sequence[Outcome]) -> str:
    planes = Counter(outcome.case.plane for outcome in these)
    violated = sum(bool(outcome.violation) for outcome in these)
    struck = Counter(end for o in these for index, end in enumerate(o.ends) if index == o.case.server)
    others = Counter(end for o in these for index, end in enumerate(o.ends) if index != o.case.server)
    pushes = Counter(outcome.push for outcome in these)
    cells = [
        kind,
        stage,
        str(planes["memory"] or "-"),
        str(planes["tcp"] or "-"),
        str(planes["gloo"] or "-"),
        str(planes["same_host"] or "-"),
        f"**{violated}**" if violated else "0",
    ]
    return f"| {' | '.join([*cells, _counts(pushes), _counts(struck), _counts(others)])} |"


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{what} {number}" for what, number in sorted(found.items()) if what) or "-"


def summary(outcomes: Sequence[Outcome]) -> str:
    violated = sum(bool(outcome.violation) for outcome in outcomes)
    kinds = len({outcome.case.kind for outcome in outcomes})
    return f"{len(outcomes)} cases of {kinds} kinds of fault, {violated} violated."


def by_kind(outcomes: Sequence[Outcome]) -> list[str]:
    found = []
    for kind in KINDS:
        these = [outcome for outcome in outcomes if outcome.case.kind == kind]
        if these:
            seconds, violated = sum(outcome.seconds for outcome in these), sum(bool(o.violation) for o in these)
            found.append(f"{kind:30} {len(these):4} cases {violated:3} violated {seconds:7.1f} s")
    return found


def real_rows(file: Path) -> list[str]:
    """One line for each test in a JUnit file."""
    found = []
    for case in ET.parse(file).getroot().iter("testcase"):
        name, _, parameters = case.get("name", "").removesuffix("]").partition("[")
        failed = any(case.find(kind) is not None for kind in ("failure", "error"))
        result = "**failed**" if failed else "**not run**" if case.find("skipped") is not None else "passed"
        found.append(f"| {name.removeprefix('test_').replace('_', ' ')} | {parameters} | {result} |")
    return found


def document(outcomes: Sequence[Outcome], real: Path | None) -> str:
    head = HEAD.format(summary=summary(outcomes), repeat=repeat_with(17))
    text = head + "\n".join(rows(outcomes)) + "\n"
    if real is None:
        return text
    cases = real_rows(real)
    return text + REAL + "\n".join(cases) + f"\n\n{len(cases)} cases.\n"
