# mypy: disallow-subclassing-any=False
"""The mends of py-libp2p 0.8.1's KadDHT: what it sees of the host, and bounded stores of its own kind.

No global of the library is changed, so that nodes of several meshes can live in one process. It
knows KadDHT's insides and nothing of what is stored: validity comes in as two functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import ALPHA, PROTOCOL_ID, QUERY_TIMEOUT
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Record as KadRecord
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator, Validator

NAMESPACE = "shoal"
# FIND_NODE is refused for keys that are neither a multihash nor 2 to 50 bytes, and the lookup then
# finds nobody without a word.
KEY_BYTES_MAX = 50

_UNREACHABLE_S = 30.0
_UNREACHABLE_MAX = 1024


class ScopedPeerstore:
    """The peerstore with the mesh's protocol id read as the library's, and without the departed.

    `peer_ids` is what a lookup falls back to in a small mesh: it would dial everybody ever heard of.
    """

    def __init__(self, peerstore: Any, scoped: str) -> None:
        self._peerstore = peerstore
        self._scoped = scoped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peerstore, name)

    def get_protocols(self, peer_id: ID) -> list[str]:
        known = self._peerstore.get_protocols(peer_id)
        return [str(PROTOCOL_ID) if name == self._scoped else str(name) for name in known]

    def peer_ids(self) -> list[ID]:
        return []


class ScopedHost:
    """Mend: KadDHT always speaks /ipfs/kad/1.0.0, whatever `protocol_prefix` says, so that meshes would mix
    with strangers' nodes. Through this it speaks `protocol` instead.

    A peer that could not be dialled is not dialled again for half a minute: one lookup asks for the
    same dead peer many times. Can go when KadDHT takes its protocol id as an argument.
    """

    def __init__(self, host: IHost, protocol: str) -> None:
        self._host = host
        self._protocol = TProtocol(protocol)
        self._peerstore = ScopedPeerstore(host.get_peerstore(), protocol)
        self._unreachable_until: dict[ID, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def get_peerstore(self) -> ScopedPeerstore:
        return self._peerstore

    def set_stream_handler(self, protocol: TProtocol, handler: Callable[[INetStream], Any]) -> None:
        self._host.set_stream_handler(self._scope(protocol), handler)

    def remove_stream_handler(self, protocol: TProtocol) -> None:
        self._host.remove_stream_handler(self._scope(protocol))

    async def new_stream(self, peer_id: ID, protocols: Sequence[TProtocol]) -> INetStream:
        if peer_id not in self._host.get_connected_peers():
            if self._unreachable_until.get(peer_id, 0.0) > trio.current_time():
                raise SwarmException(f"{peer_id} could not be reached a moment ago")
            self._note_unreachable(peer_id)
        stream = await self._host.new_stream(peer_id, [self._scope(name) for name in protocols])
        self._unreachable_until.pop(peer_id, None)
        return stream

    def _note_unreachable(self, peer_id: ID) -> None:
        """Until the dial succeeds; also when it is cancelled by a lookup's deadline."""
        if len(self._unreachable_until) >= _UNREACHABLE_MAX:
            self._unreachable_until.pop(next(iter(self._unreachable_until)))
        self._unreachable_until[peer_id] = trio.current_time() + _UNREACHABLE_S

    def _scope(self, protocol: TProtocol) -> TProtocol:
        return self._protocol if protocol == PROTOCOL_ID else protocol


class StrictValidator(Validator):
    """Mend: values nobody vouches for are stored and served. Here `valid(key, value)` decides, size first.

    Ties in `select` go to the last, which is the newly offered one: in the library, putting equal
    bytes again neither refreshes nor succeeds. Keys arrive without the namespace.
    """

    def __init__(
        self,
        valid: Callable[[str, bytes], bool],
        select: Callable[[str, Sequence[bytes]], int],
        value_bytes_max: int,
    ) -> None:
        self._valid = valid
        self._select = select
        self._value_bytes_max = value_bytes_max

    def validate(self, key: str, value: bytes) -> None:
        if len(value) > self._value_bytes_max:
            raise ValueError(f"a value of {len(value)} bytes, at most {self._value_bytes_max} are taken")
        if not self._valid(bare_key(key), value):
            raise ValueError(f"not a valid value for {key}")

    def select(self, key: str, values: list[bytes]) -> int:
        best = values[self._select(bare_key(key), values)]
        return max(index for index, value in enumerate(values) if value == best)


class BoundedValues(ValueStore):
    """The value store, bounded in bytes too (the library: 50,000 entries of 1 MiB), oldest out first.

    `read_past` lets the next `get` of a key miss: mend for reads answered from the local copy, stale
    for up to 24 h. `stored` counts the peers that took a value; the library only logs it.
    """

    def __init__(self, host: ScopedHost, local: ID, entries_max: int, bytes_max: int, ttl_s: float) -> None:
        super().__init__(host=host, local_peer_id=local)
        self.read_past: set[bytes] = set()
        self.stored: dict[bytes, int] = {}
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._ttl_s = ttl_s

    def get(self, key: bytes) -> KadRecord | None:
        if key in self.read_past:
            self.read_past.discard(key)
            return None
        found: KadRecord | None = super().get(key)
        return found

    def put(self, key: bytes, value: bytes, validity: float = 0.0) -> None:
        super().put(key, value, validity or time.time() + self._ttl_s)
        # Whoever put a value renews it; the library would do so for ever, also after a withdrawal.
        self.local_keys.discard(key)
        self._trim(key)

    def put_record(self, key: bytes, record: KadRecord) -> None:
        self.store.pop(key, None)
        self.store[key] = (record, time.time() + self._ttl_s)
        self._trim(key)

    async def _store_at_peer(
        self, peer_id: ID, key: bytes, value: bytes, record: KadRecord | None = None
    ) -> bool:
        taken: bool = await super()._store_at_peer(peer_id, key, value, record)
        if key in self.stored:
            self.stored[key] += taken
        return taken

    def _trim(self, newest: bytes) -> None:
        size = sum(len(record.value) for record, _ in self.store.values())
        for key in list(self.store):
            if len(self.store) <= self._entries_max and size <= self._bytes_max:
                return
            if key != newest:
                size -= len(self.store.pop(key)[0].value)

    def _evict_if_full(self) -> None:
        """`_trim` does it, after the put."""


class BoundedProviders(ProviderStore):
    """The provider store, bounded in keys, forgetting in an hour instead of 48, and asking the network.

    Mend: `find_providers` answers from the local store alone once that knows one provider, which may
    be this node itself, and files what others say as if it were new, so that the dead live on.
    """

    def __init__(self, host: ScopedHost, peer_routing: Any, keys_max: int, ttl_s: float) -> None:
        super().__init__(host=host, peer_routing=peer_routing)
        self._keys_max = keys_max
        self._ttl_s = ttl_s

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        if key not in self.providers and len(self.providers) >= self._keys_max:
            del self.providers[next(iter(self.providers))]
        super().add_provider(key, provider)

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        oldest_s = time.time() - self._ttl_s
        known = self.providers.get(key, {})
        for peer in [peer for peer, record in known.items() if record.timestamp < oldest_s]:
            del known[peer]
        found: list[PeerInfo] = super().get_providers(key)
        return found

    async def find_providers(self, key: bytes, count: int = 20) -> list[PeerInfo]:
        found: dict[ID, PeerInfo] = {info.peer_id: info for info in self.get_providers(key)}
        limiter = trio.CapacityLimiter(ALPHA)

        async def ask(peer_id: ID) -> None:
            async with limiter:
                with trio.move_on_after(QUERY_TIMEOUT):
                    providers, _ = await self._get_providers_from_peer_with_closers(peer_id, key)
                    for info in providers[:count]:
                        found.setdefault(info.peer_id, info)

        closest = await self.peer_routing.find_closest_peers_network(key)
        async with trio.open_nursery() as nursery:
            for peer_id in closest:
                if peer_id != self.local_peer_id:
                    nursery.start_soon(ask, peer_id)
        return list(found.values())[: 2 * count]


def build_kad(
    host: IHost, protocol: str, validator: StrictValidator, stores: tuple[int, int, float], subnet_max: int
) -> KadDHT:
    """A KadDHT with every mend of this module, serving `protocol` from now on.

    `stores` is (entries at most, bytes at most, seconds that values and providers are kept).
    """
    scoped = ScopedHost(host, protocol)
    entries_max, bytes_max, ttl_s = stores
    kad = KadDHT(
        scoped,
        DHTMode.SERVER,
        validator=NamespacedValidator({NAMESPACE: validator}, strict_validation=True),
        validator_changed=True,
        strict_validation=True,
        max_peers_per_subnet=subnet_max,
    )
    kad.value_store = BoundedValues(scoped, host.get_id(), entries_max, bytes_max, ttl_s)
    kad.provider_store = BoundedProviders(scoped, kad.peer_routing, entries_max, ttl_s)
    return kad


def full_key(key: str) -> str:
    """The namespaced key that KadDHT stores under."""
    return f"/{NAMESPACE}/{key}"


def bare_key(key: str) -> str:
    return key.removeprefix(f"/{NAMESPACE}/")
