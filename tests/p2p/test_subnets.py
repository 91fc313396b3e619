"""What the computers of one subnet may hold of a host, and how slow a sender may be."""

from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from p2p import frames
from p2p.compat.swarm import subnet_of
from p2p.errors import PeerLost, ProtocolViolation, Unreachable
from p2p.host import HostConfig
from p2p.rpc_core import Budget, CoreLimits, LaneCore
from p2p.rpc_state import MessageLimits

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def port_of(host):
    return int(host.addrs()[0].split("/")[4])


async def until(condition, within_s=5.0):
    with trio.fail_after(within_s):
        while not condition():
            await trio.lowlevel.checkpoint()


async def test_half_open_handshakes_of_one_subnet_leave_others_their_share(make_host):
    limits = HostConfig(listen=(LOOPBACK,), handshakes_per_subnet_max=2, handshake_deadline_s=0.5)
    b = await make_host(limits)
    async with AsyncExitStack() as stack:
        for _ in range(6):
            await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port_of(b)))
        await until(lambda: b._swarm.handshaking_from["127.0.0.0/24"] == 2)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert b._swarm.handshaking == 2
        await until(lambda: b._swarm.handshaking == 0)
    assert not b._swarm.handshaking_from
    await (await make_host()).connect(b.addrs())


async def test_one_subnet_may_not_hold_every_connection(make_host):
    b = await make_host(HostConfig(listen=(LOOPBACK,), connections_per_subnet_max=2))
    others = [await make_host() for _ in range(3)]
    await others[0].connect(b.addrs())
    await others[1].connect(b.addrs())
    with pytest.raises(Unreachable):
        await others[2].connect(b.addrs())
    await others[0].disconnect(b.peer_id)
    await until(lambda: b._swarm.connected_from["127.0.0.0/24"] == 1)
    await others[2].connect(b.addrs())


@pytest.mark.parametrize(
    ("ip", "subnet"),
    [
        ("198.51.100.7", "198.51.100.0/24"),
        ("::ffff:198.51.100.9", "198.51.100.0/24"),
        ("2001:db8:5:6::1", "2001:db8:5::/48"),
        ("", ""),
    ],
)
def test_a_subnet_is_what_one_home_has(ip, subnet):
    assert subnet_of(ip) == subnet


def served():
    limits = CoreLimits(frame_deadline_s=5.0)
    return LaneCore(
        serves=True,
        limits=limits,
        budget=Budget(1 << 20),
        lookup=lambda name: (MessageLimits(9000, 0), 1 << 18),
    )


def test_a_frame_that_arrives_byte_by_byte_has_a_deadline():
    core = served()
    request = frames.pack_prefix(900, 0) + bytes(900)
    data = (
        frames.pack_open(1, "m", 60.0, 1000) + frames.pack_data_header(1, 908, first=True, end=True) + request
    )
    core.feed(data[:-800], 10.0)
    for second in range(5):
        core.feed(data[-800 + second : -799 + second], 11.0 + second)
    core.check_pace(15.0)
    with pytest.raises(ProtocolViolation, match="not whole after 5 s"):
        core.check_pace(15.1)


def test_frames_that_follow_one_another_have_a_deadline_each():
    core = served()
    core.feed(frames.pack_open(1, "m", 60.0, 1000), 0.0)
    half = frames.pack_data_header(1, 20, first=True, end=False) + frames.pack_prefix(32, 0) + bytes(2)
    core.feed(half, 1.0)
    core.feed(bytes(10) + frames.pack_data_header(1, 20, first=False, end=False), 5.0)
    core.check_pace(9.9)
    core.feed(bytes(20), 10.0)
    core.check_pace(1000.0)


async def test_a_slow_sender_loses_its_stream_and_nothing_else(memory_peers, autojump_clock):
    one, other = await memory_peers(2)
    await trio.sleep(1)
    stream = await one.host.open_stream(other.host.peer_id, "rpc/1/small")
    await stream.send_all(frames.pack_open(1, "m" * 100, 60.0, 1000)[:-1])
    with trio.fail_after(40), pytest.raises(PeerLost):
        await stream.receive_some()
    assert one.host.is_connected(other.host.peer_id)
    assert other.faults[one.host.peer_id] == 1
