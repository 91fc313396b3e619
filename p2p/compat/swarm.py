# mypy: disallow-subclassing-any=False
"""The swarm: py-libp2p's, with the mends that concern connections as a whole.

Each mend is a method or function of its own whose docstring names the fault and when it can go.
It knows connections and how they are made; who may use them is `p2p.membership`'s and
`p2p.host`'s business, reached through the hooks of `SwarmHooks`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.rcmgr import ResourceManager
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.rcmgr.manager import ResourceLimits
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.transport.exceptions import SecurityUpgradeFailure
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from p2p.compat.noise import BufferedNoise
from p2p.compat.tcp import MendedTcp, MendedTcpStream, TcpListener
from p2p.compat.yamux import MendedYamux, MuxLimits
from p2p.errors import LocalFault

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SwarmLimits:
    """Counts are of connections; `handshakes_max` are those not yet encrypted."""

    connections_max: int = 512
    connections_per_peer_max: int = 8
    connections_per_subnet_max: int = 256
    handshakes_max: int = 64
    handshakes_per_subnet_max: int = 32
    handshake_deadline_s: float = 5.0
    dial_deadline_s: float = 5.0
    dial_stagger_s: float = 0.05
    streams_per_peer_max: int = 512
    mux: MuxLimits = field(default_factory=MuxLimits)


@dataclass(slots=True)
class SwarmHooks:
    """What the host above decides. The defaults let everything through at once."""

    ready: Callable[[INetConn], Awaitable[None]] | None = None
    usable: Callable[[INetConn], bool] = lambda conn: True
    connected: Callable[[MendedYamux], None] = lambda mux: None
    circuit: Callable[[str, str, str], Awaitable[ReadWriteCloser]] | None = None
    """A stream to a peer (last) through a relay (its address, its id). Raises SwarmException."""


class MendedMuxers(MuxerMultistream):
    """Mend 3, wiring: the library's `new_conn` names its own Yamux whatever options it is given.

    Can go when MuxerMultistream.new_conn builds the class that was negotiated.
    """

    def __init__(self, limits: MuxLimits) -> None:
        super().__init__({TProtocol(YAMUX_ID): MendedYamux})
        self._limits = limits

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        try:
            protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        except UnicodeDecodeError as error:
            raise MultiselectError("a muxer's name that is not UTF-8") from error
        return self._annotate_connection(MendedYamux(conn, peer_id, self._limits), conn, protocol)


class IdleAutoConnector(AutoConnector):
    """Mend 11: the library dials peers of its own choice for as long as it has fewer than half of
    `high_watermark` connections, whatever `min_connections` and `low_watermark` say (they are
    only part of the answer in 0.8.1). Whom to dial is the connector's choice, not the swarm's.

    Can go when ConnectionConfig can turn AutoConnector off.
    """

    async def maybe_connect(self) -> None:
        """Never a reason to dial."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """No task either."""


class MendedSwarm(Swarm):
    """py-libp2p's swarm over TCP, Noise and yamux only."""

    limits: SwarmLimits
    hooks: SwarmHooks
    handshaking: int = 0
    handshaking_from: Counter[str]
    connected_from: Counter[str]

    async def listen(self, *multiaddrs: Multiaddr) -> bool:
        """Mend: the library logs a failed bind and goes on without it. Here ListenError leaves.

        Can go when Swarm.listen raises for an address it could not bind.
        """
        await self.event_background_nursery_created.wait()
        for maddr in multiaddrs:
            listener = TcpListener(partial(self._inbound, maddr))
            listener.background_nursery = self.background_nursery
            await listener.listen(maddr)
            self.listeners[str(maddr)] = listener
            await self.notify_listen(maddr)
        return bool(multiaddrs)

    async def _inbound(self, maddr: Multiaddr, stream: ReadWriteCloser) -> None:
        await self._handle_inbound_connection(stream, maddr)

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        """Mend 4: inbound slots were held until the swarm's end, so that after 250 connections in
        a life all later ones were refused. Here a slot is held for as long as its connection.

        Can go when Swarm._do_handle_inbound_connection waits for the connection, not the manager.
        """
        subnet = subnet_of(_dialled_from(read_write_closer))
        if (
            self.handshaking >= self.limits.handshakes_max
            or self.handshaking_from[subnet] >= self.limits.handshakes_per_subnet_max
            or self.connected_from[subnet] >= self.limits.connections_per_subnet_max
        ):
            await read_write_closer.close()
            return
        raw = RawConnection(read_write_closer, False)
        self.handshaking += 1
        try:
            with _counted(self.handshaking_from, subnet):
                muxed = await self.upgrade_inbound_raw_conn(raw, maddr)
        except Exception as error:  # noqa: BLE001 - a stranger's bytes make the upgrade raise anything
            logger.debug("an inbound connection was not completed: %s: %s", type(error).__name__, error)
            await raw.close()
            return
        finally:
            self.handshaking -= 1
        if isinstance(muxed, MendedYamux):
            with _counted(self.connected_from, subnet):
                await muxed.event_closed.wait()

    async def dial_addr(
        self, addr: Multiaddr, peer_id: ID, source: tuple[str, int] | None = None
    ) -> INetConn:
        """The library refuses relayed addresses here. Ours run a whole connection of its own, encrypted from end to
        end, inside a stream through the relay. Can go with our own relay.
        """
        relayed = split_circuit(str(addr))
        if relayed is None:
            return await super().dial_addr(addr, peer_id, source)
        if self.hooks.circuit is None:
            raise SwarmException("this node dials through no relay")
        stream = await self.hooks.circuit(*relayed, str(peer_id))
        done = False
        try:
            conn = await self.upgrade_outbound_raw_conn(RawConnection(stream, True), peer_id)
            done = True
            return conn
        finally:
            if not done:  # whoever else won the race: the relay need not carry this one any longer
                with trio.move_on_after(0.2, shield=True):
                    await stream.close()

    async def take_over(self, stream: MendedTcpStream, peer_id: ID, *, initiator: bool) -> None:
        """Make a connection of a socket to `peer_id` that somebody else opened. Whose handshake begins is agreed on
        beforehand: of a hole that both ends punched at once each believes to have dialled. Raises SwarmException."""
        if initiator:
            await self.upgrade_outbound_raw_conn(RawConnection(stream, True), peer_id)
            return
        muxed = await self.upgrade_inbound_raw_conn(RawConnection(stream, False), Multiaddr("/ip4/0.0.0.0"))
        if muxed.peer_id != peer_id:
            await muxed.close()
            raise SwarmException(f"another peer than {peer_id} answered")

    async def accept(self, stream: ReadWriteCloser) -> None:
        """Serve a connection that somebody dialled, over any stream, until it ends."""
        await self._handle_inbound_connection(stream, Multiaddr("/ip4/0.0.0.0"))

    async def knock(self, addr: tuple[str, int], peer_id: ID) -> None:
        """Whether `peer_id` answers at `addr`: a connection of its own, that proves the peer's key and ends. Raises
        OSError or SwarmException. The deadline is the caller's."""
        stream = MendedTcpStream(await trio.open_tcp_stream(*addr))
        try:
            await self.upgrader.upgrade_security(RawConnection(stream, True), True, peer_id)
        except SecurityUpgradeFailure as error:
            raise SwarmException(f"{peer_id} did not prove itself at {addr}") from error
        finally:
            stream.close_now()

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> INetConn:
        """Caps on the peer's open streams, summed over its connections, are attached here."""
        if isinstance(muxed_conn, MendedYamux):
            peer_id = muxed_conn.peer_id
            if len(self.connections.get(peer_id, ())) >= self.limits.connections_per_peer_max:
                await muxed_conn.close()
                raise SwarmException(f"{peer_id} already has all the connections it may have")
            muxed_conn.admit = lambda: self._peer_streams(peer_id) < self.limits.streams_per_peer_max
        conn: INetConn = await super().add_conn(muxed_conn, direction)
        self.hooks.connected(conn.muxed_conn)
        return conn

    def _peer_streams(self, peer_id: ID) -> int:
        muxes = (conn.muxed_conn for conn in self.connections.get(peer_id, ()))
        return sum(mux.inbound_streams() for mux in muxes if isinstance(mux, MendedYamux))

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Mend 9, for the library's own callers: at least 250 ms, one address a transport, and a
        blacklist of 60 s. Here all known addresses are raced.

        Can go when Swarm.dial_peer races addresses and forgets failures soon.
        """
        existing = [conn for conn in self.get_connections(peer_id) if not conn.is_closed]
        if existing:
            return existing
        try:
            addrs = self.peerstore.addrs(peer_id)
        except Exception as error:  # the library's store has no common error class
            raise SwarmException(f"no addresses known for {peer_id}") from error
        conn, reasons = await race([(addr, peer_id) for addr in addrs], self)
        if conn is None:
            raise SwarmException(f"could not connect to {peer_id}: {reasons}")
        return [conn]

    async def new_stream(self, peer_id: ID) -> INetStream:
        """Streams of the library's protocols wait, as ours do, until the peer has proven itself."""
        if self.hooks.ready is not None:
            for conn in await self.dial_peer(peer_id):
                await self.hooks.ready(conn)
        return await super().new_stream(peer_id)

    def _filter_valid_connections(self, connections: list[INetConn]) -> list[INetConn]:
        return [conn for conn in super()._filter_valid_connections(connections) if self.hooks.usable(conn)]

    def _schedule_prune(self) -> None:
        """Limits refuse new connections; the library would close old ones in their place."""

    def _trim_connections(self, peer_id: ID) -> None:
        """As above: `connections_per_peer_max` is enforced on arrival."""


def _dialled_from(stream: ReadWriteCloser) -> str:
    """The IP address that dialled; "" of a relayed connection, whose relay has limits of its own."""
    return stream.way.remote[0] if isinstance(stream, MendedTcpStream) and stream.way.remote else ""


def subnet_of(ip: str) -> str:
    """What one home or one small provider has: an IPv4 /24, an IPv6 /48. "" where there is no address."""
    if not ip:
        return ""
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False))


@contextlib.contextmanager
def _counted(counts: Counter[str], subnet: str) -> Iterator[None]:
    if not subnet:
        yield
        return
    counts[subnet] += 1
    try:
        yield
    finally:
        counts[subnet] -= 1
        if not counts[subnet]:
            del counts[subnet]


def split_circuit(address: str) -> tuple[str, str] | None:
    """(the relay's address, its peer id) of /.../p2p/RELAY/p2p-circuit; None for any other address."""
    before, mark, after = address.partition("/p2p-circuit")
    relay, found, peer = before.rpartition("/p2p/")
    return (relay, peer) if mark and found and not after.strip("/") else None


async def race(
    targets: list[tuple[Multiaddr, ID]], swarm: MendedSwarm
) -> tuple[INetConn | None, dict[str, str]]:
    """Mend 9: the first address to be connected and `ready` wins, the other dials are cancelled.

    Each address starts `dial_stagger_s` after the one before, or as soon as that one fails, so that
    a good first address makes one connection only. TCP connect has no deadline of its own: each
    dial has `dial_deadline_s`. Returns the winner (None if all failed) and why each other failed.
    """
    winner: INetConn | None = None
    reasons: dict[str, str] = {}

    async def attempt(addr: Multiaddr, peer_id: ID, finished: trio.Event) -> None:
        nonlocal winner
        try:
            with trio.fail_after(swarm.limits.dial_deadline_s):
                conn = await swarm.dial_addr(addr, peer_id)
                if swarm.hooks.ready is not None:
                    await swarm.hooks.ready(conn)
        except trio.TooSlowError:
            reasons[f"{addr}/p2p/{peer_id}"] = f"no answer within {swarm.limits.dial_deadline_s:g} s"
        except Exception as error:  # noqa: BLE001 - the library wraps a socket's errors in many classes
            reasons[f"{addr}/p2p/{peer_id}"] = root_reason(error)
        else:
            winner = winner or conn
            nursery.cancel_scope.cancel()
        finally:
            finished.set()

    async with trio.open_nursery() as nursery:
        for addr, peer_id in targets:
            finished = trio.Event()
            nursery.start_soon(attempt, addr, peer_id, finished)
            with trio.move_on_after(swarm.limits.dial_stagger_s):
                await finished.wait()
    return winner, reasons


def root_reason(error: BaseException) -> str:
    """The innermost cause of a wrapped error, in a few plain words."""
    messages = [str(error)]
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
        messages.append(str(error))
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if any("ismatch" in message or "does not correspond" in message for message in messages):
        return "another peer answers at this address"
    if isinstance(error, BaseExceptionGroup):
        return root_reason(error.exceptions[0])
    return next((message for message in reversed(messages) if message), type(error).__name__)[:200]


def noise_only_upgrader(seed: bytes, limits: SwarmLimits) -> TransportUpgrader:
    """Mend 2: by default the library also accepts plaintext and secio. Here Noise and nothing else.

    Can go when new_swarm's default security options are encrypted and authenticated only.
    """
    noise = BufferedNoise(create_new_key_pair(seed), create_new_noise_key_pair().private_key)
    noise.handshake_deadline_s = limits.handshake_deadline_s
    upgrader = TransportUpgrader({NOISE_ID: noise}, {TProtocol(YAMUX_ID): MendedYamux})
    upgrader.muxer_multistream = MendedMuxers(limits.mux)
    return upgrader


def quiet_connection_config(limits: SwarmLimits) -> ConnectionConfig:
    """No connection wanted for its own sake, and every limit the library knows set to ours."""
    return ConnectionConfig(
        max_connections=limits.connections_max,
        min_connections=0,
        low_watermark=0,
        high_watermark=limits.connections_max,
        max_connections_per_peer=limits.connections_per_peer_max,
        inbound_upgrade_timeout=limits.handshake_deadline_s,
        outbound_upgrade_timeout=limits.handshake_deadline_s,
        auto_connect_interval=3600.0,
    )


def plain_resource_manager(limits: SwarmLimits) -> ResourceManager:
    """Mend 13: counts only. The library's defaults rate-limit all strangers in one bucket, open a
    circuit breaker for a minute after five refusals and shed load by the machine's free memory.

    Connections are counted twice while they are upgraded, hence the doubled limit.
    """
    return ResourceManager(
        limits=ResourceLimits(
            max_connections=2 * limits.connections_max + limits.handshakes_max,
            max_streams=limits.connections_max * limits.mux.streams_max,
        ),
        connection_limits=ConnectionLimits(
            max_established_per_peer=limits.connections_per_peer_max,
            max_established_total=limits.connections_max,
        ),
        enable_metrics=False,
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_rate_limiting=False,
    )


def build_swarm(seed: bytes, limits: SwarmLimits, hooks: SwarmHooks) -> MendedSwarm:
    """A swarm with every mend of this module. Raises LocalFault if one did not take."""
    key_pair = create_new_key_pair(seed)
    peer_id = ID.from_pubkey(key_pair.public_key)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, key_pair)
    swarm = MendedSwarm(
        peer_id,
        peerstore,
        noise_only_upgrader(seed, limits),
        transports=[MendedTcp()],
        retry_config=RetryConfig(max_retries=0),
        connection_config=quiet_connection_config(limits),
    )
    swarm.limits = limits
    swarm.handshaking_from, swarm.connected_from = Counter(), Counter()
    swarm.hooks = hooks
    swarm.auto_connector = IdleAutoConnector(swarm)
    swarm.set_resource_manager(plain_resource_manager(limits), enable_stream_semaphore=False)
    check_guards(swarm)
    return swarm


def check_guards(swarm: MendedSwarm) -> None:
    """Mend 13: the library goes on without a resource manager when making one fails."""
    if swarm._resource_manager is None:
        raise LocalFault("the resource manager was not set: connections would be unlimited")
    offered = list(swarm.upgrader.security_multistream.transports)
    if offered != [NOISE_ID]:
        raise LocalFault(f"security protocols other than Noise are offered: {offered}")


class MendedHost(BasicHost):
    """py-libp2p's host without its own negotiation; identify runs once a peer has proven itself."""

    async def _on_notifee_connected(self, conn: INetConn) -> None:
        """Identify opens a stream at once; the host calls `identify` after the proof instead."""

    def identify(self, peer_id: ID) -> None:
        """Learn the peer's protocols and addresses in the background (Kad needs them)."""
        self._schedule_identify(peer_id, reason="proven")
