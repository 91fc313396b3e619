"""What one end of a link sends: messages cut into sealed records, kept until the peer has them.

Pure: no clock, no I/O. A record is sealed once, into memory that is used again after the peer said it arrived; a new
path begins again at what the peer lacks. The window counts what the peer has not taken yet. It does not know paths.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from p2p.errors import LocalFault, ProtocolViolation
from p2p.links.keys import Cipher
from p2p.links.records import (
    ABORT,
    BEGIN,
    END,
    HEAD_BYTES,
    OVERHEAD_BYTES,
    PART,
    SEQ_MAX,
    TAG_BYTES,
    WANTS_ECHO,
    Head,
    seal,
)

BEGINNING = struct.Struct("!IQ")  # bytes of the header, bytes of the payload
INLINE_BYTES_MAX = 16 << 10
RECORDS_AHEAD_MAX = 4096
_SLOTS_FREE_MAX = 32

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class _Sealed:
    seq: int
    view: memoryview
    slot: bytearray | None


class Outbox:
    """Records of one direction, from `first` (the first that the peer may lack) to `next_seq`."""

    def __init__(self, cipher: Cipher, record_bytes: int, window_bytes: int) -> None:
        self.record_bytes = record_bytes
        self.window_bytes = window_bytes
        self.next_seq = 0
        self.cursor = 0
        self.received = 0
        self.consumed = 0
        self.unsent_bytes = 0
        self.unconsumed_bytes = 0
        self._cipher = cipher
        self._records: deque[_Sealed] = deque()
        self._sizes: deque[int] = deque()
        self._free: list[bytearray] = []
        self._message = 0

    # ---- sealing

    def room(self, plain_bytes: int) -> bool:
        """Whether the peer's window takes a record of that size."""
        return (
            self.unconsumed_bytes + plain_bytes + OVERHEAD_BYTES <= self.window_bytes
            and len(self._sizes) < RECORDS_AHEAD_MAX
        )

    def begin(self, header: bytes, payload: Buffer, payload_bytes: int, *, wants_echo: bool) -> None:
        """The first record of a message; `payload` is the whole of it or empty."""
        self._message += 1
        plain = b"".join((BEGINNING.pack(len(header), payload_bytes), header, payload))
        self._seal(BEGIN, plain, WANTS_ECHO if wants_echo else 0)

    def part(self, plain: memoryview) -> None:
        self._seal(PART, plain, 0)

    def abort(self) -> None:
        """End the message that was begun, incomplete."""
        self._seal(ABORT, b"", 0)

    def end(self) -> None:
        self._message += 1
        self._seal(END, b"", 0)

    def _seal(self, kind: int, plain: bytes | memoryview, flags: int) -> None:
        size = len(plain) + OVERHEAD_BYTES
        if self.next_seq >= SEQ_MAX or len(plain) > self.record_bytes:
            raise LocalFault(f"a record of {len(plain)} bytes cannot be sealed as number {self.next_seq}")
        slot = None
        if size > self.record_bytes // 2:  # smaller ones would keep much more memory than they need
            slot = self._free.pop() if self._free else bytearray(self.record_bytes + OVERHEAD_BYTES)
            view = memoryview(slot)[:size]
        else:
            view = memoryview(bytearray(size))
        head = Head(kind, flags, self._message & 0xFFFF, len(plain) + TAG_BYTES, self.next_seq)
        seal(self._cipher, head, plain, view)
        self._records.append(_Sealed(self.next_seq, view, slot))
        self._sizes.append(size)
        self.next_seq += 1
        self.unsent_bytes += size
        self.unconsumed_bytes += size

    # ---- sending

    @property
    def first(self) -> int:
        return self.next_seq - len(self._records)

    def take(self, bytes_max: int) -> list[memoryview]:
        """The next unsent records, one at least if there is any, for the path to send."""
        taken: list[memoryview] = []
        if self.cursor == self.next_seq:
            return taken
        for record in islice(self._records, self.cursor - self.first, None):
            size = len(record.view)
            if taken and size > bytes_max:
                break
            taken.append(record.view)
            bytes_max -= size
            self.unsent_bytes -= size
        self.cursor += len(taken)
        return taken

    def rewind(self, position: int) -> None:
        """A new path: send again from `position`, the first that the peer lacked when it was asked."""
        if position > self.next_seq:
            raise ProtocolViolation(f"the peer has record {position} of {self.next_seq}")
        # The peer may say that it has one of these, by the old path, while the new path still sends it: such memory is
        # not used again.
        self._records = deque(replace(one, slot=None) for one in self._records)
        self.cursor = max(position, self.first)
        index = self.cursor - self.first
        self.unsent_bytes = sum(len(one.view) for one in list(self._records)[index:])

    def acknowledged(self, received: int, consumed: int) -> int:
        """The peer has all records before `received` and took all before `consumed`. Returns the bytes newly received.

        Raises ProtocolViolation for what cannot be. Old news is no news.
        """
        if consumed > received or received > self.next_seq:
            raise ProtocolViolation(f"the peer took {consumed} and has {received} records of {self.next_seq}")
        count = 0
        while self._records and self._records[0].seq < received:
            record = self._records.popleft()
            count += len(record.view)
            if record.seq >= self.cursor:  # it had come by the path before
                self.cursor = record.seq + 1
                self.unsent_bytes -= len(record.view)
            if record.slot is not None and len(self._free) < _SLOTS_FREE_MAX:
                self._free.append(record.slot)
        self.received = max(self.received, received)
        for _ in range(consumed - self.consumed):
            self.unconsumed_bytes -= self._sizes.popleft()
        self.consumed = max(self.consumed, consumed)
        return count

    @property
    def kept_bytes(self) -> int:
        """Of the records that the peer may lack."""
        return sum(len(one.view) for one in self._records)

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return not self._records

    def validate(self) -> None:
        """For tests: what always holds."""
        seqs = [one.seq for one in self._records]
        if seqs != list(range(self.first, self.next_seq)) or not self.first <= self.cursor <= self.next_seq:
            raise LocalFault("the records kept are not those between first and next")
        unsent = sum(len(one.view) for one in self._records if one.seq >= self.cursor)
        if unsent != self.unsent_bytes or sum(self._sizes) != self.unconsumed_bytes:
            raise LocalFault("the counts of bytes are wrong")


def cut(pieces: Sequence[memoryview], record_bytes: int) -> Iterator[memoryview]:
    """The bytes of all pieces, in views of `record_bytes` (the last one shorter); copied only across seams."""
    pending = bytearray()
    for piece in pieces:
        at = 0
        if pending:
            at = min(record_bytes - len(pending), len(piece))
            pending += piece[:at]
            if len(pending) < record_bytes:
                continue
            yield memoryview(pending)
            pending = bytearray()
        while len(piece) - at >= record_bytes:
            yield piece[at : at + record_bytes]
            at += record_bytes
        pending += piece[at:]
    if pending:
        yield memoryview(pending)


__all__ = ["BEGINNING", "HEAD_BYTES", "INLINE_BYTES_MAX", "RECORDS_AHEAD_MAX", "Outbox", "cut"]
