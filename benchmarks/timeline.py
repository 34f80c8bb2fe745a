"""Where the time of a push goes: a copy of this checkout with timers around the steps of both sides.

    python -m benchmarks.timeline ../timed && cd ../timed && PYTHONPATH=$PWD python -m benchmarks.push --only ours ...

After each push the benchmark, and after each commit the log of a server, has a line for every step that took 0.1 ms or
more: `timer BEGAN +TOOK THREAD: STEP`, in milliseconds. All processes of a host have one clock. To time is to slow
down: no figure for RESULTS.md comes from such a copy without a word about it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "examples", "receiver_plugin", "sender", "shared", "tests")
STEPS: dict[str, dict[str, str]] = {
    "sender/sender.py": {"FP8Sender": "_meet _meet_and_plan _publish _finish push"},
    "sender/leader.py": {"Leader": "plan begin verify commit report"},
    "sender/sources.py": {"Sources": "of"},
    "sender/servers.py": {"Servers": "try_each"},
    "sender/ranks.py": {"Lead": "agree finish collect"},
    "sender/gather.py": {"Gatherer": "begin", "Gathering": "quantize gather"},
    "sender/holder.py": {"Holder": "pack check_finite"},
    "sender/slices.py": {"SliceHolder": "pack send _put"},
    "sender/sending.py": {"SendingHalf": "send flush take_digests_ahead"},
    "sender/sending_ranks.py": {"SendingRanks": "begin end"},
    "sender/connections.py": {"Connections": "post"},
    "shared/planes/nccl.py": {
        "NcclSender": "send flush",
        "NcclReceiver": "receive arrive",
        "_Broadcasts": "start finish",
    },
    "shared/planes/same_host.py": {
        "SameHostSender": "room send put flush _wait_for_places _wait_for_copies",
        "SameHostReceiver": "expect receive arrive release written",
        "_Rank": "_open _let_go",
    },
    "receiver_plugin/session.py": {"Session": "begin make_room _receive _take end_transfer"},
    "receiver_plugin/staging.py": {"Staging": "accept commit check_addresses"},
    "receiver_plugin/landing.py": {"Landing": "digests settle", "Digests": "begin read"},
    "receiver_plugin/sglang_engine.py": {
        "SglangEngine": "unsafe info flush_cache synchronize publish",
        "TpRanks": "gather",
    },
    "receiver_plugin/http.py": {"Control": "answer"},
    "receiver_plugin/sglang_http.py": {"SchedulerChannel": "ask"},
    "receiver_plugin/receiver.py": {"Receiver": "_ready_to_commit _copy handle"},
}
TELLS = {"FP8Sender": "push", "Receiver": "handle", "Control": "answer"}


def copy_with_timers(to: Path) -> None:
    """Raises: FileExistsError: there is something."""
    to.mkdir(parents=True)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", to)
    for path, owners in STEPS.items():
        lines = [f"_timers.time_steps({owner}, {names!r}, {TELLS.get(owner, '')!r})" for owner, names in owners.items()]
        with (to / path).open("a", encoding="utf-8") as file:
            file.write("\n".join(["", "from benchmarks import timers as _timers", *lines, ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that the copy is made in; it must not be there")
    copy_with_timers(parser.parse_args().folder)
