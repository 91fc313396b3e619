"""The DHT over real loopback hosts, and each mend of the library's KadDHT: every test here fails without its mend."""

import itertools
import logging

import pytest
import trio
from libp2p.host.exceptions import StreamFailure
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.pb.kademlia_pb2 import Record as KadRecord
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.record import make_signed_put_record
from multiaddr import Multiaddr

from p2p.errors import LocalFault, ResourceLimit
from p2p.host import HostConfig, open_host
from p2p.identity import Identity
from p2p.kad import Kad, KadConfig

CONFIG = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
KAD = KadConfig(refresh_settle_s=0.01, refresh_gap_s=0.05, restart_after_s=0.05)


def valid(key, value):
    return value.startswith(key.encode() + b"=")


def newest(key, values):
    return max(range(len(values)), key=lambda index: values[index])


@pytest.fixture
def make_node(nursery):
    """(host, kad) of one mesh, each running in a task of its own until the test ends."""

    async def run(mesh_id, config, task_status):
        async with open_host(Identity.generate(), mesh_id, b"k" * 32, CONFIG) as host:
            kad = Kad(host, valid, newest, config)
            async with trio.open_nursery() as inner:
                await inner.start(kad.run)
                task_status.started((host, kad))

    async def make(mesh_id="mesh", config=KAD):
        return await nursery.start(run, mesh_id, config)

    return make


async def until(condition, within_s=10.0):
    with trio.fail_after(within_s):
        while not condition():
            await trio.lowlevel.checkpoint()


def table(kad):
    return kad._dht.routing_table.size()


@pytest.fixture
async def four(make_node):
    """A chain 0-1-2-3, each knowing only its neighbours, and so much of the mesh as the DHT told."""
    nodes = [await make_node() for _ in range(4)]
    for (one, _), (other, _) in itertools.pairwise(nodes):
        await one.connect(other.addrs())
    await until(lambda: all(table(kad) >= 1 for _, kad in nodes))
    return nodes


async def test_a_value_put_by_one_is_found_by_another(four):
    assert await four[0][1].put("a", b"a=1") >= 1
    assert await four[3][1].get("a") == b"a=1"
    assert await four[3][1].get("b") is None


async def test_members_find_those_they_never_met_through_providers(four):
    key = b"\x12\x20" + b"m" * 32
    await four[0][1].provide(key)
    found = dict(await four[3][1].providers(key))
    assert set(found) == {four[0][0].peer_id}
    addrs = found[four[0][0].peer_id]
    assert all(addr.endswith(f"/p2p/{four[0][0].peer_id}") for addr in addrs)
    assert await four[3][0].connect(addrs) == four[0][0].peer_id


async def test_connecting_fills_the_routing_table_without_being_asked(make_node):
    (one, one_kad), (other, other_kad) = await make_node(), await make_node()
    await one.connect(other.addrs())
    await until(lambda: table(one_kad) == 1 and table(other_kad) == 1)
    await one.disconnect(other.peer_id)
    await until(lambda: table(one_kad) == 0 and table(other_kad) == 0)


async def test_the_library_s_own_protocol_is_not_spoken(make_node):
    host, _ = await make_node("lab")
    other, _ = await make_node("lab")
    await other.connect(host.addrs())
    served = {str(name) for name in host.raw.multiselect.handlers}
    assert str(PROTOCOL_ID) not in served
    assert "/shoal/lab/kad/1" in served
    with pytest.raises(StreamFailure):
        await other.raw.new_stream(ID.from_base58(host.peer_id), [PROTOCOL_ID])


async def test_a_member_heard_of_in_a_lookup_is_known_to_speak_the_mesh_s_protocol(make_node):
    """Identify names the mesh's own protocol id, which the library does not take for the DHT's."""
    (one, kad), (other, _) = await make_node(), await make_node()
    await one.connect(other.addrs())
    peer_id = ID.from_base58(other.peer_id)
    store = one.raw.get_peerstore()
    await until(lambda: peer_id in store.peer_ids() and "/shoal/mesh/kad/1" in store.get_protocols(peer_id))
    kad._dht.routing_table.remove_peer(peer_id)
    assert await kad._dht.routing_table.add_peer(PeerInfo(peer_id, store.addrs(peer_id)))


async def test_two_meshes_in_one_process_do_not_mix(make_node):
    nodes = [await make_node(mesh) for mesh in ("red", "red", "blue", "blue")]
    await nodes[0][0].connect(nodes[1][0].addrs())
    await nodes[2][0].connect(nodes[3][0].addrs())
    await until(lambda: all(table(kad) == 1 for _, kad in nodes))
    assert await nodes[0][1].put("a", b"a=red") == 1
    assert await nodes[2][1].put("a", b"a=blue") == 1
    assert await nodes[1][1].get("a") == b"a=red"
    assert await nodes[3][1].get("a") == b"a=blue"


async def test_reads_are_fresh(four):
    reader = four[3][1]
    await four[0][1].put("a", b"a=1")
    assert await reader.get("a") == b"a=1"
    await four[0][1].put("a", b"a=2")
    # The reader keeps a copy of what it read; its neighbours may not have told it of the second.
    reader._dht.value_store.put(b"/shoal/a", b"a=1")
    assert await reader.get("a") == b"a=2"


async def test_a_read_never_goes_back_behind_what_is_known_here(make_node):
    (one, one_kad), (other, other_kad) = await make_node(), await make_node()
    await one.connect(other.addrs())
    await until(lambda: table(one_kad) == 1)
    other_kad._dht.value_store.put(b"/shoal/a", b"a=1")
    one_kad._dht.value_store.put(b"/shoal/a", b"a=5")
    assert await one_kad.get("a") == b"a=5"
    assert one_kad._dht.value_store.get(b"/shoal/a").value == b"a=5"


async def test_the_same_bytes_again_are_taken_as_a_refresh(make_node):
    (one, one_kad), (other, other_kad) = await make_node(), await make_node()
    await one.connect(other.addrs())
    await until(lambda: table(one_kad) == 1)
    assert await one_kad.put("a", b"a=1") == 1
    before = other_kad._dht.value_store.store[b"/shoal/a"][1]
    assert await one_kad.put("a", b"a=1") == 1
    assert other_kad._dht.value_store.store[b"/shoal/a"][1] > before


async def test_an_older_value_is_refused_here_and_there(make_node):
    (one, one_kad), (other, other_kad) = await make_node(), await make_node()
    await one.connect(other.addrs())
    await until(lambda: table(one_kad) == 1)
    await one_kad.put("a", b"a=2")
    with pytest.raises(LocalFault, match="newer"):
        await one_kad.put("a", b"a=1")
    one_kad._dht.value_store.remove(b"/shoal/a")
    assert await one_kad.put("a", b"a=1") == 0
    assert other_kad._dht.value_store.get(b"/shoal/a").value == b"a=2"


@pytest.mark.parametrize("key", [b"/shoal/a", b"/pk/a", b"/other/a", b"a"])
async def test_values_nobody_vouches_for_are_not_stored(make_node, key):
    (one, one_kad), (other, other_kad) = await make_node(), await make_node()
    await one.connect(other.addrs())
    record = make_signed_put_record(key, b"forged", one.raw.get_private_key())
    one_kad._dht.value_store.store[key] = (record, 2**40)
    taken = await one_kad._dht.value_store._store_at_peer(ID.from_base58(other.peer_id), key, b"forged")
    assert not taken
    assert not other_kad._dht.value_store.store


async def test_an_invalid_value_served_by_a_peer_is_not_believed(make_node):
    (one, one_kad), (other, other_kad) = await make_node(), await make_node()
    await one.connect(other.addrs())
    await until(lambda: table(one_kad) == 1)
    other_kad._dht.value_store.put(b"/shoal/a", b"forged")
    assert await one_kad.get("a") is None


@pytest.mark.parametrize("size", [KAD.value_bytes_max + 1, 2 << 20])
async def test_a_value_too_large_is_refused_loudly(make_node, size):
    _, kad = await make_node()
    with pytest.raises(ResourceLimit, match=str(size)):
        await kad.put("a", b"a=" + bytes(size - 2))


async def test_a_peer_cannot_store_a_value_too_large(make_node):
    (one, _), (other, other_kad) = await make_node(), await make_node()
    generous = Kad(one, valid, newest, KadConfig(value_bytes_max=1 << 20))
    await one.connect(other.addrs())
    await generous.refresh()
    assert await generous.put("a", b"a=" + bytes(KAD.value_bytes_max)) == 0
    assert not other_kad._dht.value_store.store


@pytest.mark.parametrize("key", ["k" * 44, "ä" * 22])
async def test_a_key_that_could_never_be_found_is_refused_loudly(make_node, key):
    _, kad = await make_node()
    for action in (kad.put(key, key.encode() + b"=1"), kad.get(key), kad.provide(key.encode() + b"1234567")):
        with pytest.raises(LocalFault, match="hash it"):
            await action


async def test_a_lookup_finds_the_longest_key_that_is_allowed(four):
    key = "k" * 43
    assert await four[0][1].put(key, key.encode() + b"=1") >= 1
    assert await four[3][1].get(key) == key.encode() + b"=1"


async def test_a_lie_about_providers_ends_with_the_liar(four):
    """What another node says of providers is answered, not filed: else the dead are passed on for ever."""
    key = b"\x12\x20" + b"m" * 32
    ghost = Identity.generate().peer_id
    four[1][1]._dht.provider_store.add_provider(
        key, PeerInfo(ID.from_base58(ghost), [Multiaddr("/ip4/127.0.0.1/tcp/9")])
    )
    assert dict(await four[3][1].providers(key)).keys() == {ghost}
    assert four[3][1]._dht.provider_store.get_providers(key) == []


async def test_a_provider_still_asks_others(make_node):
    (one, one_kad), (other, other_kad) = await make_node(), await make_node()
    await one.connect(other.addrs())
    await until(lambda: table(one_kad) == 1 and table(other_kad) == 1)
    key = b"\x12\x20" + b"m" * 32
    one_kad._dht.provider_store.add_provider(key, PeerInfo(ID.from_base58(one.peer_id), one.raw.get_addrs()))
    other_kad._dht.provider_store.add_provider(
        key, PeerInfo(ID.from_base58(other.peer_id), other.raw.get_addrs())
    )
    assert dict(await one_kad.providers(key)).keys() == {other.peer_id}


async def test_stores_are_bounded(make_node):
    config = KadConfig(values_max=3, values_bytes_max=100)
    _, kad = await make_node(config=config)
    store, providers = kad._dht.value_store, kad._dht.provider_store
    for n in range(10):
        key = b"/shoal/%d" % n
        store.put_record(key, KadRecord(key=key, value=bytes(10)))
        providers.add_provider(key, PeerInfo(ID(b"p%d" % n), [Multiaddr("/ip4/1.2.3.4/tcp/1")]))
    assert list(store.store) == [b"/shoal/7", b"/shoal/8", b"/shoal/9"]
    assert len(providers.providers) == 3
    store.put_record(b"/shoal/x", KadRecord(key=b"/shoal/x", value=bytes(95)))
    assert list(store.store) == [b"/shoal/x"]


async def test_providers_are_forgotten_within_their_time(make_node):
    _, kad = await make_node()
    store = kad._dht.provider_store
    store.add_provider(b"key", PeerInfo(ID(b"peer"), [Multiaddr("/ip4/1.2.3.4/tcp/1")]))
    assert len(store.get_providers(b"key")) == 1
    store.providers[b"key"][str(ID(b"peer"))].timestamp -= KAD.keep_s + 1
    assert store.get_providers(b"key") == []


async def test_the_dead_are_dialled_once_not_in_every_lookup(make_node, monkeypatch):
    (one, one_kad), (other, _) = await make_node(), await make_node()
    await one.connect(other.addrs())
    await until(lambda: table(one_kad) == 1)
    dead = ID.from_base58(Identity.generate().peer_id)
    one.raw.get_peerstore().add_addrs(dead, [Multiaddr("/ip4/127.0.0.1/tcp/1")], 3600)
    dials = []
    dial = one.raw.get_network().dial_peer

    async def counted(peer_id):
        dials.append(peer_id)
        return await dial(peer_id)

    monkeypatch.setattr(one.raw.get_network(), "dial_peer", counted)
    assert dead in one.raw.get_peerstore().peer_ids()
    for n in range(3):
        await one_kad.get(str(n))
    assert dials.count(dead) == 0
    await one_kad._dht.routing_table.add_peer(PeerInfo(dead, [Multiaddr("/ip4/127.0.0.1/tcp/1")]))
    for n in range(5):
        await one_kad._dht.routing_table.add_peer(PeerInfo(dead, [Multiaddr("/ip4/127.0.0.1/tcp/1")]))
        await one_kad.get(str(n))
    assert dials.count(dead) == 1


async def test_a_failure_inside_is_contained_logged_and_the_work_begins_again(make_node, monkeypatch, caplog):
    (one, kad), (other, _) = await make_node(), await make_node()
    whole = kad._dht.refresh_routing_table

    async def broken():
        raise RuntimeError("inside the library")

    monkeypatch.setattr(kad._dht, "refresh_routing_table", broken)
    caplog.set_level(logging.ERROR, "p2p.kad")
    await one.connect(other.addrs())
    await until(lambda: kad.failures >= 2)
    assert "inside the library" in caplog.text
    monkeypatch.setattr(kad._dht, "refresh_routing_table", whole)
    await until(lambda: table(kad) == 1)
    assert one.is_connected(other.peer_id)


async def test_garbage_on_the_dht_s_protocol_costs_only_its_stream(make_node):
    (one, one_kad), (other, other_kad) = await make_node(), await make_node()
    await one.connect(other.addrs())
    await until(lambda: table(one_kad) == 1)
    for garbage in (b"\xff" * 64, b"\x05hello", b"\xff\xff\xff\xff\x7f" + bytes(64), bytes(1), b""):
        stream = await one.open_stream(other.peer_id, "kad/1")
        await stream.send_all(garbage)
        await stream.aclose()
    assert await one_kad.put("a", b"a=1") == 1
    assert await other_kad.get("a") == b"a=1"


async def test_it_stops_at_once_and_serves_no_more(four):
    async with trio.open_nursery() as inner:
        extra = Kad(four[0][0], valid, newest, KAD)
        await inner.start(extra.run)
        inner.start_soon(extra.get, "a")
        await trio.lowlevel.checkpoint()
        inner.cancel_scope.deadline = trio.current_time()
        ended_within_s = trio.current_time() + 1
    assert trio.current_time() < ended_within_s
    assert "/shoal/mesh/kad/1" not in {str(n) for n in four[0][0].raw.multiselect.handlers}


@pytest.mark.parametrize("field", ["keep_s", "values_max"])
def test_a_limit_of_nothing_is_named(field):
    with pytest.raises(LocalFault, match=field):
        KadConfig(**{field: 0})
