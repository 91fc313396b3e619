"""Cancelling, closing, limits and what traffic tells: the rest of a link's life."""

import dataclasses
import os
import socket

import numpy as np
import pytest
import trio
import trio.testing

from p2p import CallFailed, LinksConfig, LocalFault, PeerLost, ResourceLimit
from p2p.links.keys import Exchange
from p2p.links.links import OPEN, OpenLink

SMALL = LinksConfig(
    record_bytes=4096, window_bytes=64 << 10, header_bytes_max=2048, payload_bytes_max=8 << 20
)


async def test_a_cancelled_send_lets_the_next_message_through(nodes):
    one, other = await nodes(2, SMALL, SMALL)
    go = trio.Event()
    got = []

    async def late(link):
        await go.wait()
        while True:
            header, payload = await link.receive()
            got.append((header, len(payload)))
            await link.send(b"ok")

    other.links.serve("late", late)
    async with one.links.open(other.peer_id, "late") as link:
        with trio.move_on_after(0.05):
            await link.send(b"cut short", [bytes(1 << 20)])
        go.set()
        await link.send(b"whole", [bytes(200_000)])
        assert (await link.receive())[0] == b"ok"
    assert got == [(b"whole", 200_000)]


async def test_a_cancelled_receive_goes_on_with_the_same_message(nodes):
    one, other = await nodes(2, SMALL, SMALL)
    more = trio.Event()

    async def half(link):
        payload = bytes(range(256)) * 64
        link.outbox.begin(b"h", b"", len(payload), wants_echo=False)
        link.outbox.part(memoryview(payload[:4096]))
        link._send_now()
        await more.wait()
        for at in range(4096, len(payload), 4096):
            link.outbox.part(memoryview(payload[at : at + 4096]))
        link._send_now()
        await trio.sleep_forever()

    other.links.serve("half", half)
    place = bytearray(16384)
    begun = trio.Event()

    def sink(header, size):
        begun.set()
        return memoryview(place)

    async with one.links.open(other.peer_id, "half") as link:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.receive, sink)
            await begun.wait()
            nursery.cancel_scope.cancel()
        more.set()
        header, got = await link.receive(lambda header, size: pytest.fail("asked again"))
        assert (header, got.obj is place, bytes(got)) == (b"h", True, bytes(range(256)) * 64)


async def test_a_message_that_was_complete_when_its_receiver_was_cancelled_is_not_lost(memory_nodes, echo):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        for word in (b"first", b"second"):
            await link.send(word)
        with trio.CancelScope() as scope:
            scope.cancel()
            await link.receive()
        assert scope.cancelled_caught
        assert [(await link.receive())[0] for _ in range(2)] == [b"first", b"second"]


async def test_messages_of_many_senders_stay_whole(nodes, echo):
    one, other = await nodes(2, SMALL, SMALL)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link, trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(link.send, bytes([number]), [bytes([number]) * 50_000])
        got = [await link.receive() for _ in range(8)]
    assert sorted(header[0] for header, _ in got) == list(range(8))
    assert all(bytes(payload) == header * 50_000 for header, payload in got)


async def test_what_was_sent_before_a_quick_close_is_received(nodes):
    one, other = await nodes(2)
    got = trio.Event()

    async def keep(link):
        header, payload = await link.receive()
        assert (header, len(payload)) == (b"all", 3_000_000)
        got.set()

    other.links.serve("keep", keep)
    async with one.links.open(other.peer_id, "keep") as link:
        await link.send(b"all", [bytes(3_000_000)])
    with trio.fail_after(5):
        await got.wait()


async def test_using_a_link_that_was_closed_here_is_our_fault(nodes, echo):
    one, other = await nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await link.aclose()
        with pytest.raises((LocalFault, PeerLost)):
            await link.send(b"x")
        await link.aclose()


async def test_a_second_receiver_is_refused(memory_nodes, echo):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link, trio.open_nursery() as nursery:
        nursery.start_soon(link.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LocalFault, match="another task receives"):
            await link.receive()
        nursery.cancel_scope.cancel()


async def test_too_many_links_are_refused_here_and_there(memory_nodes, until, echo):
    few = LinksConfig(links_per_peer_max=2)
    one, other = await memory_nodes(2, few, LinksConfig(links_per_peer_max=1))
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo"):
        with pytest.raises(ResourceLimit, match="no room"):
            async with one.links.open(other.peer_id, "echo"):
                pass
        async with trio.open_nursery() as nursery:
            other.links.config = few
            await until(lambda: len(one.links._entries) == 1)
            async with one.links.open(other.peer_id, "echo"):
                with pytest.raises(ResourceLimit, match="2 links"):
                    async with one.links.open(other.peer_id, "echo"):
                        pass
            nursery.cancel_scope.cancel()
    await until(lambda: not one.links._entries and not other.links._entries)
    assert one.links._promised_bytes == other.links._promised_bytes == 0


async def test_windows_shrink_where_much_is_promised_and_then_links_are_refused(memory_nodes, echo, rally):
    tight = LinksConfig(held_bytes_max=4 << 20, links_per_peer_max=1000)
    one, other = await memory_nodes(2, LinksConfig(links_per_peer_max=1000), tight)
    other.links.serve("echo", echo)
    async with trio.open_nursery() as nursery:
        refused = trio.Event()

        async def hold():
            try:
                async with one.links.open(other.peer_id, "echo") as link:
                    await rally(link, count=1, size=100_000)
                    await trio.sleep_forever()
            except ResourceLimit:
                refused.set()

        for _ in range(600):
            nursery.start_soon(hold)
        await refused.wait()
        assert other.links._promised_bytes <= (4 << 20) + sum(
            entry.link.terms.send_window_bytes for entry in other.links._entries
        )
        nursery.cancel_scope.cancel()


async def test_who_opens_a_link_may_want_less_to_be_held(memory_nodes, echo, rally):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo", window_bytes=64 << 10) as link:
        await rally(link)
        (far,) = other.links._entries
        for terms in (link.terms, far.link.terms):
            assert terms.receive_window_bytes == terms.send_window_bytes == 64 << 10


@pytest.mark.parametrize("larger", [0, 1])
async def test_both_ends_count_with_the_smaller_window(memory_nodes, echo, rally, larger):
    """Who tells what it took in quarters of its own, larger window lets the other one wait for seconds."""
    configs = [LinksConfig(window_bytes=64 << 10, record_bytes=16 << 10)] * 2
    configs[larger] = LinksConfig(window_bytes=16 << 20)
    one, other = await memory_nodes(2, *configs)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        with trio.fail_after(5):
            await rally(link)
        (far,) = other.links._entries
        for terms in (link.terms, far.link.terms):
            assert terms.receive_window_bytes == terms.send_window_bytes == 64 << 10


async def test_a_node_may_open_a_link_to_itself(nodes, echo, rally):
    (node,) = await nodes(1)
    node.links.serve("echo", echo)
    async with node.links.open(node.peer_id, "echo") as link:
        await rally(link)


async def test_traffic_tells_round_trip_and_bandwidth(real_nodes, until, echo, rally):
    one, other = await real_nodes(2)
    other.links.serve("echo", echo)
    assert one.links.report() == ()
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link, count=12, size=4_000_000)
        (report,) = one.links.report()
        assert (report.peer, report.path, report.links, report.sockets) == (other.peer_id, "direct", 1, 1)
        assert report.bytes_sent == report.bytes_received == link.bytes_sent
        assert report.bytes_sent >= 48_000_000
        assert 0 < report.rtt_s < 5
        assert report.bandwidth_bps > 1e6
        assert report.inbound_bps > 1e6
    await until(lambda: one.links.report()[0].path == "none")


async def test_a_very_near_peer_gets_small_buffers(real_nodes, echo, rally):
    one, other = await real_nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link)
        (carrier,) = link.path_now.carriers
        if carrier._tcp_info(148) is None:
            pytest.skip("this system does not tell of round trips")
        assert carrier._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 512 << 10
        assert one.links.report()[0].loss is not None


@pytest.mark.parametrize("shape", [(0,), (3, 0), (7, 5)])
async def test_arrays_are_sent_as_their_bytes(memory_nodes, shape, echo):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    async with one.links.open(other.peer_id, "echo") as link:
        await link.send(b"", [array.data, b"", array.data])
        _, got = await link.receive()
        assert bytes(got) == 2 * array.tobytes()


async def test_a_link_counts_until_its_handler_has_returned(memory_nodes, until):
    one, other = await memory_nodes(2)
    stop = trio.Event()

    async def linger(link):
        await stop.wait()

    other.links.serve("linger", linger)
    async with one.links.open(other.peer_id, "linger"):
        pass
    await trio.testing.wait_all_tasks_blocked()
    assert (len(one.links._entries), len(other.links._entries)) == (0, 1)
    stop.set()
    await until(lambda: not other.links._entries)


@pytest.mark.parametrize(
    "changed",
    [
        {"service": "nothing"},
        {"service": ""},
        {"session": b""},
        {"session": bytes(1000)},
        {"key": bytes(31)},
        {"key": bytes(32)},
        {"record_bytes": -1},
        {"record_bytes": 0},
        {"record_bytes": 4095},
        {"window_bytes": -(2**63)},
        {"window_bytes": 0},
        {"window_bytes": 16383},
    ],
)
async def test_a_wish_that_makes_no_sense_is_refused_and_leaves_nothing(memory_nodes, changed, echo):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    good = OpenLink("echo", os.urandom(16), Exchange().public, 1 << 18, 1 << 20)
    with pytest.raises(CallFailed):
        await one.rpc.call(other.peer_id, OPEN, dataclasses.replace(good, **changed))
    assert not other.links._entries
    assert other.links._promised_bytes == 0


async def test_the_largest_claims_get_no_more_than_the_limits(memory_nodes, echo):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    wish = OpenLink("echo", os.urandom(16), Exchange().public, (1 << 63) - 1, (1 << 63) - 1)
    opened = await one.rpc.call(other.peer_id, OPEN, wish)
    config = other.links.config
    assert (opened.record_bytes, opened.window_bytes) == (config.record_bytes, config.window_bytes)
    assert other.links._promised_bytes == 2 * config.window_bytes
    with pytest.raises(CallFailed, match="must be new"):
        await one.rpc.call(other.peer_id, OPEN, wish)


async def test_a_wish_without_a_path_is_forgotten(memory_nodes, autojump_clock, echo):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    await one.rpc.call(
        other.peer_id, OPEN, OpenLink("echo", os.urandom(16), Exchange().public, 1 << 18, 1 << 20)
    )
    assert len(other.links._entries) == 1
    await trio.sleep(other.links.config.open_deadline_s + 1)
    assert not other.links._entries
