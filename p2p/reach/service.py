"""How this node is reached: it asks members to knock, keeps relays where nobody gets through, and punches holes.

The loops around the cores. What members say of themselves comes from `members`, and goes back by `changed`, through
whatever replicates the mesh's view. It knows neither models nor plans.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID

from p2p.addresses import CIRCUIT, interface_ips
from p2p.compat.swarm import MendedSwarm
from p2p.compat.tcp import Endpoint
from p2p.errors import P2pError, RpcRefusal
from p2p.host import Host
from p2p.identity import PeerId
from p2p.reach.core import NatKind, Probe, Reachability, RelayKeeper, RelayOffer, Reserve
from p2p.reach.mapper import PortMapper
from p2p.reach.observe import Observers
from p2p.reach.relay import Circuits
from p2p.reach.relay_core import NotRelayed, Pace, RelayCore
from p2p.reach.types import ReachConfig, ReachReport, Said
from p2p.reach.upgrade import Upgrader
from p2p.rpc import Rpc
from p2p.rpc_types import Call, Method

logger = logging.getLogger(__name__)

_PORTS_MAX = 2


@dataclass(frozen=True, slots=True)
class Knock:
    """A wish that the other side connects back: to the address that it sees us at, and to no other."""

    ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Knocked:
    """The address that was seen, and the ports there at which the asker proved itself."""

    ip: str
    answered: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wish:
    """For a reservation (or its end)."""

    wanted: bool = True


@dataclass(frozen=True, slots=True)
class Granted:
    ttl_s: float


KNOCK = Method("reach/knock", Knock, Knocked, body_bytes_max=1024, deadline_s=6.0)
RESERVE = Method("reach/reserve", Wish, Granted, body_bytes_max=256, deadline_s=6.0)


class Reach:
    """One a host, beside its Rpc. `members` tells what each member says of itself, `changed` is called when what this
    node says (`said`), or its addresses, are others than before."""

    def __init__(
        self,
        host: Host,
        rpc: Rpc,
        config: ReachConfig | None = None,
        *,
        members: Callable[[], Mapping[PeerId, Said]] = dict,
        changed: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config or ReachConfig()
        self.reachability = Reachability()
        self._host = host
        self._rpc = rpc
        self._members = members
        self._changed = changed
        self._rng = rng or random.Random()
        swarm = host.raw.get_network()
        if not isinstance(swarm, MendedSwarm):
            raise TypeError("this host has no swarm of ours")
        self._swarm = swarm
        self._core = RelayCore(self.config.relay)
        self._circuits = Circuits(host, swarm, self._core)
        self._keeper = RelayKeeper(host.peer_id)
        self._observers = Observers(host, self.config)
        self._upgrader = Upgrader(host, swarm, rpc, self.config, self._standing)
        self._mapper = PortMapper(lambda: outer_port(host), self._on_forwarding)
        self._own_ips: frozenset[str] = frozenset(interface_ips())
        self._pace, self._pace_all = Pace(4, 5.0), Pace(20, 0.5)
        self._asked_s: dict[PeerId, float] = {}
        self._due_s = 0.0
        self._told: tuple[Said, tuple[str, ...], frozenset[str]] | None = None
        rpc.serve(KNOCK, self._on_knock)
        rpc.serve(RESERVE, self._on_reserve)

    # ---- what is known

    @property
    def mapped(self) -> Endpoint | None:
        """What the router says that it forwards here."""
        forwarding = self._mapper.forwarding
        return None if forwarding is None else forwarding.outer

    @property
    def nat(self) -> NatKind:
        at = self.reachability.at
        return self._observers.kind if at is None or at[0] not in self._own_ips else "none"

    def said(self) -> Said:
        """What this node says of itself."""
        verdict = self.reachability.verdict
        relays = self._keeper.relays(trio.current_time()) if self.reachability.suspect() else ()
        mbps = self.config.relay.mbps if verdict == "public" else 0.0
        return Said(verdict, self.nat, mbps, tuple(map(str, relays)))

    def report(self) -> ReachReport:
        """For people."""
        now_s = trio.current_time()
        at = self.reachability.at
        return ReachReport(
            verdict=self.reachability.verdict,
            nat=self.nat,
            at="" if at is None else _text(at),
            mapped="" if self.mapped is None else _text(self.mapped),
            router_says=self._mapper.problem,
            relays=self._keeper.relays(now_s),
            mbps=self.config.relay.mbps,
            carries=self._core.circuits,
            carried_bytes=self._core.carried_bytes,
            serves=len(self._core.reserved(now_s)),
        )

    def _standing(self) -> tuple[bool, NatKind, tuple[Endpoint, ...]]:
        """For the upgrader: whether this node is reachable, its NAT, and where its listening port shows outside."""
        open_ = self.reachability.verdict == "public"
        seen = list(self._observers.seen.values())
        at = self.reachability.at
        ends = [*([at] if open_ and at else []), *([self.mapped] if self.mapped else []), *seen]
        return open_, self.nat, tuple(dict.fromkeys(ends))

    # ---- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. A node that listens on this computer only has nothing to find out."""
        task_status.started()
        if not outer_port(self._host):
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_probing)
            nursery.start_soon(self._observers.run)
            nursery.start_soon(self._keep_relays, nursery)
            nursery.start_soon(self._upgrader.run)
            nursery.start_soon(self._watch_network)
            if self.config.upnp:
                nursery.start_soon(self._mapper.run, self.reachability.suspect, self.config.tick_s)

    async def _watch_network(self) -> None:
        """A computer that moved has other addresses: its old connections are dead, and nothing of old holds."""
        while True:
            await trio.sleep(self.config.network_every_s)
            ips = frozenset(await trio.to_thread.run_sync(interface_ips))
            if ips == self._own_ips:
                continue
            gone = self._own_ips - ips
            logger.info("the addresses of this computer changed")
            self._own_ips = ips
            self.reachability.forget()
            self._observers.forget()
            self._upgrader.forget()
            self._mapper.forget()
            self._due_s = 0.0
            self._host.drop_from(gone)
            self._tell()

    def _on_forwarding(self) -> None:
        self._due_s = 0.0  # what it is worth, members will tell

    def _tell(self) -> None:
        """Announce addresses and say what has changed."""
        addresses = self._addresses()
        now = (self.said(), tuple(addresses), self._own_ips)
        if now != self._told:
            self._told = now
            self._host.announce(addresses)
            self._changed()

    def _addresses(self) -> list[str]:
        me = self._host.peer_id
        found = []
        at = self.reachability.at
        if self.reachability.verdict == "public" and at is not None and at[0] not in self._own_ips:
            found.append(f"{_multiaddress(at)}/p2p/{me}")
        if self.reachability.suspect():
            for relay in self._keeper.relays(trio.current_time()):
                end = self._host.dialled_at(relay)
                if end is not None:
                    found.append(f"{_multiaddress(end)}/p2p/{relay}{CIRCUIT}/p2p/{me}")
        return list(dict.fromkeys(found))

    # ---- can others connect here?

    async def _keep_probing(self) -> None:
        while True:
            await trio.sleep(self.config.tick_s)
            if trio.current_time() >= self._due_s:
                await self._probe_once()
                self._tell()

    async def _probe_once(self) -> None:
        config, now_s = self.config, trio.current_time()
        direct = [p for p in self._host.peers() if any(way.kind == "direct" for way in self._host.ways(p))]
        # Whom this port wrote to gets through some routers: that it gets through says nothing of others.
        any_will_do = self.reachability.verdict == "unknown" or self.mapped is not None
        free = [peer for peer in direct if peer not in self._observers.seen] or (
            direct if any_will_do else []
        )
        if not free:
            self._due_s = now_s + config.probe_soon_s
            return
        prober = min(free, key=lambda peer: (self._asked_s.get(peer, 0.0), peer))
        self._asked_s = {peer: at_s for peer, at_s in self._asked_s.items() if peer in direct} | {
            prober: now_s
        }
        ports = [outer_port(self._host)] + ([self.mapped[1]] if self.mapped else [])
        try:
            found = await self._rpc.call(prober, KNOCK, Knock(tuple(ports)))
        except P2pError as failure:
            logger.debug("%s did not knock: %s", prober, failure)
            self._due_s = now_s + config.probe_soon_s
            return
        reached = [port for port in found.answered if port in ports]
        probe = Probe(prober, (found.ip, reached[0] if reached else ports[0]), bool(reached))
        if self.reachability.noted(probe, self._own_ips, len(free), trio.current_time()):
            logger.info("other members can%s connect to this node", "" if reached else "not")
        settled = self.reachability.verdict == ("public" if reached else "private")
        wait_s = config.probe_every_s * self._rng.uniform(0.75, 1.25) if settled else config.probe_soon_s
        self._due_s = trio.current_time() + wait_s
        self._observers.wanted = found.ip not in self._own_ips

    async def _on_knock(self, call: Call, wish: Knock) -> Knocked:
        """Dial back, to where the asker's own connections come from: nobody can have a third party knocked at."""
        now_s = trio.current_time()
        if not self._pace.may(call.peer, now_s) or not self._pace_all.may("", now_s):
            raise RpcRefusal("busy", "asked too often", retry_after_s=5.0)
        ends = [way.remote for way in self._host.ways(call.peer) if way.kind != "relayed" and way.remote]
        if not ends:
            raise RpcRefusal("unavailable", "there is no direct connection to knock at the other end of")
        ip = ends[0][0]  # the newest connection's: the asker may have moved
        ports = [port for port in wish.ports if 0 < port < 65536][:_PORTS_MAX]
        answered: list[int] = []

        async def knock(port: int) -> None:
            try:
                with trio.fail_after(self.config.knock_s):
                    await self._swarm.knock((ip, port), ID.from_base58(call.peer))
            except (OSError, SwarmException, trio.TooSlowError):
                return
            answered.append(port)

        async with trio.open_nursery() as nursery:
            for port in dict.fromkeys(ports):
                nursery.start_soon(knock, port)
        return Knocked(ip, tuple(port for port in ports if port in answered))

    # ---- relays

    async def _keep_relays(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(self.config.tick_s)
            for peer in self._keeper.relays(trio.current_time()):
                if not self._host.is_connected(peer):
                    logger.info("lost the relay %s", peer)
                    self._keeper.lost(peer)
            for step in self._keeper.decide(self._offers(), self.reachability.suspect(), trio.current_time()):
                nursery.start_soon(self._reserve if isinstance(step, Reserve) else self._release, step.peer)
            self._host.shed_relayed()
            self._tell()

    def _offers(self) -> list[RelayOffer]:
        return [
            RelayOffer(peer, said.mbps, self._rpc.rtt_s(peer))
            for peer, said in self._members().items()
            if said.mbps > 0 and said.verdict == "public" and self._host.dialled_at(peer) is not None
        ]

    async def _reserve(self, peer: PeerId) -> None:
        try:
            granted = await self._rpc.call(peer, RESERVE, Wish())
        except P2pError as failure:
            logger.info("%s relays nothing for this node: %s", peer, failure)
            self._keeper.failed(peer, trio.current_time())
            return
        now_s = trio.current_time()
        if not 1.0 <= granted.ttl_s <= 86_400.0 or not await self._circuits.proven(peer):
            self._keeper.failed(peer, now_s)
            return
        self._keeper.granted(peer, granted.ttl_s, now_s)
        self._tell()

    async def _release(self, peer: PeerId) -> None:
        try:
            await self._rpc.call(peer, RESERVE, Wish(wanted=False))
        except P2pError as failure:
            logger.debug("%s was not told that it need not relay any more: %s", peer, failure)

    async def _on_reserve(self, call: Call, wish: Wish) -> Granted:
        ways = self._host.ways(call.peer)
        if not ways or ways[0].kind == "relayed":
            raise RpcRefusal("denied", "reservations are made on direct connections")
        if not wish.wanted:
            self._core.release(call.peer)
            return Granted(0.0)
        try:
            remote = ways[0].remote
            return Granted(self._core.reserve(call.peer, remote[0] if remote else "", trio.current_time()))
        except NotRelayed as refused:
            raise RpcRefusal("busy", str(refused), retry_after_s=30.0) from None


def outer_port(host: Host) -> int:
    """The port on which other computers find this one; 0 where it listens for itself only."""
    ends = host.bound()
    return next((port for ip, port in ends if not ip.startswith("127.") and ip != "::1"), 0)


def _text(end: Endpoint) -> str:
    return f"[{end[0]}]:{end[1]}" if ":" in end[0] else f"{end[0]}:{end[1]}"


def _multiaddress(end: Endpoint) -> str:
    return f"/ip{6 if ':' in end[0] else 4}/{end[0]}/tcp/{end[1]}"


__all__ = ["Reach"]
