"""Models offered and dropped by nodes over an in-memory network, under a virtual clock."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import trio

from dht import Gossip, View
from node import adverts
from node.adverts import AdapterAdvert, ModelAdvert, NodeAdvert
from node.atlas import Atlas, read_atlas
from node.datadir import DataDir
from node.drops import DROPS, Drop, write_drops
from node.errors import ConfigProblem, ControlProblem, DataDirProblem
from node.offering import Offering, who_added
from node.sharing import Sharing
from p2p import BlobStore, Rpc, build_manifest
from p2p.testing import MemoryNetwork

MESH_ID = "mesh"
BEGAN_S = 1_000_000_000
SHAPE = ("bfloat16", "none", 1, 4, 64, 8, 1 << 20, 0, 0, False, 1e6, 64, 64)
TTL_S = 60.0


class Member:
    """One node on a directory of its own: everything that Offering joins, and what a daemon does with it."""

    def __init__(self, mesh, name, *, hosts=False, clock_ahead_s=0):
        self.mesh, self.name, self.hosts, self.clock_ahead_s = mesh, name, hosts, clock_ahead_s
        root = mesh.root / name
        (root / "blobs").mkdir(parents=True)
        self.data = DataDir(root)
        self.store = BlobStore(root / "blobs", quota_bytes=1 << 20)

    async def start(self):
        self.host = self.mesh.network.host(self.name, mesh_id=MESH_ID)
        self.identity, self.me = self.host.identity, self.host.peer_id
        self.gossip = Gossip(
            Rpc(self.host), View(), self.identity, rng=random.Random(1),
            clock_s=lambda: BEGAN_S + self.clock_ahead_s + trio.current_time(),
        )  # fmt: skip
        self.offering = Offering(
            self.identity, MESH_ID, self.data, self.store, self.gossip,
            partial(self.gossip.publish, ttl_s=TTL_S), lambda: None,
        )  # fmt: skip
        self.scope = await self.mesh.nursery.start(self._run)
        await self.mesh.network.connect_all()

    async def _run(self, task_status):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.gossip._rpc.run)
                await nursery.start(self.gossip.run)
                self.offering.begin()
                task_status.started(scope)
                while True:
                    self.offering.look()
                    for model in self.models().values() if self.hosts else ():
                        self.offering.keep(model)
                    await trio.sleep(0.2)

    def stop(self):
        self.scope.cancel()
        self.mesh.network.kill(self.me)

    def models(self):
        now_s = self.gossip.now_s()
        return read_atlas(self.gossip.view, now_s, (), self.offering.drops.counts).models

    def add(self, name="toy"):
        """Publish a directory, as a daemon does."""
        directory = self.mesh.root / f"{self.name} {name}"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text("{}")
        manifest = build_manifest(directory, name, self.identity)
        self.store.publish(manifest, directory)
        advert = ModelAdvert(name, manifest.id, self.offering.created_s(manifest.id), *SHAPE)
        self.offering.offer(advert)
        return manifest, advert

    def kept_offers(self):
        return [adverts.read(ModelAdvert, value).name for value in self.data.offers(MESH_ID)]

    def says(self, kind):
        return [r for r in self.gossip.view.of_signer(self.me) if r.kind == kind and not r.withdrawn]


class Mesh:
    def __init__(self, root, nursery):
        self.root, self.nursery, self.network = root, nursery, MemoryNetwork(latency_s=0.01)

    async def members(self):
        """A publisher, two hosts that have the manifest and a gateway that has not; the publisher's model."""
        found = [
            Member(self, "a"),
            Member(self, "b", hosts=True),
            Member(self, "c", hosts=True),
            Member(self, "g"),
        ]
        for member in found:
            await member.start()
        manifest, advert = found[0].add()
        for host in found[1:3]:
            host.store.remember(manifest)
        await until(lambda: all(m.models() == {"toy": advert} for m in found))
        await until(lambda: all(len(m.says(adverts.MODEL)) == 1 for m in found[1:3]))
        return *found, advert


async def until(condition, within_s=30.0):
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - the clock is virtual
            await trio.sleep(0.1)


@pytest.fixture
def mesh(tmp_path, nursery):
    return Mesh(tmp_path, nursery)


async def test_an_adapter_is_offered_kept_and_dropped_as_a_model_is(mesh, autojump_clock):
    a, b, c, g, advert = await mesh.members()
    manifest, _ = a.add("pirate")
    a.offering.drop(a.offering.offered(manifest.id))
    adapter = AdapterAdvert("pirate", manifest.id, a.offering.created_s(manifest.id), advert.manifest_id)

    def known(member):
        return read_atlas(
            member.gossip.view, member.gossip.now_s(), (), member.offering.drops.counts
        ).adapters

    a.offering.offer(adapter)
    b.store.remember(manifest)
    await until(lambda: all(known(m) == {"pirate": adapter} for m in (a, b, c, g)))
    b.offering.keep(adapter)
    said = len(b.gossip.view.of_signer(b.me))
    b.offering.keep(adapter)
    assert len(b.gossip.view.of_signer(b.me)) == said
    assert {adverts.offer_kind(adverts.read_offer(adverts.MODEL, v) or adapter) for v in b.data.offers(MESH_ID)} == {
        adverts.MODEL, adverts.ADAPTER,
    }  # fmt: skip
    again = Offering(b.identity, MESH_ID, b.data, b.store, b.gossip, lambda *_: None, lambda: None)
    again.begin()
    assert again.offered(manifest.id) == adapter
    a.offering.drop(adapter)
    await until(lambda: all(known(m) == {} for m in (a, b, c, g)))
    await until(lambda: not b.says(adverts.ADAPTER))
    assert all(m.models() == {"toy": advert} for m in (a, b, c, g))


async def test_a_dropped_model_vanishes_everywhere_and_from_every_disk(mesh, autojump_clock):
    *members, advert = await mesh.members()
    a, b, c, _ = members
    assert b.kept_offers() == ["toy"]
    a.offering.drop(advert)
    assert a.models() == {}
    await until(lambda: all(m.models() == {} for m in members), within_s=3.0)
    await until(lambda: not any(m.says(adverts.MODEL) for m in members))
    assert [m.kept_offers() for m in (a, b, c)] == [[], [], []]
    for _ in range(30):
        await trio.sleep(TTL_S / 10)
        assert not any(m.models() for m in members)


async def test_another_model_stays(mesh, autojump_clock):
    *members, advert = await mesh.members()
    a, b, *_ = members
    manifest, other = a.add("other")
    b.store.remember(manifest)
    await until(lambda: len(b.kept_offers()) == 2)
    a.offering.drop(advert)
    await until(lambda: all(m.models() == {"other": other} for m in members))
    assert a.kept_offers() == b.kept_offers() == ["other"]


async def test_a_host_that_was_away_hears_of_it_though_the_publisher_is_off(mesh, autojump_clock):
    a, b, c, g, advert = await mesh.members()
    c.stop()
    a.offering.drop(advert)
    await until(lambda: b.models() == {})
    a.stop()
    await trio.sleep(2 * TTL_S)
    assert c.kept_offers() == ["toy"]
    await c.start()
    assert c.models() == {"toy": advert}
    await until(lambda: c.models() == {} and g.models() == {})
    assert c.kept_offers() == []
    b.stop()
    c.stop()
    await c.start()
    assert c.models() == {}
    assert c.says(DROPS)


@pytest.mark.parametrize("back_s", [0, 86_400])
async def test_added_again_it_is_offered_again_by_all_also_where_the_clock_went_back(
    mesh, autojump_clock, back_s
):
    *members, advert = await mesh.members()
    a, b, _, _ = members
    a.offering.drop(advert)
    await until(lambda: all(m.models() == {} for m in members))
    a.stop()
    a.clock_ahead_s = -back_s
    await a.start()
    _, again = a.add()
    assert again.manifest_id == advert.manifest_id
    assert again.created_s > advert.created_s
    await until(lambda: all(m.models() == {"toy": again} for m in members))
    await until(lambda: b.kept_offers() == ["toy"])
    a.offering.drop(again)
    await until(lambda: all(m.models() == {} for m in members))


async def test_an_old_offer_does_not_count_against_a_newer_one(mesh, autojump_clock):
    *members, advert = await mesh.members()
    a, _, c, _ = members
    c.stop()
    a.offering.drop(advert)
    _, again = a.add()
    await trio.sleep(2 * TTL_S)
    await c.start()
    await until(lambda: all(m.models() == {"toy": again} for m in members))
    await until(lambda: c.data.offers(MESH_ID) == [adverts.write(again)])


async def test_orders_of_others_change_nothing_and_are_told_by_nobody(mesh, autojump_clock):
    *members, advert = await mesh.members()
    a, b, c, g = members
    own = Drop.sign(g.identity, MESH_ID, advert.manifest_id, BEGAN_S + 1000)
    forged = replace(own, publisher=str(a.me))
    g.gossip.publish(DROPS, "", write_drops([own, forged]), TTL_S)
    await until(lambda: all((DROPS, "", g.me) in m.offering._read for m in members))
    await trio.sleep(5.0)
    assert all(m.models() == {"toy": advert} for m in members)
    assert not any(m.says(DROPS) for m in (a, b, c))


async def test_an_order_that_came_before_the_manifest_counts_once_that_is_here(mesh, autojump_clock):
    *telling, g, advert = await mesh.members()
    a = telling[0]
    a.offering.drop(advert)
    await until(lambda: all((DROPS, "", m.me) in g.offering._read for m in telling))
    assert not g.says(DROPS)
    g.store.remember(a.store.manifest(advert.manifest_id))
    await until(lambda: g.says(DROPS))
    g.offering.offer(advert)
    assert not g.says(adverts.MODEL)
    assert g.kept_offers() == []


async def test_what_cannot_be_kept_is_not_dropped(mesh, autojump_clock, monkeypatch):
    a, b, _, _, advert = await mesh.members()

    def full(mesh_id, orders):
        raise DataDirProblem("disk", "is full")

    monkeypatch.setattr(a.data, "remember_drops", full)
    with pytest.raises(DataDirProblem):
        a.offering.drop(advert)
    assert a.models() == {"toy": advert}
    monkeypatch.undo()
    monkeypatch.setattr(b.data, "remember_drops", full)
    a.offering.drop(advert)
    await until(lambda: b.models() == {} and b.kept_offers() == [])


async def test_a_drop_that_later_ones_push_out_is_refused(mesh, autojump_clock, monkeypatch):
    a, *_, advert = await mesh.members()
    monkeypatch.setattr("node.drops.DROPS_MAX", 1)
    a.offering.drops = a.offering.drops.plus(Drop("f" * 64, "p", 1 << 39))
    with pytest.raises(ControlProblem, match="1 models with a later date"):
        a.offering.drop(advert)
    assert a.models() == {"toy": advert}


async def test_a_node_knows_which_of_its_own_models_it_took_back(mesh, autojump_clock):
    a, b, _, _, advert = await mesh.members()
    assert not a.offering.took_back("toy")
    a.offering.drop(advert)
    await until(lambda: b.says(DROPS))
    assert a.offering.took_back("toy")
    assert not a.offering.took_back("other")
    assert not b.offering.took_back("toy")
    a.add()
    assert not a.offering.took_back("toy")


async def test_a_host_follows_the_offer_that_most_stand_behind(mesh, autojump_clock):
    _, b, *_, advert = await mesh.members()
    b.offering.offer(replace(advert, copies=9))
    await until(lambda: b.data.offers(MESH_ID) == [adverts.write(advert)])
    assert b.models() == {"toy": advert}


def test_whoever_waits_for_a_model_to_be_served_hears_that_it_is_dropped():
    atlas = Atlas({}, frozenset(), {}, {}, {}, {})
    offer = ModelAdvert("toy", "ab" * 32, 1, *SHAPE)
    offering = SimpleNamespace(offered=lambda _: offer)
    sharing = Sharing("me", None, None, offering, lambda: atlas, None)
    assert sharing.state(offer.manifest_id) == (False, "the model is not known yet")
    offering.offered = lambda _: None
    with pytest.raises(ConfigProblem, match="dropped meanwhile"):
        sharing.state(offer.manifest_id)


async def test_a_planner_that_held_the_model_takes_its_plan_back(mesh, autojump_clock):
    a, b, *_, advert = await mesh.members()
    b.gossip.publish(adverts.PLAN, advert.manifest_id, b"plan", TTL_S)
    b.gossip.publish(adverts.PLAN, "other", b"plan", TTL_S)
    a.offering.drop(advert)
    await until(lambda: [r.name for r in b.says(adverts.PLAN)] == ["other"])


async def test_damaged_or_changed_orders_on_the_disk_drop_nothing(mesh, autojump_clock):
    a, *_, advert = await mesh.members()
    good = Drop.sign(a.identity, MESH_ID, advert.manifest_id, BEGAN_S + 1000)
    for kept in (b"\xff", write_drops([replace(good, until_s=BEGAN_S + 2000)]), write_drops([good])):
        a.stop()
        a.data.remember_drops(MESH_ID, kept)
        await a.start()
        assert (a.models() == {}) is (kept == write_drops([good]))


def test_who_added_a_model_is_named_whether_or_not_it_is_here():
    card = NodeAdvert("desk", "0", (), None, True, 1, 1.0, 1.0, "cpu")
    atlas = Atlas({"p1": card}, frozenset(), {}, {}, {}, {})
    assert who_added(atlas, "p1") == "desk (p1)"
    assert who_added(atlas, "p2") == "p2, which is not in the mesh now"
