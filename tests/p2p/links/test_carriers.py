"""A socket as it carries records: how much a read waits for, and what a send leaves over."""

import socket

import trio

from p2p.identity import PeerId
from p2p.links.carriers import SocketCarrier


def connected():
    """Two ends on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return SocketCarrier(one, PeerId("one")), SocketCarrier(other, PeerId("other"))


async def test_a_read_waits_for_as_much_as_it_was_told(autojump_clock):
    one, other = connected()
    buffer = memoryview(bytearray(300_000))
    got = []

    async def read():
        got.append(await other.receive_into(buffer, 250_000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for size in (10, 1000, 100_000):
            await one.send([bytes(size)])
            await trio.testing.wait_all_tasks_blocked()
            assert not got
        await one.send([bytes(150_000)])
    assert 250_000 <= got[0] <= 251_010
    await one.send([b"!"])
    assert await other.receive_into(buffer) == 251_010 - got[0] + 1
    one.close()
    other.close()


async def test_a_read_that_waits_for_more_than_comes_gives_what_came_and_then_the_end():
    one, other = connected()
    buffer = memoryview(bytearray(1000))
    await one.send([b"some"])
    one.close()
    with trio.fail_after(5):
        assert await other.receive_into(buffer, 1000) == 4
        assert await other.receive_into(buffer, 1000) == 0
    other.close()


async def test_what_a_full_socket_leaves_over_goes_once_there_is_room():
    one, other = connected()
    data = bytes(range(256)) * 65536
    rest = one.send_now([memoryview(data)[:1000], memoryview(data)[1000:]])
    assert 0 < sum(map(len, rest)) < len(data)
    got = bytearray()

    async def read():
        buffer = memoryview(bytearray(1 << 20))
        while len(got) < len(data):
            got.extend(buffer[: await other.receive_into(buffer)])

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await one.send(rest)
    assert got == data
    one.close()
    other.close()
