"""`make compat`: the end-to-end proof on each supported SGLang release, one after the other; then docs/compat.md.

The release of the environment is used as it is. An older one is installed into a folder of its own that stands first
on the path, without its dependencies: torch and the rest are the environment's, except for what `RELEASES` names.
The folder is removed when its release is done, however that ended. `python -m tests.compat.run 0.5.23` runs one
release again; the document is made of the last run of each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.models_table import read

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out" / "compat"
DOCUMENT = ROOT / "docs" / "compat.md"
TESTS = ("tests/test_hooks.py", "tests/compat")
TIMEOUT_S = 1800.0
# Release -> what its Python code needs in another version than the environment has; none: the environment's release.
RELEASES: dict[str, tuple[str, ...]] = {
    "0.5.16": ("transformers==5.12.1", "tokenizers==0.22.2"),
    "0.5.20": ("transformers==5.12.1", "tokenizers==0.22.2"),
    "0.5.23": (),
}
HEAD = """# SGLang releases

Made by `make compat` on a CPU; no cell is filled by hand. Each row is one real server of that release, started with
`--load-plugin fp8sync` on a folder without weights: fenced before its first push; then, after two pushes, equal to a
server of the same release that loaded the exported FP8 checkpoint, and its replies named the version that they were
computed with. Older releases ran beside the torch of the environment, not beside the one that they ask for.
"""


def main(words: list[str]) -> int:
    """Run the releases in `words` (default: all); write the document if all have run. Returns the exit status."""
    releases = words or list(RELEASES)
    if unknown := sorted(set(releases) - set(RELEASES)):
        raise SystemExit(f"unknown release {unknown[0]}: known are {', '.join(RELEASES)}")
    table = []
    for release in releases:
        start = time.monotonic()
        run(release)
        found = recorded(release)
        good = bool(found) and all(row["result"] == "passed" for row in found)
        table.append(f"{release:10} | {'passed' if good else 'FAILED':8} | {time.monotonic() - start:7.0f}")
    rows = {release: recorded(release) for release in RELEASES}
    if all(rows.values()) or not words:
        missing = {"result": "**did not run**"}
        whole = [row for release, found in rows.items() for row in found or [{"sglang": release, **missing}]]
        DOCUMENT.write_text(document(whole), encoding="utf-8")
    print("\n".join(["", "SGLang     | result   | seconds", *table]))
    return int(any("FAILED" in line for line in table))


def run(release: str) -> None:
    """Install `release` if the environment has another one, test it, and record what came of it."""
    folder, results = OUT / release, OUT / f"{release}.xml"
    OUT.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    print(f"== SGLang {release}", flush=True)
    env = dict(os.environ)
    try:
        if needs := RELEASES[release]:
            shutil.rmtree(folder, ignore_errors=True)
            install(folder, (f"sglang=={release}", *needs))
            env["PYTHONPATH"] = str(folder)
        pytest = [sys.executable, "-m", "pytest", *TESTS, "-m", "", "-o", "junit_family=xunit1", "-W", "ignore"]
        pytest += [f"--junitxml={results}", "-p", "no:cacheprovider"]
        subprocess.run(pytest, cwd=ROOT, env=env, timeout=TIMEOUT_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recorded(release: str) -> list[dict[str, str]]:
    """A row for each model in the last run of `release`, and one for its hooks if they failed."""
    results = OUT / f"{release}.xml"
    cases = read(results) if results.exists() else []
    rows = [judged(case, release) for case in cases if "model" in case]
    if any(case["outcome"] == "failed" for case in cases if "model" not in case):
        rows.append({"sglang": release, "model": "hooks", "result": "**failed**"})
    return rows


def install(folder: Path, packages: tuple[str, ...]) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(pip, check=True, timeout=600.0)


def judged(case: dict[str, str], release: str) -> dict[str, str]:
    """A row of the document. A test that ran on another release than the wanted one has proved nothing."""
    ran_on = case.get("sglang", release)
    if case["outcome"] == "passed" and ran_on == release:
        return {**case, "result": "passed"}
    return {**case, "sglang": release, "result": "**wrong release**" if ran_on != release else f"**{case['outcome']}**"}


def document(rows: list[dict[str, str]]) -> str:
    columns = ("sglang", "torch", "transformers", "model", "proved", "result")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(row.get(column, '-') for column in columns)} |" for row in rows]
    return HEAD + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
