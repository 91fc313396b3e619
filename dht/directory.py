"""Who is in the mesh and where: finds members this node is not connected to, and connects to them.

Joins four sources of addresses: the view (an `addr` record of each member), the DHT (the same record,
and who provides the mesh's key), peers remembered on disk, and whatever the caller names. Whom to
dial when is the Dialer's decision. It does not know invites, models or plans.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from dht.adverts import (
    ADDR_KIND,
    advert_key,
    is_advert,
    mesh_key,
    newest_advert,
    own_addrs,
    read_addrs,
    write_addrs,
)
from dht.dialer import Dialer, DialerConfig
from dht.errors import RecordRefused
from dht.gossip import Gossip
from dht.lan import Lan
from dht.memory import PeerMemory, Remembered
from dht.records import Record, sign_record, sign_tombstone
from p2p import Host, Identity, Kad, P2pError, PeerId, Unreachable

logger = logging.getLogger(__name__)


class Dht(Protocol):
    """What Directory needs of `p2p.Kad`."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...
    async def put(self, key: str, value: bytes) -> Any: ...
    async def get(self, key: str) -> bytes | None: ...
    async def provide(self, key: bytes) -> None: ...
    async def providers(self, key: bytes) -> list[tuple[PeerId, tuple[str, ...]]]: ...


@dataclass(frozen=True, slots=True)
class DirectoryConfig:
    """Rhythms and limits. Beyond `connected_max` connections no more are sought. `lan`: whether the LAN is told of this
    node and asked for others."""

    connected_max: int = 64
    remembered_max: int = 64
    look_every_s: float = 1.0
    seek_every_s: float = 60.0
    announce_every_s: float = 900.0
    announce_retry_s: float = 10.0
    settle_s: float = 1.5
    save_every_s: float = 30.0
    advert_ttl_s: float = 3600.0
    view_ttl_s: float = 60.0
    dial_deadline_s: float = 5.0
    bye_s: float = 0.3
    lookups_max: int = 16
    dialer: DialerConfig = field(default_factory=DialerConfig)
    lan: bool = False

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name not in ("dialer", "lan") and getattr(self, name) <= 0:
                raise ValueError(f"DirectoryConfig.{name} is {getattr(self, name)!r}: it must be above zero")


class Directory:
    """One a host. `path` is the JSON file of remembered peers (None: none are kept)."""

    def __init__(
        self,
        host: Host,
        gossip: Gossip,
        identity: Identity,
        path: Path | None,
        config: DirectoryConfig | None = None,
        *,
        kad: Dht | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config or DirectoryConfig()
        self._host = host
        self._gossip = gossip
        self._identity = identity
        self._me = identity.peer_id
        self._rng = rng or random.Random()
        self._kad: Dht = kad or Kad(host, is_advert, newest_advert)
        self._memory = PeerMemory(path, self.config.remembered_max)
        self._dialer = Dialer(self._me, self._rng, self.config.dialer)
        self._lan = Lan(self._me, host.mesh_id, host.addrs, self.add) if self.config.lan else None
        self._announced: Record | None = None
        self._seq = -1
        self._met = trio.Event()
        self._moved = trio.Event()
        self._addrs: tuple[str, ...] = ()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find, connect, announce and remember until cancelled; then take the advert back and save."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._kad.run)
                await nursery.start(self._follow_peers)
                nursery.start_soon(self._dial_known, nursery)
                nursery.start_soon(self._seek)
                nursery.start_soon(self._announce)
                nursery.start_soon(self._keep_saving)
                if self._lan is not None:
                    nursery.start_soon(self._lan.run)
                task_status.started()
        finally:
            self._memory.save()
            await self._withdraw()

    def add(self, addrs: Iterable[str]) -> None:
        """Addresses ending in /p2p/PEER to connect to and keep trying, as from an invite."""
        by_peer: dict[PeerId, list[str]] = {}
        for addr in addrs:
            by_peer.setdefault(PeerId(addr.rpartition("/p2p/")[2]), []).append(addr)
        for peer, theirs in by_peer.items():
            self._dialer.found(peer, theirs, trio.current_time())

    def remembered(self) -> tuple[Remembered, ...]:
        """Peers remembered from this and earlier lives, the last seen first."""
        return self._memory.peers()

    def forget(self, peer: PeerId) -> None:
        """Neither dial `peer` nor remember it, until something names it again."""
        self._memory.forget(peer)
        self._dialer.drop(peer)

    async def lookup(self, peer: PeerId) -> Record | None:
        """The newest address record of a member that the DHT has, or None (also where it was withdrawn).

        Its times are those of the member's clock. Raises DeadlineExceeded.
        """
        value = await self._kad.get(advert_key(peer))
        if value is None:
            return None
        try:
            record = Record.decode(value)
        except RecordRefused:
            return None
        return None if record.withdrawn or record.signer != peer else record

    async def find_peers(self) -> dict[PeerId, tuple[str, ...]]:
        """Members the DHT names that this node is not connected to, with their addresses.

        At most `lookups_max` of them are looked up for addresses newer than those their providers'
        records give. Raises DeadlineExceeded.
        """
        providers = await self._kad.providers(mesh_key(self._host.mesh_id))
        unknown = [(peer, addrs) for peer, addrs in providers if not self._known(peer)]
        found = {peer: own_addrs(peer, addrs) for peer, addrs in unknown}
        for peer in self._rng.sample(sorted(found), min(len(found), self.config.lookups_max)):
            record = await self.lookup(peer)
            if record is not None:
                found[peer] = own_addrs(peer, (*read_addrs(record), *found[peer]))
        return {peer: addrs for peer, addrs in found.items() if addrs}

    def _known(self, peer: PeerId) -> bool:
        return peer == self._me or self._host.is_connected(peer)

    # Dialling

    async def _follow_peers(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        started = False
        while True:
            with self._host.watch() as events:
                if not started:
                    started = True
                    task_status.started()
                self._note_company()
                async for event in events:
                    self._note_company()
                    if event.kind == "down":
                        self._lost(event.peer)

    def _note_company(self) -> None:
        if self._host.peers():
            self._met.set()
        elif self._met.is_set():
            self._met = trio.Event()

    def _lost(self, peer: PeerId) -> None:
        """Whoever took its address back has left; others are dialled again soon."""
        record = self._gossip.view.held((ADDR_KIND, "", peer))
        if record is not None and record.withdrawn:
            self._dialer.drop(peer)
        else:
            self._dialer.lost(peer, trio.current_time())

    async def _dial_known(self, nursery: trio.Nursery) -> None:
        """Remembered peers at once, members of the view as they appear; all with backoff."""
        for one in self._memory.peers():
            self._dialer.found(one.peer, one.addrs, trio.current_time())
        while True:
            self._read_view()
            if len(self._host.peers()) < self.config.connected_max:
                for peer, addrs in self._dialer.take_due(self._host.peers(), trio.current_time()):
                    nursery.start_soon(self._dial, peer, addrs)
            await trio.sleep(self.config.look_every_s * self._rng.uniform(0.5, 1.0))

    def _read_view(self) -> None:
        """Publish where this node is, and learn where the others are."""
        addrs = self._host.addrs()
        if addrs != self._addrs:
            self._addrs = addrs
            self._moved.set()
        if addrs:
            self._gossip.publish(ADDR_KIND, "", write_addrs(addrs), self.config.view_ttl_s)
        now_s = self._gossip.now_s()
        for record in self._gossip.view.records(ADDR_KIND, now_s):
            if record.signer == self._me:
                continue
            self._dialer.found(record.signer, read_addrs(record), trio.current_time())
        for peer in self._host.peers():
            self._memory.remember(peer, self._dialer.addrs(peer), now_s)

    async def _dial(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        connected = self._host.is_connected(peer)
        try:
            if not connected:
                connected = await self._host.connect(addrs, deadline_s=self.config.dial_deadline_s) == peer
                logger.info("connected to %s", peer)
        except Unreachable as error:
            logger.debug("cannot reach %s: %s", peer, error)
        except P2pError as error:
            logger.info("connecting to %s failed: %s", peer, error)
        finally:
            self._dialer.ended(peer, connected, trio.current_time())

    # The DHT

    async def _seek(self) -> None:
        """Ask the DHT for members now and then. What it names is dialled as anything else."""
        while True:
            await self._until_connected()
            await trio.sleep(self.config.settle_s * self._rng.uniform(1.0, 2.0))
            try:
                for peer, addrs in (await self.find_peers()).items():
                    self._dialer.found(peer, addrs, trio.current_time())
            except P2pError as error:
                logger.info("the DHT could not be asked for members: %s", error)
            await trio.sleep(self.config.seek_every_s * self._rng.uniform(0.75, 1.25))

    async def _announce(self) -> None:
        """Keep this node's address record and its membership in the DHT."""
        while True:
            await self._until_connected()
            await trio.sleep(self.config.settle_s * self._rng.uniform(0.5, 1.0))
            wait_s = self.config.announce_every_s
            self._moved = trio.Event()
            try:
                await self._announce_once()
            except P2pError as error:
                logger.info("announcing this node in the DHT failed: %s", error)
                wait_s = self.config.announce_retry_s
            with trio.move_on_after(wait_s * self._rng.uniform(0.75, 1.25)):
                await self._moved.wait()

    async def _announce_once(self) -> None:
        addrs = self._host.addrs()
        if not addrs:
            return
        now_s = self._gossip.now_s()
        seq = await self._next_seq(now_s)
        value = write_addrs(addrs)
        record = sign_record(self._identity, ADDR_KIND, "", seq, value, now_s, self.config.advert_ttl_s)
        await self._kad.put(advert_key(self._me), record.encode())
        self._announced = record
        await self._kad.provide(mesh_key(self._host.mesh_id))

    async def _next_seq(self, now_s: float) -> int:
        """Above what the DHT still holds of an earlier life, whatever the clock says."""
        if self._seq < 0:
            value = await self._kad.get(advert_key(self._me))
            self._seq = Record.decode(value).seq if value else 0
        self._seq = max(self._seq + 1, int(now_s * 1000))
        return self._seq

    async def _withdraw(self) -> None:
        """Leave a tombstone in the DHT, within `bye_s`."""
        record = self._announced
        if record is None or not self._host.peers():
            return
        now_s = self._gossip.now_s()
        expires_at_s = max(record.expires_at_s, now_s) + 60.0
        tombstone = sign_tombstone(self._identity, ADDR_KIND, "", self._seq + 1, now_s, expires_at_s)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self.config.bye_s):
            try:
                await self._kad.put(advert_key(self._me), tombstone.encode())
            except P2pError as error:
                logger.debug("the DHT was not told of this node's leaving: %s", error)

    # Waiting and saving

    async def _until_connected(self) -> None:
        while not self._host.peers():
            await self._met.wait()
            await trio.lowlevel.checkpoint()

    async def _keep_saving(self) -> None:
        """Soon after a first peer, then now and then; the file is written only when something changed."""
        await self._until_connected()
        await trio.sleep(2 * self.config.look_every_s)
        while True:
            self._memory.save()
            await trio.sleep(self.config.save_every_s)
