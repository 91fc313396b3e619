"""Gossip over real calls in an in-memory network, under a virtual clock."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from dht import Gossip, GossipConfig, RecordRefused, View, ViewConfig
from dht.gossip import GOSSIP, Envelope
from dht.messages import Parcel, Push, Summary, encoded
from p2p import CallFailed, Rpc
from p2p.testing import MemoryNetwork

START_S = 1_000_000.0


class Node:
    """A host in memory with its calls and its gossip."""

    def __init__(self, network, name, clock_error_s=0.0, config=None, view_config=None):
        self.host = network.host(name)
        self.rpc = Rpc(self.host)
        self.view = View(view_config)
        self.gossip = Gossip(
            self.rpc,
            self.view,
            self.host.identity,
            config,
            lambda: START_S + trio.current_time() + clock_error_s,
            random.Random(name),
        )
        self.peer = self.host.peer_id
        self.scope = trio.CancelScope()

    async def run(self, task_status):
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.rpc.run)
                await nursery.start(self.gossip.run)
                task_status.started(self)

    def kill(self):
        """As kill -9: nothing is said."""
        self.scope.cancel()
        self.host.network.kill(self.peer)

    def names(self, kind="node"):
        return {r.signer for r in self.view.records(kind, self.gossip.now_s())}

    def values(self, kind="node"):
        return {(r.signer, r.name): r.value for r in self.view.records(kind, self.gossip.now_s())}


@pytest.fixture
def network():
    return MemoryNetwork(latency_s=0.02)


@pytest.fixture
def make_node(network, nursery):
    async def make(name, **options):
        return await nursery.start(Node(network, name, **options).run)

    return make


@pytest.fixture
async def four(make_node, network):
    nodes = [await make_node(str(n)) for n in range(4)]
    await network.connect_all()
    for node in nodes:
        node.gossip.publish("node", "", node.host.name.encode(), 20.0)
    await trio.sleep(3)
    return nodes


async def test_a_change_is_seen_by_connected_peers_within_a_round_trip(four, autojump_clock):
    four[0].gossip.publish("node", "", b"changed", 20.0)
    await trio.sleep(0.04)
    for node in four:
        assert node.values()[(four[0].peer, "")] == b"changed"


async def test_a_member_connected_to_one_learns_of_all(four, make_node, autojump_clock):
    late = await make_node("late")
    late.gossip.publish("node", "", b"late", 20.0)
    await late.host.connect(four[0].host.addrs())
    await trio.sleep(0.5)
    everybody = {node.peer for node in (*four, late)}
    assert late.names() == everybody
    assert all(node.names() == everybody for node in four)


async def test_records_stay_for_as_long_as_their_signer_lives(four, autojump_clock):
    for _ in range(30):
        await trio.sleep(3)
        assert all(len(node.names()) == 4 for node in four)


async def test_a_killed_node_is_suspect_at_once_and_gone_within_thirty_seconds(four, autojump_clock):
    four[0].kill()
    await trio.sleep(0.1)
    assert all(node.gossip.suspects == {four[0].peer} for node in four[1:])
    assert all(four[0].peer in node.names() for node in four[1:])
    await trio.sleep(22)
    assert all(node.names() == {n.peer for n in four[1:]} for node in four[1:])
    assert all(node.gossip.suspects == frozenset() for node in four[1:])


async def test_a_clean_stop_is_known_everywhere_within_three_seconds(four, network, autojump_clock):
    # The last node is not connected to the one that stops: it must be told by others.
    await four[0].host.disconnect(four[3].peer)
    began_s = trio.current_time()
    await four[0].gossip.withdraw_all(deadline_s=1.0)
    assert trio.current_time() - began_s < 0.5
    four[0].kill()
    await trio.sleep(1)
    assert all(four[0].peer not in node.names() for node in four[1:])


async def test_nothing_is_said_after_the_end(four, autojump_clock):
    await four[0].gossip.withdraw_all(deadline_s=1.0)
    four[0].gossip.publish("node", "", b"still here", 20.0)
    await trio.sleep(10)
    assert all(four[0].peer not in node.names() for node in four)


async def test_stopping_does_not_wait_for_a_silent_peer_beyond_its_deadline(four, network, autojump_clock):
    network.freeze(four[1].peer)
    began_s = trio.current_time()
    await four[0].gossip.withdraw_all(deadline_s=1.0)
    assert trio.current_time() - began_s == pytest.approx(1.0, abs=0.01)
    assert four[0].peer not in four[2].names()


async def test_two_halves_agree_again_after_a_partition(four, network, autojump_clock):
    halves = [[four[0], four[1]], [four[2], four[3]]]
    network.partition(*[[node.peer for node in half] for half in halves])
    await trio.sleep(10)
    four[0].gossip.publish("host", "m", b"left", 60.0)
    four[3].gossip.publish("host", "m", b"right", 60.0)
    four[2].gossip.withdraw("node", "")
    await trio.sleep(2)
    assert four[1].values("host") == {(four[0].peer, "m"): b"left"}
    network.heal()
    await network.connect_all()
    await trio.sleep(3)
    states = [(node.values("host"), node.values()) for node in four]
    assert all(state == states[0] for state in states)
    assert len(states[0][0]) == 2
    assert four[2].peer not in four[0].names()


async def test_a_restarted_node_replaces_what_it_said_before(four, make_node, network, autojump_clock):
    four[0].gossip.publish("host", "m", b"before", 60.0)
    await trio.sleep(0.1)
    four[0].kill()
    await trio.sleep(0.5)
    again = await make_node("0", clock_error_s=-4.0)
    again.gossip.publish("node", "", b"again", 20.0)
    await again.host.connect(four[1].host.addrs())
    await trio.sleep(3)
    for node in (again, *four[1:]):
        assert node.values()[(again.peer, "")] == b"again"
        assert node.values("host") == {}


async def test_nodes_with_wrong_clocks_are_members_like_others(make_node, network, autojump_clock):
    nodes = [await make_node(str(n), clock_error_s=e) for n, e in enumerate([0.0, 0.0, 0.0, 5000.0, -900.0])]
    await network.connect_all()
    await trio.sleep(2)
    for node in nodes:
        node.gossip.publish("node", "", b"v", 20.0)
    for _ in range(10):
        await trio.sleep(3)
        assert all(len(node.names()) == 5 for node in nodes)
    assert nodes[0].gossip.skew_s(nodes[3].peer) == pytest.approx(5000.0, abs=0.1)
    assert nodes[0].gossip.skew_s("nobody") is None


async def test_watchers_are_told_of_values_withdrawals_and_expiries_but_not_of_renewals(four, autojump_clock):
    with four[1].gossip.watch() as changes:
        four[0].gossip.publish("host", "m", b"one", 20.0)
        await trio.sleep(12)
        four[0].gossip.withdraw("host", "m")
        await trio.sleep(0.5)
        four[0].kill()
        seen = []
        with trio.move_on_after(25):
            async for record in changes:
                seen.append((record.kind, record.value, record.withdrawn))
    assert seen == [("host", b"one", False), ("host", b"", True), ("node", b"0", False)]


async def test_a_slow_watcher_gets_the_newest_and_never_blocks(make_node, network, autojump_clock):
    config = GossipConfig(watch_records_max=4)
    one, other = await make_node("one"), await make_node("other", config=config)
    await network.connect_all()
    await trio.sleep(1)
    with other.gossip.watch() as changes:
        for n in range(20):
            one.gossip.publish("host", str(n % 6), str(n).encode(), 60.0)
            await trio.sleep(0.1)
        assert other.values("host")[(one.peer, "1")] == b"19"
        seen = []
        with trio.move_on_after(3):
            async for record in changes:
                seen.append(record.value)
    assert seen[:4] == [b"0", b"1", b"2", b"3"]
    assert seen[4:] == [b"16", b"17", b"18", b"19"]


async def test_publishing_before_running_is_told_on_connecting(network, make_node, nursery, autojump_clock):
    early = Node(network, "early")
    early.gossip.publish("node", "", b"early", 20.0)
    other = await make_node("other")
    await nursery.start(early.run)
    await early.host.connect(other.host.addrs())
    await trio.sleep(0.5)
    assert other.values() == {(early.peer, ""): b"early"}


async def test_garbage_is_refused_counted_and_harmless(four, record, autojump_clock):
    sender, victim = four[0], four[1]
    before = victim.values()
    for data in (b"", b"\xff" * 100, Parcel(float("nan"), Push(())).encode()):
        with pytest.raises(CallFailed):
            await sender.rpc.call(victim.peer, GOSSIP, Envelope(data))
    forged = bytearray(record(now_s=START_S + trio.current_time()).encode())
    forged[-1] ^= 1
    await sender.rpc.call(victim.peer, GOSSIP, Envelope(Parcel(START_S, Push((bytes(forged),))).encode()))
    assert victim.view.counts["malformed"] == 3
    assert victim.view.counts["signature"] == 1
    assert victim.values() == before


async def test_a_forgotten_member_stays_out_though_others_still_name_it(four, autojump_clock):
    four[1].view.forget(four[0].peer)
    for _ in range(5):
        await trio.sleep(2)
        assert four[0].peer not in four[1].names()
        assert four[0].peer in four[2].names()
    with pytest.raises(RecordRefused):
        four[1].view.merge(four[2].view.get("node", "", four[0].peer), four[1].gossip.now_s())


async def test_a_lost_push_is_made_good_within_a_few_seconds(four, autojump_clock):
    four[1].view.merge_many = lambda records, now_s: View().merge_many((), now_s)
    four[0].gossip.publish("node", "", b"lost", 20.0)
    await trio.sleep(0.5)
    assert four[1].values()[(four[0].peer, "")] == b"0"
    del four[1].view.merge_many
    await trio.sleep(3)
    assert four[1].values()[(four[0].peer, "")] == b"lost"


async def test_a_flood_of_records_is_bounded_by_the_signer_s_share(make_node, network, autojump_clock):
    config = ViewConfig(records_per_signer_max=16)
    one, other = await make_node("one"), await make_node("other", view_config=config)
    await network.connect_all()
    for n in range(200):
        one.gossip.publish("host", str(n), bytes(100), 60.0)
    await trio.sleep(5)
    assert len(other.values("host")) == 16
    other.view.validate()


async def test_it_stops_at_once(four, autojump_clock):
    began_s = trio.current_time()
    for node in four:
        node.scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert trio.current_time() == began_s


async def test_a_comparison_of_equal_views_costs_one_small_message(four, autojump_clock):
    await trio.sleep(1)
    before = sum(node.gossip.counts["sent"] for node in four)
    await trio.sleep(20)
    per_node_s = (sum(node.gossip.counts["sent"] for node in four) - before) / 80
    assert per_node_s < 5
    assert len(Parcel(0.0, Summary(four[0].view.digest(four[0].gossip.now_s()))).encode()) < 100


@pytest.mark.parametrize("field", ["tick_s", "watch_records_max"])
def test_a_limit_of_nothing_is_named(field):
    with pytest.raises(ValueError, match=field):
        GossipConfig(**{field: 0})


def test_records_travel_within_the_limits_of_a_call(record):
    big = [record(n, value=bytes(60_000)) for n in range(4)]
    assert len(Parcel(0.0, Push(encoded(big))).encode()) < GOSSIP.body_bytes_max
