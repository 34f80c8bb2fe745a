"""Versions on requests and replies: the header names, what a request may demand, what a reply says. For both sides.

    request   x-fp8sync-min-version: 7      served by version 7 or a newer one, or answered 409 with Retry-After
              x-fp8sync-exact-version: 7    wholly by version 7, or answered 409 with Retry-After
    reply     x-fp8sync-version-start: 7    the version when the request was sent to the model
              x-fp8sync-version-end: 7      the version when the last of the reply left it

A reply that is streamed sends its headers before its end. Where its request carried one of the two demands (`min` 0
demands nothing), an event stream ends with the comment line `: x-fp8sync-version-end: 7`, behind all events.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shared.errors import ConfigError

MIN_HEADER, EXACT_HEADER = "x-fp8sync-min-version", "x-fp8sync-exact-version"
START_HEADER, END_HEADER = "x-fp8sync-version-start", "x-fp8sync-version-end"
_MAX_DIGITS = 20
_NUMBER = re.compile(rf"[0-9]{{1,{_MAX_DIGITS}}}")


@dataclass(frozen=True)
class Demand:
    """Which versions may serve a request. Raises `ConfigError`: no version can."""

    minimum: int | None = None
    exact: int | None = None

    def __post_init__(self) -> None:
        for version in (self.minimum, self.exact):
            if version is not None and not 0 <= version < 10**_MAX_DIGITS:
                raise ConfigError(f"{version} is no version: versions are whole numbers from 0")
        if self.minimum is not None and self.exact is not None and self.exact < self.minimum:
            raise ConfigError(f"no version is exactly {self.exact} and at least {self.minimum}")

    def fits(self, served: int) -> bool:
        return self.exact in (None, served) and (self.minimum is None or served >= self.minimum)

    def __str__(self) -> str:
        if self.exact is not None:
            return f"exactly version {self.exact}"
        return "any version" if self.minimum is None else f"version {self.minimum} or newer"

    def headers(self) -> dict[str, str]:
        """For any HTTP client: `httpx.post(url, json=body, headers=Demand(minimum=7).headers())`."""
        wanted = {MIN_HEADER: self.minimum, EXACT_HEADER: self.exact}
        return {name: str(version) for name, version in wanted.items() if version is not None}

    @classmethod
    def from_headers(cls, headers: Iterable[tuple[bytes, bytes]]) -> Demand | None:
        """What the raw `headers` of a request demand; None without a word of it. Raises `ConfigError`: malformed."""
        found: dict[str, int] = {}
        for raw_name, raw in headers:
            name, value = raw_name.decode("latin-1").lower(), raw.decode("latin-1").strip(" \t")
            if name not in (MIN_HEADER, EXACT_HEADER):
                continue
            version = _version(name, value)
            if found.setdefault(name, version) != version:
                raise ConfigError(f"{name} is given twice, as {found[name]} and {version}")
        return cls(found.get(MIN_HEADER), found.get(EXACT_HEADER)) if found else None


@dataclass(frozen=True)
class Versions:
    """The versions at the start and the end of a reply; None where they are not known."""

    start: int | None = None
    end: int | None = None

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Versions:
        """Of a reply; `headers` must ignore case, as those of httpx do. Raises `ConfigError`: malformed."""
        found = {name: headers.get(name) for name in (START_HEADER, END_HEADER)}
        start, end = (_version(name, value) if value else None for name, value in found.items())
        return cls(start, end)


def _version(name: str, value: str) -> int:
    if not _NUMBER.fullmatch(value):
        raise ConfigError(f"{name}: {value[:40]!r} is not a whole number of at most {_MAX_DIGITS} digits")
    return int(value)


def end_comment(version: int) -> str:
    """The line that ends an event stream; parsers of event streams skip it, as they skip every line with that colon."""
    return f": {END_HEADER}: {version}"


def end_of_stream(line: str) -> int | None:
    """The version in `line`, if it is that of `end_comment`. Raises `ConfigError`: malformed."""
    prefix = f": {END_HEADER}: "
    return _version(END_HEADER, line[len(prefix) :]) if line.startswith(prefix) else None
