"""What a rank holds, byte for byte: SHA-256 of the raw storage of every parameter and buffer.

Used by proofs, on servers that were pushed to and on servers that loaded a checkpoint alike.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Name -> SHA-256, hex, over element type, shape and raw bytes, for each parameter and buffer of `model`."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: _sha256(tensor.detach()) for name, tensor in sorted(tensors.items())}


def _sha256(tensor: torch.Tensor) -> str:
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
