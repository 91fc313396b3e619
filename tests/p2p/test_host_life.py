"""A host's beginning and end: listen addresses, limits, closing, and peers whose process dies or stops."""

import math
import socket
import subprocess
import sys

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2p.compat.swarm import SwarmHooks, SwarmLimits, build_swarm, check_guards
from p2p.errors import ListenError, LocalFault
from p2p.host import HostConfig, PeerEvent, open_host
from p2p.identity import Identity

KEY = b"k" * 32
CONFIG = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))


async def until(condition, within_s=5.0):
    with trio.fail_after(within_s):
        while not condition():
            await trio.lowlevel.checkpoint()


def port_of(host):
    return int(host.addrs()[0].split("/")[4])


async def test_a_port_in_use_is_one_line_that_names_it(make_host):
    a = await make_host()
    with pytest.raises(ListenError, match=rf"port {port_of(a)} is already in use") as caught:
        await make_host(HostConfig(listen=(f"/ip4/127.0.0.1/tcp/{port_of(a)}",)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["", "nonsense", "/ip4/127.0.0.1/udp/0", "/ip4/127.0.0.1", "/dns4/x/tcp/0"]
)
async def test_a_listen_address_that_is_not_one_is_one_clear_line(make_host, address):
    with pytest.raises(ListenError, match="cannot listen on"):
        await make_host(HostConfig(listen=(address,)))


@pytest.mark.parametrize(
    "fields",
    [
        {"connections_max": 0},
        {"dial_deadline_s": -1.0},
        {"stream_window_bytes": 1000},
        {"events_max": math.nan},
    ],
)
def test_a_limit_out_of_range_is_named(fields):
    with pytest.raises(LocalFault, match=f"HostConfig.{next(iter(fields))} must be"):
        HostConfig(**fields)


async def test_a_bad_mesh_id_is_refused(make_host):
    with pytest.raises(LocalFault, match="mesh id"):
        await make_host(mesh_id="no/slashes")


async def test_an_exception_of_the_block_leaves_as_it_is():
    with pytest.raises(KeyError):
        async with open_host(Identity.generate(), "mesh", KEY, CONFIG):
            raise KeyError("mine")


async def test_closing_with_many_peers_releases_the_port(make_host):
    others = [await make_host() for _ in range(5)]
    async with open_host(Identity.generate(), "mesh", KEY, CONFIG) as host:
        port = port_of(host)
        for other in others:
            await host.connect(other.addrs())
    await until(lambda: not any(other.peers() for other in others))
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_what_was_sent_just_before_the_host_stopped_still_arrives(make_host):
    other = await make_host()
    got = bytearray()

    async def collect(stream):
        while data := await stream.receive_some():
            got.extend(data)

    other.handle("collect/1", collect)
    async with open_host(Identity.generate(), "mesh", KEY, CONFIG) as host:
        await host.connect(other.addrs())
        stream = await host.open_stream(other.peer_id, "collect/1")
        await stream.send_all(b"last words" * 20_000)
    await until(lambda: len(got) == 200_000)


async def test_no_connection_is_made_that_nobody_asked_for(make_host):
    a, b, c = [await make_host() for _ in range(3)]
    await a.connect(b.addrs())
    await b.connect(c.addrs())
    a.raw.get_peerstore().add_addrs(
        ID.from_base58(c.peer_id), [Multiaddr(c.addrs()[0].partition("/p2p/")[0])], 600
    )
    await a._swarm.auto_connector.maybe_connect()
    await a.disconnect(b.peer_id)
    await trio.testing.wait_all_tasks_blocked(0.3)
    assert a.peers() == ()


def test_a_swarm_without_its_guards_is_refused():
    swarm = build_swarm(b"s" * 32, SwarmLimits(), SwarmHooks())
    check_guards(swarm)
    swarm.set_resource_manager(None)
    with pytest.raises(LocalFault, match="resource manager"):
        check_guards(swarm)


CHILD = """
import sys, trio
from p2p import HostConfig, Identity, open_host
async def main():
    config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    async with open_host(Identity.generate(), "mesh", b"k" * 32, config) as host:
        print(*host.addrs(), flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().split()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_a_killed_peer_is_down_at_once(make_host, child):
    process, addrs = child
    host = await make_host()
    with host.watch() as events:
        peer = await host.connect(addrs)
        assert await events.receive() == PeerEvent(peer, "up")
        process.kill()
        with trio.fail_after(2.5):
            assert await events.receive() == PeerEvent(peer, "down")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
async def test_a_stopped_peer_can_be_disconnected_at_once(make_host, child):
    import signal

    process, addrs = child
    host = await make_host()
    peer = await host.connect(addrs)
    process.send_signal(signal.SIGSTOP)
    with host.watch() as events, trio.fail_after(2.5):
        await host.disconnect(peer)
        assert await events.receive() == PeerEvent(peer, "down")
