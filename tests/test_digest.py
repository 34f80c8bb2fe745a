"""`shared/digest.py`: sums of parts, nothing missed, nothing that only looks the same, nothing without its secret."""

from __future__ import annotations

import hashlib
import itertools
import random

import pytest
import torch

from shared import digest as module
from shared.digest import digest
from shared.errors import ConfigError

BYTES_64 = torch.arange(64).to(torch.uint8)
PAGE = 1 << 20  # words
SECRET, OTHER = "5e" * 32, "0f" * 32


def of(data: torch.Tensor, first_word: int = 0, secret: str = SECRET, version: int = 1, bucket: int = 0) -> int:
    return digest(data, secret=secret, version=version, bucket=bucket, first_word=first_word)


def random_bytes(num_words: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4 * num_words,), dtype=torch.uint8, generator=generator)


def of_parts(data: torch.Tensor, cuts: list[int], bucket: int = 0) -> int:
    edges = [0, *sorted(cuts), data.numel() // 4]
    pairs = list(itertools.pairwise(edges))
    random.Random(1).shuffle(pairs)
    return sum(of(data[4 * a : 4 * b], first_word=a, bucket=bucket) for a, b in pairs) % 2**64


# To change these literals is to raise PROTOCOL_VERSION: sender and receiver must agree on them.
@pytest.mark.parametrize(
    ("first_word", "version", "bucket", "golden"),
    [(0, 1, 0, 0xB9036B7A7376AD20), (0, 2, 7, 0x6CB892BC2BB3F160), (PAGE, 1, 0, 0x16E9998E636F6760)],
)
def test_golden_values(first_word: int, version: int, bucket: int, golden: int) -> None:
    assert of(BYTES_64, first_word, version=version, bucket=bucket) == golden


def slow_digest(data: bytes, first_word: int, version: int, bucket: int) -> int:
    """The formula in Python integers, with its multipliers made here anew."""
    secret = bytes.fromhex(SECRET)

    def multiplier(use: str, index: int) -> int:
        stream = hashlib.shake_256(len(secret).to_bytes(8, "little") + secret + use.encode()).digest(8 * (index + 1))
        return int.from_bytes(stream[-8:], "little") | 1

    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]
    total = 0
    for i, word in enumerate(words):
        page, at = divmod(first_word + i, PAGE)
        of_page = multiplier(f"fp8sync digest pages {version} {bucket}", page)
        total += of_page * word * multiplier("fp8sync digest words", at)
    return total % 2**64


@pytest.mark.parametrize("first_word", [0, 5, PAGE - 3, 3 * PAGE - 1])
@pytest.mark.parametrize(("version", "bucket"), [(1, 0), (2**62 - 1, 12345)])
def test_equals_the_formula(first_word: int, version: int, bucket: int) -> None:
    data = random_bytes(5)
    expected = slow_digest(data.numpy().tobytes(), first_word, version, bucket)
    assert of(data, first_word, version=version, bucket=bucket) == expected


def test_any_split_across_a_page_adds_up() -> None:
    data = random_bytes(PAGE + 1000)
    whole = of(data)
    for cuts in ([1], [PAGE], [PAGE - 1, PAGE + 1], [17, 4096, PAGE // 2, PAGE + 999], [0, PAGE + 1000]):
        assert of_parts(data, cuts) == whole


def test_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_WORDS", 16)
    module._table.cache_clear()
    try:
        data = random_bytes(100)
        whole = of(data)
        for seed in range(20):
            assert of_parts(data, random.Random(seed).sample(range(1, 100), 5)) == whole
        page = random_bytes(16)
        of_page = {of(page, first_word=16 * number) for number in range(64)}
        assert len(of_page) == 64, "two pages of words share their multipliers"
    finally:
        module._table.cache_clear()


def test_any_changed_byte_changes_it() -> None:
    data = random_bytes(64)
    whole = of(data)
    for position in range(data.numel()):
        for flipped in (0x01, 0x80, 0xFF):
            bad = data.clone()
            bad[position] ^= flipped
            assert of(bad) != whole


def test_two_changes_do_not_hide_each_other() -> None:
    """Whatever is taken from one word and given to another, top bits flipped in two of them among it."""
    data = random_bytes(2 * PAGE + 8)
    whole, words = of(data), data.view(torch.int32)
    for a, b in ((0, 1), (3, 31), (7, PAGE + 7), (PAGE - 1, PAGE), (0, 2 * PAGE)):
        for delta in (1, 1 << 16, -(1 << 31)):
            bad = words.clone()
            bad[a] += delta
            bad[b] -= delta
            assert of(bad.view(torch.uint8)) != whole, (a, b, delta)
    square = words.clone()  # the same at two places of two pages: nothing of a sum of a page's and a place's multiplier
    for at, delta in ((3, 1), (PAGE + 3, -1), (9, -1), (PAGE + 9, 1)):
        square[at] += delta
    assert of(square.view(torch.uint8)) != whole


def test_words_that_move_change_it() -> None:
    data = random_bytes(PAGE + 32)
    whole, words = of(data), data.view(torch.int32)
    for a, b in ((0, 1), (3, 31), (7, PAGE + 7), (PAGE - 1, PAGE)):
        swapped = words.clone()
        swapped[[a, b]] = swapped[[b, a]]
        assert of(swapped.view(torch.uint8)) != whole
    assert of(words.roll(1).view(torch.uint8)) != whole


def test_secret_version_bucket_and_place_matter() -> None:
    data = random_bytes(8)
    found = {
        of(data, first, secret, version, bucket)
        for first in (0, 1, PAGE, 2 * PAGE + 1)
        for secret in (SECRET, OTHER)
        for version in (1, 11)
        for bucket in range(20)
    }
    assert len(found) == 320
    assert all(0 <= value < 2**64 for value in found)


def test_length_is_not_part_of_it_but_buckets_have_one() -> None:
    """Zero words add nothing: what guards a length is the plan hash, and the header of a bucket, not the digest."""
    assert of(torch.zeros(0, dtype=torch.uint8)) == of(torch.zeros(64, dtype=torch.uint8)) == 0


def test_only_the_bytes_count() -> None:
    inside = torch.cat([random_bytes(6, seed=1), BYTES_64, random_bytes(6, seed=2)])[24:88]
    assert inside.is_contiguous() and of(inside) == of(BYTES_64)


@pytest.mark.parametrize(
    "data",
    [
        random_bytes(16)[::2],
        random_bytes(16).view(8, 8),
        random_bytes(16)[:62],
        random_bytes(16).view(torch.int64),
        random_bytes(16).view(torch.int8),
        torch.zeros(1, dtype=torch.uint8).expand(64),
    ],
    ids=["strided", "2-D", "62 bytes", "int64", "int8", "expanded"],
)
def test_other_inputs_are_refused(data: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="flat contiguous uint8 of a multiple of 4 bytes"):
        of(data)
