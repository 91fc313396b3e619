# mypy: disallow-subclassing-any=False
"""One stream of the mended yamux: its queues, its windows, and how it ends.

Reads and writes only touch queues, so that they may be cancelled anywhere; the connection in
`p2p.compat.yamux` moves the frames. It does not know the wire beyond its window's start size.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from p2p.compat.yamux_frames import INITIAL_WINDOW_BYTES, RST, WINDOW_UPDATE

if TYPE_CHECKING:
    from p2p.compat.yamux import MendedYamux

logger = logging.getLogger(__name__)

_JOIN_BYTES = 16 << 10


class MendedStream(IMuxedStream):
    """One stream. Reads and writes may be cancelled: only whole frames ever reach the wire."""

    def __init__(self, conn: MendedYamux, stream_id: int) -> None:
        self.muxed_conn = conn
        self.conn = conn
        self.stream_id = stream_id
        self.send_window_bytes = INITIAL_WINDOW_BYTES
        self.recv_window_bytes = conn.limits.window_bytes
        self.consumed_bytes = 0
        self.unread: deque[memoryview | bytearray] = deque()
        self.unread_bytes = 0
        self.pending: deque[memoryview] = deque()
        self.pending_bytes = 0
        self.fin_wanted = False
        self.fin_sent = False
        self.fin_received = False
        self.was_reset = False
        self.discarding = False
        self.discard_deadline = math.inf
        self.sink: Callable[[bytes | memoryview], int] | None = None
        self._changed = trio.lowlevel.ParkingLot()

    def wake(self) -> None:
        """Let every waiting reader and writer look again."""
        self._changed.unpark_all()

    @property
    def is_closed(self) -> bool:
        return self.was_reset or (self.fin_received and self.fin_wanted)

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes (all that is there when None). Raises MuxedStreamEOF or MuxedStreamReset."""
        await trio.lowlevel.checkpoint()
        while not self.unread:
            if self.was_reset:
                raise MuxedStreamReset("the stream was reset")
            if self.fin_received or self.discarding:
                raise MuxedStreamEOF("the stream ended")
            await self._changed.park()
        return self._take(n if n is not None and n >= 0 else self.unread_bytes)

    def feed_to(self, sink: Callable[[bytes | memoryview], int]) -> None:
        """Have `sink` take what comes from now on, at once, until it takes less than it is given, which is how many
        bytes it returns. The rest, and what follows, is read; readers also see the end. It must not keep a view of what
        it is given. Should it raise, the stream is reset."""
        self.sink = None if self.unread else sink

    def drop_in(self, piece: memoryview) -> None:
        """Hand a piece to the sink."""
        taken = len(piece)
        try:
            if self.sink is not None:
                taken = self.sink(piece)
        except Exception:  # what a peer sends must never end more than its stream
            logger.exception("what came from %s could not be taken", self.conn.peer_id)
            self.abort()
        if taken < len(piece) and not self.was_reset:
            self.sink = None
            self.put(piece[taken:])
        self.conn.credit(self, taken)

    def put(self, piece: memoryview) -> None:
        """Take a piece from the reader. Small ones are joined, so that a byte never pins a packet."""
        self.unread_bytes += len(piece)
        last = self.unread[-1] if self.unread else None
        if len(piece) >= _JOIN_BYTES:
            self.unread.append(piece)
        elif isinstance(last, bytearray) and len(last) < _JOIN_BYTES:
            last += piece
        else:
            self.unread.append(bytearray(piece))
        self.wake()

    def _take(self, wanted: int) -> bytes:
        pieces: list[memoryview | bytearray] = []
        left = wanted
        while left and self.unread:
            piece = self.unread.popleft()
            if len(piece) > left:
                view = memoryview(bytes(piece)) if isinstance(piece, bytearray) else piece
                self.unread.appendleft(view[left:])
                piece = view[:left]
            pieces.append(piece)
            left -= len(piece)
        data = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
        self.unread_bytes -= len(data)
        self.conn.credit(self, len(data))
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue `data` for the connection's writer; waits while the peer or the queue is full."""
        await trio.lowlevel.checkpoint()
        rest = memoryview(data).cast("B")
        if not isinstance(rest.obj, bytes):
            rest = memoryview(bytes(rest))
        while True:
            if self.was_reset:
                raise MuxedStreamReset("the stream was reset")
            if self.fin_wanted:
                raise MuxedStreamClosed("the stream is closed for writing")
            room = self.conn.limits.pending_write_bytes_max - self.pending_bytes
            if room > 0 and rest:
                self.pending.append(rest[:room])
                self.pending_bytes += len(rest[:room])
                rest = rest[room:]
                self.conn.schedule(self)
            if not rest:
                break
            await self._changed.park()

    def write_nowait(self, data: bytes) -> bool:
        """Queue all of `data`, if there is room for it now; else False, and nothing is queued."""
        room = self.conn.limits.pending_write_bytes_max - self.pending_bytes
        if self.was_reset or self.fin_wanted or len(data) > room:
            return False
        if data and not (not self.pending and self.conn.send_frame(self, data)):
            self.pending.append(memoryview(data))
            self.pending_bytes += len(data)
            self.conn.schedule(self, now=True)
        return True

    async def drain(self) -> None:
        """Wait until all that was written has been handed to the socket's writer."""
        while self.pending_bytes and not self.was_reset:
            await self._changed.park()

    async def close_write(self) -> None:
        """Half-close: what is queued still goes out, then a FIN."""
        if not self.fin_wanted and not self.was_reset:
            self.fin_wanted = True
            self.conn.schedule(self)
        await trio.lowlevel.checkpoint_if_cancelled()

    async def close(self) -> None:
        """Half-close, and throw away what the peer may still send; reset if it never ends."""
        if not self.fin_received:
            self.discarding = True
            self.discard_deadline = trio.current_time() + self.conn.limits.linger_s
        self.conn.credit(self, self._drop_unread())
        await self.close_write()

    async def reset(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint_if_cancelled()

    def abort(self) -> None:
        """End both directions now; the peer sees a reset."""
        if not self.was_reset and not (self.fin_sent and self.fin_received):
            self.conn.send_control(WINDOW_UPDATE, RST, self.stream_id, 0)
        self.conn.drop(self)

    def fail(self, *, keep_unread: bool = False) -> None:
        """Mark as reset and wake everyone. What came before the connection's end stays readable."""
        self.was_reset = True
        self.pending.clear()
        self.pending_bytes = 0
        if not keep_unread:
            self.conn.unread_bytes -= self._drop_unread()
        self.wake()

    def _drop_unread(self) -> int:
        dropped, self.unread_bytes = self.unread_bytes, 0
        self.unread.clear()
        return dropped

    def set_deadline(self, ttl: int) -> None:
        """Deadlines are the caller's cancel scopes; part of py-libp2p's interface only."""

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.conn.get_remote_address()

    async def __aenter__(self) -> MendedStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()
