"""What a node concludes of itself, which relays it keeps, and what a relay allows: pure cores, any clock."""

from __future__ import annotations

import pytest

from p2p.errors import LocalFault
from p2p.reach.core import (
    Probe,
    Reachability,
    RelayKeeper,
    RelayOffer,
    Release,
    Reserve,
    nat_kind,
    punch_targets,
    worth_punching,
)
from p2p.reach.relay_core import NotRelayed, Pace, RelayCore, RelayLimits

OWN = {"10.1.0.2", "127.0.0.1"}
AT = ("45.0.1.1", 4001)


def note(reach, prober, answered, *, at=AT, probers=9, now_s=0.0, own=OWN):
    return reach.noted(Probe(prober, at, answered), own, probers, now_s)


# ---- can it be reached?


@pytest.mark.parametrize(("answered", "verdict"), [(True, "public"), (False, "private")])
def test_two_members_that_agree_decide(answered, verdict):
    reach = Reachability()
    assert not note(reach, "a", answered)
    assert reach.verdict == "unknown"
    assert not note(reach, "a", answered), "one member asked twice is one vote"
    assert note(reach, "b", answered)
    assert (reach.verdict, reach.at) == (verdict, AT)


def test_one_member_decides_where_there_is_no_other():
    reach = Reachability()
    assert note(reach, "a", False, probers=1)
    assert reach.verdict == "private"


def test_members_that_disagree_decide_nothing_until_most_agree():
    reach = Reachability()
    note(reach, "a", True)
    note(reach, "b", False)
    assert not note(reach, "c", False) or reach.verdict == "private"
    assert reach.verdict == "private"
    divided = Reachability()
    for prober, answered in (("a", True), ("b", False), ("c", True), ("d", False)):
        note(divided, prober, answered)
        assert divided.verdict in ("unknown", "public")


def test_one_contrary_probe_turns_nothing_and_two_in_a_row_do():
    reach = Reachability()
    note(reach, "a", True), note(reach, "b", True)
    assert not note(reach, "a", False)
    assert not note(reach, "b", True)
    assert not note(reach, "a", False)
    assert reach.verdict == "public"
    assert note(reach, "b", False)
    assert reach.verdict == "private"


def test_neighbours_behind_the_same_router_do_not_count_once_an_outsider_was_asked():
    reach = Reachability()
    note(reach, "near", True, at=("10.1.0.2", 4001), probers=2)
    note(reach, "far", False, probers=2)
    note(reach, "near", True, at=("10.1.0.2", 4001), probers=2)
    note(reach, "far2", False, probers=2)
    assert reach.verdict == "private"


def test_in_a_network_without_outside_the_neighbours_decide():
    reach = Reachability()
    note(reach, "near", False, at=("10.1.0.2", 4001))
    assert note(reach, "next", False, at=("10.1.0.2", 4001))
    assert reach.verdict == "private", "a firewall on this computer"


def test_old_probes_do_not_count():
    reach = Reachability()
    note(reach, "a", True, now_s=0.0)
    note(reach, "b", True, now_s=1801.0)
    assert reach.verdict == "unknown"


def test_relays_are_sought_at_the_first_sign_and_kept_until_the_contrary_is_sure():
    reach = Reachability()
    assert not reach.suspect()
    note(reach, "a", False)
    assert reach.suspect()
    note(reach, "b", True)
    assert not reach.suspect()
    note(reach, "c", False), note(reach, "d", False)
    assert reach.suspect()
    note(reach, "c", True)
    assert reach.suspect()


def test_another_address_begins_anew():
    reach = Reachability()
    note(reach, "a", True), note(reach, "b", True)
    note(reach, "a", True, at=("45.0.7.7", 4001))
    assert reach.verdict == "unknown"
    reach.forget()
    assert reach.at is None


def test_votes_are_bounded():
    reach = Reachability()
    for k in range(100):
        note(reach, f"peer {k}", bool(k % 2))
    assert len(reach._votes) == 8


# ---- what does the router do?


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        ({}, "unknown"),
        ({"a": AT}, "unknown"),
        ({"a": AT, "b": AT}, "port-preserving"),
        ({"a": ("45.0.1.1", 9), "b": ("45.0.1.1", 9)}, "endpoint-independent"),
        ({"a": ("45.0.1.1", 9), "b": ("45.0.1.1", 10)}, "symmetric"),
        ({"a": AT, "b": ("45.0.1.2", 4001)}, "symmetric"),
        ({"a": ("10.1.0.2", 4001)}, "none"),
    ],
)
def test_the_kind_of_nat_is_what_two_members_saw(seen, kind):
    assert nat_kind(seen, 4001, OWN) == kind


def test_no_hole_is_tried_where_a_router_is_symmetric():
    assert worth_punching("port-preserving", "endpoint-independent")
    assert worth_punching("unknown", "none")
    assert not worth_punching("symmetric", "none")
    assert not worth_punching("port-preserving", "symmetric")


def test_nobody_has_this_node_punch_at_itself_or_at_private_addresses_of_others():
    wild = [("127.0.0.1", 4001), ("10.1.0.2", 4001), ("224.0.0.1", 4001), ("0.0.0.0", 4001), ("no", 4001)]
    assert punch_targets([*wild, ("45.0.1.1", 80), ("192.168.0.9", 4001)], OWN, same_home=False) == []
    assert punch_targets([("192.168.0.9", 4001), *wild], OWN, same_home=True) == [("192.168.0.9", 4001)]
    assert punch_targets([AT, AT], OWN, same_home=False) == [AT]
    many = [("45.0.1.1", 2000 + k) for k in range(50)]
    assert len(punch_targets(many, OWN, same_home=False)) == 4


# ---- which relays?


def offers(*peers, rtt_s=0.01):
    return [RelayOffer(peer, 20.0, rtt_s) for peer in peers]


def test_two_relays_are_kept_renewed_and_given_back():
    keeper = RelayKeeper("me")
    wishes = keeper.decide(offers("a", "b", "c"), True, 0.0)
    assert len(wishes) == 2
    assert keeper.decide(offers("a", "b", "c"), True, 0.1) == [], "they are being asked"
    for wish in wishes:
        keeper.granted(wish.peer, 60.0, 1.0)
    assert keeper.decide(offers("a", "b", "c"), True, 30.0) == []
    assert set(keeper.decide(offers("a", "b", "c"), True, 31.0)) == set(wishes)
    assert set(keeper.relays(31.0)) == {wish.peer for wish in wishes}
    assert set(keeper.decide(offers("a", "b", "c"), False, 32.0)) == {Release(w.peer) for w in wishes}
    assert keeper.relays(32.0) == ()


def test_a_relay_that_fails_is_replaced_and_left_alone_ever_longer():
    keeper = RelayKeeper("me")
    first = keeper.decide(offers("a", "b", "c"), True, 0.0)[0].peer
    keeper.failed(first, 0.0)
    (third,) = keeper.decide(offers("a", "b", "c"), True, 0.1)
    assert third.peer != first
    keeper.failed(third.peer, 1.0)
    assert keeper.decide(offers("a", "b", "c"), True, 14.0) == []
    assert keeper.decide(offers("a", "b", "c"), True, 15.5) == [Reserve(first)]
    keeper.failed(first, 15.5)
    assert keeper.decide(offers("a", "b", "c"), True, 31.0) == [Reserve(third.peer)]
    keeper.failed(third.peer, 31.0)
    assert keeper.decide(offers("a", "b", "c"), True, 46.0) == [Reserve(first)]


def test_a_relay_that_is_lost_or_stops_offering_is_replaced_at_once():
    keeper = RelayKeeper("me")
    for wish in keeper.decide(offers("a", "b"), True, 0.0):
        keeper.granted(wish.peer, 60.0, 0.0)
    keeper.lost("a")
    assert keeper.decide(offers("b", "c"), True, 1.0) == [Reserve("c")]
    keeper.granted("c", 60.0, 1.0)
    assert keeper.decide(offers("c", "d"), True, 2.0) == [Reserve("d")]


def test_a_reservation_that_was_not_renewed_ends():
    keeper = RelayKeeper("me")
    keeper.decide(offers("a"), True, 0.0)
    keeper.granted("a", 60.0, 0.0)
    assert keeper.relays(59.0) == ("a",)
    assert keeper.relays(60.0) == ()


def test_near_relays_come_first_and_equals_are_spread():
    far = offers("f", "g", rtt_s=0.3)
    near = offers("a", "b")
    assert {w.peer for w in RelayKeeper("me").decide(far + near, True, 0.0)} == {"a", "b"}
    peers = [f"relay {k}" for k in range(10)]
    load = dict.fromkeys(peers, 0)
    for k in range(200):
        for wish in RelayKeeper(f"node {k}").decide(offers(*peers), True, 0.0):
            load[wish.peer] += 1
    assert min(load.values()) > 15
    assert max(load.values()) < 75


# ---- what does a relay allow?


def test_a_flood_of_reservations_leaves_room_for_others():
    core = RelayCore(RelayLimits(reservations_per_ip_max=8))
    for k in range(8):
        core.reserve(f"flood {k}", "45.0.1.1", 0.0)
    with pytest.raises(NotRelayed, match="one address"):
        core.reserve("flood 9", "45.0.1.1", 0.0)
    assert core.reserve("flood 0", "45.0.1.1", 1.0) == 60.0, "a renewal is none too many"
    for k in range(56):
        core.reserve(f"peer {k}", f"45.0.2.{k}", 0.0)
    with pytest.raises(NotRelayed, match="all its"):
        core.reserve("one more", "45.0.3.1", 0.0)
    assert core.reserve("one more", "45.0.3.1", 60.5) == 60.0


def test_circuits_need_a_reservation_and_have_limits():
    core = RelayCore(RelayLimits(circuits_max=3, circuits_per_peer_max=2))
    with pytest.raises(NotRelayed, match="no reservation"):
        core.open("a", "b", 0.0)
    core.reserve("b", "ip", 0.0)
    first, _ = core.open("a", "b", 0.0), core.open("a", "b", 0.0)
    with pytest.raises(NotRelayed, match="as many"):
        core.open("a", "b", 0.0)
    core.open("c", "b", 0.0)
    with pytest.raises(NotRelayed, match="as many"):
        core.open("d", "b", 0.0)
    core.close(first)
    core.open("d", "b", 0.0)
    assert core.circuits == 3
    with pytest.raises(NotRelayed):
        core.open("d", "b", 60.0)
    core.release("b")
    assert core.reserved(1.0) == ()


def test_whoever_gives_nothing_relays_nothing():
    with pytest.raises(NotRelayed, match="does not relay"):
        RelayCore(RelayLimits(mbps=0.0)).reserve("a", "ip", 0.0)
    with pytest.raises(LocalFault, match="mbps"):
        RelayLimits(mbps=-1.0)


def test_all_circuits_together_keep_to_the_budget():
    core = RelayCore(RelayLimits(mbps=8.0))
    now_s, sent = 0.0, 0
    while now_s < 10.0:
        now_s += core.wait_s(16384, now_s)
        sent += 16384
    assert sent == pytest.approx(10e6, rel=0.02)
    assert core.wait_s(1000, now_s + 60.0) == 0.0, "after a pause a little goes at once"
    assert core.wait_s(1_000_000, now_s + 60.0) > 0.8


def test_a_pace_gives_each_peer_a_burst_and_then_one_in_a_while():
    pace = Pace(3, 5.0, peers_max=100)
    assert [pace.may("a", 100.0) for _ in range(5)] == [True, True, True, False, False]
    assert pace.may("b", 100.0)
    assert not pace.may("a", 104.0)
    assert pace.may("a", 105.0)
    assert not pace.may("a", 105.0)
    for k in range(1000):
        pace.may(f"peer {k}", 106.0)
    assert len(pace._due_s) <= 100
