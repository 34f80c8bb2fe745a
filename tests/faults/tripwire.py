"""Where a fault strikes: a named point that a push passes, and what happens there, once.

The fakes around sender and receivers call `at` wherever a fault may be put. A campaign arms one point with an action:
raise, kill this process, wait, damage the bytes that pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

Action = Callable[[torch.Tensor | None], None]


class InjectedError(RuntimeError):
    """What a fault raises: no error of fp8sync, so nothing expects it."""


@dataclass(frozen=True)
class Place:
    """`nth`: how often the point is passed before the fault strikes there."""

    stage: str
    server: int = 0
    rank: int = 0
    nth: int = 0


class Tripwire:
    """Points and their actions. Safe on all threads; an action runs outside of the lock and at most once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[tuple[Place, Action]] = []
        self._passed: dict[Place, int] = {}
        self.struck: list[Place] = []

    def arm(self, place: Place, action: Action) -> None:
        with self._lock:
            self._armed.append((place, action))
            self._passed[place] = 0

    def disarm(self) -> None:
        with self._lock:
            self._armed.clear()

    def at(self, stage: str, server: int, rank: int = 0, data: torch.Tensor | None = None) -> None:
        """`data`: the bytes that pass here; an action may change them."""
        for action in self._due(stage, server, rank):
            action(data)

    def _due(self, stage: str, server: int, rank: int) -> list[Action]:
        due = []
        with self._lock:
            for place, action in list(self._armed):
                if (place.stage, place.server, place.rank) != (stage, server, rank):
                    continue
                self._passed[place] += 1
                if self._passed[place] == place.nth + 1:
                    self._armed.remove((place, action))
                    self.struck.append(place)
                    due.append(action)
        return due


def raising(error: BaseException) -> Action:
    def action(data: torch.Tensor | None) -> None:
        raise error

    return action
