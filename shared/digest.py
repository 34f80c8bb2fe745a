"""A keyed, position-dependent digest of bytes that any device computes with integer arithmetic.

    digest = sum over i of word[i] * m(first + i, key)   (mod 2^64),   word: little-endian int64, m odd

Sums are associative, so a digest of a whole is the sum of the digests of its parts, in any order, whatever the split
(`first` is the index of the part's first word). Because every multiplier is odd, a change of any single word always
changes the digest. It guards against damage in transit, not against an adversary.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from shared.errors import ConfigError

_PAGE_WORDS = 1 << 20
_MASK = (1 << 64) - 1


def digest(data: torch.Tensor, *, first_word: int = 0, key: int = 0) -> int:
    """The digest of `data` (flat contiguous uint8, length a multiple of 8) as an unsigned 64-bit number.

    Raises:
        ConfigError: `data` is not flat contiguous uint8 of a multiple of 8 bytes.
    """
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous() or data.numel() % 8:
        raise ConfigError(f"digest needs flat contiguous uint8 of a multiple of 8 bytes, got {data.dtype} {data.shape}")
    words = data.view(torch.int64)
    table = _table(data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    done = 0
    while done < words.numel():
        page, at = divmod(first_word + done, _PAGE_WORDS)
        num = min(_PAGE_WORDS - at, words.numel() - done)
        total += (words[done : done + num] * (table[at : at + num] + _page_offset(page, key))).sum()
        done += num
    return int(total.item()) & _MASK


def _page_offset(page: int, key: int) -> int:
    """Even, so that odd multipliers stay odd; different for every page of words and every key."""
    return _signed(_mix(page ^ _mix(key)) & ~1 & _MASK)


@lru_cache(maxsize=8)
def _table(device: torch.device) -> torch.Tensor:
    """[_PAGE_WORDS] int64: odd, well mixed, made with the same integer steps on every device."""
    x = torch.arange(1, _PAGE_WORDS + 1, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * _signed(factor)
    return (x ^ (x >> 31)) | 1


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
