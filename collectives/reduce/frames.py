"""Frames: what travels between two members while they reduce. Layout of the header, and nothing else.

Header, 32 bytes, little-endian: version u8, kind u8, zero u16, chunk u32, ident u64, key 16 bytes. The payload's length
follows from the kind and the chunk, so it can be checked before anything is allocated.

    LEAF      a member's own values of a chunk, encoded.   ident: the member's nonce
    PARTIAL   weighted sum over a LAN group, encoded.      ident: hash of who is in the sum
    RESULT    the mean of a chunk, encoded.                key: the declaration's
    WANT      three bitmaps of chunks that the sender asks for (again): leaves, partials, results
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from collectives.reduce.errors import FrameRefused

VERSION = 1
KEY_BYTES = 16
_HEADER = struct.Struct("<BBHIQ16s")
HEADER_BYTES = _HEADER.size
IDENT_MASK = (1 << 64) - 1


class Kind(IntEnum):
    """What a frame carries."""

    LEAF = 1
    PARTIAL = 2
    RESULT = 3
    WANT = 4


@dataclass(frozen=True, slots=True)
class Header:
    """The decoded header of a frame."""

    kind: Kind
    chunk: int
    ident: int
    key: bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame to send. `payload` may be memory of the exchange: it must have left (or been copied) before
    `next_frame` is called again for the same peer."""

    kind: Kind
    chunk: int
    header: bytes
    payload: tuple[memoryview, ...]
    payload_bytes: int


def frame_of(kind: Kind, chunk: int, ident: int, key: bytes, payload: Iterable[memoryview] = ()) -> Frame:
    """A frame with its header packed."""
    parts = tuple(payload)
    header = _HEADER.pack(VERSION, kind, 0, chunk, ident & IDENT_MASK, key[:KEY_BYTES])
    return Frame(kind, chunk, header, parts, sum(part.nbytes for part in parts))


def header_of(peer: str, data: bytes | bytearray | memoryview) -> Header:
    """Total: a header, or FrameRefused."""
    if len(data) != HEADER_BYTES:
        raise FrameRefused(peer, "malformed", f"a header has {HEADER_BYTES} bytes, got {len(data)}")
    version, kind, zero, chunk, ident, key = _HEADER.unpack(data)
    if version != VERSION or zero or kind not in Kind._value2member_map_:
        raise FrameRefused(peer, "malformed", f"version {version}, kind {kind}, reserved {zero}")
    return Header(Kind(kind), chunk, ident, key)


def want_bytes(chunks: int) -> int:
    """Length of a WANT's payload."""
    return 3 * ((chunks + 7) // 8)


def pack_wants(chunks: int, leaves: Iterable[int], partials: Iterable[int], results: Iterable[int]) -> bytes:
    """Three bitmaps, one after the other."""
    bits = np.zeros((3, chunks), np.uint8)
    for row, wanted in enumerate((leaves, partials, results)):
        bits[row, list(wanted)] = 1
    return np.packbits(bits, axis=1).tobytes()


def unpack_wants(
    chunks: int, payload: bytes | bytearray | memoryview
) -> tuple[list[int], list[int], list[int]]:
    """What `pack_wants` packed; the length has been checked."""
    rows = np.frombuffer(payload, np.uint8).reshape(3, -1)
    bits = np.unpackbits(rows, axis=1, count=chunks)
    leaves, partials, results = (np.flatnonzero(row).tolist() for row in bits)
    return leaves, partials, results
