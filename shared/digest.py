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
from functools import lru_cache

import numpy as np
import torch

from shared.errors import ConfigError

WORD_BYTES = 4
_PAGE_WORDS = 1 << 20
_MASK = (1 << 64) - 1


def digest(data: torch.Tensor, *, secret: str, version: int, bucket: int, first_word: int = 0) -> int:
    """The digest of `data` (flat contiguous uint8, length a multiple of 4) as an unsigned 64-bit number.

    `secret` of the session, `version` and `bucket` choose the multipliers.

    Raises:
        ConfigError: `data` is not flat contiguous uint8 of a multiple of 4 bytes.
    """
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous() or data.numel() % WORD_BYTES:
        raise ConfigError(f"digest needs flat contiguous uint8 of a multiple of 4 bytes, got {data.dtype} {data.shape}")
    words = data.view(torch.int32)
    if not words.numel():
        return 0
    first_page, at = divmod(first_word, _PAGE_WORDS)
    table, sums, done = _table(secret, data.device, _at_least(min(at + words.numel(), _PAGE_WORDS))), [], 0
    while done < words.numel():
        at = (first_word + done) % _PAGE_WORDS
        num = min(_PAGE_WORDS - at, words.numel() - done)
        sums.append(_dot(words[done : done + num], table[at : at + num]))
        done += num
    pages = _page_multipliers(secret, version, bucket, first_page, len(sums)).to(data.device)
    return int((torch.stack(sums) * pages).sum().item()) & _MASK


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
