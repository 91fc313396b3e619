"""Routers and the small internet as pure cores: who gets through, from which port, and when a packet arrives."""

from __future__ import annotations

import random
import socket
import struct

import pytest

from testnet.nat import KINDS, HostSpec, LinkSpec, Network, Router, RouterSpec
from testnet.nat.packets import TCP, UDP, flow_of, rewritten

A, X, Y = ("10.0.0.2", 4001), ("45.0.0.10", 80), ("45.0.0.11", 80)
WAN = "45.0.1.1"


def checksum(data: bytes) -> int:
    """RFC 1071, over whole data."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(source, target, protocol=TCP, body=b"hello") -> bytes:
    """A whole IPv4 packet with right checksums."""
    ports = struct.pack("!HH", source[1], target[1])
    head = ports + (struct.pack("!IIBBHHH", 1, 2, 0x50, 2, 512, 0, 0) if protocol == TCP else b"")
    if protocol == UDP:
        head += struct.pack("!HH", 8 + len(body), 0)
    ends = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    at = 16 if protocol == TCP else 6
    total = checksum(ends + struct.pack("!BBH", 0, protocol, len(head) + len(body)) + head + body)
    head = head[:at] + struct.pack("!H", total) + head[at + 2 :]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(head) + len(body), 7, 0, 64, protocol, 0) + ends
    return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + head + body


def outer(router: Router, target, source=A, now_s=0.0):
    """Where `target` sees a packet of `source` come from."""
    return flow_of(router.outward(packet(source, target), now_s)).source


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_checksums_stay_right_whatever_is_rewritten(protocol):
    rng = random.Random(1)
    for _ in range(300):
        ends = [(socket.inet_ntoa(rng.randbytes(4)), rng.randrange(1, 65536)) for _ in range(4)]
        body = rng.randbytes(rng.randrange(9))
        before = packet(ends[0], ends[1], protocol, body)
        after = rewritten(before, source=ends[2], target=ends[3])
        assert (flow_of(after).source, flow_of(after).target) == (ends[2], ends[3])
        right = packet(ends[2], ends[3], protocol, body)
        assert checksum(after[:20]) == checksum(right[:20]) == 0
        assert after == right or int.from_bytes(right[26:28], "big") in (0, 0xFFFF)


@pytest.mark.parametrize(
    "junk", [b"", b"\x60" + bytes(50), packet(A, X)[:39], b"\x45" + bytes(18), packet(A, X, 1)]
)
def test_what_is_no_packet_of_tcp_or_udp_gets_nowhere(junk):
    assert flow_of(junk) is None
    assert Router("cone", WAN).outward(junk, 0.0) is None
    assert Router("cone", WAN).inward(junk, 0.0) is None


@pytest.mark.parametrize(("kind", "keeps"), [("cone", True), ("full-cone", True), ("shifting", False)])
def test_endpoint_independent_mappings_show_one_port_to_all(kind, keeps):
    router = Router(kind, WAN)
    seen = {outer(router, target) for target in (X, Y)}
    assert len(seen) == 1
    assert ((WAN, A[1]) in seen) is keeps


def test_a_symmetric_router_takes_another_port_for_each_target():
    router = Router("symmetric", WAN)
    first, second = outer(router, X), outer(router, Y)
    assert first != second
    assert outer(router, X) == first


def test_two_computers_cannot_both_keep_one_port():
    router = Router("cone", WAN)
    assert outer(router, X) == (WAN, 4001)
    assert outer(router, X, ("10.0.0.3", 4001)) != (WAN, 4001)


@pytest.mark.parametrize("kind", KINDS)
def test_who_may_knock(kind):
    router = Router(kind, WAN)
    inside = A if not router.translates else (WAN, 4001)
    assert (router.inward(packet(X, inside), 0.0) is not None) is (kind == "open")
    source = outer(router, X)
    answer = router.inward(packet(X, source), 0.0)
    assert flow_of(answer).target == A
    stranger = router.inward(packet(Y, source), 0.0)
    assert (stranger is not None) is (kind in ("full-cone", "open"))


def test_an_idle_mapping_ends_and_a_used_one_does_not():
    router = Router("cone", WAN, idle_s=10.0)
    source = outer(router, X)
    assert router.inward(packet(X, source), 9.0) is not None
    assert router.inward(packet(X, source), 18.0) is not None
    assert router.inward(packet(X, source), 28.1) is None


def test_a_forwarded_port_lets_everybody_in_and_answers_from_that_port():
    router = Router("symmetric", WAN)
    router.forward(TCP, 5000, A)
    assert flow_of(router.inward(packet(Y, (WAN, 5000)), 0.0)).target == A
    assert outer(router, Y) == (WAN, 5000)
    router.unforward(TCP, 5000)
    assert router.inward(packet(X, (WAN, 5000)), 0.0) is None


def test_a_restarted_router_forgets():
    router = Router("cone", WAN)
    source = outer(router, X)
    router.restart()
    assert router.inward(packet(X, source), 0.0) is None


def test_mappings_are_bounded():
    router = Router("symmetric", WAN)
    for port in range(1, 6000):
        router.outward(packet(A, ("45.0.0.9", port)), float(port))
    assert len(router._by_inner) <= 4096
    assert len(router._by_port) <= 4096


HOMES = [
    RouterSpec("isp", "cone", "45.0.9.1"),
    RouterSpec("ra", "cone", "100.64.0.2", "isp"),
    RouterSpec("rb", "cone", "45.0.2.1"),
]
COMPUTERS = [
    HostSpec("pub", "45.0.0.10"),
    HostSpec("a", "10.1.0.2", "ra"),
    HostSpec("a2", "10.1.0.3", "ra"),
    HostSpec("b", "10.2.0.2", "rb"),
]


def sent(network, host, source, target, now_s=0.0):
    """(host, source as seen there) or None."""
    for one in network.send(host, packet(source, target), now_s):
        return one.host, flow_of(one.packet).source
    return None


def test_a_double_nat_translates_twice_and_answers_find_back():
    network = Network(HOMES, COMPUTERS)
    assert sent(network, "a", ("10.1.0.2", 7), ("45.0.0.10", 80)) == ("pub", ("45.0.9.1", 7))
    assert sent(network, "pub", ("45.0.0.10", 80), ("45.0.9.1", 7)) == ("a", ("45.0.0.10", 80))


def test_neighbours_reach_each_other_and_strangers_do_not():
    network = Network(HOMES, COMPUTERS)
    assert sent(network, "a", ("10.1.0.2", 7), ("10.1.0.3", 80)) == ("a2", ("10.1.0.2", 7))
    assert sent(network, "b", ("10.2.0.2", 7), ("10.1.0.3", 80)) is None
    assert sent(network, "b", ("10.2.0.2", 7), ("45.0.2.1", 80)) is None
    assert sent(network, "a", ("10.1.0.2", 7), ("45.0.2.1", 4001)) is None


def test_two_homes_meet_once_each_has_written_first():
    network = Network(HOMES, COMPUTERS)
    assert sent(network, "a", ("10.1.0.2", 7), ("45.0.2.1", 8)) is None
    assert sent(network, "b", ("10.2.0.2", 8), ("45.0.9.1", 7)) == ("a", ("45.0.2.1", 8))
    assert sent(network, "a", ("10.1.0.2", 7), ("45.0.2.1", 8)) == ("b", ("45.0.9.1", 7))


def test_a_multicast_stays_in_the_home():
    network = Network(HOMES, COMPUTERS)
    assert sent(network, "a", ("10.1.0.2", 7), ("239.255.255.250", 1900), 0.0)[0] == "a2"
    assert sent(network, "pub", ("45.0.0.10", 7), ("239.255.255.250", 1900)) is None


def test_lines_delay_hold_back_and_lose():
    slow = HostSpec("pub", "45.0.0.10", None, LinkSpec(delay_s=0.02, rate_bps=8000.0))
    network = Network([], [slow, HostSpec("c", "45.0.0.11")])
    size = len(packet(X, Y))
    first, second = (
        next(network.send("c", packet(("45.0.0.11", 1), ("45.0.0.10", 2)), 5.0)).due_s for _ in range(2)
    )
    assert first == pytest.approx(5.02 + size / 1000)
    assert second - first == pytest.approx(size / 1000)
    for _ in range(100):
        list(network.send("c", packet(("45.0.0.11", 1), ("45.0.0.10", 2)), 5.0))
    assert not list(network.send("c", packet(("45.0.0.11", 1), ("45.0.0.10", 2)), 5.0)), "the queue is full"
    lossy = Network([], [HostSpec("p", "45.0.0.10", None, LinkSpec(loss=0.5)), HostSpec("c", "45.0.0.11")])
    arrived = sum(len(list(lossy.send("c", packet(Y, X), 0.0))) for _ in range(400))
    assert 150 < arrived < 250


def test_who_moved_is_found_at_the_new_place_only():
    network = Network(HOMES, COMPUTERS)
    network.attach(HostSpec("a", "10.2.0.9", "rb"))
    assert sent(network, "b", ("10.2.0.2", 7), ("10.2.0.9", 80)) == ("a", ("10.2.0.2", 7))
    assert sent(network, "a2", ("10.1.0.3", 7), ("10.1.0.2", 80)) is None
    network.detach("a")
    assert sent(network, "b", ("10.2.0.2", 7), ("10.2.0.9", 80)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Router("sieve", WAN),
        lambda: LinkSpec(loss=1.0),
        lambda: LinkSpec(delay_s=-1.0),
        lambda: Network([], [HostSpec("a", "10.0.0.2", "nowhere")]),
        lambda: Network([], [HostSpec("a", "no address")]),
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError):
        wrong()
