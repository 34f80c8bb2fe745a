"""What this process holds: threads, files and sockets, mapped shared memory, children."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    threads: frozenset[str]
    num_native_threads: int
    files: frozenset[str]
    shared_memory: frozenset[str]
    children: frozenset[str]


def held() -> Held:
    me = Path("/proc/self")
    files = set()
    for descriptor in os.listdir(me / "fd"):
        with contextlib.suppress(OSError):
            files.add(f"{descriptor}: {os.readlink(me / 'fd' / descriptor)}")
    maps = (line.split(maxsplit=5)[-1] for line in (me / "maps").read_text().splitlines())
    tasks = os.listdir(me / "task")
    children: set[str] = set()
    for task in tasks:
        with contextlib.suppress(OSError):
            children |= set((me / "task" / task / "children").read_text().split())
    return Held(
        threads=frozenset(f"{thread.name} ({thread.ident})" for thread in threading.enumerate()),
        num_native_threads=len(tasks),
        files=frozenset(file for file in files if "/proc/" not in file),
        shared_memory=frozenset(found for found in maps if found.startswith(("/dev/shm/", "/memfd:fp8sync"))),
        children=frozenset(children),
    )


def left_behind(before: Held, timeout_s: float) -> list[str]:
    """What is held now and was not `before`, once it had `timeout_s` to go away."""
    deadline = time.monotonic() + timeout_s
    while (found := _more(before, held())) and time.monotonic() < deadline:
        gc.collect()  # an error in a cycle keeps the sockets of its frames
        time.sleep(0.02)
    return found


def _more(before: Held, now: Held) -> list[str]:
    found = [
        f"{what}: {sorted(more)}"
        for what in ("threads", "files", "shared_memory", "children")
        if (more := getattr(now, what) - getattr(before, what))
    ]
    if now.num_native_threads > before.num_native_threads and not found:
        found.append(f"{now.num_native_threads} native threads, {before.num_native_threads} before")
    return found
