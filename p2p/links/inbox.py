"""What one end of a link receives: records in any order become messages in order.

Pure: no clock, no I/O. A piece whose message is being received is decrypted straight into its place, in the buffer that
the receiver's sink gave; what nobody waits for yet is decrypted and held, within the window. Sizes are checked before
anything is allocated. It does not know paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from p2p.errors import LocalFault, ProtocolViolation
from p2p.links.keys import Cipher
from p2p.links.outbox import BEGINNING, RECORDS_AHEAD_MAX
from p2p.links.records import (
    ABORT,
    BEGIN,
    END,
    HEAD_BYTES,
    OVERHEAD_BYTES,
    PART,
    TAG_BYTES,
    Head,
    open_into,
    open_record,
)

Sink = Callable[[bytes, int], memoryview | None]
_EMPTY = memoryview(b"")


@dataclass(eq=False, slots=True)
class _Message:
    """One that is being received: records `first` to `last` hold its payload."""

    number: int
    header: bytes
    buffer: memoryview
    first: int
    last: int
    placed: set[int] = field(default_factory=set)


class Inbox:
    """One direction. `received` and `consumed` are the first record that is lacking, and the first not taken."""

    def __init__(
        self,
        cipher: Cipher,
        record_bytes: int,
        window_bytes: int,
        header_bytes_max: int,
        payload_bytes_max: int,
    ) -> None:
        self.record_bytes = record_bytes
        self.window_bytes = window_bytes
        self.header_bytes_max = header_bytes_max
        self.payload_bytes_max = payload_bytes_max
        self.received = 0
        self.consumed = 0
        self.taken_bytes = 0
        self.ended = False
        self.ready: tuple[bytes, memoryview] | None = None
        self.sink_failure: BaseException | None = None
        self._cipher = cipher
        self._held: dict[int, tuple[Head, memoryview]] = {}
        self._held_bytes = 0
        self._message: _Message | None = None
        self._messages = 0
        self._end_seq: int | None = None
        self._posted = False
        self._sink: Sink | None = None

    # ---- the receiver

    def post(self, sink: Sink | None) -> None:
        """Somebody waits for the next message; one that is ready is the next."""
        if self.ready is None:
            self._posted, self._sink = True, sink
            self._pump()

    def unpost(self) -> None:
        """Nobody waits: no buffer is written to until somebody does."""
        self._posted, self._sink = False, None

    def take(self) -> tuple[bytes, memoryview] | None:
        """The complete message, once."""
        ready, self.ready = self.ready, None
        return ready

    def divert(self) -> None:
        """The buffer that a sink gave is not written to any more: what came so far moves to memory of its own."""
        message = self._message
        if message is not None and message.buffer:
            message.buffer = memoryview(bytearray(message.buffer))
        if self.ready is not None and self.ready[1]:
            self.ready = (self.ready[0], memoryview(bytearray(self.ready[1])))

    @property
    def has_ended(self) -> bool:
        """Whether the peer ended its direction, and everything before that is here."""
        return self._end_seq is not None and self.received > self._end_seq

    @property
    def in_message(self) -> bool:
        """Whether a message has begun and somebody waits for the rest."""
        return self._posted and self._message is not None

    # ---- the paths

    def arrived(self, head: Head, record: memoryview) -> None:
        """A data record, whole. RecordRefused if the peer did not seal it, ProtocolViolation if it should not have."""
        message = self._message
        seq = head.seq
        if (
            message is not None
            and self._posted
            and head.kind == PART
            and head.message == message.number
            and self.received
            <= seq
            <= message.last  # again is not enough: a bad copy would spoil the good one
            and message.first <= seq
            and seq not in message.placed
            and seq not in self._held
        ):
            place = self._place(message, seq)
            if len(place) != head.length - TAG_BYTES:
                raise self._misfit(head, record, len(place))
            open_into(self._cipher, head, record, place)
            self.taken_bytes += len(record)
            self._placed(message, seq)
            self._advance()
            if self._held:
                self._pump()
            return
        if seq < self.received or seq in self._held or (message is not None and seq in message.placed):
            return
        size = len(record)
        plain = open_record(self._cipher, head, record)  # what follows is held against the peer: it said it
        if self._held_bytes + size > self.window_bytes + self.record_bytes + OVERHEAD_BYTES:
            raise ProtocolViolation(f"the peer sends more than its window of {self.window_bytes} bytes")
        if seq >= self.consumed + RECORDS_AHEAD_MAX + 4:
            raise ProtocolViolation(f"the peer sends record {seq}, and {self.consumed} were taken")
        self._held[seq] = (head, plain)
        self._held_bytes += size
        if head.kind == END and self._end_seq is None:
            self._end_seq = seq
        self._advance()
        self._pump()

    def _place(self, message: _Message, seq: int) -> memoryview:
        start = (seq - message.first) * self.record_bytes
        return message.buffer[start : start + self.record_bytes]

    def _misfit(self, head: Head, record: memoryview, wanted_bytes: int) -> ProtocolViolation:
        """What to say of a piece of the wrong size: RecordRefused if the peer did not seal it."""
        open_record(self._cipher, head, record)
        return ProtocolViolation(f"a piece of {head.length - TAG_BYTES} bytes where {wanted_bytes} belong")

    def _placed(self, message: _Message, seq: int) -> None:
        if seq != self.consumed:
            message.placed.add(seq)
            return
        self.consumed += 1
        while self.consumed in message.placed:
            message.placed.remove(self.consumed)
            self.consumed += 1
        if self.consumed > message.last:
            self.ready = (message.header, message.buffer)
            self._message = None
            self._posted = False

    def _advance(self) -> None:
        """`received` follows what came without a gap."""
        placed = self._message.placed if self._message is not None else ()
        self.received = max(self.received, self.consumed)
        while self.received in self._held or self.received in placed:
            self.received += 1

    # ---- held records

    def _pump(self) -> None:
        """Take what is held, in order, for as long as somebody waits."""
        while self._posted and not self.ended:
            message = self._message
            held = self._held.get(self.consumed)
            if held is None:
                return
            head, plain = held
            if message is None:
                if not self._open_message(head, plain):
                    return
                self._drop(head.seq)
                self.consumed += 1
                self._finish_if_empty()
            elif head.kind == PART and head.message == message.number:
                place = self._place(message, head.seq)
                if head.seq > message.last or len(place) != len(plain):
                    raise ProtocolViolation(f"a piece of {len(plain)} bytes where {len(place)} belong")
                place[:] = plain
                self._drop(head.seq)
                self._placed(message, head.seq)
            elif head.kind == ABORT and head.message == message.number:
                self._drop(head.seq)
                self.consumed += 1
                self._message = None
            else:
                raise ProtocolViolation(f"a record of kind {head.kind} in the middle of a message")
            self._advance()

    def _drop(self, seq: int) -> None:
        _, plain = self._held.pop(seq)
        self._held_bytes -= len(plain) + OVERHEAD_BYTES
        self.taken_bytes += len(plain) + OVERHEAD_BYTES

    def _open_message(self, head: Head, plain: memoryview) -> bool:
        """Begin the message of a first record; False where the sink failed, and the record stays."""
        if head.kind == END:
            self.ended = True
            return True
        if head.kind != BEGIN or head.message != (self._messages + 1) & 0xFFFF:
            raise ProtocolViolation(f"a record of kind {head.kind} where a message should begin")
        header, inline, payload_bytes = self._read_beginning(plain)
        try:
            buffer = self._buffer(header, payload_bytes)
        except BaseException as failure:  # noqa: BLE001 - the receiver's own code; raised in `receive`
            self.sink_failure = failure
            self._posted = False
            return False
        self._messages += 1
        if inline:
            buffer[:] = inline
            payload_bytes = 0
        records = -(-payload_bytes // self.record_bytes)
        self._message = _Message(head.message, header, buffer, head.seq + 1, head.seq + records)
        return True

    def _finish_if_empty(self) -> None:
        message = self._message
        if message is not None and message.last < message.first:
            self.ready = (message.header, message.buffer)
            self._message = None
            self._posted = False

    def _read_beginning(self, plain: memoryview) -> tuple[bytes, memoryview, int]:
        """(header, payload inside the record, bytes of the payload)"""
        if len(plain) < BEGINNING.size:
            raise ProtocolViolation(f"the beginning of a message of {len(plain)} bytes")
        header_bytes, payload_bytes = BEGINNING.unpack_from(plain)
        if header_bytes > self.header_bytes_max:
            raise ProtocolViolation(
                f"a header of {header_bytes} bytes; at most {self.header_bytes_max} are taken"
            )
        if payload_bytes > self.payload_bytes_max:
            raise ProtocolViolation(
                f"a payload of {payload_bytes} bytes; at most {self.payload_bytes_max} are taken"
            )
        end = BEGINNING.size + header_bytes
        inline = plain[end:]
        if len(plain) < end or (inline and len(inline) != payload_bytes):
            raise ProtocolViolation("the beginning of a message does not have the size that it says")
        return bytes(plain[BEGINNING.size : end]), inline, payload_bytes

    def _buffer(self, header: bytes, payload_bytes: int) -> memoryview:
        if not payload_bytes:
            return _EMPTY
        given = None if self._sink is None else self._sink(header, payload_bytes)
        if given is None:
            return memoryview(bytearray(payload_bytes))
        view = memoryview(given).cast("B")
        if view.readonly or len(view) != payload_bytes:
            raise LocalFault(
                f"a sink gave {len(view)} bytes for a payload of {payload_bytes}, or read-only ones"
            )
        return view

    def validate(self) -> None:
        """For tests: what always holds."""
        if self._held_bytes != sum(len(plain) + OVERHEAD_BYTES for _, plain in self._held.values()):
            raise LocalFault("the count of held bytes is wrong")
        if not self.consumed <= self.received or any(seq < self.consumed for seq in self._held):
            raise LocalFault("records that were taken are held")


__all__ = ["HEAD_BYTES", "Inbox", "Sink"]
