"""`shared/versions.py`: what is a demand, what is none, and what a reply says."""

from __future__ import annotations

import httpx
import pytest

from shared.errors import ConfigError
from shared.versions import EXACT_HEADER, MIN_HEADER, Demand, Versions, end_comment, end_of_stream

MIN, EXACT = MIN_HEADER.encode(), EXACT_HEADER.encode()


@pytest.mark.parametrize(
    ("demand", "fitting", "others"),
    [
        (Demand(), [0, 1, 9], []),
        (Demand(minimum=0), [0, 1, 9], []),
        (Demand(minimum=3), [3, 4, 10**19], [0, 2]),
        (Demand(exact=0), [0], [1, 2]),
        (Demand(exact=3), [3], [2, 4]),
        (Demand(minimum=2, exact=3), [3], [2, 4]),
    ],
)
def test_what_fits(demand: Demand, fitting: list[int], others: list[int]) -> None:
    assert all(demand.fits(version) for version in fitting) and not any(demand.fits(version) for version in others)


@pytest.mark.parametrize("demand", [Demand(minimum=0), Demand(exact=7), Demand(minimum=10**20 - 1), Demand(2, 3)])
def test_headers_there_and_back(demand: Demand) -> None:
    raw = [(name.upper().encode(), value.encode()) for name, value in demand.headers().items()]
    assert Demand.from_headers([(b"host", b"x"), *raw]) == demand


def test_without_a_word_there_is_no_demand() -> None:
    assert Demand.from_headers([(b"host", b"x"), (b"x-fp8sync-version-start", b"1")]) is None
    assert Demand().headers() == {}


@pytest.mark.parametrize("name", [MIN, EXACT])
@pytest.mark.parametrize(
    "value", [b"", b" ", b"-1", b"+1", b"1.0", b"1e3", b"0x1", b"1 2", b"1,1", b"latest", b"\xb2", b"1" * 21, b"1\n"]
)
def test_what_is_no_version(name: bytes, value: bytes) -> None:
    with pytest.raises(ConfigError, match="is not a whole number of at most 20 digits"):
        Demand.from_headers([(name, value)])


def test_demands_that_no_version_meets() -> None:
    with pytest.raises(ConfigError, match="no version is exactly 3 and at least 4"):
        Demand.from_headers([(MIN, b"4"), (EXACT, b"3")])
    with pytest.raises(ConfigError, match="is given twice, as 3 and 4"):
        Demand.from_headers([(MIN, b"3"), (MIN, b"4")])
    with pytest.raises(ConfigError, match="-1 is no version"):
        Demand(minimum=-1)
    assert Demand.from_headers([(MIN, b" 3\t"), (MIN, b"03")]) == Demand(minimum=3)


def test_what_a_reply_says() -> None:
    headers = httpx.Headers({"X-FP8Sync-Version-Start": "3", "x-fp8sync-version-end": "4"})
    assert Versions.from_headers(headers) == Versions(3, 4)
    assert Versions.from_headers({}) == Versions(None, None)
    assert end_of_stream(end_comment(12)) == 12
    assert end_of_stream("data: [DONE]") is None and end_of_stream(": ping") is None
