"""Membership at work between nodes over an in-memory network, under a virtual clock."""

import random

import pytest
import trio

from dht import Gossip, View
from node.datadir import DataDir, Membership
from node.errors import DataDirProblem
from node.standing import DOCUMENTS, PART_BYTES_MAX, PARTS_MAX, Documents, Standing, in_parts, open_roster
from p2p import Identity, Rpc, pack_value
from p2p.certs import Expulsion, key_id_of
from p2p.testing import MemoryNetwork


class Addresses:
    """What a Directory is asked for here."""

    def __init__(self):
        self.forgotten = []

    def forget(self, peer):
        self.forgotten.append(peer)


class Member:
    """One node of a mesh: everything that Standing joins, on a data directory of its own."""

    def __init__(self, mesh, name, membership):
        self.mesh = mesh
        self.name = name
        self.membership = membership
        root = mesh.root / name
        root.mkdir(exist_ok=True)
        self.data = DataDir(root)
        self.data.remember(membership)
        self.identity = Identity.load_or_create(self.data.identity_path)
        self.me = self.identity.peer_id

    async def start(self):
        membership = self.data.membership()
        self.roster = open_roster(self.identity, membership, self.data)
        self.host = self.mesh.network.host(self.name, identity=self.identity, mesh_id=membership.mesh_id)
        self.rpc = Rpc(self.host)
        self.gossip = Gossip(
            self.rpc, View(), self.identity, clock_s=lambda: 1e9 + trio.current_time(), rng=random.Random(1)
        )
        self.directory = Addresses()

        def keep(state):
            self.data.remember_roster(membership.mesh_id, state)

        self.standing = Standing(self.roster, keep, self.host, self.rpc, self.gossip, self.directory)
        self.scope = await self.mesh.nursery.start(self._run)

    async def _run(self, task_status):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.rpc.run)
                await nursery.start(self.gossip.run)
                await nursery.start(self.standing.run)
                self.gossip.publish("node", "", self.name.encode(), 60.0)
                task_status.started(scope)

    def stop(self):
        self.scope.cancel()
        self.mesh.network.kill(self.me)

    def sees(self):
        return set(self.gossip.view.signers(self.gossip.now_s()))


class Mesh:
    def __init__(self, root, nursery):
        self.root = root
        self.nursery = nursery
        self.network = MemoryNetwork(latency_s=0.01)

    async def found(self, *, public=False):
        founder = Member(self, "a", Membership.found(public=public))
        await founder.start()
        return founder

    async def invited(self, by, name):
        known = by.membership
        ticket = b"" if by.roster.public else by.roster.invite(0.0, None, once=False)
        membership = Membership(known.mesh_id, known.swarm_key, (), known.founder, ticket)
        member = Member(self, name, membership)
        await member.start()
        if ticket:
            assert member.roster.admitted(by.roster.admit(member.me, ticket, 1.0))
        await self.network.connect_all()
        return member


async def until(condition, within_s=60.0):
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - the clock is virtual
            await trio.sleep(0.1)


@pytest.fixture
def mesh(tmp_path, nursery, autojump_clock):
    return Mesh(tmp_path, nursery)


async def four(mesh):
    a = await mesh.found()
    members = [a, *[await mesh.invited(a, name) for name in "bcd"]]
    everybody = {one.me for one in members}
    await until(lambda: all(one.sees() == everybody for one in members))
    await until(lambda: all(len(one.roster.members) == 3 for one in members))
    return members


async def test_an_expelled_member_is_cut_off_by_all_and_leaves_every_view(autojump_clock, mesh):
    a, b, c, d = await four(mesh)
    a.roster.expel(c.me, 5.0)
    staying = (a, b, d)
    await until(lambda: all(c.me not in one.sees() and c.me not in one.host.peers() for one in staying), 5.0)
    assert all(one.directory.forgotten == [c.me] for one in staying)
    # It may connect again where the transport does not know yet: it is cut off, and its records stay out.
    await c.host.connect(b.host.addrs())
    await until(lambda: c.me not in b.host.peers(), 5.0)
    assert c.me not in b.sees()
    assert b.gossip.view.counts["forgotten"] > 0 or not b.gossip.view.of_signer(c.me)


async def test_an_expulsion_reaches_who_was_cut_off_or_off_and_holds_after_restarts(autojump_clock, mesh):
    a, b, c, d = await four(mesh)
    d.stop()
    mesh.network.partition([a.me], [b.me, c.me])
    a.roster.expel(c.me, 5.0)
    await trio.sleep(5)
    assert c.me in b.host.peers()
    mesh.network.heal()
    await mesh.network.connect_all(a.host, b.host)
    await until(lambda: c.me not in b.host.peers())
    a.stop()
    await d.start()
    await d.host.connect(b.host.addrs())
    await until(lambda: d.roster.expelled == {c.me})
    d.stop()
    await d.start()
    assert d.roster.expelled == {c.me}
    assert d.roster.problem(c.me)


async def test_a_new_swarm_key_reaches_members_and_those_that_were_off(autojump_clock, mesh):
    a, b, c, d = await four(mesh)
    d.stop()
    old = a.roster.swarm_key
    a.roster.rotate(1e9, 60.0)
    new = a.roster.swarm_key
    assert new != old
    await until(lambda: b.roster.swarm_key == c.roster.swarm_key == new)
    a.stop()
    await d.start()
    assert d.roster.swarm_key == old
    await d.host.connect(b.host.addrs())
    await until(lambda: d.roster.swarm_key == new)
    c.stop()
    await c.start()
    assert c.roster.swarm_key == new


async def test_the_new_key_is_not_given_to_the_expelled(autojump_clock, mesh):
    a, b, c, d = await four(mesh)
    mesh.network.partition([d.me], [a.me, b.me, c.me])
    mesh.network.partition([c.me], [a.me, b.me])
    a.roster.expel(c.me, 5.0)
    a.roster.rotate(1e9, 0.0)
    await until(lambda: b.roster.swarm_key == a.roster.swarm_key)
    mesh.network.heal()
    await mesh.network.connect_all(a.host, b.host, d.host)
    await until(lambda: d.roster.swarm_key == a.roster.swarm_key)
    await c.host.connect(b.host.addrs())
    await trio.sleep(10)
    assert key_id_of(c.roster.swarm_key) != key_id_of(a.roster.swarm_key)


async def test_what_members_make_up_is_refused_and_counted(autojump_clock, mesh):
    a, b, _c, _d = await four(mesh)
    forged = Expulsion.sign(b.identity, a.roster.mesh_id, a.me, a.roster.chain, (), 1.0)
    b.gossip.publish(DOCUMENTS, "7", pack_value(Documents((forged.encode(), b"junk"))), 60.0)
    b.gossip.publish(DOCUMENTS, "8", b"no list of documents", 60.0)
    await until(lambda: a.roster.counts["documents_refused"] > 0)
    await trio.sleep(3)
    assert not a.roster.expelled
    assert b.me in a.host.peers()


async def test_a_damaged_roster_stops_the_node_instead_of_letting_everybody_back_in(autojump_clock, mesh):
    a = await mesh.found()
    (path,) = (a.data.root / "meshes").glob("*.roster")
    path.write_bytes(b"\x81\xa1")
    with pytest.raises(DataDirProblem, match="damaged"):
        open_roster(a.identity, a.data.membership(), a.data)


async def test_a_mesh_of_an_earlier_version_still_opens_without_certificates(tmp_path):
    data = DataDir(tmp_path)
    (tmp_path / "mesh.json").write_text('{"version": 1, "mesh_id": "old", "swarm_key": null, "addrs": []}')
    assert open_roster(Identity.generate(), data.membership(), data) is None


def test_parts_are_bounded_and_keep_what_comes_first():
    documents = [bytes([k]) * 10_000 for k in range(60)]
    parts = in_parts(documents)
    assert len(parts) == PARTS_MAX
    assert all(sum(map(len, part)) <= PART_BYTES_MAX for part in parts)
    said = [one for part in parts for one in part]
    assert said == documents[: len(said)]
    assert in_parts([]) == []
