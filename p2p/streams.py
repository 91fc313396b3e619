"""ByteStream, what the rest of p2p sees of a connection's streams, and its libp2p-backed form.

Knows how the muxer's errors translate into ours. It does not know protocols or frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError

from p2p.compat.tcp import Way
from p2p.compat.yamux_stream import MendedStream
from p2p.errors import PeerLost
from p2p.identity import PeerId


class ByteStream(Protocol):
    """A reliable, flow-controlled pair of byte flows with one peer.

    All methods may be cancelled. A cancelled `send_all` may have sent a part of its data: whoever
    frames messages then resets the stream. Errors: PeerLost.
    """

    peer: PeerId

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of `data`; waits while the peer does not read. One caller at a time."""

    def send_nowait(self, data: bytes) -> bool:
        """Queue all of `data` if there is room for it at once; else False, and nothing was queued. Never raises: where
        the stream is lost, `send_all` says so. Not while a `send_all` waits."""

    async def receive_some(self, max_bytes: int = 1 << 20) -> bytes:
        """At least one byte and at most `max_bytes`; b"" once the peer has ended its side."""

    def feed_to(self, sink: Callable[[bytes | memoryview], int]) -> None:
        """Where that is possible, have `sink` take at once what comes from now on, in pieces that it must not keep. It
        returns how many bytes it took: from the first that it did not take on, `receive_some` gives them."""

    async def aclose(self) -> None:
        """End our side after what is queued, and stop reading."""

    def reset(self) -> None:
        """Abandon the stream at once; the peer's calls raise PeerLost."""


class MuxByteStream:
    """A ByteStream over one stream of the mended yamux."""

    __slots__ = ("_stream", "peer")

    def __init__(self, stream: MendedStream, peer: PeerId) -> None:
        self._stream = stream
        self.peer = peer

    @property
    def way(self) -> Way:
        """How the connection beneath runs."""
        return self._stream.conn.way

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.write(data)
        except (MuxedStreamError, MuxedConnUnavailable) as error:
            raise self._lost(error) from error

    def send_nowait(self, data: bytes) -> bool:
        return self._stream.write_nowait(data)

    async def receive_some(self, max_bytes: int = 1 << 20) -> bytes:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        try:
            return await self._stream.read(max_bytes)
        except MuxedStreamEOF:
            return b""
        except (MuxedStreamError, MuxedConnUnavailable) as error:
            raise self._lost(error) from error

    def feed_to(self, sink: Callable[[bytes | memoryview], int]) -> None:
        self._stream.feed_to(sink)

    async def send_eof(self) -> None:
        """End our side and go on reading."""
        await self._stream.close_write()

    async def aclose(self) -> None:
        await self._stream.close()

    def reset(self) -> None:
        self._stream.abort()

    def _lost(self, error: Exception) -> PeerLost:
        reason = self._stream.conn.close_reason if self._stream.conn.is_closed else str(error)
        return PeerLost(self.peer, f"lost the stream to {self.peer}: {reason}")
