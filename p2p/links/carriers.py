"""What carries records: a connected socket, or a libp2p stream. Bytes in order, nothing else.

Knows system calls and how their failures translate into PeerLost. It does not know records.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Literal, Protocol

import trio

from p2p.errors import PeerLost
from p2p.host import ByteStream
from p2p.identity import PeerId

_PIECES_MAX = 64
_HAS_MARK = sys.platform.startswith("linux")
_TCP_INFO_BYTES = 192
_TCP_INFO_MIN_RTT_AT = 148
_VERY_NEAR_US = 500
_VERY_NEAR_BUFFER_BYTES = 256 << 10
_TCP_INFO_RETRANSMITS_AT = 100
_TCP_INFO_SEGMENTS_AT = 136


class Carrier(Protocol):
    """One task sends and one receives, at the same time. Errors: PeerLost."""

    @property
    def kind(self) -> Literal["direct", "stream"]: ...
    async def send(self, pieces: Sequence[memoryview | bytes]) -> None: ...
    def send_now(self, pieces: list[memoryview]) -> list[memoryview]:
        """Send what needs no waiting; the pieces that are left. Not while `send` waits."""

    async def receive_into(self, buffer: memoryview, least: int = 1) -> int:
        """At least one byte; 0 at the end. Where it has to wait it may do so for `least` bytes."""

    async def receive_exactly(self, count: int) -> bytes: ...
    def tune(self) -> None:
        """Set what depends on how far away the peer is."""

    def loss(self) -> float | None:
        """The share of segments that had to be sent again, where it is known."""

    @property
    def closed(self) -> trio.Event: ...
    def close(self) -> None: ...


class SocketCarrier:
    """A TCP socket, in trio's loop. Trio's own socket adds a copy of nothing, but a trip through the loop each call."""

    kind: Literal["direct", "stream"] = "direct"

    def __init__(self, sock: socket.socket, peer: PeerId) -> None:
        self.peer = peer
        self.closed = trio.Event()
        self._sock = sock
        self._full = False  # the system's buffer, as far as the last call told
        self._mark = 1
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def send(self, pieces: Sequence[memoryview | bytes]) -> None:
        rest = [memoryview(piece) for piece in pieces]
        while rest:
            if self._full:
                await self._wait(trio.lowlevel.wait_writable)
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
            rest = self.send_now(rest)
        await trio.lowlevel.cancel_shielded_checkpoint()

    def send_now(self, pieces: list[memoryview]) -> list[memoryview]:
        rest = deque(pieces)
        self._full = False
        while rest and not self._full:
            try:
                self._send_some(rest)
            except BlockingIOError:
                self._full = True
            except OSError as error:
                raise self._lost(error) from error
        return list(rest)

    def _send_some(self, rest: deque[memoryview]) -> None:
        offered = list(islice(rest, _PIECES_MAX))
        sent = self._send_pieces(offered)
        for piece in offered:
            if sent < len(piece):
                rest[0] = piece[sent:]
                return
            sent -= len(piece)
            rest.popleft()

    if hasattr(socket.socket, "sendmsg"):

        def _send_pieces(self, pieces: list[memoryview]) -> int:
            return self._sock.sendmsg(pieces)

    else:  # Windows

        def _send_pieces(self, pieces: list[memoryview]) -> int:
            del pieces[1:]
            return self._sock.send(pieces[0])

    async def receive_into(self, buffer: memoryview, least: int = 1) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        have = 0
        while True:
            try:
                count = self._sock.recv_into(buffer[have:] if have else buffer)
            except BlockingIOError:
                count = -1
            except OSError as error:
                raise self._lost(error) from error
            have += max(count, 0)
            if have >= least or count == 0:
                return have
            self._wake_at(least - have)
            await self._wait(trio.lowlevel.wait_readable)

    def _wake_at(self, count: int) -> None:
        """The system says that there is something to read once so many bytes are here, or the end. Linux honours it in
        `poll`, and makes room for them."""
        if _HAS_MARK and count != self._mark:
            self._mark = count
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    async def receive_exactly(self, count: int) -> bytes:
        data = bytearray(count)
        at = 0
        while at < count:
            got = await self.receive_into(memoryview(data)[at:])
            if not got:
                raise PeerLost(self.peer, "the socket was closed")
            at += got
        return bytes(data)

    async def _wait(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        try:
            await wait(self._sock)
        except (trio.ClosedResourceError, OSError, ValueError) as error:
            raise self._lost(error) from error

    def tune(self) -> None:
        """A peer that is very near gets a small buffer: what waits in a large one has left the processor's caches by
        the time the kernel copies it, which was seen to cost a fifth of all CPU time."""
        rtt_us = self._tcp_info(_TCP_INFO_MIN_RTT_AT)
        if rtt_us is not None and rtt_us < _VERY_NEAR_US:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _VERY_NEAR_BUFFER_BYTES)

    def loss(self) -> float | None:
        again, segments = self._tcp_info(_TCP_INFO_RETRANSMITS_AT), self._tcp_info(_TCP_INFO_SEGMENTS_AT)
        return again / segments if again is not None and segments else None

    def _tcp_info(self, at: int) -> int | None:
        """One 32-bit field of struct tcp_info (linux/tcp.h), where there is one."""
        if not sys.platform.startswith("linux"):
            return None
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            field: int = struct.unpack_from("=I", info, at)[0]
        except (OSError, struct.error):
            return None
        return field

    def close(self) -> None:
        self.closed.set()
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def _lost(self, error: Exception) -> PeerLost:
        return PeerLost(self.peer, f"a socket to {self.peer} is lost: {error or type(error).__name__}")


class StreamCarrier:
    """A libp2p stream, or whatever else is a ByteStream."""

    kind: Literal["direct", "stream"] = "stream"

    def __init__(self, stream: ByteStream) -> None:
        self.closed = trio.Event()
        self._stream = stream
        self._rest = memoryview(b"")

    async def send(self, pieces: Sequence[memoryview | bytes]) -> None:
        for piece in pieces:
            await self._stream.send_all(piece)

    def send_now(self, pieces: list[memoryview]) -> list[memoryview]:
        return pieces

    async def receive_into(self, buffer: memoryview, least: int = 1) -> int:
        if not self._rest:
            self._rest = memoryview(await self._stream.receive_some(max(len(buffer), 1)))
        count = min(len(self._rest), len(buffer))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    async def receive_exactly(self, count: int) -> bytes:
        data = bytearray(count)
        at = 0
        while at < count:
            got = await self.receive_into(memoryview(data)[at:])
            if not got:
                raise PeerLost(self._stream.peer, "the stream was closed")
            at += got
        return bytes(data)

    def tune(self) -> None:
        pass

    def loss(self) -> float | None:
        return None

    def close(self) -> None:
        self.closed.set()
        self._stream.reset()
