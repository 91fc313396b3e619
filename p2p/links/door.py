"""The side that is dialled: sockets and streams prove which link they belong to, and become its path once all came.

Knows the listener's half of the handshake and paths that are not complete yet. Everything here is said by strangers
until proven: fixed sizes, deadlines, counts. It does not know services.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from p2p.errors import PeerLost, ProtocolViolation
from p2p.host import ByteStream
from p2p.identity import PeerId
from p2p.links.carriers import Carrier, SocketCarrier, StreamCarrier
from p2p.links.connect import release
from p2p.links.handshake import HELLO_SIZE, MAGIC, Hello, read_hello, welcome
from p2p.links.keys import new_challenge
from p2p.links.link import Link
from p2p.links.types import LinksConfig

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Pending:
    """Carriers of a generation that is not complete yet."""

    generation: int
    count: int
    position: int
    carriers: dict[int, Carrier] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Seat:
    """What the door knows of one link: `seated` is called once its first path is there."""

    link: Link
    seated: Callable[[], None]
    generation: int = 0
    pending: _Pending | None = None

    def drop_pending(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            for carrier in pending.carriers.values():
                carrier.close()


class Door:
    """`seats` are the links that may be joined, by session. `faults` counts what was refused, by reason."""

    def __init__(self, config: LinksConfig, nursery: Callable[[], trio.Nursery]) -> None:
        self.seats: dict[bytes, Seat] = {}
        self.faults: Counter[str] = Counter()
        self._config = config
        self._nursery = nursery

    async def on_socket(self, sock: trio.socket.SocketType) -> None:
        """One accepted socket: it proves its link within the deadline, or is closed."""
        carrier = SocketCarrier(release(sock), PeerId("an unproven peer"))
        with trio.CancelScope(deadline=self._deadline()) as scope:
            await self._introduced(carrier, None)
        if scope.cancelled_caught:
            self.faults["slow"] += 1

    async def on_stream(self, stream: ByteStream) -> None:
        """One libp2p stream, which lives as long as this call."""
        carrier = StreamCarrier(stream)
        taken = False
        with trio.CancelScope(deadline=self._deadline()) as scope:
            taken = await self._introduced(carrier, stream.peer)
        if scope.cancelled_caught:
            self.faults["slow"] += 1
        elif taken:
            await carrier.closed.wait()

    def _deadline(self) -> float:
        return trio.current_time() + self._config.handshake_deadline_s

    async def _introduced(self, carrier: Carrier, peer: PeerId | None) -> bool:
        challenge = new_challenge()
        done = False
        try:
            await carrier.send([MAGIC + challenge])
            hello, proof = read_hello(await carrier.receive_exactly(HELLO_SIZE))
            seat = self.seats.get(hello.session)
            if seat is None or (peer is not None and seat.link.peer != peer):
                raise ProtocolViolation("a hello for a link that is not open here")
            link = seat.link
            if not link.keys.proves(b"hello", challenge, hello.said(), proof):
                raise ProtocolViolation("a hello without proof")
            if isinstance(carrier, SocketCarrier):
                carrier.peer = link.peer
            self._check(seat, hello)
            await carrier.send([welcome(link.keys, hello, challenge, link.inbox.received)])
            self._attach(seat, hello, carrier)
            done = True
            return True
        except ProtocolViolation as violation:
            self.faults["refused"] += 1
            logger.debug("a path was refused: %s", violation)
        except PeerLost:
            self.faults["lost"] += 1
        finally:
            if not done:
                carrier.close()
        return False

    def _check(self, seat: Seat, hello: Hello) -> None:
        pending = seat.pending
        if seat.link.failure is not None or hello.generation <= seat.generation:
            raise ProtocolViolation("a hello for a path that is over")
        if hello.position > seat.link.outbox.next_seq:
            raise ProtocolViolation("a hello with more records than were sent")
        if (
            pending is not None
            and hello.generation <= pending.generation
            and (
                hello.generation < pending.generation
                or hello.count != pending.count
                or hello.index in pending.carriers
            )
        ):
            raise ProtocolViolation("a hello that does not fit the others of its path")

    def _attach(self, seat: Seat, hello: Hello, carrier: Carrier) -> None:
        """One more carrier of a generation; complete, it becomes the path. Raises ProtocolViolation."""
        self._check(seat, hello)  # again: others may have come while the welcome was sent
        pending = seat.pending
        if pending is None or hello.generation > pending.generation:
            seat.drop_pending()
            pending = seat.pending = _Pending(hello.generation, hello.count, hello.position)
            if hello.count > 1:
                self._nursery().start_soon(self._expire, seat, pending)
        pending.carriers[hello.index] = carrier
        pending.position = min(pending.position, hello.position)
        if len(pending.carriers) < pending.count:
            return
        seat.pending = None
        first, seat.generation = seat.generation == 0, pending.generation
        carriers = [pending.carriers[index] for index in range(pending.count)]
        path = seat.link.adopt(pending.generation, carriers, pending.position)
        self._nursery().start_soon(seat.link.run_path, path)
        if first:
            seat.seated()

    async def _expire(self, seat: Seat, pending: _Pending) -> None:
        await trio.sleep(self._config.handshake_deadline_s)
        if seat.pending is pending:
            self.faults["slow"] += 1
            seat.drop_pending()
