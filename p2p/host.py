"""The host: encrypted, member-only connections to peers, and byte streams over them.

Knows links (connections and whether they are proven), protocols and their handlers, and when a
peer is up or down. It does not know messages, whom to connect to, or what a stream carries. All
of libp2p's weaknesses are dealt with beneath, in `p2p.compat`.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import trio
from libp2p.abc import IHost, INetConn, INetStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from p2p import compat
from p2p.addresses import announced, dial_target, interface_ips
from p2p.compat.negotiate import NegotiationError, answer, ask
from p2p.compat.swarm import (
    MendedHost,
    MendedSwarm,
    SwarmHooks,
    build_swarm,
    race,
    root_reason,
)
from p2p.compat.tcp import Endpoint, MendedTcpStream, Way, connect_from, listen_address
from p2p.compat.yamux import MendedYamux
from p2p.compat.yamux_stream import MendedStream
from p2p.errors import (
    DeadlineExceeded,
    ListenError,
    LocalFault,
    PeerLost,
    ProtocolViolation,
    RemoteFault,
    Unreachable,
)
from p2p.host_types import HostConfig, PeerEvent
from p2p.identity import Identity, PeerId
from p2p.membership import CertifiedMembership, Membership, MembershipRefused
from p2p.roster import Roster
from p2p.streams import ByteStream, MuxByteStream

__all__ = ["ByteStream", "Handler", "Host", "HostConfig", "PeerEvent", "open_host"]

logger = logging.getLogger(__name__)

Handler = Callable[[ByteStream], Awaitable[None]]
INTERFACES_MAX = 6
MOVABLE = ("links/1",)
"""Protocols whose openers make a new stream, without losing anything, when one is reset."""
_MESH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(eq=False, slots=True)
class _Link:
    """One connection. `settled` is set when it is proven or will never be."""

    mux: MendedYamux
    peer: PeerId
    proven: bool = False
    reason: str = "the connection was closed during the proof of membership"
    settled: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    movable: list[MendedStream] = field(default_factory=list)

    @property
    def relayed(self) -> bool:
        return self.mux.way.kind == "relayed"

    @property
    def remote_ip(self) -> str:
        return self.mux.way.remote[0] if self.mux.way.remote else ""


class Pinned:
    """One connection of several to a peer, for whom it matters which. It ends as any other."""

    def __init__(self, host: Host, link: _Link) -> None:
        self.peer = link.peer
        self._host = host
        self._link = link

    @property
    def alive(self) -> bool:
        return self._link.proven and not self._link.mux.is_closed

    async def open_stream(self, protocol: str, *, deadline_s: float | None = None) -> MuxByteStream:
        """As `Host.open_stream`, on this very connection."""
        return await self._host._open_on(self._link, protocol, deadline_s)

    def close(self) -> None:
        """End it at once."""
        self._link.mux.abort("no longer needed")


class Host:
    """Made by `open_host`. One trio event loop; no method is safe from another thread."""

    def __init__(
        self,
        identity: Identity,
        membership: Membership | CertifiedMembership,
        mesh_id: str,
        config: HostConfig,
        raw: MendedHost,
    ) -> None:
        self.peer_id = identity.peer_id
        self.mesh_id = mesh_id
        self.config = config
        self._raw = raw
        self._swarm: MendedSwarm = raw.get_network()
        self._membership = membership
        self._handlers: dict[str, Handler] = {}
        self._links: dict[MendedYamux, _Link] = {}
        self._up: set[PeerId] = set()
        self._watchers: set[trio.MemorySendChannel[PeerEvent]] = set()
        self._announced: tuple[str, ...] = ()
        self._nursery: trio.Nursery | None = None
        self._swarm.hooks.ready = self._wait_ready
        self._swarm.hooks.usable = lambda conn: self._link(conn.muxed_conn).proven
        self._swarm.hooks.connected = self._on_connected
        self._swarm.set_stream_handler(self._on_stream)

    # ---- what is connected

    @property
    def raw(self) -> IHost:
        """The libp2p host, for p2p/kad.py only."""
        return self._raw

    def addrs(self) -> tuple[str, ...]:
        """Dialable multiaddresses ending /p2p/ID: real interfaces', what was announced besides, loopback last."""
        own = [f"{address}/p2p/{self.peer_id}" for address in bare_addrs(self._swarm)]
        outer = [one for one in own if not one.startswith(("/ip4/127.", "/ip6/::1/"))]
        return tuple(dict.fromkeys((*outer[:INTERFACES_MAX], *self._announced, *own)))

    def announce(self, addrs: Sequence[str]) -> None:
        """Addresses beside those of the interfaces: what a router forwards here, and relays'. They replace the last."""
        self._announced = tuple(addrs)

    def bound(self) -> tuple[Endpoint, ...]:
        """(IP, port) of each listening socket."""
        return tuple(one for listener in self._swarm.listeners.values() for one in listener.sockets())

    def dialled_at(self, peer: str) -> Endpoint | None:
        """Where this node itself reached `peer` directly, on its oldest connection to it."""
        ends = (link.mux.way.remote for link in self._live() if link.peer == peer and link.mux.is_initiator)
        return next((end for end in ends if end is not None), None)

    def ways(self, peer: str) -> tuple[Way, ...]:
        """How each proven connection to `peer` runs, the one that new streams take first."""
        return tuple(link.mux.way for link in self._best(peer))

    def _best(self, peer: str) -> list[_Link]:
        """Direct before relayed, and the newest first: a peer that moved has left its older ones."""
        links = [(link.relayed, -k, link) for k, link in enumerate(self._live()) if link.peer == peer]
        return [link for _, _, link in sorted(links, key=lambda one: one[:2])]

    def port(self) -> int:
        """The TCP port it listens on, 0 where it listens nowhere."""
        return bound_port(self._swarm)

    def peers(self) -> tuple[PeerId, ...]:
        """Connected and proven peers, sorted."""
        return tuple(sorted({link.peer for link in self._live()}))

    def is_connected(self, peer: str) -> bool:
        return any(link.peer == peer for link in self._live())

    def dialled_by(self) -> frozenset[PeerId]:
        """Connected peers of whom at least one connection was made from their side."""
        return frozenset(link.peer for link in self._live() if not link.mux.is_initiator)

    def streams_open(self) -> int:
        """Streams of all kinds, both ends' making, on all connections."""
        return sum(len(mux.streams) for mux in self._links)

    def _live(self) -> Iterator[_Link]:
        return (link for link in self._links.values() if link.proven and not link.mux.is_closed)

    @contextlib.contextmanager
    def watch(self) -> Iterator[trio.MemoryReceiveChannel[PeerEvent]]:
        """Events from now on, in order. A watcher `events_max` behind is ended (EndOfChannel)."""
        send, receive = trio.open_memory_channel[PeerEvent](self.config.events_max)
        self._watchers.add(send)
        try:
            with receive:
                yield receive
        finally:
            self._watchers.discard(send)
            send.close()

    def _emit(self, event: PeerEvent) -> None:
        for watcher in list(self._watchers):
            try:
                watcher.send_nowait(event)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._watchers.discard(watcher)
                watcher.close()

    # ---- making and ending connections

    async def connect(self, addrs: Sequence[str], *, deadline_s: float | None = None) -> PeerId:
        """Race all addresses; returns once one is connected and its membership proven.

        Raises Unreachable with the reason for each address, within `deadline_s` seconds
        (`dial_deadline_s` when None).
        """
        attempts: dict[str, str] = {}
        targets: list[tuple[Multiaddr, ID]] = []
        for address in list(addrs)[: self.config.dial_addrs_max]:
            try:
                maddr, peer = dial_target(address)
            except ValueError as error:
                attempts[address] = str(error)
                continue
            if peer == self.peer_id:
                attempts[address] = "it is this node's own address"
            elif self.is_connected(peer):
                return PeerId(peer)
            else:
                targets.append((maddr, ID.from_base58(peer)))
        within_s = self.config.dial_deadline_s if deadline_s is None else deadline_s
        with trio.move_on_after(within_s):
            conn, reasons = await race(targets, self._swarm)
            attempts.update(reasons)
            if conn is not None:
                return self._link(conn.muxed_conn).peer
        for maddr, peer_id in targets:
            attempts.setdefault(f"{maddr}/p2p/{peer_id}", f"no answer within {within_s:g} s")
        raise Unreachable(attempts)

    async def disconnect(self, peer: str) -> None:
        """End every connection to `peer` at once, whether or not its machine still answers."""
        links = [link for link in self._links.values() if link.peer == peer]
        for link in links:
            link.mux.abort("disconnected by this node")
        with trio.move_on_after(self.config.close_deadline_s):
            for link in links:
                await link.gone.wait()

    async def _keep_alive(self) -> None:
        """Mend 10: the library never notices a peer that is gone without a word. Calls do, for a peer as a whole; here
        each single connection is watched. Time in which this very loop did not run is nobody's silence.

        Can go when the library's connections have a keepalive.
        """
        while True:
            slept_from_s = trio.current_time()
            await trio.sleep(self.config.quiet_s)
            now_s = trio.current_time()
            stalled_s = now_s - slept_from_s - self.config.quiet_s
            for link in list(self._links.values()):
                link.mux.heard_s = min(now_s, link.mux.heard_s + stalled_s)
                silent_s = now_s - link.mux.heard_s
                if silent_s >= self.config.silence_s:
                    link.mux.abort(f"nothing came for {silent_s:.1f} s")
                elif silent_s >= self.config.quiet_s:
                    link.mux.ask()

    def drop_from(self, ips: Collection[str]) -> None:
        """End connections from addresses that this computer has no more: nobody at the other end would say so soon."""
        for link in list(self._links.values()):
            local = link.mux.way.local
            if local is not None and local[0] in ips:
                link.mux.abort("the address of this computer changed")

    async def _close(self) -> None:
        """Mend 12: leaving the library's run() leaves sockets open; close everything first, together.

        Can go when background services of the library close their connections concurrently.
        """
        deadline = trio.current_time() + self.config.close_deadline_s
        with trio.CancelScope(deadline=deadline, shield=True):
            for listener in list(self._swarm.listeners.values()):
                await listener.close()
            async with trio.open_nursery() as nursery:
                for link in list(self._links.values()):
                    nursery.start_soon(link.mux.close)
            await self._raw.close()
        for link in list(self._links.values()):
            link.mux.abort("this node stopped")

    # ---- links: proof of membership, up and down

    def _link(self, mux: MendedYamux) -> _Link:
        link = self._links.get(mux)
        if link is None:
            link = _Link(mux, PeerId(str(mux.peer_id)))
            if self._nursery is None or mux.is_closed:
                link.settled.set()
                link.gone.set()
                return link
            self._links[mux] = link
            mux.on_end = link.settled.set
            self._nursery.start_soon(self._run_link, link)
        return link

    def _on_connected(self, mux: MendedYamux) -> None:
        self._link(mux)

    async def _wait_ready(self, conn: INetConn) -> None:
        link = self._link(conn.muxed_conn)
        await link.settled.wait()
        if not link.proven:
            raise MembershipRefused(link.reason)

    async def _run_link(self, link: _Link) -> None:
        """A link's life: prove, then wait for its end. The only place that emits `down`."""
        try:
            with trio.move_on_after(self.config.member_deadline_s):
                if link.mux.is_initiator:
                    await self._dialler_proof(link)
                else:
                    await link.settled.wait()
            if link.proven:
                await link.mux.event_closed.wait()
            else:
                link.settled.set()
                await link.mux.close()
        finally:
            link.settled.set()
            self._links.pop(link.mux, None)
            link.mux.abort("the link ended")
            if link.peer in self._up and not self.is_connected(link.peer):
                self._up.discard(link.peer)
                self._emit(PeerEvent(link.peer, "down"))
            link.gone.set()

    async def _dialler_proof(self, link: _Link) -> None:
        try:
            stream = await link.mux.open_stream()
            await ask(stream, self._membership.protocol)
            await self._membership.prove_as_dialler(stream, link.peer)
            await stream.close()
        except NegotiationError:
            link.reason = f"it is not a member of mesh {self.mesh_id}"
        except MembershipRefused as error:
            link.reason = str(error)
        except (MuxedStreamError, MuxedConnUnavailable):
            link.reason = "it hung up during the proof of membership"
        else:
            self._mark_proven(link)

    async def _listener_proof(self, link: _Link, stream: MendedStream) -> None:
        try:
            answer = await self._membership.check_as_listener(stream, link.peer)
        except MembershipRefused as error:
            link.reason = str(error)
            await stream.close()  # what was said of the refusal leaves before the connection does
            link.settled.set()
            return
        self._mark_proven(link)
        try:
            await self._membership.accept(stream, link.peer, answer)
        except MembershipRefused as error:
            logger.info("%s did not let this node in: %s", link.peer, error)
            link.mux.abort("it did not let this node in")
            return
        await stream.close()

    def _mark_proven(self, link: _Link) -> None:
        if link.settled.is_set() or link.mux.is_closed:
            return
        others = [one for one in self._live() if one.peer == link.peer]
        link.proven = True
        link.settled.set()
        if link.peer not in self._up:
            self._up.add(link.peer)
            self._emit(PeerEvent(link.peer, "up"))
        elif not link.relayed and all(one.relayed or one.remote_ip != link.remote_ip for one in others):
            self._emit(PeerEvent(link.peer, "moved"))
        self._raw.identify(link.mux.peer_id)

    # ---- streams

    def handle(self, protocol: str, handler: Handler) -> None:
        """Serve `protocol` (scoped by the mesh). The stream is closed when `handler` returns, and
        reset when it raises; an exception is logged and never ends the host."""
        self._handlers[self._scoped(protocol)] = handler

    async def open_stream(self, peer: str, protocol: str, *, deadline_s: float | None = None) -> ByteStream:
        """A new stream that `peer` has agreed to serve as `protocol`.

        Raises PeerLost (not connected, or lost meanwhile), ProtocolViolation (the peer does not
        serve it), DeadlineExceeded after `deadline_s` (`negotiate_deadline_s` when None).
        """
        links = self._best(peer)
        if not links:
            raise PeerLost(peer, f"not connected to {peer}")
        return await self._open_on(links[0], protocol, deadline_s)

    async def _open_on(self, link: _Link, protocol: str, deadline_s: float | None) -> MuxByteStream:
        within_s = self.config.negotiate_deadline_s if deadline_s is None else deadline_s
        peer = link.peer
        stream: MendedStream | None = None
        agreed = False
        try:
            with trio.fail_after(within_s):
                stream = await link.mux.open_stream()
                await ask(stream, self._scoped(protocol))
                agreed = True
        except trio.TooSlowError:
            raise DeadlineExceeded(f"{peer} did not answer for {protocol} within {within_s:g} s") from None
        except NegotiationError as error:
            raise ProtocolViolation(f"{peer}: {error}") from error
        except (MuxedStreamError, MuxedConnUnavailable) as error:
            raise PeerLost(peer, f"lost {peer} while opening {protocol}: {error}") from error
        finally:
            if stream is not None and not agreed:
                stream.abort()
        if link.relayed and protocol in MOVABLE:
            link.movable.append(stream)
        return MuxByteStream(stream, peer)

    async def connect_from(self, source: Endpoint, target: Endpoint, peer: str) -> Pinned:
        """One more connection, from a port that this node listens on, beside any that there are.

        Raises Unreachable. The deadline is the caller's.
        """
        where = f"{target[0]} port {target[1]}"
        try:
            stream = MendedTcpStream(await connect_from(source, target))
            conn = await self._swarm.upgrade_outbound_raw_conn(
                RawConnection(stream, True), ID.from_base58(peer)
            )
            await self._wait_ready(conn)
        except Exception as error:  # the library wraps a socket's errors in many classes
            raise Unreachable({where: root_reason(error)}) from error
        return Pinned(self, self._link(conn.muxed_conn))

    def shed_relayed(self) -> None:
        """End relayed connections to peers that are there directly and on which nothing is under way any more."""
        direct = {link.peer for link in self._live() if not link.relayed}
        for link in [link for link in self._live() if link.relayed and link.peer in direct]:
            for stream in link.movable:
                stream.abort()
            link.movable.clear()
            if not link.mux.streams:
                link.mux.abort("a direct connection took its place")

    def _scoped(self, protocol: str) -> str:
        prefix = f"/shoal/{self.mesh_id}/"
        return (
            protocol if protocol.startswith(prefix) else prefix + protocol.removeprefix("/shoal/").lstrip("/")
        )

    async def _on_stream(self, net_stream: INetStream) -> None:
        """Mend 1, and the one boundary around everything that a peer's stream can set off.

        In the library a stream whose first bytes are not UTF-8, or an exception in a handler, ends
        the host. Can go when SwarmConn._handle_muxed_stream contains its handler's exceptions.
        """
        stream: MendedStream = net_stream.muxed_stream
        link = self._link(stream.conn)
        try:
            await self._serve_stream(net_stream, stream, link)
        except (NegotiationError, MuxedStreamError, MuxedConnUnavailable, RemoteFault) as error:
            logger.debug("a stream from %s was reset: %s", link.peer, error)
            stream.abort()
        except Exception as error:  # a handler is anyone's code: its failure resets its stream
            if only_remote(error):
                logger.debug("a stream from %s was reset: %s", link.peer, error)
            else:
                logger.exception("a handler failed; its stream from %s is reset", link.peer)
            stream.abort()
        except BaseException:  # cancelled: the stream must not outlive its handler
            stream.abort()
            raise

    async def _serve_stream(self, net_stream: INetStream, stream: MendedStream, link: _Link) -> None:
        with trio.fail_after(self.config.negotiate_deadline_s):
            if link.mux.is_initiator:
                await link.settled.wait()
            known, names = self._served_on(link)
            protocol = await answer(stream, known, names)
            if protocol == self._membership.protocol:
                await self._listener_proof(link, stream)
                return
        handler = self._handlers.get(protocol)
        if handler is not None:
            await handler(MuxByteStream(stream, link.peer))
            await stream.close()
            return
        net_stream.set_protocol(protocol)
        await self._raw.multiselect.handlers[protocol](net_stream)

    def _served_on(self, link: _Link) -> tuple[Callable[[str], bool], Callable[[], list[str]]]:
        """Nothing but the proof is served on a link that is not proven."""
        if not link.proven:
            own = self._membership.protocol
            return (lambda name: name == own and not link.settled.is_set()), lambda: [own]
        library: dict[Any, Any] = self._raw.multiselect.handlers
        return (
            lambda name: name in self._handlers or library.get(name) is not None,
            lambda: [*self._handlers, *(str(name) for name in library)],
        )


def bare_addrs(swarm: MendedSwarm) -> list[Multiaddr]:
    """What the host announces, without its peer id: real addresses, never 0.0.0.0."""
    sockets = [one for listener in swarm.listeners.values() for one in listener.sockets()]
    return [Multiaddr(address) for address in announced(sockets, interface_ips())]


async def _listen(swarm: MendedSwarm, config: HostConfig) -> None:
    wanted, lacking = config.port_wanted, None
    for address in config.listen:
        maddr, host, port = listen_address(address)
        if port:
            await swarm.listen(maddr)
            continue
        if wanted:
            with contextlib.suppress(ListenError):
                await swarm.listen(Multiaddr(f"/ip{6 if ':' in host else 4}/{host}/tcp/{wanted}"))
                continue
        try:
            await swarm.listen(maddr)
        except ListenError as problem:
            if not ip_address(host).is_unspecified:
                raise
            lacking = problem
            logger.info("%s", problem)
            continue
        wanted = bound_port(swarm)
    if lacking is not None and not swarm.listeners:
        raise lacking


def bound_port(swarm: MendedSwarm) -> int:
    """The TCP port that a host bound last, 0 where it listens nowhere."""
    return next((port for one in reversed(swarm.listeners.values()) for _, port in one.sockets()), 0)


def only_remote(error: BaseException) -> bool:
    """Whether an exception, or every leaf of a group, is the peer's doing."""
    if isinstance(error, BaseExceptionGroup):
        return all(only_remote(one) for one in error.exceptions)
    return isinstance(error, RemoteFault | MuxedStreamError | MuxedConnUnavailable | trio.TooSlowError)


@asynccontextmanager
async def open_host(
    identity: Identity,
    mesh_id: str,
    swarm_key: bytes | None,
    config: HostConfig | None = None,
    *,
    roster: Roster | None = None,
) -> AsyncIterator[Host]:
    """A listening host for as long as the block runs.

    With a `roster`, members are known by certificates besides the swarm key, which the roster holds then.

    Raises ListenError for an address that cannot be bound, LocalFault for a bad mesh id.
    An exception of the block's own leaves as it is, not in a group.
    """
    compat.apply()
    if not _MESH_ID.fullmatch(mesh_id):
        raise LocalFault(f"mesh id {mesh_id!r} is not 1 to 64 letters, digits, dots, dashes or underscores")
    config = config or HostConfig()
    swarm = build_swarm(identity.seed, config.swarm_limits(), SwarmHooks())
    raw = MendedHost(
        swarm, disable_identify_address_discovery=True, addrs_factory=lambda _: bare_addrs(swarm)
    )
    plain = Membership(mesh_id, swarm_key, identity.peer_id)
    membership = plain if roster is None else CertifiedMembership(roster)
    host = Host(identity, membership, mesh_id, config, raw)
    failure: Exception | None = None
    async with background_trio_service(swarm), trio.open_nursery() as nursery:
        host._nursery = nursery
        try:
            await _listen(swarm, config)
            nursery.start_soon(host._keep_alive)
            yield host
        except Exception as error:  # noqa: BLE001 - kept whole, and raised below the nurseries
            failure = error
        finally:
            host._nursery = None
            await host._close()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
