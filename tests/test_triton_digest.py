"""The digest in one launch against `shared.digest` in torch, and both against the formula: sums modulo 2^64."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from shared import digest as module
from shared.triton_digest import NUM_PAGES, NUM_WORDS, digest_many
from tests.test_digest import SECRET, random_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 1 << 20  # words


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No test leaves tables of small pages behind."""
    module._table.cache_clear()
    yield
    module._table.cache_clear()


def both(words: Tensor, first_word: int = 0, page: int = PAGE, version: int = 1, **sizes: int) -> None:
    """`words` (int32 on `DEVICE`): the kernel, and torch on the CPU."""
    data = words.cpu().view(torch.uint8)
    wanted = module.digest(data, secret=SECRET, version=version, bucket=3, first_word=first_word)
    first_page, at = divmod(first_word, page)
    num_pages = -(-(at + words.numel()) // page)
    pages = module._page_multipliers(SECRET, version, 3, first_page, num_pages).to(DEVICE)
    found = digest_many(words, module._table(SECRET, DEVICE, page), pages, at, **sizes)
    assert found.dtype == torch.int64 and found.shape == () and found.device.type == DEVICE.type
    assert module.number(found) == wanted


def words_of(num_words: int, seed: int = 0) -> Tensor:
    return random_bytes(num_words, seed).view(torch.int32).to(DEVICE)


@pytest.mark.parametrize("num_words", [1, 3, NUM_WORDS - 1, NUM_WORDS, NUM_WORDS + 1, 5 * NUM_WORDS + 7])
@pytest.mark.parametrize("first_word", [0, 1, 4, NUM_WORDS - 1])
def test_less_than_a_page(num_words: int, first_word: int) -> None:
    both(words_of(num_words), first_word)


@pytest.mark.parametrize("first_word", [0, 5, PAGE - 1, 2 * PAGE, 3 * PAGE - 5])
@pytest.mark.parametrize("num_words", [3, PAGE - 1, PAGE, PAGE + 5, 2 * PAGE + 9])
def test_around_the_end_of_a_page(num_words: int, first_word: int) -> None:
    both(words_of(num_words), first_word, num_words=PAGE // 8)


@pytest.mark.parametrize("seed", range(60))
def test_many_pages(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small pages: any start, any end, and programs that share pages and places in any way."""
    dice = random.Random(seed)
    page = dice.choice([16, 64, 256])
    monkeypatch.setattr(module, "PAGE_WORDS", page)
    num_words, first_word = dice.randint(1, 12 * page), dice.choice([0, dice.randrange(4 * page)])
    sizes = {"num_words": dice.choice([8, 16, 64]), "num_pages": dice.choice([1, 2, 4, 8])}
    both(words_of(num_words, seed), first_word, page, version=dice.choice([1, 2**62 - 1]), **sizes)


@pytest.mark.parametrize("value", [-(1 << 31), -1, 0, 1, (1 << 31) - 1])
def test_words_have_a_sign(value: int) -> None:
    both(torch.full((NUM_WORDS + 5,), value, dtype=torch.int32, device=DEVICE))


def test_data_at_any_word() -> None:
    """Elsewhere than on 16 bytes: what is read 4 bytes at a time."""
    words = words_of(3 * NUM_WORDS + 8)
    for start in (0, 1, 2, 3, 4):
        both(words[start : start + 3 * NUM_WORDS], first_word=5 - start)


def test_what_lies_around_it_is_not_read() -> None:
    around = torch.full((4096,), -1, dtype=torch.int32, device=DEVICE)
    around[1000:3000] = words_of(2000)
    both(around[1000:3000], first_word=1000)
    for edge in (999, 3000):
        around[edge] = 12345
        both(around[1000:3000], first_word=1000)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, for `shared.digest`, also where there is no GPU."""
    monkeypatch.setattr(module, "_kernel", lambda device: digest_many)


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 4 * NUM_WORDS, 4 * NUM_WORDS * NUM_PAGES + 12])
@pytest.mark.parametrize("first_word", [0, 7, 8 * NUM_WORDS - 1])
def test_the_digest_of_a_bucket(num_bytes: int, first_word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_WORDS", 4 * NUM_WORDS)
    data = random_bytes(num_bytes // 4)
    wanted = module.digest(data, secret=SECRET, version=5, bucket=2, first_word=first_word)
    monkeypatch.setattr(module, "_kernel", lambda device: digest_many)
    started = module.start_digest(data.to(DEVICE), secret=SECRET, version=5, bucket=2, first_word=first_word)
    assert started.device.type == DEVICE.type and module.number(started) == wanted
    assert module.digest(data.to(DEVICE), secret=SECRET, version=5, bucket=2, first_word=first_word) == wanted


def test_warm_makes_the_table_that_digests_use(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_WORDS", 4 * NUM_WORDS)
    module.warm(SECRET, DEVICE)
    before = module._table.cache_info()
    module.digest(random_bytes(100).to(DEVICE), secret=SECRET, version=1, bucket=0)
    after = module._table.cache_info()
    assert (before.misses, after.misses, after.hits) == (1, 1, before.hits + 1)


def test_warm_does_nothing_without_a_kernel() -> None:
    module.warm(SECRET, torch.device("cpu"))
    assert module._table.cache_info().misses == 0


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shared.triton_digest import NUM_PAGES, NUM_WORDS, _digest_kernel

constants = {"EVEN": True, "PAGE_WORDS": 1 << 20, "NUM_WORDS": NUM_WORDS, "NUM_PAGES": NUM_PAGES}
types = {name: "i32" for name in _digest_kernel.arg_names} | dict.fromkeys(constants, "constexpr")
types |= {"words_ptr": "*i32", "table_ptr": "*i64", "pages_ptr": "*i64", "out_ptr": "*i64"}
aligned = {(argument,): [["tt.divisibility", 16]] for argument in range(4)}
source = ASTSource(_digest_kernel, types, constants, aligned)
text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
a_thread = NUM_WORDS // 128
assert text.count("ld.global.v4.b32") == NUM_PAGES * a_thread // 4, "whole chunks are read 16 bytes at a time"
assert text.count("ld.global.v2.b64") == a_thread // 2, "the table is read once"
assert "atom.global.gpu.relaxed.add.u64" in text
"""


def test_compiles_into_wide_instructions(tmp_path: Path) -> None:
    """Needs no GPU: what the interpreter cannot see."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
