"""Where this process computes: its host and its GPU, as others can compare them with theirs."""

from __future__ import annotations

import torch

from shared.errors import TransferError
from shared.planes.same_host_messages import this_host
from shared.protocol import Place


def place_of(device: torch.device) -> Place:
    """Of a process that computes on `device`."""
    return Place(host=_host(), gpu=_uuid(device) if device.type == "cuda" else "")


def _host() -> str:
    """The boot id of the kernel, which containers of a host share; "" where the system does not tell it."""
    try:
        return this_host().hex()
    except TransferError:
        return ""


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
