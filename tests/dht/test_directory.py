"""The directory: with a DHT in memory under a virtual clock, then with the real one over loopback."""

from __future__ import annotations

import itertools
import random

import pytest
import trio

from dht import Directory, DirectoryConfig, Gossip, Record, View
from dht.adverts import advert_key, is_advert, mesh_key, newest_advert
from dht.dialer import DialerConfig
from p2p import DeadlineExceeded, HostConfig, Identity, Rpc, open_host
from p2p.testing import MemoryNetwork

START_S = 1_000_000.0


class MemoryDht:
    """One table for all, with the real one's rules; `broken` makes every call fail."""

    def __init__(self):
        self.values = {}
        self.provided = {}
        self.broken = False
        self.calls = 0

    def of(self, host):
        return _Part(self, host)


class _Part:
    def __init__(self, table, host):
        self.table, self.host = table, host

    async def run(self, *, task_status):
        task_status.started()
        await trio.sleep_forever()

    async def _call(self):
        self.table.calls += 1
        await trio.sleep(0.01)
        if self.table.broken:
            raise DeadlineExceeded("the DHT is broken")

    async def put(self, key, value):
        await self._call()
        assert is_advert(key, value)
        known = self.table.values.get(key, value)
        self.table.values[key] = [known, value][newest_advert(key, [known, value])]

    async def get(self, key):
        await self._call()
        return self.table.values.get(key)

    async def provide(self, key):
        await self._call()
        self.table.provided.setdefault(key, {})[self.host.peer_id] = self.host.addrs()

    async def providers(self, key):
        await self._call()
        return list(self.table.provided.get(key, {}).items())


class Node:
    def __init__(self, host, identity, table, path=None, config=None, gossip=True, clock_error_s=0.0):
        self.host = host
        self.peer = host.peer_id
        self.rpc = Rpc(host)
        self.view = View()
        self.gossip = Gossip(
            self.rpc,
            self.view,
            identity,
            clock_s=lambda: START_S + trio.current_time() + clock_error_s,
            rng=random.Random(1),
        )
        kad = None if table is None else table.of(host)
        self.directory = Directory(
            host, self.gossip, identity, path, config, kad=kad, rng=random.Random(str(host.peer_id))
        )
        self.with_gossip = gossip
        self.scope = trio.CancelScope()
        self.stopped = trio.Event()

    async def run(self, task_status=trio.TASK_STATUS_IGNORED):
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.rpc.run)
                    if self.with_gossip:
                        await nursery.start(self.gossip.run)
                    await nursery.start(self.directory.run)
                    task_status.started(self)
        finally:
            self.stopped.set()

    async def stop(self):
        self.scope.cancel()
        await self.stopped.wait()


@pytest.fixture
def network():
    return MemoryNetwork(latency_s=0.01)


@pytest.fixture
def table():
    return MemoryDht()


@pytest.fixture
def make_node(network, table, nursery, tmp_path):
    async def make(name, **options):
        host = network.host(name)
        options.setdefault("path", tmp_path / f"{name}.json")
        return await nursery.start(Node(host, host.identity, table, **options).run)

    return make


def whole(nodes):
    return all(len(node.host.peers()) == len(nodes) - 1 for node in nodes)


async def test_members_of_the_view_connect_to_one_another(make_node, autojump_clock):
    nodes = [await make_node(str(n)) for n in range(6)]
    for node in nodes[1:]:
        node.directory.add(nodes[0].host.addrs())
    await trio.sleep(6)
    assert whole(nodes)


async def test_members_find_one_another_through_the_dht_alone(make_node, autojump_clock):
    config = DirectoryConfig(seek_every_s=5.0)
    nodes = [await make_node(str(n), gossip=False, config=config) for n in range(5)]
    for one, other in itertools.pairwise(nodes):
        one.directory.add(other.host.addrs())
    await trio.sleep(20)
    assert whole(nodes)


async def test_found_peers_are_those_not_connected_with_their_newest_addresses(
    make_node, network, table, autojump_clock
):
    one, other, third = [await make_node(n, gossip=False) for n in ("one", "other", "third")]
    one.directory.add(other.host.addrs())
    await other.host.connect(third.host.addrs())
    await trio.sleep(5)
    await one.host.disconnect(third.peer)
    table.provided[mesh_key("memory")][third.peer] = (f"/memory/999/p2p/{third.peer}",)
    found = await one.directory.find_peers()
    assert found == {third.peer: (*third.host.addrs(), f"/memory/999/p2p/{third.peer}")}


async def test_a_lookup_gives_the_signed_record_and_nothing_after_a_clean_stop(make_node, autojump_clock):
    one, other = await make_node("one"), await make_node("other")
    one.directory.add(other.host.addrs())
    await trio.sleep(5)
    record = await one.directory.lookup(other.peer)
    assert isinstance(record, Record)
    assert record.signer == other.peer
    assert await one.directory.lookup("12D3KooWnobody") is None
    began_s = trio.current_time()
    await other.stop()
    assert trio.current_time() - began_s < 0.5
    assert await one.directory.lookup(other.peer) is None


async def test_stopping_does_not_wait_for_a_dht_that_hangs(make_node, table, autojump_clock, monkeypatch):
    one, other = await make_node("one"), await make_node("other")
    one.directory.add(other.host.addrs())
    await trio.sleep(5)

    async def hang(self):
        await trio.sleep_forever()

    monkeypatch.setattr(_Part, "_call", hang)
    began_s = trio.current_time()
    await other.stop()
    assert trio.current_time() - began_s <= 0.31


async def test_a_mesh_forms_again_from_memory_alone(make_node, network, table, autojump_clock, tmp_path):
    nodes = [await make_node(str(n)) for n in range(4)]
    for node in nodes[1:]:
        node.directory.add(nodes[0].host.addrs())
    await trio.sleep(10)
    assert whole(nodes)
    addrs = {node.peer: node.host.addrs() for node in nodes}
    for node in nodes:
        await node.stop()
        network.kill(node.peer)
    table.values.clear()
    table.provided.clear()
    network._hosts_made = 0
    again = [await make_node(str(n)) for n in range(4)]
    assert {node.peer: node.host.addrs() for node in again} == addrs
    assert {one.peer for one in again[3].directory.remembered()} == {node.peer for node in nodes[:3]}
    await trio.sleep(10)
    assert whole(again)


async def test_a_lost_member_is_dialled_again_and_one_that_left_is_not(make_node, network, autojump_clock):
    nodes = [await make_node(str(n)) for n in range(3)]
    for node in nodes[1:]:
        node.directory.add(nodes[0].host.addrs())
    await trio.sleep(6)
    await nodes[0].host.disconnect(nodes[1].peer)
    assert not whole(nodes)
    await trio.sleep(6)
    assert whole(nodes)
    await nodes[2].gossip.withdraw_all(1.0)
    await nodes[2].stop()
    network.kill(nodes[2].peer)
    dials = []
    connect = nodes[0].host.connect

    async def counted(addrs, **options):
        dials.append(addrs)
        return await connect(addrs, **options)

    nodes[0].host.connect = counted
    await trio.sleep(30)
    assert dials == []


async def test_a_dead_member_is_dialled_ever_more_rarely(make_node, network, autojump_clock):
    nodes = [await make_node(str(n)) for n in range(2)]
    nodes[0].directory.add(nodes[1].host.addrs())
    await trio.sleep(6)
    network.kill(nodes[1].peer)
    dials = []

    async def counted(addrs, **options):
        dials.append(trio.current_time())
        return await connect(addrs, **options)

    connect, nodes[0].host.connect = nodes[0].host.connect, counted
    await trio.sleep(600)
    assert 6 < len(dials) < 20


async def test_no_more_connections_are_sought_than_wanted(make_node, autojump_clock):
    config = DirectoryConfig(connected_max=2)
    nodes = [await make_node(str(n), config=config) for n in range(8)]
    for node in nodes[1:]:
        node.directory.add(nodes[0].host.addrs())
    await trio.sleep(10)
    assert all(node.host.peers() for node in nodes)
    assert sum(len(node.host.peers()) for node in nodes) < 8 * 7


async def test_a_broken_dht_costs_only_what_it_would_have_helped(make_node, table, autojump_clock, caplog):
    table.broken = True
    nodes = [await make_node(str(n)) for n in range(3)]
    for node in nodes[1:]:
        node.directory.add(nodes[0].host.addrs())
    await trio.sleep(60)
    assert whole(nodes)
    assert table.values == {}
    table.broken = False
    await trio.sleep(60)
    assert len(table.values) == 3


async def test_the_advert_goes_on_above_an_earlier_life_s_though_the_clock_fell(
    make_node, network, table, autojump_clock
):
    one, other = await make_node("one"), await make_node("other")
    one.directory.add(other.host.addrs())
    await trio.sleep(5)
    first = Record.decode(table.values[advert_key(one.peer)])
    one.scope.cancel()
    network.kill(one.peer)
    await trio.sleep(1)
    again = await make_node("one", gossip=False, clock_error_s=-50_000.0)
    again.directory.add(other.host.addrs())
    await trio.sleep(5)
    second = Record.decode(table.values[advert_key(one.peer)])
    assert not second.withdrawn
    assert second.seq > first.seq


async def test_a_quiet_mesh_leaves_the_dht_alone(make_node, table, autojump_clock):
    nodes = [await make_node(str(n)) for n in range(4)]
    for node in nodes[1:]:
        node.directory.add(nodes[0].host.addrs())
    await trio.sleep(60)
    before = table.calls
    await trio.sleep(300)
    assert (table.calls - before) / 4 < 15


async def test_a_moved_node_announces_itself_anew(make_node, table, autojump_clock):
    one, other = await make_node("one"), await make_node("other")
    one.directory.add(other.host.addrs())
    await trio.sleep(10)
    moved = (f"/memory/777/p2p/{one.peer}",)
    one.host.addrs = lambda: moved
    await trio.sleep(10)
    record = await other.directory.lookup(one.peer)
    assert b"/memory/777/" in record.value
    assert other.view.get("addr", "", one.peer).value == record.value


@pytest.mark.parametrize("field", ["connected_max", "seek_every_s"])
def test_a_limit_of_nothing_is_named(field):
    with pytest.raises(ValueError, match=field):
        DirectoryConfig(**{field: 0})


async def until(condition, within_s=15.0):
    with trio.fail_after(within_s):
        while not condition():
            await trio.lowlevel.checkpoint()


@pytest.fixture
def make_real(nursery):
    """Nodes over real loopback sockets with the real DHT."""

    async def run(options, task_status):
        identity = Identity.generate()
        listen = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
        async with open_host(identity, "lab", b"k" * 32, listen) as host:
            await Node(host, identity, None, **options).run(task_status=task_status)

    async def make(**options):
        return await nursery.start(run, options)

    return make


async def test_over_real_hosts_members_meet_through_the_dht_alone(make_real):
    """A chain of four without gossip: only the DHT can tell the first of the last."""
    config = DirectoryConfig(
        settle_s=0.05,
        look_every_s=0.05,
        seek_every_s=0.2,
        announce_retry_s=0.2,
        dialer=DialerConfig(first_delay_s=0.05, backoff_first_s=0.1),
    )
    nodes = [await make_real(config=config, gossip=False) for _ in range(4)]
    for one, other in itertools.pairwise(nodes):
        await one.host.connect(other.host.addrs())
    await until(lambda: whole(nodes))
    with trio.fail_after(10):
        while await nodes[0].directory.lookup(nodes[3].peer) is None:
            pass
    began_s = trio.current_time()
    await nodes[3].stop()
    assert trio.current_time() - began_s < 1


async def test_over_real_hosts_a_mesh_forms_agrees_and_takes_its_leave(make_real):
    nodes = [await make_real() for _ in range(4)]
    for node in nodes:
        node.gossip.publish("node", "", node.peer.encode(), 20.0)
        node.directory.add(nodes[0].host.addrs())
    await until(lambda: whole(nodes))
    peers = {node.peer for node in nodes}

    def names(node):
        return {record.signer for record in node.view.records("node", node.gossip.now_s())}

    await until(lambda: all(names(node) == peers for node in nodes))
    with nodes[3].gossip.watch() as changes:
        nodes[0].gossip.publish("host", "m", b"now", 20.0)
        with trio.fail_after(2):
            while (record := await changes.receive()).kind != "host":
                pass
        assert record.value == b"now"
    await nodes[0].gossip.withdraw_all(1.0)
    await until(lambda: all(names(node) == peers - {nodes[0].peer} for node in nodes[1:]), within_s=3)
