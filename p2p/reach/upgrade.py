"""From a relayed connection to a direct one: both ends tell where they can be seen, and dial, or punch, at once.

The end with the smaller peer id asks, over the relayed connection, and begins every handshake. What is under way on the
relayed connection is left alone. It knows peers and attempts; sockets are `punch`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2p.addresses import interface_ips
from p2p.compat.swarm import MendedSwarm, root_reason
from p2p.compat.tcp import Endpoint
from p2p.errors import P2pError, RpcRefusal
from p2p.host import Host
from p2p.identity import PeerId
from p2p.reach.core import NatKind, punch_targets, worth_punching
from p2p.reach.observe import read_end, source_for
from p2p.reach.punch import Hole, punch
from p2p.reach.relay_core import Pace
from p2p.reach.types import ReachConfig
from p2p.rpc import Rpc
from p2p.rpc_types import Call, Method

logger = logging.getLogger(__name__)

ENDS_MAX = 8
READY_S = 4.0
"""How long the first attempt waits for members to say where they see this node."""


@dataclass(frozen=True, slots=True)
class Meet:
    """What one end tells the other: "IP PORT" of its listening port, as seen and as bound, and what may lead there."""

    ends: tuple[str, ...]
    open: bool
    nat: str


MEET = Method("reach/meet", Meet, Meet, body_bytes_max=2048, deadline_s=5.0)

Standing = Callable[[], tuple[bool, NatKind, tuple[Endpoint, ...]]]


@dataclass(slots=True)
class _Attempts:
    since_s: float
    due_s: float
    failed: int = 0
    running: bool = False


class Upgrader:
    """One a node. `standing` tells whether this node is reachable, its NAT, and where its port is seen."""

    def __init__(
        self, host: Host, swarm: MendedSwarm, rpc: Rpc, config: ReachConfig, standing: Standing
    ) -> None:
        self._host = host
        self._swarm = swarm
        self._rpc = rpc
        self._config = config
        self._standing = standing
        self._attempts: dict[PeerId, _Attempts] = {}
        self._pace = Pace(3, 4.0)
        self._nursery: trio.Nursery | None = None
        rpc.serve(MEET, self._on_meet)

    def forget(self) -> None:
        """The network is another one: what failed there may succeed here."""
        self._attempts.clear()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await trio.sleep(self._config.tick_s)
                for peer in self._due(trio.current_time()):
                    nursery.start_soon(self._ask, peer)

    def _due(self, now_s: float) -> list[PeerId]:
        if not self._config.upgrade:
            return []
        relayed = {p for p in self._host.peers() if self._only_relayed(p) and self._host.peer_id < p}
        for peer in self._attempts.keys() - relayed:
            if not self._attempts[peer].running:
                del self._attempts[peer]
        due = []
        for peer in sorted(relayed):
            one = self._attempts.setdefault(peer, _Attempts(now_s, now_s))
            ready = bool(self._standing()[2]) or now_s - one.since_s > READY_S
            if ready and not one.running and one.due_s <= now_s:
                one.running = True
                due.append(peer)
        return due

    def _only_relayed(self, peer: PeerId) -> bool:
        ways = self._host.ways(peer)
        return bool(ways) and ways[0].kind == "relayed"

    async def _ask(self, peer: PeerId) -> None:
        one = self._attempts[peer]
        done = False
        try:
            theirs = await self._rpc.call(peer, MEET, self._mine())
            done = await self._meet(peer, theirs, begins=True)
        except P2pError as failure:
            logger.debug("%s would not meet: %s", peer, failure)
        one.running = False
        if not done:
            one.failed += 1
            wait_s = self._config.punch_again_s * 2 ** min(one.failed - 1, 20)
            one.due_s = trio.current_time() + min(wait_s, self._config.punch_again_max_s)

    async def _on_meet(self, call: Call, theirs: Meet) -> Meet:
        if self._nursery is None or not self._only_relayed(call.peer) or call.peer > self._host.peer_id:
            raise RpcRefusal("unavailable", "there is nothing to better")
        if not self._pace.may(call.peer, trio.current_time()):
            raise RpcRefusal("busy", "asked too often", retry_after_s=5.0)
        self._nursery.start_soon(self._answer, call.peer, theirs)
        return self._mine()

    async def _answer(self, peer: PeerId, theirs: Meet) -> None:
        await self._meet(peer, theirs, begins=False)

    def _mine(self) -> Meet:
        open_, nat, seen = self._standing()
        bound = [(ip, source[1]) for ip in interface_ips() if (source := source_for(self._host, ip))]
        ends = list(dict.fromkeys((*seen, *bound)))[:ENDS_MAX]
        return Meet(tuple(f"{ip} {port}" for ip, port in ends), open_, nat)

    async def _meet(self, peer: PeerId, theirs: Meet, *, begins: bool) -> bool:
        """Whether a direct connection came of it."""
        open_, nat, seen = self._standing()
        ends = _readable(theirs.ends)
        same_home = bool({ip for ip, _ in seen} & {ip for ip, _ in ends})
        targets = punch_targets(ends, interface_ips(), same_home)
        if theirs.open and (begins or not open_):
            return await self._dial(peer, targets)
        if open_:
            return False  # the other end dials
        if not worth_punching(nat, theirs.nat):
            return False
        made = False
        for version in (4, 6):
            mine = [end for end in targets if (":" in end[0]) == (version == 6)]
            source = source_for(self._host, mine[0][0]) if mine else None
            if source is not None and not made:
                hole = Hole(peer, source, mine, begins)
                made = await punch(self._swarm, hole, self._config.punch_s)
        logger.info("a hole to %s was %s", peer, "punched" if made else "tried and not found")
        return made

    async def _dial(self, peer: PeerId, targets: Sequence[Endpoint]) -> bool:
        for ip, port in targets:
            address = Multiaddr(f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}")
            try:
                with trio.fail_after(self._config.punch_s / max(1, len(targets))):
                    await self._swarm.dial_addr(address, ID.from_base58(peer))
                return True
            except Exception as failure:  # noqa: BLE001 - the library wraps a socket's errors in many classes
                logger.debug("%s does not answer at %s: %s", peer, address, root_reason(failure))
        return False


def _readable(ends: Sequence[str]) -> list[Endpoint]:
    found = []
    for text in ends[:ENDS_MAX]:
        try:
            found.append(read_end(text.encode("ascii", "replace")))
        except ValueError:
            continue
    return found
