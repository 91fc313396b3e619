"""A replica's own part: sequence numbers, renewal, withdrawal, leftovers of earlier lives, clocks that lie."""

from __future__ import annotations

import random

import pytest

from dht import OwnRecordsFull, RecordInvalid, View, ViewConfig
from dht.messages import Exchange, Inventory, Push, Summary, encoded
from dht.replica import (
    Changed,
    PeerDown,
    PeerUp,
    Publish,
    Received,
    Replica,
    ReplicaConfig,
    Send,
    Tick,
    Withdraw,
    WithdrawAll,
)

NOW_S = 10_000.0


@pytest.fixture
def make_replica(identity):
    def make(n=0, config=None, view_config=None):
        return Replica(View(view_config), identity(n), random.Random(n), config)

    return make


def sent(instructions, kind=Push):
    return [(i.peer, i.message) for i in instructions if isinstance(i, Send) and isinstance(i.message, kind)]


def changed(instructions):
    return [i.record for i in instructions if isinstance(i, Changed)]


def test_publishing_tells_every_connected_peer_at_once(make_replica):
    replica = make_replica()
    for n in range(5):
        assert len(sent(replica.handle(PeerUp(f"p{n}"), NOW_S), Summary)) == 1
    out = replica.handle(Publish("node", "", b"v", 20.0), NOW_S)
    assert {peer for peer, _ in sent(out)} == {f"p{n}" for n in range(5)}
    assert [r.value for r in changed(out)] == [b"v"]
    replica.validate()


def test_saying_the_same_again_is_silent(make_replica):
    replica = make_replica()
    replica.handle(PeerUp("p"), NOW_S)
    replica.handle(Publish("node", "", b"v", 20.0), NOW_S)
    assert replica.handle(Publish("node", "", b"v", 20.0), NOW_S + 1) == []
    assert len(sent(replica.handle(Publish("node", "", b"w", 20.0), NOW_S + 1))) == 1


def test_a_record_is_renewed_before_it_expires_for_as_long_as_it_is_published(make_replica):
    replica = make_replica()
    replica.handle(Publish("node", "", b"v", 20.0), NOW_S)
    renewals = 0
    last = replica.view.records("node", NOW_S)[0]
    for second in range(1, 101):
        out = replica.handle(Tick(), NOW_S + second)
        assert changed(out) == []
        (record,) = replica.view.records("node", NOW_S + second)
        assert record.expires_at_s - (NOW_S + second) >= 14
        if record != last:
            assert record.seq > last.seq
            renewals, last = renewals + 1, record
    assert renewals == 20


def test_a_withdrawal_outlives_what_it_withdraws_and_then_goes_too(make_replica):
    replica = make_replica()
    replica.handle(PeerUp("p"), NOW_S)
    replica.handle(Publish("host", "m", b"v", 20.0), NOW_S)
    out = replica.handle(Withdraw("host", "m"), NOW_S + 1)
    (tombstone,) = changed(out)
    assert tombstone.withdrawn
    assert tombstone.expires_at_s >= NOW_S + 20 + replica.view.config.skew_max_s
    assert len(sent(out)) == 1
    assert replica.handle(Withdraw("host", "m"), NOW_S + 2) == []
    for second in range(2, 40):
        replica.handle(Tick(), NOW_S + second)
    assert len(replica.view) == 0


def test_withdrawing_everything_tells_everybody(make_replica):
    config = ReplicaConfig(push_fanout=2)
    replica = make_replica(config=config)
    for n in range(6):
        replica.handle(PeerUp(f"p{n}"), NOW_S)
    for name in "abc":
        replica.handle(Publish("host", name, b"v", 20.0), NOW_S)
    out = replica.handle(WithdrawAll(), NOW_S + 1)
    assert {peer for peer, _ in sent(out)} == {f"p{n}" for n in range(6)}
    assert replica.view.records("host", NOW_S + 1) == ()
    assert all(r.withdrawn for r in replica.view.of_signer(replica.view.owner))
    replica.handle(Tick(), NOW_S + 2)
    assert replica.view.records("host", NOW_S + 2) == ()


def test_the_sequence_goes_on_though_the_clock_jumped_back_between_two_lives(make_replica):
    earlier = make_replica()
    earlier.handle(Publish("node", "", b"old", 80_000.0), NOW_S)
    (old,) = earlier.view.records("node", NOW_S)
    again = make_replica()
    again.handle(Publish("node", "", b"new", 20.0), NOW_S - 5000)
    now_s = NOW_S - 5
    again.handle(Received("p", Push(encoded([old]))), now_s)
    again.handle(Tick(), now_s)
    (record,) = again.view.records("node", now_s)
    assert record.value == b"new"
    assert record.seq > old.seq


def test_the_sequence_grows_though_the_clock_stands_still_or_falls(make_replica):
    replica = make_replica()
    seqs = []
    for step, now_s in enumerate([NOW_S, NOW_S, NOW_S - 3600, NOW_S - 3600, NOW_S + 5]):
        replica.handle(Publish("node", "", bytes([step]), 20.0), now_s)
        seqs.append(replica.view.seq_max(replica.view.owner))
    assert seqs == sorted(set(seqs))


def test_after_the_clock_falls_records_are_signed_anew_so_that_others_take_them(make_replica):
    replica, other = make_replica(0), make_replica(1)
    replica.handle(Publish("node", "", b"v", 20.0), NOW_S)
    past_s = NOW_S - 3600
    replica.handle(PeerUp("p"), past_s)
    replica.handle(Tick(), past_s)
    (held,) = replica.view.records("node", past_s)
    assert other.view.merge(held, past_s)


def test_what_an_earlier_life_left_behind_is_withdrawn(make_replica):
    earlier, again = make_replica(), make_replica()
    earlier.handle(Publish("host", "gone", b"v", 20.0), NOW_S)
    (old,) = earlier.view.records("host", NOW_S)
    again.handle(PeerUp("p"), NOW_S)
    again.handle(Received("p", Push(encoded([old]))), NOW_S)
    out = again.handle(Tick(), NOW_S + 1)
    assert [r.withdrawn for r in changed(out)] == [True]
    assert len(sent(out)) == 1


def test_two_nodes_with_one_identity_quarrel_no_faster_than_they_tick(make_replica):
    one, other = make_replica(), make_replica()
    for replica, value in ((one, b"1"), (other, b"2")):
        replica.handle(PeerUp("twin"), NOW_S)
        replica.handle(Publish("node", "", value, 20.0), NOW_S)
    messages = 0
    queue = [(one, Push(encoded(other.view.records("node", NOW_S))))]
    while queue:
        replica, message = queue.pop()
        messages += 1
        assert messages < 10
        twin = other if replica is one else one
        out = replica.handle(Received("twin", message), NOW_S)
        queue += [(twin, i.message) for i in out if isinstance(i, Send)]


def test_an_outdated_push_is_answered_with_the_newer_version(make_replica, record):
    replica = make_replica(9)
    replica.handle(PeerUp("p"), NOW_S)
    old, new = (record(seq=s, value=bytes([s]), now_s=NOW_S) for s in (1, 2))
    replica.handle(Received("q", Push(encoded([new]))), NOW_S)
    out = replica.handle(Received("p", Push(encoded([old]))), NOW_S)
    assert sent(out) == [("p", Push(encoded([new])))]
    assert replica.handle(Received("p", Push(encoded([new]))), NOW_S) == []


def test_news_are_relayed_to_a_few_others_and_renewals_to_none(make_replica, record):
    replica = make_replica(9, ReplicaConfig(relay_fanout=3))
    for n in range(10):
        replica.handle(PeerUp(f"p{n}"), NOW_S)
    news = record(seq=1, now_s=NOW_S)
    out = sent(replica.handle(Received("p0", Push(encoded([news]))), NOW_S))
    assert len(out) == 3
    assert "p0" not in dict(out)
    renewal = record(seq=2, now_s=NOW_S + 5)
    assert replica.handle(Received("p0", Push(encoded([renewal]))), NOW_S + 5) == []


def test_one_unreadable_record_does_not_cost_the_others(make_replica, record):
    replica = make_replica(9)
    good = record(now_s=NOW_S)
    out = replica.handle(Received("p", Push((b"garbage", good.encode()))), NOW_S)
    assert changed(out) == [good]
    assert replica.view.counts["malformed"] == 1


def test_a_comparison_sends_only_what_differs_both_ways(make_replica, record):
    one, other = make_replica(8), make_replica(9)
    shared = record(1, now_s=NOW_S)
    for replica, own in ((one, record(2, now_s=NOW_S)), (other, record(3, now_s=NOW_S))):
        replica.view.merge_many([shared, own], NOW_S)
    ((_, summary),) = sent(one.handle(PeerUp("other"), NOW_S), Summary)
    ((_, inventory),) = sent(other.handle(Received("one", summary), NOW_S), Inventory)
    ((_, exchange),) = sent(one.handle(Received("other", inventory), NOW_S), Exchange)
    assert len(exchange.records) == 1
    ((_, push),) = sent(other.handle(Received("one", exchange), NOW_S))
    assert len(push.records) == 1
    one.handle(Received("other", push), NOW_S)
    assert one.view.digest(NOW_S) == other.view.digest(NOW_S)
    assert other.handle(Received("one", Summary(one.view.digest(NOW_S))), NOW_S) == []


def test_one_peer_cannot_ask_without_end(make_replica, record):
    replica = make_replica(9, ReplicaConfig(answers_per_tick_max=5))
    replica.view.merge(record(now_s=NOW_S), NOW_S)
    asking = Received("p", Inventory(replica.view.detail(frozenset(), NOW_S)))
    answers = sum(len(replica.handle(asking, NOW_S)) for _ in range(50))
    assert answers == 5
    replica.handle(Tick(), NOW_S + 1)
    assert len(replica.handle(asking, NOW_S + 1)) == 1


def test_a_lost_peer_is_suspect_until_it_returns_or_its_records_expire(make_replica, record, identity):
    replica = make_replica(9)
    peers = [identity(n).peer_id for n in range(3)]
    for n, peer in enumerate(peers[:2]):
        replica.view.merge(record(n, now_s=NOW_S), NOW_S)
        replica.handle(PeerUp(peer), NOW_S)
    replica.handle(PeerUp(peers[2]), NOW_S)
    for peer in peers:
        replica.handle(PeerDown(peer), NOW_S)
    assert replica.suspects == {peers[0], peers[1]}
    assert len(replica.view.records("node", NOW_S)) == 2
    replica.handle(PeerUp(peers[0]), NOW_S)
    assert replica.suspects == {peers[1]}
    replica.validate()
    out = replica.handle(Tick(), NOW_S + 21)
    assert {r.signer for r in changed(out)} == set(peers[:2])
    assert replica.suspects == frozenset()


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (Publish("Bad Kind", "", b"", 20.0), RecordInvalid),
        (Publish("node", "", bytes(70_000), 20.0), RecordInvalid),
        (Publish("node", "", b"", 0.0), RecordInvalid),
        (Publish("node", "", b"", 1e6), RecordInvalid),
    ],
)
def test_publishing_nonsense_is_refused_and_changes_nothing(make_replica, event, error):
    replica = make_replica()
    with pytest.raises(error):
        replica.handle(event, NOW_S)
    assert len(replica.view) == 0
    assert replica.handle(Tick(), NOW_S + 1) == []


@pytest.mark.parametrize("size", [0, 60_000])
def test_publishing_more_than_one_share_is_refused(make_replica, size):
    replica = make_replica(view_config=ViewConfig(records_per_signer_max=8, bytes_per_signer_max=300_000))
    room = 8 if size == 0 else 4
    for n in range(room):
        replica.handle(Publish("host", str(n), bytes(size), 20.0), NOW_S)
    with pytest.raises(OwnRecordsFull):
        replica.handle(Publish("host", "one more", bytes(size), 20.0), NOW_S)
    replica.validate()
    assert len(replica.view.records("host", NOW_S)) == room


def test_a_flood_of_strangers_cannot_keep_this_node_out_of_its_own_view(make_replica, record):
    replica = make_replica(9, view_config=ViewConfig(signers_max=3, bytes_max=2000))
    for n in range(3):
        replica.view.merge(record(n, now_s=NOW_S), NOW_S)
    replica.handle(Publish("node", "", bytes(1900), 20.0), NOW_S)
    assert len(replica.view.records("node", NOW_S)) == 4
    replica.validate()


def test_nodes_whose_clocks_are_hours_apart_see_one_another(make_world):
    world = make_world(3, 5)
    peers = list(world.replicas)
    world.clock_error_s = {peers[0]: 7200.0, peers[1]: -30.0, peers[4]: -86_400.0}
    world.rounds(2)
    for peer in peers:
        world.do(peer, Publish("node", "", peer.encode(), 20.0))
    for _ in range(10):
        world.rounds(3)
        for peer, replica in world.replicas.items():
            now_s = replica.now_s(world.now_s + world.clock_error_s.get(peer, 0.0))
            assert replica.view.signers(now_s) == tuple(sorted(peers))


@pytest.mark.parametrize("claim_s", [0.0, 2.0**39])
def test_absurd_clocks_of_a_majority_do_not_silence_a_node(make_replica, claim_s):
    replica = make_replica()
    for peer in ("p", "q"):
        replica.handle(PeerUp(peer), NOW_S)
        replica.handle(Received(peer, Push(()), claim_s), NOW_S)
    replica.handle(Publish("node", "", b"v", 20.0), NOW_S)
    for second in range(30):
        replica.handle(Tick(), NOW_S + second)
        replica.validate()
    assert len(replica.view.records("node", replica.now_s(NOW_S + 30))) == 1


def test_a_killed_node_vanishes_within_its_time_to_live_and_a_stopped_one_at_once(make_world):
    world = make_world(4, 8)
    peers = list(world.replicas)
    for peer in peers:
        world.do(peer, Publish("node", "", peer.encode(), 20.0))
    world.rounds(4)
    world.do(peers[0], WithdrawAll())
    world.settle()
    assert all(peers[0] not in r.view.signers(world.now_s) for r in world.replicas.values())
    world.kill(peers[0])
    world.kill(peers[1])
    seen = []
    for _ in range(30):
        world.rounds(1)
        seen.append(sum(peers[1] in r.view.signers(world.now_s) for r in world.replicas.values()))
    assert seen[0] == 6
    assert seen[21] == 0


def test_traffic_of_a_quiet_mesh_stays_small(make_world):
    world = make_world(5, 16)
    for peer in world.replicas:
        world.do(peer, Publish("node", "", b"v", 20.0))
    world.rounds(3)
    before = world.sent
    world.rounds(20)
    assert (world.sent - before) / (20 * 16) < 8
