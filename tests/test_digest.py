"""`shared/digest.py`: sums of parts, nothing missed, nothing that only looks the same."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from shared import digest as module
from shared.digest import digest
from shared.errors import ConfigError

BYTES_64 = torch.arange(64).to(torch.uint8)
PAGE = 1 << 20  # words


def random_bytes(num_words: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (8 * num_words,), dtype=torch.uint8, generator=generator)


def digest_of_parts(data: torch.Tensor, cuts: list[int], key: int = 0) -> int:
    edges = [0, *sorted(cuts), data.numel() // 8]
    pairs = list(itertools.pairwise(edges))
    random.Random(1).shuffle(pairs)
    return sum(digest(data[8 * a : 8 * b], first_word=a, key=key) for a, b in pairs) % 2**64


# To change these literals is to raise PROTOCOL_VERSION: sender and receiver must agree on them.
@pytest.mark.parametrize(
    ("first_word", "key", "golden"),
    [(0, 0, 0xD4CEA2F0822FE500), (0, 7, 0x3E96878AA32FB040), (PAGE, 0, 0xBFA5F3B09BC0B100)],
)
def test_golden_values(first_word: int, key: int, golden: int) -> None:
    assert digest(BYTES_64, first_word=first_word, key=key) == golden


def slow_digest(data: bytes, first_word: int, key: int) -> int:
    """The formula in Python integers, with its multipliers made here anew."""

    def signed(x: int) -> int:
        x &= 2**64 - 1
        return x - 2**64 if x >= 2**63 else x

    def multiplier(index: int) -> int:
        page, at = divmod(index, PAGE)
        x = signed((at + 1) * 0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = signed((x ^ (x >> shift)) * factor)
        return ((x ^ (x >> 31)) | 1) + module._page_offset(page, key)

    words = [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]
    return sum(word * multiplier(first_word + i) for i, word in enumerate(words)) % 2**64


@pytest.mark.parametrize("first_word", [0, 5, PAGE - 3, 3 * PAGE - 1])
@pytest.mark.parametrize("key", [0, 1, 12345])
def test_equals_the_formula(first_word: int, key: int) -> None:
    data = random_bytes(9)
    assert digest(data, first_word=first_word, key=key) == slow_digest(data.numpy().tobytes(), first_word, key)


@pytest.mark.parametrize("key", [0, 3])
def test_any_split_across_a_page_adds_up(key: int) -> None:
    data = random_bytes(PAGE + 1000)
    whole = digest(data, key=key)
    for cuts in ([1], [PAGE], [PAGE - 1, PAGE + 1], [17, 4096, PAGE // 2, PAGE + 999], [0, PAGE + 1000]):
        assert digest_of_parts(data, cuts, key) == whole


def test_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE_WORDS", 16)
    module._table.cache_clear()
    try:
        data = random_bytes(100)
        whole = digest(data)
        for seed in range(20):
            assert digest_of_parts(data, random.Random(seed).sample(range(1, 100), 5)) == whole
        page = random_bytes(16)
        of_page = {digest(page, first_word=16 * number) for number in range(64)}
        assert len(of_page) == 64, "two pages of words share their multipliers"
    finally:
        module._table.cache_clear()


def test_any_changed_byte_changes_it() -> None:
    data = random_bytes(32)
    whole = digest(data)
    for position in range(data.numel()):
        for flipped in (0x01, 0x80, 0xFF):
            bad = data.clone()
            bad[position] ^= flipped
            assert digest(bad) != whole


def test_words_that_move_change_it() -> None:
    data = random_bytes(PAGE + 32)
    whole, words = digest(data), data.view(torch.int64)
    for a, b in ((0, 1), (3, 31), (7, PAGE + 7), (PAGE - 1, PAGE)):
        swapped = words.clone()
        swapped[[a, b]] = swapped[[b, a]]
        assert digest(swapped.view(torch.uint8)) != whole
    assert digest(words.roll(1).view(torch.uint8)) != whole


def test_keys_and_positions_matter() -> None:
    data = random_bytes(8)
    found = {digest(data, key=key, first_word=first) for key in range(50) for first in (0, 1, PAGE, 2 * PAGE + 1)}
    assert len(found) == 200
    assert all(0 <= value < 2**64 for value in found)


def test_length_is_not_part_of_it_but_buckets_have_one() -> None:
    """Zero words add nothing: what guards a length is the plan hash, not the digest."""
    assert digest(torch.zeros(0, dtype=torch.uint8)) == digest(torch.zeros(64, dtype=torch.uint8)) == 0


def test_only_the_bytes_count() -> None:
    inside = torch.cat([random_bytes(3, seed=1), BYTES_64, random_bytes(3, seed=2)])[24:88]
    assert inside.is_contiguous() and digest(inside) == digest(BYTES_64)


@pytest.mark.parametrize(
    "data",
    [
        random_bytes(8)[::2],
        random_bytes(8).view(8, 8),
        random_bytes(8)[:63],
        random_bytes(8).view(torch.int64),
        random_bytes(8).view(torch.int8),
        torch.zeros(1, dtype=torch.uint8).expand(64),
    ],
    ids=["strided", "2-D", "63 bytes", "int64", "int8", "expanded"],
)
def test_other_inputs_are_refused(data: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="flat contiguous uint8 of a multiple of 8 bytes"):
        digest(data)
