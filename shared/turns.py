"""Python's lock, while two threads of one process work on a push and each step of them is small."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_num_inside = 0
_usual_s = sys.getswitchinterval()


@contextmanager
def frequent_turns() -> Iterator[None]:
    """Threads of this process take turns 250 times as often as usual, so that one which takes many small steps
    beside one that is busy in Python does not wait 5 ms before each of them.
    """
    global _num_inside, _usual_s
    with _lock:
        if _num_inside == 0:
            _usual_s = sys.getswitchinterval()
            sys.setswitchinterval(_usual_s / 250)
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0:
                sys.setswitchinterval(_usual_s)
