"""What the two sides of `shared/planes/same_host.py` say to each other: messages of fixed sizes, signed.

A server rank says `Said`; the sender tells headers (`shared/planes/signing.py`), and numbers of the same length.
"""

from __future__ import annotations

import struct
import uuid
from pathlib import Path
from typing import NamedTuple

from shared.errors import TransferError
from shared.planes.signing import HEADER_BYTES, TAG_BYTES, Signer

# What a rank says: that it comes, that a bucket has its place, that memory is to be let go, why it cannot go on, where
# everything goes (`num_bytes` of a map follow, and their tag).
MEET, PLACE, GIVE_BACK, CANNOT, MAP = b"meet", b"plac", b"give", b"cann", b"map."
ON_GPU, ON_CPU = b"cuda", b"host"
# What the sender tells: size and digest of a bucket, that it is there, that memory was let go.
HEADER, WRITTEN, LET_GO = b"head", b"writ", b"let."
WHAT_BYTES = 4
TOLD_BYTES = WHAT_BYTES + HEADER_BYTES
_SAID, _RANK = struct.Struct("<4sQQQ16s4s600s"), struct.Struct("<Q")
_NUMBER = struct.Struct("<QQQ")
SAID_BYTES = _SAID.size + TAG_BYTES


class Said(NamedTuple):
    """`number`, `num_bytes` and `offset` (in the memory): of a bucket. `memory`: a name of 16 bytes, or the host's own.

    `where`: how to open that memory, by the module of its `kind`; or a text.
    """

    what: bytes
    number: int = 0
    num_bytes: int = 0
    offset: int = 0
    memory: bytes = b""
    kind: bytes = b""
    where: bytes = b""

    def signed(self, signer: Signer, rank: int) -> bytes:
        """`SAID_BYTES`, of that server rank."""
        body = _SAID.pack(*self)
        return body + signer.tag("said", _RANK.pack(rank), body)

    @classmethod
    def read(cls, data: bytes, signer: Signer, rank: int) -> Said:
        """Raises: TransferError: it is not of that server rank."""
        body, tag = data[: _SAID.size], data[_SAID.size :]
        if not signer.signs(tag, "said", _RANK.pack(rank), body):
            raise TransferError("what it said is not signed by a rank of this session")
        return cls(*_SAID.unpack(body))

    @property
    def text(self) -> str:
        return self.where.rstrip(b"\0").decode(errors="replace")


def signed_map(signer: Signer, rank: int, body: bytes) -> bytes:
    return body + signer.tag("map", _RANK.pack(rank), body)


def read_map(signer: Signer, rank: int, data: bytes) -> bytes:
    """Raises: TransferError: it is not of that server rank."""
    body, tag = data[:-TAG_BYTES], data[-TAG_BYTES:]
    if not signer.signs(tag, "map", _RANK.pack(rank), body):
        raise TransferError("its map of slices is not signed by a rank of this session")
    return body


def told(signer: Signer, what: bytes, number: int) -> bytes:
    """`TOLD_BYTES` of `WRITTEN` or `LET_GO`, number `number` of these in this session."""
    body = _NUMBER.pack(number, 0, 0)
    return what + body + signer.tag(what.decode(), body)


def check_told(message: bytes, signer: Signer, what: bytes, number: int) -> None:
    """Raises: TransferError: `message` is not `told(signer, what, number)`."""
    body, tag = message[WHAT_BYTES : WHAT_BYTES + _NUMBER.size], message[WHAT_BYTES + _NUMBER.size :]
    if message[:WHAT_BYTES] != what or not signer.signs(tag, what.decode(), body):
        raise TransferError("the sender told something without the signature of this session's sender")
    if _NUMBER.unpack(body) != (number, 0, 0):
        raise TransferError("the sender told something out of its order")


def this_host() -> bytes:
    """16 bytes that no other host has, of this boot. Raises: TransferError: the system does not tell."""
    try:
        return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    except (OSError, ValueError) as error:
        raise TransferError(f"plane='same_host' needs the boot id of Linux: {error}") from error
