"""The four one-way messages of gossip and their bytes.

Push carries records. Summary, Inventory and Exchange are anti-entropy: A's digest; B's versions of
what differs; what B lacks with A's versions, which B answers with a Push. Each stands alone, so
loss, repetition and reordering do no harm. Decoding is total; records are decoded one by one later,
so that one unreadable record does not cost the others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from dht.digest import DIGEST_BYTES_MAX, ENTRIES_BYTES_MAX, SCOPE_BYTES_MAX, Detail, Digest
from dht.errors import RecordRefused
from dht.records import RECORD_BYTES_MAX, Record

RECORDS_MAX = 4096
RECORDS_BYTES_MAX = 512 * 1024
MESSAGE_BYTES_MAX = DIGEST_BYTES_MAX + SCOPE_BYTES_MAX + ENTRIES_BYTES_MAX + RECORDS_BYTES_MAX

_VERSION = 1
_HEAD = struct.Struct(">BBdIIIH")
_LENGTH = struct.Struct(">I")
# Half of what a record may say, so that no claim can make this node's own records unsayable.
_TIME_MAX_S = 2.0**39


@dataclass(frozen=True, slots=True)
class Push:
    """Records the receiver may lack, encoded."""

    records: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Opens anti-entropy: one hash a signer."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Inventory:
    """Answers Summary: the versions held of the signers that differ."""

    detail: Detail


@dataclass(frozen=True, slots=True)
class Exchange:
    """Answers Inventory: what the other lacks, and the versions held here."""

    records: tuple[bytes, ...]
    detail: Detail


Message = Push | Summary | Inventory | Exchange
_KINDS: tuple[type[Message], ...] = (Push, Summary, Inventory, Exchange)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message and the sender's own clock (Unix seconds, uncorrected) when it was made."""

    sent_at_s: float
    message: Message

    def encode(self) -> bytes:
        """At most MESSAGE_BYTES_MAX bytes for messages that a Replica makes."""
        message = self.message
        digest = message.digest.encode() if isinstance(message, Summary) else b""
        scope, entries = b"", b""
        if isinstance(message, Inventory | Exchange):
            scope, entries = message.detail.encode()
        records = message.records if isinstance(message, Push | Exchange) else ()
        kind = _KINDS.index(type(message))
        sizes = (len(digest), len(scope), len(entries), len(records))
        parts = [_HEAD.pack(_VERSION, kind, self.sent_at_s, *sizes), digest, scope, entries]
        for record in records:
            parts += (_LENGTH.pack(len(record)), record)
        return b"".join(parts)

    @staticmethod
    def decode(data: bytes) -> Parcel:
        """Raises RecordRefused (`malformed`) for anything that is not a parcel."""
        try:
            return _decode(bytes(data))
        except struct.error as error:
            raise RecordRefused("malformed", str(error)) from None


def encoded(records: Iterable[Record]) -> tuple[bytes, ...]:
    """Records as messages carry them."""
    return tuple(record.encode() for record in records)


def batches(records: Iterable[bytes]) -> tuple[Push, ...]:
    """As few Push messages as the limits of one allow."""
    out: list[Push] = []
    batch: list[bytes] = []
    size = 0
    for record in records:
        if batch and (len(batch) >= RECORDS_MAX or size + len(record) > RECORDS_BYTES_MAX // 2):
            out.append(Push(tuple(batch)))
            batch, size = [], 0
        batch.append(record)
        size += len(record) + _LENGTH.size
    return (*out, Push(tuple(batch))) if batch else tuple(out)


def _decode(data: bytes) -> Parcel:
    if len(data) > MESSAGE_BYTES_MAX:
        raise RecordRefused("malformed", f"a message of {len(data)} bytes")
    version, kind, sent_at_s, digest_len, scope_len, entries_len, count = _HEAD.unpack_from(data)
    if version != _VERSION or kind >= len(_KINDS) or count > RECORDS_MAX:
        raise RecordRefused("malformed", f"message version {version}, kind {kind}, {count} records")
    if not 0 <= sent_at_s <= _TIME_MAX_S:
        raise RecordRefused("malformed", f"sent at {sent_at_s} s")
    scope_at = _HEAD.size + digest_len
    entries_at = scope_at + scope_len
    records_at = entries_at + entries_len
    if records_at > len(data):
        raise RecordRefused("malformed", "shorter than its header says")
    digest, scope, entries = (
        data[_HEAD.size : scope_at],
        data[scope_at:entries_at],
        data[entries_at:records_at],
    )
    return Parcel(
        sent_at_s, _assemble(_KINDS[kind], digest, scope, entries, _records(data, records_at, count))
    )


def _records(data: bytes, at: int, count: int) -> tuple[bytes, ...]:
    records = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > RECORD_BYTES_MAX or at + length > len(data):
            raise RecordRefused("malformed", f"a record of {length} bytes")
        records.append(data[at : at + length])
        at += length
    if at != len(data):
        raise RecordRefused("malformed", "longer than its header says")
    return tuple(records)


def _assemble(
    kind: type[Message], digest: bytes, scope: bytes, entries: bytes, records: tuple[bytes, ...]
) -> Message:
    """Parts that a message of `kind` does not have must be empty, so that each has one encoding."""
    if kind is not Summary and digest:
        raise RecordRefused("malformed", "a digest where none belongs")
    if kind in (Push, Summary) and (scope or entries):
        raise RecordRefused("malformed", "a detail where none belongs")
    if kind in (Summary, Inventory) and records:
        raise RecordRefused("malformed", "records where none belong")
    if kind is Summary:
        return Summary(Digest.decode(digest))
    if kind is Push:
        return Push(records)
    detail = Detail.decode(scope, entries)
    return Inventory(detail) if kind is Inventory else Exchange(records, detail)
