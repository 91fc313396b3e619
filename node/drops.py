"""Orders to drop a model or an adapter: signed by whoever added it; anybody may carry them on, nobody make one up.

A model's manifest names its publisher, and whoever holds the manifest can check an order against it. An order counts
for offers created up to its time, by the clock that both bear: the same model added again counts. Knows the bytes of
orders and their bounds; it neither keeps nor sends them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from node.adverts import MANIFEST_ID, Offer
from p2p import Identity, PeerId, RemoteFault, pack_value, unpack_value, verify

DROPS = "drops"
DROPS_MAX = 64
"""A node keeps the newest so many. They never expire: however long a host was away, it hears of them."""
UNTIL_MAX_S = 1 << 40
_DOMAIN = "shoal/drop/1"


@dataclass(frozen=True, slots=True)
class Drop:
    """`publisher` takes back its model `manifest_id` as far as offered until `until_s` (Unix seconds)."""

    manifest_id: str
    publisher: str
    until_s: int
    signature: bytes = b""

    @classmethod
    def sign(cls, identity: Identity, mesh_id: str, manifest_id: str, until_s: int) -> Drop:
        """An order by `identity`, for one mesh."""
        bare = cls(manifest_id, str(identity.peer_id), until_s)
        return replace(bare, signature=identity.sign(_DOMAIN, bare._unsigned(mesh_id)))

    def valid(self, mesh_id: str, publisher: str) -> bool:
        """Whether `publisher`, who signed the model's manifest, signed this for the mesh."""
        return self.publisher == publisher and verify(
            PeerId(self.publisher), _DOMAIN, self._unsigned(mesh_id), self.signature
        )

    def _unsigned(self, mesh_id: str) -> bytes:
        return pack_value(_Unsigned(mesh_id, self.manifest_id, self.publisher, self.until_s))


@dataclass(frozen=True, slots=True)
class _Unsigned:
    mesh_id: str
    manifest_id: str
    publisher: str
    until_s: int


@dataclass(frozen=True, slots=True)
class _Told:
    drops: tuple[Drop, ...]


@dataclass(frozen=True, slots=True)
class Drops:
    """The newest order for each model, at most DROPS_MAX of them. Whoever adds one has checked it."""

    held: dict[str, Drop] = field(default_factory=dict)

    def plus(self, drop: Drop) -> Drops:
        """With one more; the same object where that says nothing new."""
        known = self.held.get(drop.manifest_id)
        if known is not None and known.until_s >= drop.until_s:
            return self
        newest = sorted(
            (self.held | {drop.manifest_id: drop}).values(), key=lambda d: (d.until_s, d.manifest_id)
        )
        held = {kept.manifest_id: kept for kept in newest[-DROPS_MAX:]}
        return Drops(held) if drop.manifest_id in held else self

    def counts(self, offer: Offer) -> bool:
        """Whether this offer is taken back."""
        drop = self.held.get(offer.manifest_id)
        return drop is not None and offer.created_s <= drop.until_s

    def created_s(self, manifest_id: str, now_s: float) -> int:
        """When an offer made now was created: after whatever was taken back, also where clocks went back."""
        drop = self.held.get(manifest_id)
        return int(now_s) if drop is None else max(int(now_s), drop.until_s + 1)


def write_drops(drops: Iterable[Drop]) -> bytes:
    """Orders as a record's value, or for the disk."""
    return pack_value(_Told(tuple(drops)))


def read_drops(value: bytes) -> tuple[Drop, ...]:
    """Orders out of bytes from anybody, their signatures unchecked; none where the bytes are anything else."""
    try:
        told = unpack_value(_Told, value)
    except RemoteFault:
        return ()
    sane = all(MANIFEST_ID.fullmatch(d.manifest_id) and 0 <= d.until_s <= UNTIL_MAX_S for d in told.drops)
    return told.drops if sane and len(told.drops) <= DROPS_MAX else ()
