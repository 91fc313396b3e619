"""What every ByteStream does: over libp2p, in the memory network, and inside this process."""

import pytest
import trio

from p2p import PeerLost
from p2p.pipe import stream_pair


@pytest.fixture(params=["memory", "libp2p", "pipe"])
async def stream_ends(request, network):
    """Two ends of one stream, as (opened, accepted)."""
    if request.param == "pipe":
        yield stream_pair("me")
        return
    async with trio.open_nursery() as nursery:
        ends = request.getfixturevalue("peers_class")(nursery, network if request.param == "memory" else None)
        one, other = await ends.host("a"), await ends.host("b")
        send, receive = trio.open_memory_channel(1)

        async def accept(stream):
            await send.send(stream)
            await trio.sleep_forever()

        other.handle("p", accept)
        await one.connect(other.addrs())
        near = await one.open_stream(other.peer_id, "p")
        yield near, await receive.receive()
        nursery.cancel_scope.cancel()


async def read(stream, count):
    got = b""
    while len(got) < count:
        data = await stream.receive_some()
        assert data
        got += data
    return got


async def test_bytes_arrive_in_order_however_they_are_sent(stream_ends):
    near, far = stream_ends
    sent = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(far.send_all, b"back")
        for index in range(200):
            data = bytes([index]) * (index * 7 % 1000)
            sent += data
            if index % 3 or not near.send_nowait(data):
                await near.send_all(data)
            if len(sent) > 20_000:
                assert await read(far, len(sent)) == sent
                sent = b""
        assert await read(near, 4) == b"back"
    assert await read(far, len(sent)) == sent


async def test_sending_at_once_takes_all_or_nothing(stream_ends):
    near, far = stream_ends
    taken = 0
    piece = bytes(60_000)
    while near.send_nowait(piece):
        taken += len(piece)
        assert taken < 100 << 20
    assert taken >= 180_000
    waited = trio.Event()

    async def send():
        await near.send_all(b"end")
        waited.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert (await read(far, taken + 3)).endswith(b"end")
        await waited.wait()
    assert near.send_nowait(b"more")
    assert await read(far, 4) == b"more"


async def test_a_reset_is_told_to_both_ends(stream_ends):
    near, far = stream_ends
    near.reset()
    assert not near.send_nowait(b"x")
    with pytest.raises(PeerLost):
        await near.send_all(b"x")
    with trio.fail_after(5), pytest.raises(PeerLost):
        await far.receive_some()
    with pytest.raises(PeerLost):
        await far.send_all(b"x")
    assert not far.send_nowait(b"x")


async def test_closing_ends_the_others_reading_after_what_was_sent(stream_ends):
    near, far = stream_ends
    await near.send_all(b"last words")
    await near.aclose()
    assert not near.send_nowait(b"x")
    with trio.fail_after(5):
        assert await read(far, 10) == b"last words"
        assert await far.receive_some() == b""
