# mypy: disallow-subclassing-any=False
"""Circuits: streams of bytes between two peers through a third, and the whole encrypted connection inside each.

Our own, since py-libp2p's circuit v2 ends all of a peer's circuits with one of them, knows no budget and takes no dial
of ours. The relay sees peer ids and ciphertext; both ends prove key and membership to one another inside, as on any
connection. It knows streams and their ends; who relays for whom is decided by the cores.
"""

from __future__ import annotations

import contextlib
import logging
import secrets

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.exceptions import SwarmException

from p2p.compat.swarm import MendedSwarm
from p2p.compat.tcp import Endpoint, Way
from p2p.errors import P2pError, PeerLost, ProtocolViolation, RemoteFault
from p2p.host import ByteStream, Host
from p2p.identity import PeerId
from p2p.reach.relay_core import NotRelayed, Pace, RelayCore

logger = logging.getLogger(__name__)

HOP, STOP = "relay/1/hop", "relay/1/stop"
PIECE_BYTES = 16 << 10
SET_UP_S = 5.0
IDLE_S = 60.0
_YES, _NO = b"\x01", b"\x00"
_MARK_BYTES = 16


class CircuitStream(ReadWriteCloser):
    """A stream through a relay, as the socket of a connection."""

    def __init__(self, stream: ByteStream, relay: str) -> None:
        self.way = Way("relayed", None, None, relay)
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        try:
            return await self._stream.receive_some(n or PIECE_BYTES)
        except PeerLost as lost:
            raise ConnectionClosedError(str(lost)) from lost

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except PeerLost as lost:
            raise ConnectionClosedError(str(lost)) from lost

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> Endpoint | None:
        return None


class Circuits:
    """Both roles of a node: it carries what `core` allows, and dials and takes circuits of its own."""

    def __init__(self, host: Host, swarm: MendedSwarm, core: RelayCore) -> None:
        self.core = core
        self._pace = Pace(20, 0.5)
        self._host = host
        self._swarm = swarm
        swarm.hooks.circuit = self._dial
        host.handle(HOP, self._hop)
        host.handle(STOP, self._stop)

    # ---- as an end

    async def _dial(self, address: str, relay: str, peer: str) -> CircuitStream:
        try:
            if relay == self._host.peer_id:
                raise ProtocolViolation("this node is the relay itself")
            if not self._host.is_connected(relay):
                await self._host.connect([f"{address}/p2p/{relay}"])
            return CircuitStream(await self._through(relay, peer), relay)
        except (P2pError, trio.TooSlowError) as failure:
            raise SwarmException(f"not through {relay[-8:]}: {failure}") from None

    async def _through(self, relay: str, peer: str) -> ByteStream:
        """A stream that `relay` has joined to one of `peer`. Raises RemoteFault."""
        if not any(way.kind != "relayed" for way in self._host.ways(relay)):
            raise ProtocolViolation("the relay itself is behind one")
        stream = await self._host.open_stream(relay, HOP)
        joined = False
        try:
            with trio.fail_after(SET_UP_S):
                await stream.send_all(_named(peer))
                if await _exactly(stream, 1) != _YES:
                    raise ProtocolViolation((await _sized(stream)).decode("utf-8", "replace")[:120])
            joined = True
            return stream
        finally:
            if not joined:
                stream.reset()

    async def proven(self, relay: PeerId) -> bool:
        """Whether `relay` does carry circuits to this node: one to ourselves, and back a mark that only we know."""
        try:
            with trio.fail_after(SET_UP_S):
                stream = await self._through(relay, self._host.peer_id)
                mark = secrets.token_bytes(_MARK_BYTES)
                await stream.send_all(mark)
                back = await _exactly(stream, _MARK_BYTES)
                stream.reset()
                return secrets.compare_digest(back, mark)
        except (P2pError, trio.TooSlowError) as failure:
            logger.info("%s does not relay what it promised: %s", relay, failure)
            return False

    async def _stop(self, stream: ByteStream) -> None:
        """A relay brings a circuit; who it says has dialled proves itself inside."""
        with trio.fail_after(SET_UP_S):
            dialler = (await _sized(stream)).decode("ascii", "replace")
            await stream.send_all(_YES)
            if dialler == self._host.peer_id:
                await stream.send_all(await _exactly(stream, _MARK_BYTES))
                return
        await self._swarm.accept(CircuitStream(stream, stream.peer))

    # ---- as the relay

    async def _hop(self, stream: ByteStream) -> None:
        with trio.fail_after(SET_UP_S):
            target = PeerId((await _sized(stream)).decode("ascii", "replace"))
        try:
            circuit = self._allowed(stream, target)
        except NotRelayed as refused:
            await stream.send_all(_NO + _named(str(refused)))
            return
        far: ByteStream | None = None
        try:
            with trio.fail_after(SET_UP_S):
                far = joint = await self._host.open_stream(target, STOP)
                await joint.send_all(_named(stream.peer))
                if await _exactly(joint, 1) != _YES:
                    raise ProtocolViolation("the peer refused the circuit")
            await stream.send_all(_YES)
            await self._carry(stream, joint)
        except (P2pError, trio.TooSlowError) as failure:
            logger.debug("a circuit from %s to %s failed: %s", stream.peer, target, failure)
            stream.reset()
        finally:
            self.core.close(circuit)
            if far is not None:
                far.reset()

    def _allowed(self, stream: ByteStream, target: PeerId) -> int:
        way = getattr(stream, "way", Way())
        ways = self._host.ways(target)
        if way.kind == "relayed" or not ways or ways[0].kind == "relayed":
            raise NotRelayed("it is not connected to that peer, or to this one, directly")
        if not self._pace.may(stream.peer, trio.current_time()):
            raise NotRelayed("asked too often")
        return self.core.open(stream.peer, target, trio.current_time())

    async def _carry(self, near: ByteStream, far: ByteStream) -> None:
        """Until either end ends, or nothing went either way for long."""
        async with trio.open_nursery() as nursery:
            quiet = trio.CancelScope(deadline=trio.current_time() + IDLE_S)

            async def pump(source: ByteStream, sink: ByteStream) -> None:
                # Caught here: beside another task's cancellation it would be in a group that no one handles.
                with contextlib.suppress(RemoteFault):
                    while data := await source.receive_some(PIECE_BYTES):
                        now_s = trio.current_time()
                        quiet.deadline = now_s + IDLE_S
                        wait_s = self.core.wait_s(len(data), now_s)
                        if wait_s > 0:
                            await trio.sleep(wait_s)
                        await sink.send_all(data)
                nursery.cancel_scope.cancel()

            with quiet:
                nursery.start_soon(pump, near, far)
                nursery.start_soon(pump, far, near)
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()


def _named(text: str) -> bytes:
    data = text.encode()[:255]
    return bytes([len(data)]) + data


async def _sized(stream: ByteStream) -> bytes:
    return await _exactly(stream, (await _exactly(stream, 1))[0])


async def _exactly(stream: ByteStream, count: int) -> bytes:
    """Raises PeerLost where the stream ends before."""
    data = b""
    while len(data) < count:
        piece = await stream.receive_some(count - len(data))
        if not piece:
            raise PeerLost(stream.peer, "the stream ended")
        data += piece
    return data
