"""What a copy of this project that `benchmarks.timeline` made imports: timers around its steps."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

LEAST_S = 1e-4
_MOST = 10_000  # steps that are remembered; a process that never tells forgets the others
_steps: list[tuple[float, float, str, str]] = []


def time_steps(owner: type, names: str, tells: str = "") -> None:
    """Time methods `names` (by spaces) of `owner`. `tells`: the one after which all is printed that was timed."""
    for name in names.split():
        setattr(owner, name, _timed(getattr(owner, name), f"{owner.__name__}.{name}", tells == name))


def _timed(method: Callable[..., Any], step: str, tells: bool) -> Callable[..., Any]:
    def note(began: float, args: tuple[Any, ...]) -> None:
        kind = getattr(args[1], "kind", "") if len(args) > 1 else ""
        if len(_steps) < _MOST:
            _steps.append((began, time.time(), threading.current_thread().name, f"{step} {kind}".rstrip()))
        if tells and kind in ("", "commit"):
            tell()

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            began = time.time()
            try:
                return await method(*args, **kwargs)
            finally:
                note(began, args)

        return awaited

    @functools.wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.time()
        try:
            return method(*args, **kwargs)
        finally:
            note(began, args)

    return timed


def tell() -> None:
    steps, _steps[:] = sorted(_steps), []
    lines = [
        f"timer {1e3 * (began % 1000):.2f} +{1e3 * (ended - began):.2f} {thread}: {step}"
        for began, ended, thread, step in steps
        if ended - began >= LEAST_S
    ]
    print("\n".join(lines), flush=True)
