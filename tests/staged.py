"""A server that has every byte of a push, and was told nothing yet of its commit."""

from __future__ import annotations

import time

import torch

from sender import FP8Sender
from sender.control import ControlClient
from tests.tiny_models import Trainer


def staged(control: ControlClient, version: int = 1, timeout_s: float = 30.0) -> tuple[FP8Sender, str]:
    """A sender whose `version`, all ones, is STAGED on the server behind `control`; and its session."""
    sender = FP8Sender([control], plane="memory", timeout_s=timeout_s)
    plan = sender.prepare(Trainer(seed=version))
    fleet = sender._fleet
    fleet.survey()
    fleet.begin(version)
    for bucket in plan.layout.buckets:
        fleet.send(torch.ones(bucket.num_bytes, dtype=torch.uint8), bucket.index)
    fleet.verify()
    while control.call(fleet._question(), timeout_s).state != "STAGED":  # a single server hears no Verify
        time.sleep(0.002)
    return sender, fleet._session
