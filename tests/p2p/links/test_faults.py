"""Paths break, strangers knock, peers die or lie: links go on over another path, or end with a typed error."""

import contextlib
import logging
import os
import socket

import pytest
import trio
import trio.testing

from p2p import (
    Links,
    LinksConfig,
    ListenError,
    PeerLost,
    ProtocolViolation,
    Rpc,
)
from p2p.links.handshake import CHALLENGE_SIZE, HELLO_SIZE, MAGIC, WELCOME_SIZE, Hello
from p2p.links.keys import PROOF_BYTES

SMALL = LinksConfig(
    record_bytes=4096, window_bytes=64 << 10, header_bytes_max=2048, payload_bytes_max=8 << 20
)
EAGER = LinksConfig(upgrade_min_s=0.01, upgrade_max_s=0.05)


# ---- paths that break, and better ones


@pytest.mark.parametrize("sockets", [1, 3])
async def test_a_broken_direct_path_is_replaced_and_comes_back(real_nodes, until, sockets, echo, rally):
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


async def test_a_changed_bit_costs_the_path_and_not_the_message(real_nodes, proxy_to, echo, rally):
    one, other = await real_nodes(2)
    proxy = await proxy_to(other)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        assert link.path == "direct"
        proxy.corrupt_after = 1_000_000
        await rally(link, count=8)
        assert proxy.corrupt_after is None
        assert link.path == "stream"


async def test_a_path_that_goes_silent_is_given_up(real_nodes, proxy_to, echo, rally):
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
async def test_a_listener_that_cannot_be_dialled_means_a_stream(real_nodes, until, listener, echo, rally):
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


async def test_addresses_that_fail_are_not_waited_for_again_at_once(real_nodes, echo):
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


async def test_without_listeners_and_direct_paths_streams_carry_links(real_nodes, echo, rally):
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


async def test_a_recorded_hello_is_worth_nothing(real_nodes, proxy_to, until, echo, rally):
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
async def test_a_hello_without_proof_is_refused(real_nodes, until, what, echo, rally):
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


async def test_a_listener_that_pretends_gets_no_link(real_nodes, nursery, echo, rally):
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


async def test_a_flood_of_strangers_is_bounded_and_links_still_open(real_nodes, until, echo, rally):
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


async def test_no_secret_and_no_payload_is_logged(real_nodes, proxy_to, caplog, echo, rally):
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
async def test_the_death_of_a_peer_ends_the_link_at_once(memory_nodes, nursery, waits, idle):
    one, other = await memory_nodes(2, SMALL, SMALL)
    other.links.serve("idle", idle)
    async with one.links.open(other.peer_id, "idle") as link:
        nursery.start_soon(_kill, memory_nodes.network, other)
        with pytest.raises(PeerLost):
            await (link.receive() if waits == "receiving" else link.send(b"", [bytes(1 << 20)]))


async def _kill(network, node):
    await trio.testing.wait_all_tasks_blocked()
    network.kill(node.peer_id)


async def test_a_stopped_peer_is_noticed_by_its_silence(memory_nodes, autojump_clock, idle):
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


async def test_a_handler_that_fails_ends_its_link_only(nodes, caplog, echo, rally):
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


async def test_disconnecting_a_peer_ends_its_links(nodes, echo, rally):
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


async def test_what_fails_for_one_socket_ends_that_socket_only(real_nodes, rally, echo, caplog, monkeypatch):
    one, other = await real_nodes(2)
    other.links.serve("echo", echo)

    async def fail(sock):
        raise OSError("the system is out of something")

    monkeypatch.setattr(other.links._listener, "_on_socket", fail)
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link)
        assert link.path == "stream"
    assert "out of something" in caplog.text


async def test_without_sockets_to_dial_with_a_stream_does(real_nodes, rally, echo, monkeypatch):
    one, other = await real_nodes(2)
    other.links.serve("echo", echo)

    def fail(*args):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(trio.socket, "socket", fail)
        async with one.links.open(other.peer_id, "echo") as link:
            await rally(link)
            assert link.path == "stream"


async def test_a_fault_of_our_own_ends_the_link_and_is_logged(nodes, echo, rally, caplog, monkeypatch):
    one, other = await nodes(2)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link, count=1)
        monkeypatch.setattr(link.inbox, "arrived", lambda head, record: 1 // 0)
        with pytest.raises(PeerLost, match="failed here"):
            await rally(link)
    assert "ZeroDivisionError" in caplog.text
    async with one.links.open(other.peer_id, "echo") as link:
        await rally(link, count=1)
