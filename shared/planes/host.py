"""Planes move host memory: the pinned buffer through which a bucket on a GPU goes; on a CPU it goes as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch


class HostBuffer:
    """As large as the largest bucket so far; used again for every bucket."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def filled_from(self, bucket: torch.Tensor) -> torch.Tensor:
        """The bytes of `bucket` (flat uint8) in host memory, valid until the next call."""
        return bucket if bucket.device.type == "cpu" else self._of(bucket.numel()).copy_(bucket)

    def fill(self, bucket: torch.Tensor, receive: Callable[[torch.Tensor], None]) -> None:
        """`receive` into `bucket` (flat uint8), by way of host memory."""
        if bucket.device.type == "cpu":
            receive(bucket)
            return
        arriving = self._of(bucket.numel())
        receive(arriving)
        bucket.copy_(arriving)

    def _of(self, num_bytes: int) -> torch.Tensor:
        if self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._buffer[:num_bytes]
