"""Paths break, strangers knock, peers die or lie: links go on over another path, or end with a typed error."""

import contextlib
import dataclasses
import logging
import os
import socket

import numpy as np
import pytest
import trio
import trio.testing

from p2p import (
    CallFailed,
    Links,
    LinksConfig,
    ListenError,
    LocalFault,
    PeerLost,
    ProtocolViolation,
    ResourceLimit,
    Rpc,
)
from p2p.links.handshake import CHALLENGE_SIZE, HELLO_SIZE, MAGIC, WELCOME_SIZE, Hello
from p2p.links.keys import PROOF_BYTES, Exchange
from p2p.links.links import OPEN, OpenLink

SMALL = LinksConfig(
    record_bytes=4096, window_bytes=64 << 10, header_bytes_max=2048, payload_bytes_max=8 << 20
)
EAGER = LinksConfig(upgrade_min_s=0.01, upgrade_max_s=0.05)


async def echo(link):
    while True:
        header, payload = await link.receive()
        await link.send(header, [payload])


async def idle(link):
    await trio.sleep_forever()


async def rally(link, count=5, size=300_000):
    """Messages there and back, checked."""
    for index in range(count):
        payload = os.urandom(size)
        await link.send(str(index).encode(), [payload])
        header, got = await link.receive()
        assert (header, bytes(got)) == (str(index).encode(), payload)


# ---- paths that break, and better ones


@pytest.mark.parametrize("sockets", [1, 3])
async def test_a_broken_direct_path_is_replaced_and_comes_back(real_nodes, until, sockets):
    config = LinksConfig(upgrade_min_s=0.01, sockets=sockets, sockets_near=sockets)
    one, other = await real_nodes(2, config, config)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link)
        for _ in range(3):
            path = link.path_now
            assert path.name == "direct"
            path.carriers[-1].close()
            await until(lambda path=path: link.path_now not in (path, None))
            await rally(link)
            await until(lambda: link.path == "direct")
            await rally(link)


async def test_a_path_that_breaks_in_mid_message_loses_nothing(real_nodes, proxy_to, until):
    one, other = await real_nodes(2, EAGER, EAGER)
    proxy = await proxy_to(other)
    got = []

    async def keep(link):
        while True:
            got.append(bytes((await link.receive())[1]))

    other.links.serve("keep", keep)
    payloads = [os.urandom(3_000_000) for _ in range(12)]
    async with one.links.open(other.peer_id, "keep") as link, trio.open_nursery() as nursery:

        async def send():
            for payload in payloads:
                await link.send(b"", [payload])

        nursery.start_soon(send)
        for count in (2, 5, 9):
            await until(lambda count=count: len(got) >= count)
            await proxy.cut()
        await until(lambda: len(got) == len(payloads))
    assert got == payloads


async def test_a_changed_bit_costs_the_path_and_not_the_message(real_nodes, proxy_to):
    one, other = await real_nodes(2)
    proxy = await proxy_to(other)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        assert link.path == "direct"
        proxy.corrupt_after = 1_000_000
        await rally(link, count=8)
        assert proxy.corrupt_after is None
        assert link.path == "stream"


async def test_a_path_that_goes_silent_is_given_up(real_nodes, proxy_to):
    config = LinksConfig(stall_deadline_s=0.2, upgrade_min_s=60)
    one, other = await real_nodes(2, config, config)
    proxy = await proxy_to(other)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link, count=1)
        proxy.flowing = trio.Event()
        with trio.fail_after(5):
            await rally(link)
        assert link.path == "stream"


@pytest.mark.parametrize("listener", ["closed", "silent", "something else"])
async def test_a_listener_that_cannot_be_dialled_means_a_stream(real_nodes, until, listener):
    one, other = await real_nodes(2, EAGER, EAGER)
    other.links.serve("echo", echo)
    truth = other.links.addrs()
    with socket.create_server(("127.0.0.1", 0)) as server:
        if listener == "closed":
            server.close()
            other.links._listener._offered = ["127.0.0.1:1"]
        else:
            other.links._listener._offered = [f"127.0.0.1:{server.getsockname()[1]}"]
        async with trio.open_nursery() as nursery:
            if listener == "something else":
                nursery.start_soon(_greet, server)
            async with one.links.open(other.peer_id, "echo") as link:
                assert link.path == "stream"
                await rally(link)
            nursery.cancel_scope.cancel()
    other.links._listener._offered = list(truth)
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link)
        await until(lambda: link.path == "direct")
        await rally(link)


async def _greet(server):
    server.setblocking(False)
    trio_server = trio.socket.from_stdlib_socket(server)
    while True:
        stranger, _ = await trio_server.accept()
        with stranger:
            await stranger.send(b"HTTP/1.1 400 Bad Request, and a good deal more than that\r\n")


async def test_addresses_that_fail_are_not_waited_for_again_at_once(real_nodes):
    slow = LinksConfig(dial_grace_s=0.2, upgrade_min_s=60)
    one, other = await real_nodes(2, slow, slow)
    other.links.serve("echo", echo)
    with socket.create_server(("127.0.0.1", 0)) as server:
        other.links._listener._offered = [f"127.0.0.1:{server.getsockname()[1]}"]
        async with one.links.open(other.peer_id, "echo"):
            pass
        began_s = trio.current_time()
        async with one.links.open(other.peer_id, "echo") as link:
            assert link.path == "stream"
            assert trio.current_time() - began_s < 0.2


async def test_a_port_in_use_is_said_in_one_line(memory_nodes):
    host = memory_nodes.network.host("a")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        links = Links(host, Rpc(host), host, LinksConfig(listen=(f"127.0.0.1:{port}",)))
        with pytest.raises(ListenError, match=f"port {port} is already in use"):
            await links.run()


async def test_without_listeners_and_direct_paths_streams_carry_links(real_nodes):
    one, other = await real_nodes(2, LinksConfig(listen=()), LinksConfig(direct=False))
    for node in (one, other):
        node.links.serve("echo", echo)
    assert one.links.addrs() == other.links.addrs() == ()
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link)
        assert link.path == "stream"


# ---- strangers


async def knock(address, said):
    """A stranger says `said` to a listener; whether anything was answered but the challenge."""
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stranger:
        assert len(await stranger.receive_some(CHALLENGE_SIZE)) == CHALLENGE_SIZE
        await stranger.send_all(said)
        with contextlib.suppress(trio.BrokenResourceError):
            return await stranger.receive_some() != b""
        return False


async def test_a_recorded_hello_is_worth_nothing(real_nodes, proxy_to, until):
    """Not even one that never arrived: its proof answers another challenge."""
    late = LinksConfig(upgrade_min_s=60)
    one, other = await real_nodes(2, late, late)
    target = other.links.addrs()[0]
    proxy = await proxy_to(other)
    proxy.withheld = True
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        assert link.path == "stream"
        hello = b"".join(proxy.said)
        assert len(hello) == HELLO_SIZE
        path = link.path_now
        assert not await knock(target, hello)
        await until(lambda: other.links.faults["refused"] == 1)
        await rally(link, count=1)
        assert link.path_now is path


@pytest.mark.parametrize(
    "what", ["wrong proof", "another challenge", "unknown session", "noise", "another protocol"]
)
async def test_a_hello_without_proof_is_refused(real_nodes, until, what):
    one, other = await real_nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link, count=1)
        path = link.path_now
        true = Hello(link.terms.session, 1000, 0, 1, 0).said()
        said = {
            "wrong proof": true + bytes(PROOF_BYTES),
            "another challenge": true + link.keys.proof(b"hello", os.urandom(32), true),
            "unknown session": Hello(bytes(16), 1000, 0, 1, 0).said() + bytes(PROOF_BYTES),
            "noise": os.urandom(HELLO_SIZE),
            "another protocol": b"GET / HTTP/1.1".ljust(HELLO_SIZE),
        }[what]
        assert not await knock(other.links.addrs()[0], said)
        await until(lambda: other.links.faults["refused"] == 1)
        await rally(link, count=1)
        assert link.path_now is path


async def test_a_listener_that_pretends_gets_no_link(real_nodes, nursery):
    one, other = await real_nodes(2, EAGER, EAGER)
    other.links.serve("echo", echo)

    told = []

    async def pretend(stream):
        async with stream:
            await stream.send_all(MAGIC + bytes(CHALLENGE_SIZE - len(MAGIC)))
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.receive_some()
                await stream.send_all(bytes(WELCOME_SIZE))
                told.append(await stream.receive_some())

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, pretend, [listener])
    other.links._listener._offered = [f"127.0.0.1:{listener.socket.getsockname()[1]}"]
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link)
        assert link.path == "stream"
    assert not any(told)


async def test_a_stranger_who_says_nothing_is_shown_out(real_nodes, until):
    (node,) = await real_nodes(1, LinksConfig(handshake_deadline_s=0.05))
    host, _, port = node.links.addrs()[0].rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stranger:
        await stranger.receive_some(CHALLENGE_SIZE)
        await stranger.send_all(b"SHL1")
        with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):
            assert await stranger.receive_some() == b""
    assert node.links.faults["slow"] == 1


async def test_a_flood_of_strangers_is_bounded_and_links_still_open(real_nodes, until):
    crowded = LinksConfig(handshakes_max=8, handshakes_per_ip_max=4)
    one, other = await real_nodes(2, crowded, crowded)
    other.links.serve("echo", echo)
    host, _, port = other.links.addrs()[0].rpartition(":")
    strangers = [await trio.open_tcp_stream(host, int(port)) for _ in range(40)]
    await until(lambda: other.links.faults["crowded"] >= 36)
    assert other.links._listener._knocking.total() <= 4
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link)
    for stranger in strangers:
        await stranger.aclose()
    await until(lambda: other.links._listener._knocking.total() == 0)


async def test_no_secret_and_no_payload_is_logged(real_nodes, proxy_to, caplog):
    caplog.set_level(logging.DEBUG)
    one, other = await real_nodes(2)
    proxy = await proxy_to(other)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await link.send(b"the header", [b"the payload"])
        await link.receive()
        await proxy.cut()
        await rally(link, count=1)
        secrets = [link.terms.session, link.keys._proofs, link.keys.outward._secret]
        shown = repr(link) + repr(link.keys) + repr(link.keys.outward)
    for text in [*(record.getMessage() for record in caplog.records), shown]:
        assert "the header" not in text
        assert "the payload" not in text
        assert not any(secret.hex() in text or repr(secret)[2:-1] in text for secret in secrets)


# ---- peers


@pytest.mark.parametrize("waits", ["receiving", "sending"])
async def test_the_death_of_a_peer_ends_the_link_at_once(memory_nodes, nursery, waits):
    one, other = await memory_nodes(2, SMALL, SMALL)
    other.links.serve("idle", idle)
    async with one.links.open(other.peer_id, "idle") as link:
        nursery.start_soon(_kill, memory_nodes.network, other)
        with pytest.raises(PeerLost):
            await (link.receive() if waits == "receiving" else link.send(b"", [bytes(1 << 20)]))


async def _kill(network, node):
    await trio.testing.wait_all_tasks_blocked()
    network.kill(node.peer_id)


async def test_a_stopped_peer_is_noticed_by_its_silence(memory_nodes, autojump_clock):
    one, other = await memory_nodes(2)
    other.links.serve("idle", idle)
    async with one.links.open(other.peer_id, "idle") as link:
        memory_nodes.network.freeze(other.peer_id)
        with trio.fail_after(6), pytest.raises(PeerLost):
            await link.receive()


async def test_a_peer_that_stalls_in_mid_message_is_given_up(memory_nodes, autojump_clock):
    one, other = await memory_nodes(2)

    async def half(link):
        link.outbox.begin(b"h", b"", 1_000_000, wants_echo=False)
        link.outbox.part(memoryview(bytes(262144)))
        link._send_now()
        await trio.sleep_forever()

    other.links.serve("half", half)
    async with one.links.open(other.peer_id, "half") as link:
        with pytest.raises(PeerLost, match="stalled in mid-message for 1"):
            await link.receive()


async def test_a_claim_of_a_tebibyte_allocates_nothing(nodes):
    one, other = await nodes(2)

    async def boast(link):
        link.outbox.begin(b"h", b"", 1 << 40, wants_echo=False)
        link._send_now()
        await trio.sleep_forever()

    other.links.serve("boast", boast)
    async with one.links.open(other.peer_id, "boast") as link:
        with pytest.raises(ProtocolViolation, match="1099511627776"):
            await link.receive(lambda header, size: pytest.fail("asked for a buffer"))


async def test_a_handler_that_fails_ends_its_link_only(nodes, caplog):
    one, other = await nodes(2)
    other.links.serve("echo", echo)

    async def fail(link):
        await link.receive()
        raise ZeroDivisionError

    other.links.serve("fail", fail)
    async with one.links.open(other.peer_id, "fail") as link:
        await link.send(b"x")
        with pytest.raises(PeerLost):
            await link.receive()
    assert "the handler of service fail failed" in caplog.text
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link)


async def test_disconnecting_a_peer_ends_its_links(nodes):
    one, other = await nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link, count=1)
        await one.host.disconnect(other.peer_id)
        with trio.fail_after(5), pytest.raises(PeerLost):
            await link.receive()
    with pytest.raises(PeerLost):
        async with one.links.open(other.peer_id, "echo"):
            pass


# ---- cancelling, closing, limits


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


async def test_a_message_that_was_complete_when_its_receiver_was_cancelled_is_not_lost(memory_nodes):
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


async def test_messages_of_many_senders_stay_whole(nodes):
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


async def test_using_a_link_that_was_closed_here_is_our_fault(nodes):
    one, other = await nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await link.aclose()
        with pytest.raises((LocalFault, PeerLost)):
            await link.send(b"x")
        await link.aclose()


async def test_a_second_receiver_is_refused(memory_nodes):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link, trio.open_nursery() as nursery:
        nursery.start_soon(link.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LocalFault, match="another task receives"):
            await link.receive()
        nursery.cancel_scope.cancel()


async def test_too_many_links_are_refused_here_and_there(memory_nodes, until):
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


async def test_windows_shrink_where_much_is_promised_and_then_links_are_refused(memory_nodes):
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


async def test_a_node_may_open_a_link_to_itself(nodes):
    (node,) = await nodes(1)
    node.links.serve("echo", echo)
    async with node.links.open(node.peer_id, "echo") as link:
        await rally(link)


async def test_traffic_tells_round_trip_and_bandwidth(real_nodes, until):
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


async def test_a_very_near_peer_gets_small_buffers(real_nodes):
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
async def test_arrays_are_sent_as_their_bytes(memory_nodes, shape):
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
async def test_a_wish_that_makes_no_sense_is_refused_and_leaves_nothing(memory_nodes, changed):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    good = OpenLink("echo", os.urandom(16), Exchange().public, 1 << 18, 1 << 20)
    with pytest.raises(CallFailed):
        await one.rpc.call(other.peer_id, OPEN, dataclasses.replace(good, **changed))
    assert not other.links._entries
    assert other.links._promised_bytes == 0


async def test_the_largest_claims_get_no_more_than_the_limits(memory_nodes):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    wish = OpenLink("echo", os.urandom(16), Exchange().public, (1 << 63) - 1, (1 << 63) - 1)
    opened = await one.rpc.call(other.peer_id, OPEN, wish)
    config = other.links.config
    assert (opened.record_bytes, opened.window_bytes) == (config.record_bytes, config.window_bytes)
    assert other.links._promised_bytes == 2 * config.window_bytes
    with pytest.raises(CallFailed, match="must be new"):
        await one.rpc.call(other.peer_id, OPEN, wish)


async def test_a_wish_without_a_path_is_forgotten(memory_nodes, autojump_clock):
    one, other = await memory_nodes(2)
    other.links.serve("echo", echo)
    await one.rpc.call(
        other.peer_id, OPEN, OpenLink("echo", os.urandom(16), Exchange().public, 1 << 18, 1 << 20)
    )
    assert len(other.links._entries) == 1
    await trio.sleep(other.links.config.open_deadline_s + 1)
    assert not other.links._entries
