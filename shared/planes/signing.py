"""What a session's secret is good for: everything that others could write or send is signed with it, and checked.

The sender draws the secret, 32 random bytes, and hands it to the ranks of a server in `Open.rendezvous`, over the
authenticated control route. It is never sent on the data plane, never stored, and no name is made of it.

    store   value  = tag | payload                   over its name, too: none can stand in the place of another
    group   proof  = tag                             over a challenge of the sender and the rank that answers it
    bucket  header = number | size | digest | tag    a bucket is announced before it comes, in its order

Every tag is HMAC-SHA256 with a label of its use in front, so that a tag of one use is worth nothing in another.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from datetime import timedelta

import torch.distributed as dist

from shared.errors import TransferError

TAG_BYTES = 32
MAX_STORED_BYTES = 4096  # gloo stores some 150 bytes and 8 a rank
_HEADER = struct.Struct("<QQQ")
HEADER_BYTES = _HEADER.size + TAG_BYTES


def new_secret() -> str:
    """32 random bytes as hex, as they travel in `Open`."""
    return secrets.token_hex(32)


class Signer:
    """Tags of one session. `secret`: hex, as in the rendezvous."""

    def __init__(self, secret: str) -> None:
        self._secret = bytes.fromhex(secret)

    def tag(self, use: str, *parts: bytes) -> bytes:
        """HMAC-SHA256 over `use` and `parts`, each behind its length."""
        body = b"".join(len(part).to_bytes(8, "little") + part for part in (use.encode(), *parts))
        return hmac.new(self._secret, body, hashlib.sha256).digest()

    def signs(self, tag: bytes, use: str, *parts: bytes) -> bool:
        return hmac.compare_digest(tag, self.tag(use, *parts))

    def header(self, number: int, num_bytes: int, digest: int, link: bytes = b"") -> bytes:
        """`HEADER_BYTES` that announce bucket `number` of this session (from 0): its size, and its digest, masked.
        `link`: where other headers of that number go to others, with other digests.

        A digest that anybody could read beside its bytes would tell him of the multipliers that it was made with.
        """
        body = _HEADER.pack(number, num_bytes, digest ^ self._mask(number, link))
        return body + self.tag("bucket", body, *_given(link))

    def _mask(self, number: int, link: bytes) -> int:
        return int.from_bytes(self.tag("mask", number.to_bytes(8, "little"), *_given(link))[:8], "little")

    def read_header(self, header: bytes, number: int, link: bytes = b"") -> tuple[int, int]:
        """The size in bytes and the digest that `header` announces for bucket `number`.

        Raises: TransferError: not signed by the sender of this session, or another bucket.
        """
        body, tag = header[: _HEADER.size], header[_HEADER.size :]
        if len(header) != HEADER_BYTES or not self.signs(tag, "bucket", body, *_given(link)):
            raise TransferError("a bucket was announced without the signature of this session's sender")
        announced, num_bytes, masked = _HEADER.unpack(body)
        if announced != number:
            raise TransferError(f"bucket {announced} of the session was announced, expected bucket {number}")
        return num_bytes, masked ^ self._mask(number, link)


def _given(link: bytes) -> tuple[bytes, ...]:
    return (link,) if link else ()


class SignedStore(dist.Store):
    """What a process group needs of a store (set, get, wait), over one that anybody may write to.

    Raises (also out of the constructor of a process group): TransferError: a value is not signed, or too large.
    """

    def __init__(self, store: dist.Store, signer: Signer, prefix: str) -> None:
        super().__init__()
        self._store, self._signer, self._prefix = store, signer, prefix

    def set(self, key: str, value: bytes | str) -> None:
        payload = value.encode() if isinstance(value, str) else bytes(value)
        if len(payload) > MAX_STORED_BYTES:
            raise TransferError(f"{len(payload)} bytes are too many for {key} in the store of the data plane")
        signed = self._signer.tag("store", key.encode(), payload) + payload
        self._store.set(self._prefix + key, signed)  # type: ignore[arg-type]  # bytes are what it takes

    def get(self, key: str) -> bytes:
        found = bytes(self._store.get(self._prefix + key))
        if len(found) > TAG_BYTES + MAX_STORED_BYTES:
            raise TransferError(f"{key} in the store of the data plane has {len(found)} bytes: not of this session")
        tag, payload = found[:TAG_BYTES], found[TAG_BYTES:]
        if not self._signer.signs(tag, "store", key.encode(), payload):
            raise TransferError(f"{key} in the store of the data plane is not signed by a rank of this session")
        return payload

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        names = [self._prefix + key for key in keys]
        self._store.wait(names) if timeout is None else self._store.wait(names, timeout)
