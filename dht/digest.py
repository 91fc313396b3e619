"""What two views tell one another so that only what differs has to travel.

Knows the two levels of anti-entropy summaries (one hash a signer, then one version a key) and
their packed bytes. It does not know records or views: it sees only 64-bit ids and hashes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from dht.errors import RecordRefused

SIGNERS_MAX = 8192
ENTRIES_MAX = 16_384

_PAIR = struct.Struct(">QQ")
_ENTRY = struct.Struct(">QQQ")
_ID = struct.Struct(">Q")

DIGEST_BYTES_MAX = SIGNERS_MAX * _PAIR.size
ENTRIES_BYTES_MAX = ENTRIES_MAX * _ENTRY.size
SCOPE_BYTES_MAX = SIGNERS_MAX * _ID.size


def hash64(data: bytes) -> int:
    """64 bits of BLAKE2b: names keys, signers and versions in digests."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class Digest:
    """Level one: signer id -> hash over all its live entries. 16 bytes a signer on the wire.

    A hash of 0 is never that of a held signer: it says "do not send me this signer's".
    """

    signers: Mapping[int, int]

    def encode(self) -> bytes:
        return b"".join(_PAIR.pack(*pair) for pair in sorted(self.signers.items()))

    @staticmethod
    def decode(data: bytes) -> Digest:
        """Raises RecordRefused for anything that is not a digest."""
        _check_length(data, _PAIR.size, DIGEST_BYTES_MAX)
        return Digest(dict(_PAIR.iter_unpack(data)))


@dataclass(frozen=True, slots=True)
class Detail:
    """Level two, for the signers in `scope`: key id -> (seq, version hash). 24 bytes an entry."""

    scope: frozenset[int]
    entries: Mapping[int, tuple[int, int]]

    def encode(self) -> tuple[bytes, bytes]:
        """(scope bytes, entry bytes)."""
        scope = b"".join(_ID.pack(signer) for signer in sorted(self.scope))
        return scope, b"".join(_ENTRY.pack(key, *version) for key, version in sorted(self.entries.items()))

    @staticmethod
    def decode(scope: bytes, entries: bytes) -> Detail:
        """Raises RecordRefused for anything that is not a detail."""
        _check_length(scope, _ID.size, SCOPE_BYTES_MAX)
        _check_length(entries, _ENTRY.size, ENTRIES_BYTES_MAX)
        signers = frozenset(signer for (signer,) in _ID.iter_unpack(scope))
        return Detail(signers, {key: (seq, version) for key, seq, version in _ENTRY.iter_unpack(entries)})


def _check_length(data: bytes, unit_bytes: int, bytes_max: int) -> None:
    if len(data) > bytes_max or len(data) % unit_bytes:
        raise RecordRefused("malformed", f"a digest of {len(data)} bytes")
