"""A pair of byte streams inside this process, for calls to our own peer id. No latency, a bounded buffer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from p2p.errors import PeerLost
from p2p.identity import PeerId

_WINDOW_BYTES = 1 << 20


class _Flow:
    """One direction. Readers and writers both wait at `lot`."""

    __slots__ = ("bytes", "ended", "lost", "lot", "pieces")

    def __init__(self) -> None:
        self.pieces: deque[bytes] = deque()
        self.bytes = 0
        self.ended = False
        self.lost = False
        self.lot = trio.lowlevel.ParkingLot()

    def put(self, data: bytes) -> None:
        if data:  # an empty piece would read as the end
            self.pieces.append(data)
            self.bytes += len(data)
            self.lot.unpark_all()


class PipeStream:
    """A ByteStream to its twin. A write is taken whole once there is room for a part of it."""

    __slots__ = ("_in", "_out", "peer")

    def __init__(self, peer: PeerId, inward: _Flow, outward: _Flow) -> None:
        self.peer = peer
        self._in = inward
        self._out = outward

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        flow = self._out
        await trio.lowlevel.checkpoint_if_cancelled()
        while flow.bytes >= _WINDOW_BYTES and not flow.lost and not flow.ended:
            await flow.lot.park()
        if flow.lost or flow.ended:
            raise PeerLost(self.peer, "the stream inside this process has ended")
        flow.put(bytes(data))

    def send_nowait(self, data: bytes) -> bool:
        flow = self._out
        if flow.bytes >= _WINDOW_BYTES or flow.lost or flow.ended:
            return False
        flow.put(data)
        return True

    async def receive_some(self, max_bytes: int = 1 << 20) -> bytes:
        flow = self._in
        await trio.lowlevel.checkpoint_if_cancelled()
        while not flow.pieces:
            if flow.lost:
                raise PeerLost(self.peer, "the stream inside this process was reset")
            if flow.ended:
                return b""
            await flow.lot.park()
        piece = flow.pieces.popleft()
        if len(piece) > max_bytes:
            flow.pieces.appendleft(piece[max_bytes:])
            piece = piece[:max_bytes]
        flow.bytes -= len(piece)
        flow.lot.unpark_all()
        return piece

    def feed_to(self, sink: Callable[[bytes | memoryview], int]) -> None:
        pass

    async def aclose(self) -> None:
        self._out.ended = True
        self._in.ended = True
        self._out.lot.unpark_all()
        self._in.lot.unpark_all()
        await trio.lowlevel.checkpoint_if_cancelled()

    def reset(self) -> None:
        for flow in (self._in, self._out):
            flow.lost = True
            flow.pieces.clear()
            flow.lot.unpark_all()


def stream_pair(peer: PeerId) -> tuple[PipeStream, PipeStream]:
    """Two ends of one pipe, both of which name `peer`."""
    there, back = _Flow(), _Flow()
    return PipeStream(peer, back, there), PipeStream(peer, there, back)
