"""The links of one node: opening and serving them, their paths, and what their traffic tells of peers.

Knows services, sessions, limits and when a path is made anew: a direct one where it can be dialled, a libp2p stream
meanwhile or for ever. It does not know records (`records`) or how messages are kept (`link`).
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from p2p.errors import (
    CallFailed,
    EndOfChannel,
    LocalFault,
    PeerLost,
    ProtocolViolation,
    RemoteFault,
    ResourceLimit,
    RpcRefusal,
    Unreachable,
)
from p2p.host import ByteStream
from p2p.identity import PeerId
from p2p.links.carriers import Carrier, SocketCarrier, StreamCarrier
from p2p.links.connect import Address, dial, ips_of, release, worth_dialling
from p2p.links.handshake import (
    CHALLENGE_SIZE,
    HELLO_SIZE,
    MAGIC,
    Hello,
    challenge_of,
    introduce,
    read_hello,
    welcome,
)
from p2p.links.keys import (
    PUBLIC_BYTES,
    SESSION_BYTES,
    Exchange,
    LinkKeys,
    context_of,
    new_challenge,
    new_session,
)
from p2p.links.link import Link, Terms
from p2p.links.listen import Listener
from p2p.links.meter import Meter
from p2p.links.types import RECORD_BYTES_MAX, RECORD_BYTES_MIN, LinkReport, LinksConfig
from p2p.pipe import stream_pair
from p2p.rpc import Rpc, RpcHost
from p2p.rpc_types import Call, Method

logger = logging.getLogger(__name__)

PROTOCOL = "links/1"
_OFFERED_MAX = 32
_STEADY_S = 30.0

Handler = Callable[[Link], Awaitable[None]]


class LinksHost(RpcHost, Protocol):
    """What Links needs of a host; `p2p.Host` and `p2p.testing.MemoryHost` both are one."""

    def addrs(self) -> tuple[str, ...]: ...


class LinksIdentity(Protocol):
    """What Links needs of an identity: the peer id. Rpc proves it."""

    @property
    def peer_id(self) -> PeerId: ...


@dataclass(frozen=True)
class OpenLink:
    """A wish for a link: our half of the exchange, and what we would take."""

    service: str
    session: bytes
    key: bytes
    record_bytes: int
    window_bytes: int


@dataclass(frozen=True)
class LinkOpened:
    """The other half, what is agreed, and where direct sockets are taken."""

    key: bytes
    record_bytes: int
    window_bytes: int
    addrs: tuple[str, ...] = ()


OPEN = Method("links/open", OpenLink, LinkOpened, body_bytes_max=8 << 10, deadline_s=10.0)


@dataclass(eq=False, slots=True)
class _Pending:
    """Carriers of a generation that is not complete yet, at the side that is dialled."""

    generation: int
    count: int
    position: int
    carriers: dict[int, Carrier] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Entry:
    """What Links keeps of one link. `offered` are the peer's addresses, for the side that dials."""

    link: Link
    offered: list[Address]
    promised_bytes: int
    generation: int = 0
    pending: _Pending | None = None
    handler: Handler | None = None
    handled: trio.Event | None = None


class Links:
    """One a host, beside its Rpc. `serve` before or after `run`; `open` only while `run` runs."""

    def __init__(
        self, host: LinksHost, rpc: Rpc, identity: LinksIdentity, config: LinksConfig | None = None
    ) -> None:
        if identity.peer_id != host.peer_id:
            raise LocalFault("this identity is not that of the host")
        self.host = host
        self.rpc = rpc
        self.config = config or LinksConfig()
        self.faults: Counter[str] = Counter()
        self._services: dict[str, Handler] = {}
        self._opened: dict[bytes, _Entry] = {}
        self._served: dict[bytes, _Entry] = {}
        self._meters: OrderedDict[PeerId, Meter] = OrderedDict()
        self._promised_bytes = 0
        self._nursery: trio.Nursery | None = None
        self._listener = Listener(self.config, self._on_socket)
        rpc.serve(OPEN, self._on_open)
        host.handle(PROTOCOL, self._on_stream)

    # ---- the face

    def serve(self, service: str, handler: Handler) -> None:
        """Give links that peers open for `service` to `handler`; a link is closed when it returns."""
        if not 0 < len(service) <= 128:
            raise LocalFault(f"a service's name must be 1 to 128 characters, got {service!r}")
        if service in self._services or len(self._services) >= self.config.services_max:
            raise LocalFault(f"service {service!r} is served already, or there are too many")
        self._services[service] = handler

    def unserve(self, service: str) -> None:
        """Refuse new links for `service`; those that are open go on."""
        self._services.pop(service, None)

    @asynccontextmanager
    async def open(self, peer: str, service: str, *, deadline_s: float | None = None) -> AsyncIterator[Link]:
        """A link to `peer`, ready for use. Leaving the block ends it cleanly.

        Raises PeerLost, Unreachable (the peer does not serve it, or no path), DeadlineExceeded, ResourceLimit.
        """
        within_s = self.config.open_deadline_s if deadline_s is None else deadline_s
        deadline = trio.current_time() + within_s
        link = await self._open(PeerId(peer), service, deadline)
        failed = True
        try:
            await link.wait_open(deadline)
            yield link
            failed = False
        finally:
            if failed:
                link.fail(PeerLost(link.peer, "the link was abandoned"))
            else:
                await link.aclose()

    def report(self) -> tuple[LinkReport, ...]:
        """What is known of each peer with which there were links, sorted by peer."""
        return tuple(self._report(peer, meter) for peer, meter in sorted(self._meters.items()))

    def addrs(self) -> tuple[str, ...]:
        """IP:PORT at which direct paths are taken now."""
        return tuple(self._listener.addrs())

    # ---- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the listeners, links and their paths until cancelled. Raises ListenError for a port that is asked for
        by number and cannot be had."""
        if self._nursery is not None:
            raise LocalFault("these Links are running already")
        try:
            async with trio.open_nursery() as nursery:
                await self._listener.open(ips_of(self.host.addrs()))
                self._nursery = nursery
                nursery.start_soon(self._listener.run)
                await nursery.start(self._watch_peers)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self._listener.close()
            for entry in self._entries():
                entry.link.fail(PeerLost(entry.link.peer, "this node ends its links"))

    def _entries(self) -> list[_Entry]:
        return [*self._opened.values(), *self._served.values()]

    async def _watch_peers(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """A peer that is no longer connected, and with that no longer a proven member, has no links."""
        started = False
        while True:
            with self.host.watch() as events:
                self._drop_lost()
                if not started:
                    started = True
                    task_status.started()
                async for event in events:
                    if event.kind == "down":
                        self._drop_lost()

    def _drop_lost(self) -> None:
        for entry in self._entries():
            peer = entry.link.peer
            if peer != self.host.peer_id and not self.host.is_connected(peer):
                entry.link.fail(PeerLost(peer, f"the connection to {peer} is gone"))

    # ---- opening

    async def _open(self, peer: PeerId, service: str, deadline: float) -> Link:
        self._running()
        self._check_room(peer)
        exchange = Exchange()
        session = new_session()
        config = self.config
        window_bytes = self._grant(config.window_bytes)
        wish = OpenLink(service, session, exchange.public, config.record_bytes, window_bytes)
        within_s = max(deadline - trio.current_time(), 1e-3)
        try:
            reply = await self.rpc.call(peer, OPEN, wish, deadline_s=within_s)
        except CallFailed as refused:
            if refused.code == "busy":
                raise ResourceLimit(f"{peer} has no room for a link", refused.retry_after_s or 1.0) from None
            raise Unreachable({str(peer): f"{refused.code}: {refused.message}"}) from None
        record_bytes = min(config.record_bytes, reply.record_bytes)
        check_terms(reply.key, record_bytes, reply.window_bytes)
        context = context_of(session, service, self.host.peer_id, peer, (exchange.public, reply.key))
        keys = LinkKeys(exchange.finish(reply.key, context), opener=True)
        terms = Terms(
            session, service, record_bytes, min(reply.window_bytes, config.window_bytes), window_bytes, True
        )
        link = Link(peer, terms, keys, config, self._meter(peer))
        direct = config.direct and peer != self.host.peer_id
        offered = worth_dialling(reply.addrs, config.dial_addrs_max) if direct else []
        entry = _Entry(link, offered, terms.send_window_bytes + window_bytes)
        self._add(self._opened, entry)
        return link

    def _check_room(self, peer: PeerId) -> None:
        of_peer = sum(1 for entry in self._entries() if entry.link.peer == peer)
        total = len(self._opened) + len(self._served)
        if total >= self.config.links_max or of_peer >= self.config.links_per_peer_max:
            raise ResourceLimit(f"{of_peer} links to {peer} and {total} in all are open")

    def _grant(self, wanted_bytes: int) -> int:
        """A window of at most `wanted_bytes`, out of what all links may hold. Raises ResourceLimit."""
        left_bytes = (self.config.held_bytes_max - self._promised_bytes) // 4
        granted = min(self.config.window_bytes, wanted_bytes, left_bytes)
        if granted < 4 * RECORD_BYTES_MIN:
            raise ResourceLimit(f"links may hold {self.config.held_bytes_max} bytes, and all are promised")
        return granted

    def _add(self, registry: dict[bytes, _Entry], entry: _Entry) -> None:
        """Own a link from now on, until it is gone."""
        nursery = self._running()
        registry[entry.link.terms.session] = entry
        self._promised_bytes += entry.promised_bytes
        nursery.start_soon(self._live, registry, entry)

    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise LocalFault("Links.run is not running")
        return self._nursery

    async def _live(self, registry: dict[bytes, _Entry], entry: _Entry) -> None:
        link = entry.link
        try:
            async with trio.open_nursery() as nursery:
                if link.terms.opener:
                    nursery.start_soon(self._keep_path, nursery, entry)
                else:
                    nursery.start_soon(self._await_path, entry)
                await link.gone.wait()
                nursery.cancel_scope.cancel()
            if entry.handled is not None:
                await entry.handled.wait()  # what came before the end is still the handler's to receive
        finally:
            link.fail(PeerLost(link.peer, "this node ends its links"))
            self._drop_pending(entry)
            del registry[link.terms.session]
            self._promised_bytes -= entry.promised_bytes

    # ---- paths, at the side that opened the link

    async def _keep_path(self, nursery: trio.Nursery, entry: _Entry) -> None:
        """A direct path if it answers at once, a stream otherwise, and a direct one again as soon as there is one."""
        link = entry.link
        wait_s = self.config.upgrade_min_s
        meter = self._meter(link.peer)
        if entry.offered and trio.current_time() >= meter.no_direct_until_s:
            with trio.move_on_after(self.config.dial_grace_s):
                await self._try_direct(nursery, entry)
            if link.path_now is None:  # do not let the next links wait for it
                meter.no_direct_until_s = trio.current_time() + self.config.direct_retry_s
        while link.failure is None:
            path = link.path_now
            if path is None:
                await self._fall_back(nursery, entry)
            elif path.name == "direct" or not entry.offered:
                changed = link.changed
                await changed.wait()
                if path.name == "direct" and link.path_now is None:
                    logger.info("a direct path to %s broke: %s", link.peer, path.reason)
                    steady = trio.current_time() - path.began_s >= _STEADY_S
                    wait_s = self.config.upgrade_min_s if steady else self._longer(wait_s)
            else:
                with trio.move_on_after(wait_s):
                    while link.path_now is path and link.failure is None:
                        await link.changed.wait()
                if link.path_now is path and link.failure is None:
                    with trio.move_on_after(self.config.dial_deadline_s):
                        await self._try_direct(nursery, entry)
                    if link.path_now is path:
                        wait_s = self._longer(wait_s)
                    else:
                        meter.no_direct_until_s = 0.0

    def _longer(self, wait_s: float) -> float:
        return min(2 * wait_s, self.config.upgrade_max_s)

    async def _try_direct(self, nursery: trio.Nursery, entry: _Entry) -> None:
        link = entry.link
        if not entry.offered:
            return
        entry.generation += 1
        generation = entry.generation
        entry.generation += len(entry.offered)  # each address that fails uses one up
        try:
            carriers, position = await dial(link, entry.offered, generation, self.rpc.rtt_s(link.peer))
        except Unreachable as unreachable:
            logger.debug("no direct path to %s: %s", link.peer, unreachable)
            return
        self._adopt(nursery, entry, carriers, position)

    async def _fall_back(self, nursery: trio.Nursery, entry: _Entry) -> None:
        """A stream to the peer. Without one, the link is over."""
        link = entry.link
        try:
            with trio.fail_after(self.config.recover_deadline_s):
                carrier = await self._open_stream(link)
                entry.generation += 1
                hello = Hello(link.terms.session, entry.generation, 0, 1, link.inbox.received)
                done = False
                try:
                    challenge = challenge_of(await carrier.receive_exactly(CHALLENGE_SIZE))
                    position = await introduce(carrier, link.keys, hello, challenge)
                    done = True
                finally:
                    if not done:
                        carrier.close()
        except trio.TooSlowError:
            link.fail(PeerLost(link.peer, f"no path to {link.peer} could be made in time"))
        except RemoteFault as fault:
            link.fail(PeerLost(link.peer, f"no path to {link.peer}: {fault}"))
        else:
            self._adopt(nursery, entry, [carrier], position)

    async def _open_stream(self, link: Link) -> StreamCarrier:
        if link.peer != self.host.peer_id:
            return StreamCarrier(await self.host.open_stream(link.peer, PROTOCOL))
        near, far = stream_pair(link.peer)
        self._running().start_soon(self._on_stream, far)
        return StreamCarrier(near)

    def _adopt(self, nursery: trio.Nursery, entry: _Entry, carriers: list[Carrier], position: int) -> None:
        try:
            path = entry.link.adopt(entry.generation, carriers, position)
        except ProtocolViolation as violation:
            for carrier in carriers:
                carrier.close()
            entry.link.fail(violation)
            return
        nursery.start_soon(entry.link.run_path, path)

    # ---- serving

    async def _on_open(self, call: Call, wish: OpenLink) -> LinkOpened:
        handler = self._services.get(wish.service)
        if handler is None:
            raise RpcRefusal("not_found", f"no service {wish.service[:128]!r} is served here")
        if len(wish.session) != SESSION_BYTES or wish.session in self._served:
            raise RpcRefusal("invalid", "a session must be new, and 16 bytes")
        record_bytes = min(self.config.record_bytes, wish.record_bytes)
        check_terms(wish.key, record_bytes, wish.window_bytes)
        self._check_room(call.peer)
        if self._nursery is None:
            raise RpcRefusal("unavailable", "links are not running here")
        window_bytes = self._grant(self.config.window_bytes)
        send_window_bytes = min(wish.window_bytes, self.config.window_bytes)
        exchange = Exchange()
        context = context_of(
            wish.session, wish.service, call.peer, self.host.peer_id, (wish.key, exchange.public)
        )
        keys = LinkKeys(exchange.finish(wish.key, context), opener=False)
        terms = Terms(wish.session, wish.service, record_bytes, send_window_bytes, window_bytes, False)
        link = Link(call.peer, terms, keys, self.config, self._meter(call.peer))
        entry = _Entry(link, [], send_window_bytes + window_bytes, handler=handler)
        self._add(self._served, entry)
        addrs = tuple(self._listener.addrs())[:_OFFERED_MAX] if self.config.direct else ()
        return LinkOpened(exchange.public, record_bytes, window_bytes, addrs)

    async def _await_path(self, entry: _Entry) -> None:
        """The opener makes the paths; without one for too long, the link is over."""
        link = entry.link
        within_s = self.config.open_deadline_s
        while link.failure is None:
            with trio.move_on_after(within_s):
                while link.path_now is None and link.failure is None:
                    await link.changed.wait()
            if link.path_now is None:
                link.fail(PeerLost(link.peer, f"{link.peer} made no path within {within_s:g} s"))
                return
            within_s = 2 * self.config.recover_deadline_s
            if entry.handler is not None:
                handler, entry.handler = entry.handler, None
                entry.handled = trio.Event()
                self._running().start_soon(self._handle, link, handler, entry.handled)
            while link.path_now is not None and link.failure is None:
                await link.changed.wait()

    async def _handle(self, link: Link, handler: Handler, handled: trio.Event) -> None:
        """The boundary around a service's own code: what it raises ends its link only."""
        try:
            await handler(link)
            await link.aclose()
        except Exception as error:  # a handler is anyone's code: its failure ends its link
            if not _of_the_peer(error):
                logger.exception("the handler of service %s failed for %s", link.service, link.peer)
            elif all(isinstance(leaf, EndOfChannel) for leaf in _leaves(error)):
                await link.aclose()
            else:
                logger.debug("a link of %s was given up: %s", link.peer, error)
            link.fail(PeerLost(link.peer, "the handler gave the link up"))
        finally:
            handled.set()

    # ---- sockets and streams that come in

    async def _on_socket(self, sock: trio.socket.SocketType) -> None:
        """One accepted socket: it proves its link within the deadline, or is closed."""
        carrier = SocketCarrier(release(sock), PeerId("an unproven peer"))
        with trio.move_on_after(self.config.handshake_deadline_s) as scope:
            await self._introduced(carrier, None)
            return
        if scope.cancelled_caught:
            self._fault("slow", carrier)

    async def _on_stream(self, stream: ByteStream) -> None:
        carrier = StreamCarrier(stream)
        with trio.move_on_after(self.config.handshake_deadline_s) as scope:
            taken = await self._introduced(carrier, stream.peer)
        if scope.cancelled_caught:
            self._fault("slow", carrier)
        elif taken:
            await carrier.closed.wait()

    def _fault(self, reason: str, carrier: Carrier) -> None:
        self.faults[reason] += 1
        carrier.close()

    async def _introduced(self, carrier: Carrier, peer: PeerId | None) -> bool:
        challenge = new_challenge()
        done = False
        try:
            await carrier.send([MAGIC + challenge])
            hello, proof = read_hello(await carrier.receive_exactly(HELLO_SIZE))
            entry = self._served.get(hello.session)
            if entry is None or (peer is not None and entry.link.peer != peer):
                raise ProtocolViolation("a hello for a link that is not open here")
            link = entry.link
            if not link.keys.proves(b"hello", challenge, hello.said(), proof):
                raise ProtocolViolation("a hello without proof")
            if isinstance(carrier, SocketCarrier):
                carrier.peer = link.peer
            await carrier.send([welcome(link.keys, hello, challenge, link.inbox.received)])
            self._attach(entry, hello, carrier)
            done = True
            return True
        except ProtocolViolation as violation:
            self.faults["refused"] += 1
            logger.info("a path was refused: %s", violation)
        except PeerLost:
            self.faults["lost"] += 1
        finally:
            if not done:
                carrier.close()
        return False

    def _attach(self, entry: _Entry, hello: Hello, carrier: Carrier) -> None:
        """One more carrier of a generation; complete, it becomes the path. Raises ProtocolViolation."""
        link = entry.link
        pending = entry.pending
        if link.failure is not None or hello.generation <= entry.generation:
            raise ProtocolViolation("a hello for a path that is over")
        if pending is None or hello.generation > pending.generation:
            self._drop_pending(entry)
            pending = entry.pending = _Pending(hello.generation, hello.count, hello.position)
            self._running().start_soon(self._expire, entry, pending)
        if (
            hello.generation < pending.generation
            or hello.count != pending.count
            or hello.index in pending.carriers
        ):
            raise ProtocolViolation("a hello that does not fit the others of its path")
        if hello.position > link.outbox.next_seq:
            raise ProtocolViolation("a hello with more records than were sent")
        pending.carriers[hello.index] = carrier
        pending.position = min(pending.position, hello.position)
        if len(pending.carriers) < pending.count:
            return
        entry.pending = None
        entry.generation = pending.generation
        carriers = [pending.carriers[index] for index in range(pending.count)]
        path = link.adopt(pending.generation, carriers, pending.position)
        self._running().start_soon(link.run_path, path)

    async def _expire(self, entry: _Entry, pending: _Pending) -> None:
        await trio.sleep(self.config.handshake_deadline_s)
        if entry.pending is pending:
            self.faults["slow"] += 1
            self._drop_pending(entry)

    def _drop_pending(self, entry: _Entry) -> None:
        pending, entry.pending = entry.pending, None
        if pending is not None:
            for carrier in pending.carriers.values():
                carrier.close()

    # ---- what is known of peers

    def _meter(self, peer: PeerId) -> Meter:
        meter = self._meters.pop(peer, None) or Meter()
        self._meters[peer] = meter
        if len(self._meters) > self.config.peers_remembered_max:
            self._meters.popitem(last=False)
        return meter

    def _report(self, peer: PeerId, meter: Meter) -> LinkReport:
        links = [entry.link for entry in self._entries() if entry.link.peer == peer]
        for link in links:
            link.sample_loss()
        paths = [link.path_now for link in links if link.path_now is not None]
        newest = max(paths, key=lambda path: path.began_s, default=None)
        return LinkReport(
            peer=peer,
            path="none" if newest is None else newest.name,
            links=len(links),
            sockets=sum(len(path.carriers) for path in paths if path.name == "direct"),
            rtt_s=meter.rtt_s,
            bandwidth_bps=_bits(meter.outward.bytes_per_s),
            inbound_bps=_bits(meter.inward.bytes_per_s),
            loss=meter.loss,
            bytes_sent=meter.bytes_sent,
            bytes_received=meter.bytes_received,
        )


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]


def _of_the_peer(error: Exception) -> bool:
    """Whether the peer's doing, a limit or the clean end is all that ended a handler."""
    return all(isinstance(leaf, RemoteFault | ResourceLimit | EndOfChannel) for leaf in _leaves(error))


def check_terms(key: bytes, record_bytes: int, window_bytes: int) -> None:
    """Raises ProtocolViolation for terms that cannot be worked with."""
    if len(key) != PUBLIC_BYTES:
        raise ProtocolViolation(f"a key of {len(key)} bytes")
    if not RECORD_BYTES_MIN <= record_bytes <= RECORD_BYTES_MAX:
        raise ProtocolViolation(f"records of {record_bytes} bytes")
    if window_bytes < 4 * RECORD_BYTES_MIN:
        raise ProtocolViolation(f"a window of {window_bytes} bytes")


def _bits(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else 8 * bytes_per_s


__all__ = ["Links", "LinksHost"]
