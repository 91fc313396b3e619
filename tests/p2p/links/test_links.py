"""Links between two nodes: messages come whole and in order, whatever carries them."""

import os

import pytest
import trio

from p2p import EndOfChannel, LinksConfig, LocalFault, PeerLost, Unreachable

SMALL = LinksConfig(
    record_bytes=4096, window_bytes=64 << 10, header_bytes_max=2048, payload_bytes_max=8 << 20
)


async def echo(link):
    while True:
        header, payload = await link.receive()
        await link.send(header, [payload])


@pytest.mark.parametrize("size", [0, 1, 4096, 16 << 10, 65536, 100_001, 1 << 20, 5_000_003])
async def test_a_message_comes_back_as_it_was(nodes, size):
    one, other = await nodes(2)
    other.links.serve("echo", echo)
    payload = os.urandom(size)
    async with one.links.open(other.peer_id, "echo") as link:
        await link.send(b"head", [payload])
        header, got = await link.receive()
        assert (header, bytes(got)) == (b"head", payload)
        assert link.path == ("direct" if nodes.network is None else "stream")


@pytest.mark.parametrize("sockets", [1, 3])
async def test_many_messages_keep_their_order_both_ways(nodes, sockets):
    config = LinksConfig(
        sockets=sockets, sockets_near=sockets, record_bytes=4096, window_bytes=64 << 10, header_bytes_max=2048
    )
    one, other = await nodes(2, config, config)
    other.links.serve("echo", echo)
    sizes = [0, 5, 4096, 20_000, 70_000, 3, 16_384, 300_000] * 6
    payloads = [os.urandom(size) for size in sizes]
    async with one.links.open(other.peer_id, "echo") as link, trio.open_nursery() as nursery:

        async def send():
            for index, payload in enumerate(payloads):
                half = len(payload) // 2
                await link.send(str(index).encode(), [payload[:half], memoryview(payload)[half:]])

        nursery.start_soon(send)
        for index, payload in enumerate(payloads):
            header, got = await link.receive()
            assert header == str(index).encode()
            assert bytes(got) == payload
        link.inbox.validate()
        link.outbox.validate()
        if nodes.network is None:
            assert one.links.report()[0].sockets == sockets


async def test_a_sink_gives_the_place_where_the_payload_lands(nodes):
    one, other = await nodes(2)
    other.links.serve("echo", echo)
    place = bytearray(1_000_000)
    asked = []

    def sink(header, payload_bytes):
        asked.append((header, payload_bytes))
        return memoryview(place)

    payload = os.urandom(1_000_000)
    async with one.links.open(other.peer_id, "echo") as link:
        await link.send(b"x", [payload])
        _, got = await link.receive(sink)
        assert asked == [(b"x", 1_000_000)]
        assert got.obj is place
        assert place == payload


async def test_the_end_comes_after_everything_that_was_sent(nodes):
    one, other = await nodes(2)
    got = []
    done = trio.Event()

    async def keep(link):
        try:
            while True:
                got.append(bytes((await link.receive())[1]))
        except EndOfChannel:
            done.set()

    other.links.serve("keep", keep)
    async with one.links.open(other.peer_id, "keep") as link:
        for index in range(20):
            await link.send(b"", [bytes([index]) * 50_000])
    with trio.fail_after(5):
        await done.wait()
    assert got == [bytes([index]) * 50_000 for index in range(20)]
    with pytest.raises(PeerLost):
        await link.send(b"late")


async def test_a_service_that_is_not_served_is_unreachable(nodes):
    one, other = await nodes(2)
    with pytest.raises(Unreachable, match="no service"):
        async with one.links.open(other.peer_id, "nothing"):
            pass


async def test_what_is_beyond_the_limits_is_refused_at_once(nodes):
    one, other = await nodes(2, SMALL, SMALL)
    other.links.serve("echo", echo)
    async with one.links.open(other.peer_id, "echo") as link:
        with pytest.raises(LocalFault, match="header of 2049"):
            await link.send(bytes(2049))
        with pytest.raises(LocalFault, match="payload of 8388609"):
            await link.send(b"", [bytes((8 << 20) + 1)])
        await link.send(b"still", [b"alive"])
        assert (await link.receive())[0] == b"still"
