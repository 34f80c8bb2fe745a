"""What a rank holds, byte for byte: SHA-256 of the raw bytes of every parameter, buffer and plain tensor attribute.

Used by proofs, on servers that were pushed to and on servers that loaded a checkpoint alike.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from receiver_plugin.held import destinations, plain_tensors
from shared import protocol as wire

NUM_THREADS = min(8, os.cpu_count() or 1)  # copying and hashing leave Python to others


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Name -> SHA-256, hex, over element type, shape and raw bytes, for each tensor that `model` holds.

    Parameters, buffers, and tensors that modules hold as plain attributes, such as weights derived from parameters.
    """
    tensors = {**dict(plain_tensors(model)), **destinations(model)}
    names = sorted(tensors)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return dict(zip(names, pool.map(sha256, [tensors[name].detach() for name in names]), strict=True))


def sha256(tensor: torch.Tensor) -> str:
    """Hex, over element type, shape and raw bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class ProbeOnly:
    """Answers probes and nothing else: for servers that were started without `--load-plugin`."""

    def __init__(self, model: nn.Module, ranks: Any) -> None:
        self._model, self._ranks = model, ranks

    def handle(self, message: Any) -> wire.Reply:
        if isinstance(message, wire.Probe):
            found = tuple(self._ranks.gather(fingerprint(self._model)))
            return wire.Reply(state="SERVING", version=0, fence=None, probe=found)
        error = wire.WireError(kind="IncompatibleServerError", message="started without --load-plugin fp8sync")
        return wire.Reply(state="SERVING", version=0, fence=None, error=error)
