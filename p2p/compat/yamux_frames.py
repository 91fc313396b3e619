"""Yamux frame headers: twelve bytes, packed and checked. Pure; no streams, no I/O.

Spec: https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import struct

HEADER_BYTES = 12
INITIAL_WINDOW_BYTES = 256 << 10

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
GO_AWAY_NORMAL, GO_AWAY_PROTOCOL_ERROR = 0, 1

_HEADER = struct.Struct("!BBHII")


class FrameError(Exception):
    """The peer sent a frame that yamux does not allow."""


def pack_header(kind: int, flags: int, stream_id: int, length: int) -> bytes:
    """Twelve bytes; `length` is the body's size, a window's delta or a ping's value."""
    return _HEADER.pack(0, kind, flags, stream_id, length)


def unpack_header(header: bytes | bytearray | memoryview) -> tuple[int, int, int, int]:
    """(kind, flags, stream_id, length). Raises FrameError."""
    version, kind, flags, stream_id, length = _HEADER.unpack(header)
    if version != 0:
        raise FrameError(f"version {version}")
    if kind > GO_AWAY:
        raise FrameError(f"frame type {kind}")
    if flags & ~(SYN | ACK | FIN | RST):
        raise FrameError(f"flags {flags:#x}")
    if (stream_id == 0) != (kind in (PING, GO_AWAY)):
        raise FrameError(f"frame type {kind} on stream {stream_id}")
    return kind, flags, stream_id, length
