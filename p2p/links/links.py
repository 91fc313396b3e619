"""The links of one node: opening and serving them, their paths, and what their traffic tells of peers.

Knows services, sessions, limits and when a path is made anew: a direct one where it can be dialled, a libp2p stream
meanwhile or for ever. It does not know records (`records`) or how messages are kept (`link`).
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
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
from p2p.links.connect import ips_of, worth_dialling
from p2p.links.door import Door, Seat
from p2p.links.keeper import Keeper
from p2p.links.keys import PUBLIC_BYTES, SESSION_BYTES, Exchange, LinkKeys, context_of, new_session
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
_RECORDS_PER_WINDOW_MIN = 4

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
class _Entry:
    """What Links keeps of one link, until it is over and its handler has returned."""

    link: Link
    promised_bytes: int
    keep: Callable[[], Awaitable[None]]
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
        self._services: dict[str, Handler] = {}
        self._entries: set[_Entry] = set()
        self._meters: OrderedDict[PeerId, Meter] = OrderedDict()
        self._promised_bytes = 0
        self._nursery: trio.Nursery | None = None
        self._door = Door(self.config, self._running)
        self._listener = Listener(self.config, self._door.on_socket)
        rpc.serve(OPEN, self._on_open)
        host.handle(PROTOCOL, self._door.on_stream)

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
    async def open(
        self, peer: str, service: str, *, deadline_s: float | None = None, window_bytes: int | None = None
    ) -> AsyncIterator[Link]:
        """A link to `peer`, ready for use, that holds at most `window_bytes` in each direction (None: the configured
        ones, which also bound it). Leaving the block ends it cleanly.

        Raises PeerLost, Unreachable (the peer does not serve it, or no path), DeadlineExceeded, ResourceLimit.
        """
        within_s = self.config.open_deadline_s if deadline_s is None else deadline_s
        deadline = trio.current_time() + within_s
        link = await self._open(PeerId(peer), service, deadline, window_bytes or self.config.window_bytes)
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

    @property
    def faults(self) -> Counter[str]:
        """Sockets and streams that were refused, by reason: refused (no proof), slow, lost, crowded."""
        counted = Counter(self._door.faults)
        counted["crowded"] = self._listener.refused
        return counted

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
            await self._listener.open(ips_of(self.host.addrs()))
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._listener.run)
                await nursery.start(self._watch_peers)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self._listener.close()
            for entry in list(self._entries):
                entry.link.fail(PeerLost(entry.link.peer, "this node ends its links"))

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
        for entry in list(self._entries):
            peer = entry.link.peer
            if peer != self.host.peer_id and not self.host.is_connected(peer):
                entry.link.fail(PeerLost(peer, f"the connection to {peer} is gone"))

    # ---- opening

    async def _open(self, peer: PeerId, service: str, deadline: float, window_bytes: int) -> Link:
        self._running()
        self._check_room(peer)
        exchange = Exchange()
        session = new_session()
        config = self.config
        window_bytes = self._grant(window_bytes)
        wish = OpenLink(service, session, exchange.public, config.record_bytes, window_bytes)
        within_s = max(deadline - trio.current_time(), 1e-3)
        try:
            reply = await self.rpc.call(peer, OPEN, wish, deadline_s=within_s)
        except CallFailed as refused:
            if refused.code == "busy":
                raise ResourceLimit(f"{peer} has no room for a link", refused.retry_after_s or 1.0) from None
            raise Unreachable({str(peer): f"{refused.code}: {refused.message}"}) from None
        record_bytes = min(config.record_bytes, reply.record_bytes)
        # One window for both ways: who tells what it took in shares of a larger one than the sender keeps, stops it.
        window_bytes = min(reply.window_bytes, window_bytes)
        check_terms(reply.key, record_bytes, window_bytes)
        context = context_of(session, service, self.host.peer_id, peer, (exchange.public, reply.key))
        keys = LinkKeys(exchange.finish(reply.key, context), opener=True)
        terms = Terms(session, service, record_bytes, window_bytes, window_bytes, True)
        meter = self._meter(peer)
        link = Link(peer, terms, keys, config, meter)
        direct = config.direct and peer != self.host.peer_id
        offered = worth_dialling(reply.addrs, config.dial_addrs_max) if direct else []
        keeper = Keeper(link, offered, partial(self._stream_to, peer), partial(self.rpc.rtt_s, peer), meter)
        self._add(_Entry(link, 2 * window_bytes, keeper.run))
        return link

    async def _stream_to(self, peer: PeerId) -> ByteStream:
        if peer != self.host.peer_id:
            return await self.host.open_stream(peer, PROTOCOL)
        near, far = stream_pair(peer)
        self._running().start_soon(self._door.on_stream, far)
        return near

    def _check_room(self, peer: PeerId) -> None:
        of_peer = sum(1 for entry in self._entries if entry.link.peer == peer)
        total = len(self._entries)
        if total >= self.config.links_max or of_peer >= self.config.links_per_peer_max:
            raise ResourceLimit(f"{of_peer} links to {peer} and {total} in all are open")

    def _grant(self, wanted_bytes: int) -> int:
        """A window of at most `wanted_bytes`, out of what all links may hold. Raises ResourceLimit."""
        left_bytes = (self.config.held_bytes_max - self._promised_bytes) // 4
        granted = min(self.config.window_bytes, wanted_bytes, left_bytes)
        if granted < _RECORDS_PER_WINDOW_MIN * RECORD_BYTES_MIN:
            raise ResourceLimit(f"links may hold {self.config.held_bytes_max} bytes, and all are promised")
        return granted

    def _add(self, entry: _Entry) -> None:
        """Own a link from now on, until it is over."""
        self._running().start_soon(self._live, entry)
        self._entries.add(entry)
        self._promised_bytes += entry.promised_bytes

    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise LocalFault("Links.run is not running")
        return self._nursery

    async def _live(self, entry: _Entry) -> None:
        link = entry.link
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(entry.keep)
                await link.gone.wait()
                nursery.cancel_scope.cancel()
            if entry.handled is not None:
                await entry.handled.wait()  # what came before the end is still the handler's to receive
        finally:
            link.fail(PeerLost(link.peer, "this node ends its links"))
            seat = None if link.terms.opener else self._door.seats.pop(link.terms.session, None)
            if seat is not None:
                seat.drop_pending()
            self._entries.discard(entry)
            self._promised_bytes -= entry.promised_bytes

    # ---- serving

    async def _on_open(self, call: Call, wish: OpenLink) -> LinkOpened:
        handler = self._services.get(wish.service)
        if handler is None:
            raise RpcRefusal("not_found", f"no service {wish.service[:128]!r} is served here")
        if len(wish.session) != SESSION_BYTES or wish.session in self._door.seats:
            raise RpcRefusal("invalid", "a session must be new, and 16 bytes")
        if self._nursery is None:
            raise RpcRefusal("unavailable", "links are not running here")
        self._check_room(call.peer)
        check_terms(wish.key, RECORD_BYTES_MIN, wish.window_bytes)
        window_bytes = self._grant(wish.window_bytes)
        record_bytes = min(
            self.config.record_bytes, wish.record_bytes, window_bytes // _RECORDS_PER_WINDOW_MIN
        )
        check_terms(wish.key, record_bytes, window_bytes)
        exchange = Exchange()
        context = context_of(
            wish.session, wish.service, call.peer, self.host.peer_id, (wish.key, exchange.public)
        )
        keys = LinkKeys(exchange.finish(wish.key, context), opener=False)
        terms = Terms(wish.session, wish.service, record_bytes, window_bytes, window_bytes, False)
        link = Link(call.peer, terms, keys, self.config, self._meter(call.peer))
        entry = _Entry(link, 2 * window_bytes, partial(self._await_path, link))
        self._door.seats[wish.session] = Seat(link, partial(self._seated, entry, handler))
        self._add(entry)
        addrs = tuple(self._listener.addrs())[:_OFFERED_MAX] if self.config.direct else ()
        return LinkOpened(exchange.public, record_bytes, window_bytes, addrs)

    async def _await_path(self, link: Link) -> None:
        """The opener makes the paths; without one for too long, the link is over."""
        within_s = self.config.open_deadline_s
        while link.failure is None:
            with trio.move_on_after(within_s):
                while link.path_now is None and link.failure is None:
                    await link.changed.wait()
            if link.path_now is None:
                link.fail(PeerLost(link.peer, f"{link.peer} made no path within {within_s:g} s"))
            within_s = 2 * self.config.recover_deadline_s
            while link.path_now is not None and link.failure is None:
                await link.changed.wait()

    def _seated(self, entry: _Entry, handler: Handler) -> None:
        entry.handled = trio.Event()
        self._running().start_soon(self._handle, entry.link, handler, entry.handled)

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

    # ---- what is known of peers

    def _meter(self, peer: PeerId) -> Meter:
        meter = self._meters.pop(peer, None) or Meter()
        self._meters[peer] = meter
        if len(self._meters) > self.config.peers_remembered_max:
            self._meters.popitem(last=False)
        return meter

    def _report(self, peer: PeerId, meter: Meter) -> LinkReport:
        links = [entry.link for entry in self._entries if entry.link.peer == peer]
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
    if window_bytes < _RECORDS_PER_WINDOW_MIN * record_bytes:
        raise ProtocolViolation(f"a window of {window_bytes} bytes")


def _bits(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else 8 * bytes_per_s


__all__ = ["Links", "LinksHost"]
