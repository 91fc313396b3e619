"""Where members see this node's listening port: connections from that very port to two of them, kept open.

They also keep the router's mapping of the port alive, which is what a hole is punched through. It knows connections and
what came of them; what they tell of the router is decided by the core.
"""

from __future__ import annotations

import ipaddress
import logging

import trio

from p2p.addresses import interface_ips
from p2p.compat.tcp import Endpoint
from p2p.errors import P2pError
from p2p.host import ByteStream, Host, Pinned
from p2p.identity import PeerId
from p2p.reach.core import NatKind, nat_kind
from p2p.reach.types import ReachConfig

logger = logging.getLogger(__name__)

SEEN = "reach/1/seen"
OBSERVERS = 2
TRY_S = 4.0
AGAIN_S = 30.0
_TEXT_BYTES_MAX = 64


class Observers:
    """`seen` is what each of at most two members told, while its connection lasts. Nobody is asked until `wanted`."""

    def __init__(self, host: Host, config: ReachConfig) -> None:
        self.wanted = False
        self.seen: dict[PeerId, Endpoint] = {}
        self.kind: NatKind = "unknown"
        self._host = host
        self._config = config
        self._pinned: dict[PeerId, Pinned] = {}
        self._again_s: dict[PeerId, float] = {}
        host.handle(SEEN, self._tell)

    def forget(self) -> None:
        """The network is another one: what was seen is of no use, and its connections are dead."""
        for one in self._pinned.values():
            one.close()
        self._pinned.clear()
        self._again_s.clear()
        self.seen.clear()
        self.kind = "unknown"

    async def run(self) -> None:
        """Until cancelled."""
        asked_s = -float("inf")
        while True:
            await trio.sleep(self._config.tick_s)
            lost = [peer for peer, one in self._pinned.items() if not one.alive]
            for peer in lost:
                del self._pinned[peer]
                self.seen.pop(peer, None)
            if self.wanted and len(self._pinned) < OBSERVERS:
                await self._pin_one()
            if trio.current_time() - asked_s > self._config.observe_every_s:
                asked_s = trio.current_time()
                for one in list(self._pinned.values()):
                    await self._ask(one)

    async def _pin_one(self) -> None:
        """One more member that this node reached at an address of its own, rather at one not asked yet."""
        now_s = trio.current_time()
        ends = {peer: self._host.dialled_at(peer) for peer in self._host.peers() if peer not in self._pinned}
        free = {p: end for p, end in ends.items() if end and self._again_s.get(p, 0.0) <= now_s}
        asked = {end[0] for end in map(self._host.dialled_at, self._pinned) if end}
        if not free:
            return
        peer = min(free, key=lambda peer: (free[peer][0] in asked, peer))
        source = source_for(self._host, free[peer][0])
        self._again_s[peer] = now_s + AGAIN_S
        if source is None or len(self._host.ways(peer)) > 3:
            return
        try:
            with trio.fail_after(TRY_S):
                one = await self._host.connect_from(source, free[peer], peer)
        except (P2pError, trio.TooSlowError) as failure:
            logger.debug("no connection from the listening port to %s: %s", peer, failure)
            return
        self._pinned[peer] = one
        await self._ask(one)

    async def _ask(self, one: Pinned) -> None:
        try:
            stream = await one.open_stream(SEEN, deadline_s=TRY_S)
            with trio.fail_after(TRY_S):
                said = b""
                while len(said) <= _TEXT_BYTES_MAX and (piece := await stream.receive_some(_TEXT_BYTES_MAX)):
                    said += piece
            stream.reset()
            end = read_end(said)
        except (P2pError, trio.TooSlowError, ValueError) as failure:
            logger.debug("%s did not say where it sees this node: %s", one.peer, failure)
            one.close()
            return
        self.seen[one.peer] = end
        source = source_for(self._host, end[0])
        self.kind = nat_kind(self.seen, source[1] if source else 0, interface_ips())

    async def _tell(self, stream: ByteStream) -> None:
        way = getattr(stream, "way", None)
        if way is not None and way.remote is not None:
            await stream.send_all(f"{way.remote[0]} {way.remote[1]}".encode())


def read_end(said: bytes) -> Endpoint:
    """Raises ValueError for anything but an address and a port."""
    ip, _, port = said[:_TEXT_BYTES_MAX].decode("ascii").partition(" ")
    number = int(port)
    if not 0 < number < 65536:
        raise ValueError(f"port {number}")
    return str(ipaddress.ip_address(ip)), number


def source_for(host: Host, target_ip: str) -> Endpoint | None:
    """What the listening socket of the same version of IP is bound to."""
    version = ipaddress.ip_address(target_ip).version
    ends = [end for end in host.bound() if ipaddress.ip_address(end[0]).version == version]
    return next((end for end in ends if not ipaddress.ip_address(end[0]).is_loopback), None)
