"""How much memory a rank sets apart for staging before SGLang turns all that is left into KV cache.

`--fp8sync-staging auto|GB|0`. `auto` reserves what `receiver_plugin.rooms` needs, the weights once more and a little or
some buckets beside them, unless that takes more than half of what the KV cache would get. Then a push stages in the KV
cache itself, and the server stands still for it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from receiver_plugin.held import destinations
from receiver_plugin.rooms import aligned, num_at_once
from shared.buckets import DEFAULT_BUCKET_BYTES
from shared.errors import ConfigError

AUTO = "auto"
_LEAST_BESIDE = 64 << 20


class Account(NamedTuple):
    """Bytes of one rank: its image, what has to be beside it, what the KV cache would get if nothing were reserved."""

    image: int
    beside: int
    for_kv: int

    @property
    def need(self) -> int:
        return self.image + self.beside


def wish(text: str) -> int | None:
    """The bytes of `--fp8sync-staging text`, None for `auto`. Raises: ConfigError: it is neither `auto` nor a size."""
    if text == AUTO:
        return None
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e6:
        raise ConfigError(f"--fp8sync-staging {text}: it is auto, 0, or so many GB (of 10^9 bytes) on every rank")
    return int(gigabytes * 1e9)


def image_bytes(model: nn.Module) -> int:
    """Of everything that a push can write."""
    return sum(aligned(tensor.nbytes) for tensor in destinations(model).values())


def bytes_beside(model: nn.Module, tp_size: int) -> int:
    """Beside an image. The only rank of a server keeps whole buckets in its place, where each checkpoint tensor begins
    on a multiple of the alignment, not each parameter; others have a bucket buffer.
    """
    return max(image_bytes(model) // 64, _LEAST_BESIDE) if tp_size == 1 else bucket_bytes(model, tp_size)


def bucket_bytes(model: nn.Module, tp_size: int) -> int:
    """A bucket of the usual size, or one for the largest checkpoint tensor and its scale, estimated from above; on a
    GPU one of the usual size beside it.
    """
    # What is stacked in three dimensions, as experts are, comes one by one; the rest may be cut into `tp_size` parts.
    tensors = list(destinations(model).values())
    sizes = [t.nbytes // (max(t.shape[0], 1) if t.dim() == 3 else 1) for t in tensors]
    largest = max(sizes, default=0) * tp_size
    num = max((num_at_once(t.device) for t in tensors), default=1)
    return max(DEFAULT_BUCKET_BYTES, aligned(largest + largest // 4096 + 1)) + (num - 1) * DEFAULT_BUCKET_BYTES


def reserved_bytes(wanted: int | None, ranks: list[Account], mine: int) -> tuple[int, str]:
    """How much rank `mine` of a server reserves, and why; `auto` reserves on all ranks or on none."""
    own = ranks[mine]
    parts = f"the weights once more, {own.image / 1e9:.2f} GB, and {own.beside / 1e9:.2f} GB beside them"
    if wanted is not None:
        return wanted, f"--fp8sync-staging {wanted / 1e9:.2f}; {parts} would be needed"
    if any(2 * rank.need > rank.for_kv for rank in ranks):
        return 0, f"{parts} would take more than half of the {own.for_kv / 1e9:.2f} GB that are left for the KV cache"
    return own.need, f"{parts}, of {own.for_kv / 1e9:.2f} GB that were left for the KV cache"
