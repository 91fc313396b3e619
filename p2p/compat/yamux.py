# mypy: disallow-subclassing-any=False
"""A yamux that neither deadlocks nor loses step, in place of py-libp2p's (mends 3, 5 and 6).

Speaks /yamux/1.0.0 over any secured connection of py-libp2p. Faults of 0.8.1 that it replaces:
its reader writes under the write lock (bulk both ways plus stream opens stalls for ever), a
cancelled write leaves half a frame on the wire, a writer unread for five seconds is reset, the
receive window is not enforced, frames up to 16 MiB are taken, and each read sends an update.
It knows frames, windows and streams; not protocols, peers' membership or the socket.
Spec: https://github.com/hashicorp/yamux/blob/master/spec.md
It can go when py-libp2p's own passes tests/p2p/test_yamux.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
)
from multiaddr import Multiaddr

from p2p.compat.tcp import Way
from p2p.compat.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    GO_AWAY_NORMAL,
    GO_AWAY_PROTOCOL_ERROR,
    HEADER_BYTES,
    INITIAL_WINDOW_BYTES,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    FrameError,
    pack_header,
    unpack_header,
)
from p2p.compat.yamux_stream import MendedStream

logger = logging.getLogger(__name__)

_NOTHING = memoryview(b"")
# So many times after something came, a stream's write is sent on the spot. What more is written before something
# comes again waits for the writer, which sends it together.
_TURNS = 3


class Packets(Protocol):
    """What an encrypted connection offers beside `read` and `write`. Raises what those raise."""

    @property
    def is_direct(self) -> bool: ...
    def seal(self, data: bytes | memoryview) -> memoryview: ...
    def send_now(self, sealed: memoryview) -> memoryview: ...
    async def send(self, sealed: memoryview) -> None: ...
    async def read_packets(self) -> list[bytes]: ...


@dataclass(frozen=True, slots=True)
class MuxLimits:
    """What one connection may hold. Windows are granted to each stream, in bytes."""

    streams_max: int = 256
    window_bytes: int = 2 << 20
    unread_bytes_max: int = 64 << 20
    frame_bytes_max: int = 65_507
    batch_bytes_max: int = 256 << 10
    pending_write_bytes_max: int = 256 << 10
    control_frames_max: int = 4096
    linger_s: float = 10.0
    flush_s: float = 0.2


class MendedYamux(IMuxedConn):
    """One connection: a reader task that never writes, and the only task that writes."""

    def __init__(self, conn: ISecureConn, peer_id: ID, limits: MuxLimits | None = None) -> None:
        self.limits = limits or MuxLimits()
        self.secured_conn = conn
        self.peer_id = peer_id
        self.way: Way = getattr(conn, "way", None) or Way()
        self.heard_s = trio.current_time()
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self.on_end: Callable[[], None] = lambda: None
        self.admit: Callable[[], bool] = lambda: True
        self.streams: dict[int, MendedStream] = {}
        self.unread_bytes = 0
        self.close_reason = ""
        self._initiator = bool(conn.is_initiator)
        self._next_id = 1 if self._initiator else 2
        self._last_peer_id = 0
        self._control: deque[bytes] = deque()
        self._ready: deque[MendedStream] = deque()
        self._queued: set[int] = set()
        self._work = trio.Event()
        self._flushed = trio.Event()
        self._closing = False
        self._busy = False
        # Set where packets can leave without a turn of the scheduler, see `flush`.
        self._packets: Packets | None = getattr(conn, "packets", None)
        self._sealed: memoryview = _NOTHING
        self._writing = False
        self._corked = False
        self._turns_left = _TURNS
        self._scope = trio.CancelScope()
        self._accept_send, self._accept_receive = trio.open_memory_channel[MendedStream](
            self.limits.streams_max
        )

    @property
    def is_initiator(self) -> bool:
        return self._initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        return self._closing or self.event_closed.is_set()

    def get_remote_address(self) -> tuple[str, int] | None:
        address: tuple[str, int] | None = self.secured_conn.get_remote_address()
        return address

    def get_transport_addresses(self) -> list[Multiaddr]:
        addresses: list[Multiaddr] = self.secured_conn.get_transport_addresses()
        return addresses

    def get_connection_type(self) -> Any:
        return self.secured_conn.get_connection_type()

    # ---- life

    async def start(self) -> None:
        """Run the connection until it ends. Never raises for what the peer does."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_loop)
                    nursery.start_soon(self._sweep_loop)
                    self.event_started.set()
                    await self._read_loop()
                    self._scope.cancel()
        finally:
            self.event_started.set()
            self._end()
            with trio.CancelScope(shield=True):
                await self._close_socket()
                if self.on_close is not None:
                    await self.on_close()

    async def close(self) -> None:
        """Send what is queued (for at most `flush_s`), say good-bye, and end."""
        try:
            if not self._closing and self.event_started.is_set():
                with trio.move_on_after(self.limits.flush_s):
                    await self._flush()
                    self.send_control(GO_AWAY, 0, 0, GO_AWAY_NORMAL)
                    await self._flush()
        finally:
            self.abort("closed here")
            with trio.CancelScope(shield=True):
                await self._close_socket()

    async def _flush(self) -> None:
        while self._busy and not self._closing:
            await self._flushed.wait()

    def abort(self, reason: str) -> None:
        """End at once: every stream fails, the socket is closed without waiting for the peer."""
        self.close_reason = self.close_reason or reason
        self._end()
        self._scope.cancel()

    def _end(self) -> None:
        self._closing = True
        for stream in list(self.streams.values()):
            stream.fail(keep_unread=True)
        self.streams.clear()
        self._ready.clear()
        self._queued.clear()
        self._control.clear()
        self._accept_send.close()
        self._flushed.set()
        self.event_closed.set()
        self.on_end()

    async def _close_socket(self) -> None:
        with trio.move_on_after(self.limits.flush_s):
            try:
                await self.secured_conn.close()
            except Exception as error:  # noqa: BLE001 - closing a broken socket may raise anything
                logger.debug("closing the connection to %s: %s", self.peer_id, error)

    # ---- streams

    async def open_stream(self) -> MendedStream:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.is_closed:
            raise MuxedConnUnavailable("the connection is closed")
        if len(self.streams) >= self.limits.streams_max * 2:
            raise MuxedConnUnavailable("too many open streams on this connection")
        stream = MendedStream(self, self._next_id)
        self._next_id += 2
        self.streams[stream.stream_id] = stream
        self.send_control(WINDOW_UPDATE, SYN, stream.stream_id, self._extra_window())
        return stream

    async def accept_stream(self) -> MendedStream:
        try:
            return await self._accept_receive.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection is closed") from None

    def inbound_streams(self) -> int:
        """How many streams of the peer's making are open."""
        return sum(1 for stream_id in self.streams if stream_id % 2 != self._next_id % 2)

    def drop(self, stream: MendedStream) -> None:
        """Forget a stream that was reset from either side."""
        self.streams.pop(stream.stream_id, None)
        stream.fail()

    def credit(self, stream: MendedStream, count: int) -> None:
        """The application took `count` bytes: grant the peer that much again, in large steps."""
        self.unread_bytes -= count
        stream.consumed_bytes += count
        if stream.fin_received or stream.was_reset:
            self._forget_if_done(stream)
        elif stream.consumed_bytes * 2 >= self.limits.window_bytes:
            stream.recv_window_bytes += stream.consumed_bytes
            self.send_control(WINDOW_UPDATE, 0, stream.stream_id, stream.consumed_bytes)
            stream.consumed_bytes = 0

    def _extra_window(self) -> int:
        return max(0, self.limits.window_bytes - INITIAL_WINDOW_BYTES)

    def _forget_if_done(self, stream: MendedStream) -> None:
        if stream.fin_received and stream.fin_sent and not stream.unread:
            self.streams.pop(stream.stream_id, None)

    # ---- writing: one task, whole frames, streams in turn

    def send_control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame without payload, ahead of all data. A peer that makes us queue too many loses."""
        if self._closing:
            return
        if len(self._control) >= self.limits.control_frames_max:
            self.abort("the peer does not read while asking for answers")
            return
        self._control.append(pack_header(kind, flags, stream_id, length))
        self._busy = True
        if not self._corked:
            self._work.set()

    def ask(self) -> None:
        """Have the peer send something, so that `heard_s` tells whether it is still there."""
        self.send_control(PING, SYN, 0, 0)

    def schedule(self, stream: MendedStream, *, now: bool = False) -> None:
        """Give `stream` a turn at the writer, unless its window is used up; on the spot if `now` and possible."""
        if self._closing or stream.stream_id in self._queued:
            return
        if (stream.pending and stream.send_window_bytes > 0) or (
            stream.fin_wanted and not stream.fin_sent and not stream.pending
        ):
            self._queued.add(stream.stream_id)
            self._ready.append(stream)
            self._busy = True
            if now:
                self.flush()
            elif not self._corked:
                self._work.set()

    def send_frame(self, stream: MendedStream, data: bytes) -> bool:
        """The short way of most small messages: one frame, sent before this returns, where nothing else is queued."""
        size = len(data)
        if (
            self._busy
            or self._corked
            or not self._turns_left
            or self._packets is None
            or not self._packets.is_direct
            or size > stream.send_window_bytes
            or size > self.limits.frame_bytes_max
        ):
            return False
        self._turns_left -= 1
        stream.send_window_bytes -= size
        try:
            frame = pack_header(DATA, 0, stream.stream_id, size) + data
            self._sealed = self._packets.send_now(self._packets.seal(frame))
        except Exception as error:  # noqa: BLE001 - as in the writer
            self.abort(f"writing failed: {error}")
            return True
        if self._sealed:
            self._busy = True
            self._work.set()
        return True

    def flush(self) -> None:
        """Send what is queued here and now as far as the socket takes it; the writer sees to the rest."""
        packets = self._packets
        if self._corked:
            return
        if packets is not None and packets.is_direct and not self._writing and self._turns_left:
            self._turns_left -= 1
            try:
                while (self._control or self._ready) and not self._sealed:
                    self._sealed = packets.send_now(packets.seal(self._next_batch()))
            except Exception as error:  # noqa: BLE001 - as in the writer
                self.abort(f"writing failed: {error}")
        if self._control or self._ready or self._sealed:
            self._work.set()
        elif not self._writing:
            self._busy = False

    async def _write_loop(self) -> None:
        packets = self._packets
        while True:
            while not self._control and not self._ready and not self._sealed:
                self._busy = False
                self._turns_left = _TURNS
                self._flushed.set()
                self._flushed = trio.Event()
                self._work = trio.Event()
                await self._work.wait()
            self._busy = self._writing = True
            try:
                if packets is None:
                    await self.secured_conn.write(self._next_batch())
                else:
                    sealed, self._sealed = self._sealed or packets.seal(self._next_batch()), _NOTHING
                    await packets.send(sealed)
            except Exception as error:  # noqa: BLE001 - whatever the socket or cipher raises ends it
                self.abort(f"writing failed: {error}")
                return
            self._writing = False

    def _next_batch(self) -> bytes:
        parts: list[bytes | memoryview] = []
        size = 0
        while self._control:
            parts.append(self._control.popleft())
            size += HEADER_BYTES
        while self._ready and size < self.limits.batch_bytes_max:
            stream = self._ready.popleft()
            self._queued.discard(stream.stream_id)
            if not stream.was_reset:
                size += self._take_frame(stream, parts)
                self.schedule(stream)
        return b"".join(parts)

    def _take_frame(self, stream: MendedStream, parts: list[bytes | memoryview]) -> int:
        budget = min(self.limits.frame_bytes_max, stream.send_window_bytes, stream.pending_bytes)
        pieces: list[memoryview] = []
        left = budget
        while left > 0:
            piece = stream.pending.popleft()
            if len(piece) > left:
                stream.pending.appendleft(piece[left:])
                piece = piece[:left]
            pieces.append(piece)
            left -= len(piece)
        stream.pending_bytes -= budget
        stream.send_window_bytes -= budget
        flags = 0
        if stream.fin_wanted and not stream.pending and not stream.fin_sent:
            flags = FIN
            stream.fin_sent = True
            self._forget_if_done(stream)
        if budget or flags:
            parts.append(pack_header(DATA, flags, stream.stream_id, budget))
            parts.extend(pieces)
        stream.wake()
        return HEADER_BYTES + budget

    # ---- reading: never writes, never waits for the application

    async def _read_loop(self) -> None:
        parser = self._parse()
        next(parser)
        try:
            packets = [await self.secured_conn.read(None)]
            while True:
                self.heard_s = trio.current_time()
                self._corked = True
                for packet in packets:
                    if not packet:
                        self.close_reason = self.close_reason or "the peer closed the connection"
                        return
                    parser.send(memoryview(packet))
                self._corked = False
                self._turns_left = _TURNS
                if self._busy:
                    self.flush()
                if self._packets is not None:
                    packets = await self._packets.read_packets()
                else:
                    packets = [await self.secured_conn.read(None)]
        except FrameError as error:
            logger.info("yamux: %s: %s; closing its connection", self.peer_id, error)
            self.close_reason = f"protocol error: {error}"
            self.send_control(GO_AWAY, 0, 0, GO_AWAY_PROTOCOL_ERROR)
        except Exception as error:  # noqa: BLE001 - a peer's bytes must never end more than its connection
            self.close_reason = self.close_reason or f"reading failed: {error or type(error).__name__}"

    def _parse(self) -> Generator[None, memoryview, None]:
        """Frames out of the pieces that are sent to it, however they were cut. Raises FrameError."""
        header = bytearray()
        while True:
            chunk = yield
            while chunk:
                if not header and len(chunk) >= HEADER_BYTES:
                    target, flags, left = self._on_header(chunk[:HEADER_BYTES])
                    chunk = chunk[HEADER_BYTES:]
                else:
                    need = HEADER_BYTES - len(header)
                    header += chunk[:need]
                    chunk = chunk[need:]
                    if len(header) < HEADER_BYTES:
                        continue
                    target, flags, left = self._on_header(header)
                    header = bytearray()
                while left:
                    while not chunk:
                        chunk = yield
                    piece = chunk[:left]
                    chunk = chunk[left:]
                    left -= len(piece)
                    self._deliver(target, piece)
                    if not left:
                        self._after_frame(target, flags)

    def _on_header(self, header: memoryview | bytearray) -> tuple[MendedStream | None, int, int]:
        """Act on a frame; for data, returns (stream, flags, bytes of body that follow)."""
        kind, flags, stream_id, length = unpack_header(header)
        if kind == PING:
            if flags & SYN:
                self.send_control(PING, ACK, 0, length)
            return None, 0, 0
        if kind == GO_AWAY:
            raise ConnectionError("the peer said good-bye")
        stream = self._accept(stream_id) if flags & SYN else self.streams.get(stream_id)
        if kind == WINDOW_UPDATE:
            if stream is not None:
                stream.send_window_bytes += length
                if stream.send_window_bytes > 0xFFFF_FFFF:
                    raise FrameError("a send window beyond 4 GiB")
                self.schedule(stream)
            self._after_frame(stream, flags)
            return None, 0, 0
        if stream is None and length > self.limits.window_bytes:
            raise FrameError(f"{length} bytes for a stream that is not open")
        if stream is not None:
            if length > stream.recv_window_bytes:
                raise FrameError(f"{length} bytes where {stream.recv_window_bytes} were granted")
            stream.recv_window_bytes -= length
        if not length:
            self._after_frame(stream, flags)
        return stream, flags, length

    def _accept(self, stream_id: int) -> MendedStream | None:
        if stream_id % 2 == self._next_id % 2 or stream_id == 0 or stream_id in self.streams:
            raise FrameError(f"stream id {stream_id} cannot be opened by the peer")
        if self.inbound_streams() >= self.limits.streams_max or not self.admit():
            self.send_control(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        stream = MendedStream(self, stream_id)
        try:
            self._accept_send.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self.send_control(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        self.streams[stream_id] = stream
        self.send_control(WINDOW_UPDATE, ACK, stream_id, self._extra_window())
        return stream

    def _deliver(self, stream: MendedStream | None, piece: memoryview) -> None:
        if stream is None or stream.was_reset:
            return
        self.unread_bytes += len(piece)
        if stream.discarding:
            self.credit(stream, len(piece))
            return
        if stream.sink is not None:
            stream.drop_in(piece)
        else:
            stream.put(piece)
        if self.unread_bytes > self.limits.unread_bytes_max:
            fullest = max(self.streams.values(), key=lambda one: one.unread_bytes)
            logger.info("yamux: %s fills unread streams; resetting the fullest", self.peer_id)
            fullest.abort()

    def _after_frame(self, stream: MendedStream | None, flags: int) -> None:
        if stream is None:
            return
        if flags & RST:
            self.drop(stream)
        elif flags & FIN:
            stream.fin_received = True
            stream.wake()
            self._forget_if_done(stream)

    async def _sweep_loop(self) -> None:
        """Reset streams that we closed and whose peer never ended its side."""
        while True:
            await trio.sleep(self.limits.linger_s)
            now = trio.current_time()
            for stream in list(self.streams.values()):
                if stream.discard_deadline <= now:
                    stream.abort()
