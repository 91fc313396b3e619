"""The models and adapters that this node offers, and those it may offer no more: kept on disk, said, and taken back.

Whoever hosts a model also offers it, so that it outlives its publisher; a signed order of the publisher (`node.drops`)
ends that on every node. Who can check an order, because the model's manifest is on its disk, obeys it, keeps it and
tells it on, so that hosts which were away hear of it though the publisher is off. It does not choose what to offer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from dht import Gossip
from node import adverts
from node.adverts import Offer
from node.atlas import Atlas
from node.datadir import DataDir
from node.drops import DROPS, Drop, Drops, read_drops, write_drops
from node.errors import ControlProblem, DataDirProblem
from p2p import BlobStore, Identity, PeerId

log = logging.getLogger("shoal.offering")
Say = Callable[[str, str, bytes], None]


class Offering:
    """`say(kind, name, value)` publishes a record and never fails; `changed` is called when an offer came or went."""

    def __init__(
        self,
        identity: Identity,
        mesh_id: str,
        data: DataDir,
        store: BlobStore,
        gossip: Gossip,
        say: Say,
        changed: Callable[[], None],
    ) -> None:
        self._identity = identity
        self._me = identity.peer_id
        self._mesh_id = mesh_id
        self._data = data
        self._store = store
        self._gossip = gossip
        self._say = say
        self._changed = changed
        self._offers: dict[str, Offer] = {}
        self._read: dict[tuple[str, str, PeerId], tuple[bytes, tuple[Drop, ...]]] = {}
        self.drops = Drops()
        for drop in read_drops(data.drops(mesh_id)):
            if drop.valid(mesh_id, drop.publisher):
                self.drops = self.drops.plus(drop)

    def begin(self) -> None:
        """Offer what this node offered before it stopped and whose bytes are still here; tell on what is dropped."""
        self._tell()
        here = {manifest.id for manifest in self._store.manifests()}
        for value in self._data.offers(self._mesh_id):
            # A model's advert has fields that an adapter's lacks, and the other way round.
            advert = adverts.read_offer(adverts.MODEL, value) or adverts.read_offer(adverts.ADAPTER, value)
            if advert is not None and advert.manifest_id in here:
                self.offer(advert)

    def offer(self, advert: Offer) -> None:
        """Offer a model or an adapter, now and after a restart, unless it is dropped."""
        if self.drops.counts(advert):
            return
        self._say(adverts.offer_kind(advert), advert.name, adverts.write(advert))
        self._offers[advert.manifest_id] = advert
        self._remember()
        self._changed()

    def keep(self, model: Offer) -> None:
        """Offer a model, or an adapter of a model, that this node hosts."""
        if self._own(model) != model:
            self.offer(model)

    def offered(self, manifest_id: str) -> Offer | None:
        """What this node says of a model or adapter, whether or not the mesh goes by it."""
        return self._offers.get(manifest_id)

    def created_s(self, manifest_id: str) -> int:
        """The time that a new offer of this model bears."""
        return self.drops.created_s(manifest_id, self._gossip.now_s())

    def took_back(self, name: str) -> bool:
        """Whether this node itself added a model of that name, and dropped it for good."""
        return any(
            manifest.name == name
            and manifest.publisher == self._me
            and manifest.id in self.drops.held
            and manifest.id not in self._offers
            for manifest in self._store.manifests()
        )

    def drop(self, model: Offer) -> None:
        """Order all to drop what this node added. Raises DataDirProblem and ControlProblem, and then nothing is
        dropped."""
        until_s = max(self.created_s(model.manifest_id), model.created_s)
        order = Drop.sign(self._identity, self._mesh_id, model.manifest_id, until_s)
        fresh = self.drops.plus(order)
        if fresh is self.drops:
            raise ControlProblem(f"{len(fresh.held)} models with a later date are dropped already")
        self._data.remember_drops(self._mesh_id, write_drops(fresh.held.values()))
        self._obey(fresh)

    def look(self) -> None:
        """Obey, keep and tell on what the view says is dropped."""
        fresh = self.drops
        for record in self._gossip.view.records(DROPS, self._gossip.now_s()):
            value, waiting = self._read.get(record.key, (None, ()))
            if value != record.value:
                waiting = () if record.signer == self._me else read_drops(record.value)
            later = []
            for drop in waiting:
                manifest = self._store.manifest(drop.manifest_id)
                if manifest is None:
                    later.append(drop)
                elif fresh.plus(drop) is not fresh and drop.valid(self._mesh_id, manifest.publisher):
                    fresh = fresh.plus(drop)
            self._read[record.key] = record.value, tuple(later)
        if len(self._read) > 4 * self._gossip.view.config.signers_max:
            self._read.clear()
        if fresh is self.drops:
            return
        try:
            self._data.remember_drops(self._mesh_id, write_drops(fresh.held.values()))
        except DataDirProblem as problem:
            log.error("what is dropped cannot be kept: %s", problem)
        self._obey(fresh)

    def _obey(self, drops: Drops) -> None:
        self.drops = drops
        gone = [advert for advert in self._offers.values() if drops.counts(advert)]
        for advert in gone:
            log.info("%s is dropped from the mesh by who added it", advert.name)
            kind = adverts.offer_kind(advert)
            if self._own(advert) == advert:
                self._gossip.withdraw(kind, advert.name)
            if kind == adverts.MODEL:
                self._gossip.withdraw(adverts.PLAN, advert.manifest_id)
            del self._offers[advert.manifest_id]
        if gone:
            self._remember()
        self._tell()
        self._changed()

    def _own(self, offer: Offer) -> Offer | None:
        """What this node says under the offer's kind and name."""
        kind = adverts.offer_kind(offer)
        own = self._gossip.view.get(kind, offer.name, self._me)
        return None if own is None else adverts.read_offer(kind, own.value)

    def _remember(self) -> None:
        self._data.remember_offers(self._mesh_id, map(adverts.write, self._offers.values()))

    def _tell(self) -> None:
        if self.drops.held:
            self._say(DROPS, "", write_drops(self.drops.held.values()))


def who_added(atlas: Atlas, publisher: PeerId) -> str:
    """The node that added a model, in words for whoever wants to drop it."""
    node = atlas.nodes.get(publisher)
    return f"{node.name} ({publisher})" if node is not None else f"{publisher}, which is not in the mesh now"
