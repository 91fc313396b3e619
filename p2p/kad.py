"""A Kademlia DHT among the members of one mesh: values by key, and who provides a key.

Knows when to refresh the routing table and how to bound and contain libp2p's KadDHT (mends in
`p2p.compat.kad`). It does not know what values mean: `validator` and `select` do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo

from p2p.compat.kad import KEY_BYTES_MAX, StrictValidator, build_kad, full_key
from p2p.errors import DeadlineExceeded, LocalFault, ResourceLimit
from p2p.host import Host, PeerEvent
from p2p.identity import PeerId

__all__ = ["Kad", "KadConfig"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KadConfig:
    """Limits and rhythms. `subnet_peers_max` 0 lets any number of members share a public network."""

    value_bytes_max: int = 128 * 1024
    values_max: int = 4096
    values_bytes_max: int = 32 * 1024 * 1024
    keep_s: float = 7200.0
    operation_deadline_s: float = 15.0
    refresh_every_s: float = 600.0
    refresh_settle_s: float = 1.0
    refresh_gap_s: float = 5.0
    identify_deadline_s: float = 5.0
    restart_after_s: float = 5.0
    subnet_peers_max: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 0 or (value == 0 and name != "subnet_peers_max"):
                raise LocalFault(f"KadConfig.{name} must be positive, got {value!r}")


class Kad:
    """One node's part in the DHT. It serves others from construction on and maintains itself in `run`.

    `validator(key, value)` says whether a value may be stored or believed under a key, `select(key,
    values)` gives the index of the best of several valid ones. Neither may raise.
    """

    def __init__(
        self,
        host: Host,
        validator: Callable[[str, bytes], bool],
        select: Callable[[str, Sequence[bytes]], int],
        config: KadConfig | None = None,
    ) -> None:
        self.config = config or KadConfig()
        self._host = host
        self._select = select
        self._valid = validator
        self._protocol = f"/shoal/{host.mesh_id}/kad/1"
        self._dht = build_kad(
            host.raw,
            self._protocol,
            StrictValidator(validator, select, self.config.value_bytes_max),
            (self.config.values_max, self.config.values_bytes_max, self.config.keep_s),
            self.config.subnet_peers_max,
        )
        self._stale = trio.Event()
        self.failures = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow connections and keep the routing table fresh, until cancelled. Never raises.

        A failure inside the library is logged and the maintenance begins again.
        """
        started = False
        try:
            while True:
                try:
                    with self._host.watch() as events:
                        if not started:
                            started = True
                            task_status.started()
                        await self._maintain(events)
                except Exception:  # the library raises anything; the DHT is a help, not a condition
                    self.failures += 1
                    logger.exception(
                        "the DHT's maintenance failed; again in %g s", self.config.restart_after_s
                    )
                await trio.sleep(self.config.restart_after_s)
        finally:
            self._dht.host.remove_stream_handler(PROTOCOL_ID)

    async def put(self, key: str, value: bytes) -> int:
        """Store `value` here and at the members closest to `key`; returns how many of those took it.

        Raises ResourceLimit for a value over `value_bytes_max` (the library would keep it to itself,
        silently), LocalFault for a key or value that could never be found or believed, or one older
        than what is known here, DeadlineExceeded.
        """
        if len(value) > self.config.value_bytes_max:
            raise ResourceLimit(
                f"a DHT value has at most {self.config.value_bytes_max} bytes, this has {len(value)}"
            )
        name = self._checked(key)
        if not self._valid(key, value):
            raise LocalFault(f"the DHT's own rules refuse this value for {key!r}")
        known = self._dht.value_store.get(name.encode())
        if known is not None and known.value != value and self._select(key, [value, known.value]) != 0:
            raise LocalFault(f"a newer value than this is known for {key!r}")
        stored = self._dht.value_store.stored
        stored[name.encode()] = 0
        try:
            with trio.fail_after(self.config.operation_deadline_s):
                await self._dht.put_value(name, value)
            return int(stored[name.encode()])
        except trio.TooSlowError:
            raise DeadlineExceeded(f"storing {key!r} in the DHT took too long") from None
        finally:
            stored.pop(name.encode(), None)

    async def get(self, key: str) -> bytes | None:
        """The best value the network and this node know, asked afresh. Raises DeadlineExceeded."""
        name = self._checked(key)
        store = self._dht.value_store
        local = store.get(name.encode())
        store.read_past.add(name.encode())
        try:
            with trio.fail_after(self.config.operation_deadline_s):
                found: bytes | None = await self._dht.get_value(name)
        except trio.TooSlowError:
            raise DeadlineExceeded(f"asking the DHT for {key!r} took too long") from None
        finally:
            store.read_past.discard(name.encode())
        if local is None or not self._valid(key, local.value):
            return found
        if found is not None and self._select(key, [local.value, found]) == 1:
            return found
        store.put_record(name.encode(), local)
        return bytes(local.value)

    async def provide(self, key: bytes) -> None:
        """Tell the members closest to `key` that this node provides it. Raises DeadlineExceeded."""
        self._checked_length(len(key))
        try:
            with trio.fail_after(self.config.operation_deadline_s):
                await self._dht.provider_store.provide(key)
        except trio.TooSlowError:
            raise DeadlineExceeded("announcing in the DHT took too long") from None

    async def providers(self, key: bytes) -> list[tuple[PeerId, tuple[str, ...]]]:
        """Who provides `key`, as the network says now, without this node; addresses end in /p2p/PEER.

        A departed provider may be named for up to `keep_s`. Raises DeadlineExceeded.
        """
        self._checked_length(len(key))
        try:
            with trio.fail_after(self.config.operation_deadline_s):
                found: list[PeerInfo] = await self._dht.provider_store.find_providers(key)
        except trio.TooSlowError:
            raise DeadlineExceeded("asking the DHT for providers took too long") from None
        return [
            (PeerId(str(info.peer_id)), tuple(_dialable(info)))
            for info in found
            if str(info.peer_id) != self._host.peer_id
        ]

    async def refresh(self) -> None:
        """Take all connected peers into the routing table and look up around this node."""
        for peer in self._host.peers():
            await self._add(peer)
        with trio.move_on_after(self.config.operation_deadline_s):
            await self._dht.refresh_routing_table()

    async def _maintain(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refresh_when_stale)
            for peer in self._host.peers():
                nursery.start_soon(self._welcome, peer)
            async for event in events:
                if event.kind == "up":
                    nursery.start_soon(self._welcome, event.peer)
                else:
                    self._dht.routing_table.remove_peer(ID.from_base58(event.peer))
            nursery.cancel_scope.cancel()

    async def _refresh_when_stale(self) -> None:
        """Soon after connections, at most once in `refresh_gap_s`; otherwise every `refresh_every_s`."""
        while True:
            with trio.move_on_after(self.config.refresh_every_s):
                await self._stale.wait()
            await trio.sleep(self.config.refresh_settle_s)
            self._stale = trio.Event()
            await self.refresh()
            self._dht.value_store.cleanup_expired()
            self._dht.provider_store.cleanup_expired()
            await trio.sleep(self.config.refresh_gap_s)

    async def _welcome(self, peer: PeerId) -> None:
        """Take a newly connected member into the routing table once identify has told its addresses."""
        with trio.move_on_after(self.config.identify_deadline_s):
            while self._host.is_connected(peer):
                if await self._add(peer):
                    self._stale.set()
                    return
                await trio.sleep(0.1)

    async def _add(self, peer: PeerId) -> bool:
        peer_id = ID.from_base58(peer)
        return bool(await self._dht.routing_table.add_peer(peer_id, skip_server_mode_check=True))

    def _checked(self, key: str) -> str:
        name = full_key(key)
        self._checked_length(len(name.encode()))
        return name

    def _checked_length(self, key_bytes: int) -> None:
        if not 2 <= key_bytes <= KEY_BYTES_MAX:
            raise LocalFault(
                f"a DHT key has 2 to {KEY_BYTES_MAX} bytes with its namespace, this has {key_bytes}: hash it"
            )


def _dialable(info: PeerInfo) -> list[str]:
    suffix = f"/p2p/{info.peer_id}"
    return [str(addr) if str(addr).endswith(suffix) else f"{addr}{suffix}" for addr in info.addrs]
