"""Packets that leave on the spot: order is kept where a socket takes only a part, and a sink's fault stays its own."""

import os
import random
import socket
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamReset

from p2p.compat.noise import BufferedNoiseReadWriter
from p2p.compat.tcp import MendedTcpStream
from p2p.compat.yamux import MendedYamux, MuxLimits

PEER = ID(b"\x00\x24\x08\x01\x12\x20" + b"p" * 32)


class Session:
    """What a handshake leaves: a connection encrypted by two keys."""

    def __init__(self, sock, initiator, keys):
        states = [SimpleNamespace(k=key, n=0) for key in (keys if initiator else keys[::-1])]
        protocol = SimpleNamespace(cipher_state_encrypt=states[0], cipher_state_decrypt=states[1])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.stream = MendedTcpStream(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        raw = RawConnection(self.stream, initiator)
        self.packets = BufferedNoiseReadWriter(raw, SimpleNamespace(noise_protocol=protocol))
        self.is_initiator = initiator

    async def read(self, n=None):
        return await self.packets.read_msg()

    async def write(self, data):
        await self.packets.write_msg(data)

    async def close(self):
        await self.stream.close()


@pytest.fixture
def sockets():
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    for one in (near, far):
        one.setblocking(False)
    return near, far


@pytest.fixture
async def muxers(nursery, sockets):
    keys = os.urandom(32), os.urandom(32)
    made = [
        MendedYamux(Session(sock, sock is sockets[0], keys), PEER, MuxLimits(window_bytes=256 << 10))
        for sock in sockets
    ]
    for muxer in made:
        nursery.start_soon(muxer.start)
        await muxer.event_started.wait()
    yield made
    for muxer in made:
        muxer.abort("the test ends")


async def test_what_a_full_socket_left_over_goes_first(muxers):
    chance = random.Random(5)
    near = [await muxers[0].open_stream() for _ in range(4)]
    far = [await muxers[1].accept_stream() for _ in range(4)]
    sent = [chance.randbytes(1 << 19) for _ in near]
    received = [bytearray() for _ in near]

    async def send(stream, data):
        at = 0
        while at < len(data):
            piece = data[at : at + chance.choice((1, 700, 9000, 70_000))]
            if not stream.write_nowait(piece):
                await stream.write(piece)
            at += len(piece)

    async def receive(stream, into):
        while len(into) < 1 << 19:
            into += await stream.read(1 << 16)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for index, one in enumerate(near):
                nursery.start_soon(send, one, sent[index])
                nursery.start_soon(receive, far[index], received[index])
                nursery.start_soon(send, far[index], sent[index])
                nursery.start_soon(receive, one, bytearray())
    assert received == sent


async def test_the_rest_of_a_single_frame_needs_no_other_frame_to_follow(muxers):
    near = await muxers[0].open_stream()
    far = await muxers[1].accept_stream()
    await trio.testing.wait_all_tasks_blocked(0.05)
    got = 0
    assert near.write_nowait(bytes(65_000))
    assert muxers[0]._sealed, "the socket was to take only a part"
    with trio.fail_after(5):
        while got < 65_000:
            got += len(await far.read(1 << 16))


async def test_a_sink_takes_what_it_can_and_the_rest_is_read(muxers):
    near = await muxers[0].open_stream()
    far = await muxers[1].accept_stream()
    taken = []

    def take(piece):
        taken.append(bytes(piece[:4]))
        return min(4, len(piece))

    far.feed_to(take)
    await near.write(b"1234")
    await trio.testing.wait_all_tasks_blocked(0.05)
    await near.write(b"5678 and more")
    await near.close_write()
    with trio.fail_after(5):
        assert await far.read() == b" and more"
        with pytest.raises(MuxedStreamEOF):
            await far.read(1)
    assert taken == [b"1234", b"5678"]
    assert muxers[1].unread_bytes == 0


async def test_a_sink_that_fails_ends_its_own_stream_only(muxers, caplog):
    near = [await muxers[0].open_stream() for _ in range(2)]
    far = [await muxers[1].accept_stream() for _ in range(2)]

    def fail(piece):
        raise KeyError("a fault of ours")

    far[0].feed_to(fail)
    with trio.fail_after(5):
        await near[0].write(b"x")
        with pytest.raises(MuxedStreamReset):
            await near[0].read()
        await near[1].write(b"still here")
        assert await far[1].read() == b"still here"
    assert "could not be taken" in caplog.text


async def test_bytes_that_were_not_sealed_by_the_peer_end_the_connection(muxers, sockets):
    stream = await muxers[0].open_stream()
    muxers[1].secured_conn.stream.send_now(memoryview(b"\x00\x20" + bytes(32)))
    with trio.fail_after(5):
        await muxers[0].event_closed.wait()
    assert stream.was_reset


async def test_a_socket_that_is_gone_says_so(sockets):
    near = MendedTcpStream(trio.SocketStream(trio.socket.from_stdlib_socket(sockets[0])))
    sockets[1].close()
    with trio.fail_after(5):
        assert await near.receive_into(memoryview(bytearray(8))) == 0
        with pytest.raises(ConnectionClosedError):
            await near.write(bytes(64 << 20))
        near.close_now()
        assert await near.receive_into(memoryview(bytearray(8))) == 0
