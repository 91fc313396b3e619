"""Frames of the call protocol, version 1: bytes in, frozen events out, and back. No I/O, no call state.

A frame is a header of 16 bytes (kind, flags, zero, length, call id; big-endian) and `length` bytes. DATA carries
messages in pieces: a FIRST frame starts a message with its body's and payload's sizes, later frames of the same call
continue it, and frames of other calls may come between. Lengths are checked against fixed limits before a byte is
kept; DATA is never gathered here but handed on as it arrives.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from p2p.errors import ProtocolViolation
from p2p.messages import codec_of

HEADER_BYTES = 16
PREFIX_BYTES = 8
DATA_FRAME_BYTES_MAX = 1 << 20
METHOD_CHARS_MAX = 128
REFUSAL_BYTES_MAX = 8192
CALL_ID_MAX = (1 << 64) - 1
DEADLINE_S_MAX = 7 * 24 * 3600.0

_HEADER = struct.Struct("!BBHIQ")
_PREFIX = struct.Struct("!II")
_OPEN = struct.Struct("!dI")
_COUNT = struct.Struct("!I")
_TOKEN = struct.Struct("!Q")


class Kind(IntEnum):
    OPEN = 1
    DATA = 2
    REFUSE = 3
    CANCEL = 4
    CREDIT = 5
    PING = 6
    PONG = 7


FIRST, END = 1, 2


class Open(NamedTuple):
    """The caller starts `call`; it may be sent `window_bytes` of DATA before it grants more."""

    call: int
    method: str
    deadline_s: float
    window_bytes: int


class Piece(NamedTuple):
    """A part of a DATA frame. `first`: a message starts here. `end`: the sender will send no more in this call."""

    call: int
    data: memoryview
    first: bool
    end: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a handler's failure travels."""

    code: str
    message: str
    retry_after_s: float | None = None
    detail: dict[str, str] = field(default_factory=dict)


class Refuse(NamedTuple):
    call: int
    refusal: Refusal


class Cancel(NamedTuple):
    call: int


class Credit(NamedTuple):
    """The receiver takes that many bytes of DATA more."""

    call: int
    granted_bytes: int


class Ping(NamedTuple):
    token: int


class Pong(NamedTuple):
    token: int


Event = Open | Piece | Refuse | Cancel | Credit | Ping | Pong

# What a body may measure, by kind: (least, most) bytes.
_LENGTHS = {
    Kind.OPEN: (_OPEN.size + 1, _OPEN.size + 4 * METHOD_CHARS_MAX),
    Kind.DATA: (0, DATA_FRAME_BYTES_MAX),
    Kind.REFUSE: (1, REFUSAL_BYTES_MAX),
    Kind.CANCEL: (0, 0),
    Kind.CREDIT: (_COUNT.size, _COUNT.size),
    Kind.PING: (_TOKEN.size, _TOKEN.size),
    Kind.PONG: (_TOKEN.size, _TOKEN.size),
}


class FrameParser:
    """Feed it a stream's bytes, in any pieces. `begun` counts frames. Not to be fed after a ProtocolViolation."""

    __slots__ = ("_body", "_call", "_flags", "_header", "_kind", "_left", "begun")

    def __init__(self) -> None:
        self.begun = 0
        self._header = bytearray()
        self._body = bytearray()
        self._kind = Kind.DATA
        self._flags = 0
        self._call = 0
        self._left = 0

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun that is not whole yet."""
        return bool(self._header) or self._left > 0

    def feed(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """All that `data` completes. Pieces are views of `data`. Raises ProtocolViolation."""
        return self.feed_some(data, len(data) + 1)[0]

    def feed_some(self, data: bytes | bytearray | memoryview, events_max: int) -> tuple[list[Event], int]:
        """At most so many events, and how many bytes of `data` were read for them. Otherwise as `feed`."""
        view = memoryview(data)
        events: list[Event] = []
        at, end = 0, len(view)
        while at < end and len(events) < events_max:
            if not self._left:
                at = self._take_header(view, at, end)
                if self._header:
                    break
                if not self._left:
                    events.append(self._whole(b""))
                continue
            taken = min(self._left, end - at)
            piece = view[at : at + taken]
            at += taken
            self._left -= taken
            if self._kind is Kind.DATA:
                events.append(self._piece(piece))
            elif self._left:
                self._body += piece
            else:
                events.append(self._whole(bytes(self._body) + bytes(piece) if self._body else bytes(piece)))
                self._body.clear()
        return events, at

    def _take_header(self, view: memoryview, at: int, end: int) -> int:
        """Read a header, or keep what there is of one; returns where to go on."""
        if not self._header and end - at >= HEADER_BYTES:
            self._start(_HEADER.unpack_from(view, at))
            return at + HEADER_BYTES
        upto = min(end, at + HEADER_BYTES - len(self._header))
        self._header += view[at:upto]
        if len(self._header) == HEADER_BYTES:
            self._start(_HEADER.unpack(self._header))
            self._header.clear()
        return upto

    def _start(self, header: tuple[int, int, int, int, int]) -> None:
        number, flags, zero, length, call = header
        found = _BY_NUMBER.get(number)
        if found is None:
            raise ProtocolViolation(f"frame kind {number}")
        kind, least, most = found
        if not least <= length <= most:
            raise ProtocolViolation(f"a {kind.name} frame of {length} bytes")
        if zero or flags & ~(FIRST | END) or (flags and kind is not Kind.DATA):
            raise ProtocolViolation(f"a {kind.name} frame with flags {flags:#x}")
        if (call == 0) != (kind is Kind.PING or kind is Kind.PONG):
            raise ProtocolViolation(f"a {kind.name} frame of call {call}")
        if kind is Kind.DATA and not length and flags != END:
            raise ProtocolViolation("a DATA frame that says nothing")
        self._kind, self._flags, self._left, self._call = kind, flags, length, call
        self.begun += 1

    def _piece(self, piece: memoryview) -> Piece:
        first = self._flags & FIRST != 0
        self._flags &= ~FIRST
        return Piece(self._call, piece, first, self._flags & END != 0 and not self._left)

    def _whole(self, body: bytes) -> Event:
        kind, call = self._kind, self._call
        if kind is Kind.DATA:
            return Piece(call, memoryview(b""), False, True)
        if kind is Kind.CREDIT:
            return Credit(call, _COUNT.unpack(body)[0])
        if kind is Kind.CANCEL:
            return Cancel(call)
        if kind is Kind.PING:
            return Ping(_TOKEN.unpack(body)[0])
        if kind is Kind.PONG:
            return Pong(_TOKEN.unpack(body)[0])
        if kind is Kind.REFUSE:
            return Refuse(call, codec_of(Refusal).decode(body))
        return _parse_open(call, body)


# By plain numbers, since an enum's own hash is a call each time.
_BY_NUMBER = {int(kind): (kind, *_LENGTHS[kind]) for kind in Kind}


def _parse_open(call: int, body: bytes) -> Open:
    deadline_s, window_bytes = _OPEN.unpack_from(body)
    try:
        method = body[_OPEN.size :].decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolViolation("a method's name is not UTF-8") from None
    if not (math.isfinite(deadline_s) and 0 < deadline_s <= DEADLINE_S_MAX):
        raise ProtocolViolation(f"a deadline of {deadline_s} s")
    if len(method) > METHOD_CHARS_MAX:
        raise ProtocolViolation(f"a method's name of {len(method)} characters")
    return Open(call, method, deadline_s, window_bytes)


def parse_prefix(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """(body bytes, payload bytes) that a message's first PREFIX_BYTES announce."""
    body_bytes, payload_bytes = _PREFIX.unpack_from(data)
    return body_bytes, payload_bytes


def pack_prefix(body_bytes: int, payload_bytes: int) -> bytes:
    return _PREFIX.pack(body_bytes, payload_bytes)


def pack_data_header(call: int, length: int, *, first: bool, end: bool) -> bytes:
    """The header of a DATA frame, whose `length` bytes follow."""
    return _HEADER.pack(Kind.DATA, (FIRST if first else 0) | (END if end else 0), 0, length, call)


def pack_open(call: int, method: str, deadline_s: float, window_bytes: int) -> bytes:
    return _frame(Kind.OPEN, call, _OPEN.pack(deadline_s, window_bytes) + method.encode("utf-8"))


def pack_refuse(call: int, refusal: Refusal) -> bytes:
    """Never fails: texts are cut to fit, and what is not Unicode in them is replaced."""
    detail = list(refusal.detail.items())[:_DETAILS_MAX]
    fitting = Refusal(
        _cut(refusal.code, 64),
        _cut(refusal.message, 2048),
        refusal.retry_after_s if _is_number(refusal.retry_after_s) else None,
        {_cut(key, 64): _cut(value, 256) for key, value in detail},
    )
    return _frame(Kind.REFUSE, call, codec_of(Refusal).encode(fitting).body)


_DETAILS_MAX = 16


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _cut(text: object, bytes_max: int) -> str:
    return str(text).encode("utf-8", "replace")[:bytes_max].decode("utf-8", "ignore")


def pack_cancel(call: int) -> bytes:
    return _frame(Kind.CANCEL, call, b"")


def pack_credit(call: int, count: int) -> bytes:
    return _frame(Kind.CREDIT, call, _COUNT.pack(count))


def pack_ping(token: int) -> bytes:
    return _frame(Kind.PING, 0, _TOKEN.pack(token))


def pack_pong(token: int) -> bytes:
    return _frame(Kind.PONG, 0, _TOKEN.pack(token))


def _frame(kind: Kind, call: int, body: bytes) -> bytes:
    return _HEADER.pack(kind, 0, 0, len(body), call) + body
