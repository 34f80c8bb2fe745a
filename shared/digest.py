"""A keyed digest of bytes, a linear universal hash, that any device computes with integer arithmetic.

    digest = sum over pages p of  A[p] * (sum over i of word[p, i] * T[i])    (mod 2^64)

    word    the data as little-endian signed int32, in pages of 2^20 words
    T       2^20 odd multipliers, drawn from the secret of the session alone
    A       an odd multiplier a page, drawn from the secret, the version and the bucket

Sums are associative, so a digest of a whole is the sum of the digests of its parts, in any order, whatever the split
(`first_word` is the index of the part's first word). A change of any single word is always found, because every
multiplier is odd. Any other change, by damage or by somebody who does not know the secret, is missed with a probability
of at most 2^-26, whatever the change is. (Words are half as wide as multipliers: the sum of a changed page differs by a
multiple of 2^k with probability 2^(32-k) at most, and then A hides that with 2^(k-63) at most; sum over k from 32.)
That holds as long as those who tamper see no digests: they travel in `Verify`, on the control route.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch

from shared.errors import ConfigError

WORD_BYTES = 4
PAGE_WORDS = 1 << 20
_MASK = (1 << 64) - 1


def digest(data: torch.Tensor, *, secret: str, version: int, bucket: int, first_word: int = 0) -> int:
    """The digest of `data` (flat contiguous uint8, length a multiple of 4) as an unsigned 64-bit number.

    `secret` of the session, `version` and `bucket` choose the multipliers.

    Raises:
        ConfigError: `data` is not flat contiguous uint8 of a multiple of 4 bytes.
    """
    return number(start_digest(data, secret=secret, version=version, bucket=bucket, first_word=first_word))


def start_digest(data: torch.Tensor, *, secret: str, version: int, bucket: int, first_word: int = 0) -> torch.Tensor:
    """The digest as int64 (0-d, on the device of `data`), which `number` reads. On a GPU nothing waits for it: `data`
    is read on the current stream, one launch, and may be overwritten by what follows on that stream.

    Raises: ConfigError: as `digest`.
    """
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous() or data.numel() % WORD_BYTES:
        raise ConfigError(f"digest needs flat contiguous uint8 of a multiple of 4 bytes, got {data.dtype} {data.shape}")
    words = data.view(torch.int32)
    if not words.numel():
        return torch.zeros((), dtype=torch.int64, device=data.device)
    first_page, at = divmod(first_word, PAGE_WORDS)
    num_pages = -(-(at + words.numel()) // PAGE_WORDS)
    pages = _page_multipliers(secret, version, bucket, first_page, num_pages)
    if (digest_many := _kernel(data.device)) is None:
        return _in_torch(words, at, secret, pages.to(data.device))
    return digest_many(words, _table(secret, data.device, PAGE_WORDS), _sent(pages, data.device), at)


def multipliers(
    sizes: Sequence[int], device: torch.device, *, secret: str, version: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """T, and for each bucket of so many bytes A of its pages: int64 on a GPU, each on 16 bytes; sent there at once."""
    drawn, starts = list[torch.Tensor](), [0]
    for bucket, num_bytes in enumerate(sizes):
        num_pages = max(1, -(-num_bytes // (WORD_BYTES * PAGE_WORDS)))
        drawn.append(_page_multipliers(secret, version, bucket, 0, num_pages + num_pages % 2))
        starts.append(starts[-1] + drawn[-1].numel())
    sent = _sent(torch.cat(drawn), device)
    return _table(secret, device, PAGE_WORDS), [sent[start:end] for start, end in pairwise(starts)]


def begin_digest(data: torch.Tensor, *, secret: str, version: int, bucket: int) -> Callable[[], int]:
    """The digest, begun; the call waits for it, and so for all that `data` was made by, but for nothing that the
    current stream is asked for later. Raises: ConfigError: as `digest`.
    """
    found = read(start_digest(data, secret=secret, version=version, bucket=bucket).view(1))
    return lambda: found()[0]


def read(found: torch.Tensor) -> Callable[[], list[int]]:
    """What `start_digest` returned, [n] of them, as unsigned 64-bit numbers: the call waits for that, as above."""
    if found.device.type != "cuda":
        return lambda: _numbers(found)
    there = torch.empty(found.shape, dtype=torch.int64, pin_memory=True)
    there.copy_(found, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(found.device))

    def wait() -> list[int]:
        done.synchronize()
        return _numbers(there)

    return wait


def _numbers(found: torch.Tensor) -> list[int]:
    return [value & _MASK for value in found.tolist()]


def number(found: torch.Tensor) -> int:
    """What `start_digest` returned as an unsigned 64-bit number; waits for it."""
    return int(found.item()) & _MASK


def warm(secret: str, device: torch.device) -> None:
    """Do once what the first digest with `secret` on a GPU would do beside its work: draw T, which takes about 30 ms of
    a processor, move it there, and compile. Elsewhere nothing: T is drawn as large as a bucket needs it.
    """
    if _kernel(device) is not None:
        digest(torch.zeros(WORD_BYTES, dtype=torch.uint8, device=device), secret=secret, version=0, bucket=0)


def _kernel(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor] | None:
    """`shared.triton_digest.digest_many`, or None where torch does it: not on a GPU, or without Triton."""
    return _triton() if device.type == "cuda" else None


@cache
def _triton() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor] | None:
    if find_spec("triton") is None:  # no wheel for this platform, or left out on purpose
        return None
    from shared.triton_digest import digest_many

    return digest_many


def _sent(pages: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return pages.to(device)
    # PyTorch keeps pinned memory until it was read; a copy from other memory would wait for the stream.
    return pages.pin_memory().to(device, non_blocking=True)


def _in_torch(words: torch.Tensor, at: int, secret: str, pages: torch.Tensor) -> torch.Tensor:
    table, sums, done = _table(secret, words.device, _at_least(min(at + words.numel(), PAGE_WORDS))), [], 0
    while done < words.numel():
        place = (at + done) % PAGE_WORDS
        num = min(PAGE_WORDS - place, words.numel() - done)
        sums.append(_dot(words[done : done + num], table[place : place + num]))
        done += num
    return (torch.stack(sums) * pages).sum()


def _dot(words: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    if words.device.type == "cpu":
        return torch.dot(words.to(torch.int64), multipliers)  # ten times as fast as a product and a sum
    return (words * multipliers).sum()


def _at_least(num: int) -> int:
    return 1 << (num - 1).bit_length()


@lru_cache(maxsize=4)
def _table(secret: str, device: torch.device, num: int) -> torch.Tensor:
    """[num] int64, odd: the first ones of a page, as many as a bucket needs."""
    return _odd(bytes.fromhex(secret), "fp8sync digest words", num).to(device)


def _page_multipliers(secret: str, version: int, bucket: int, first: int, num: int) -> torch.Tensor:
    """[num] int64, odd: those of pages `first` and up."""
    return _odd(bytes.fromhex(secret), f"fp8sync digest pages {version} {bucket}", first + num)[first:]


def _odd(secret: bytes, use: str, num: int) -> torch.Tensor:
    """[num] int64, odd, uniform to all who do not know `secret`."""
    stream = hashlib.shake_256(len(secret).to_bytes(8, "little") + secret + use.encode()).digest(8 * num)
    return torch.from_numpy(np.frombuffer(stream, dtype="<i8").copy()) | 1
