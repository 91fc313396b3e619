"""The in-memory network behaves as a network does."""

import pytest
import trio

from p2p import DeadlineExceeded, LocalFault, PeerEvent, PeerLost, ProtocolViolation, Unreachable
from p2p.testing import MemoryNetwork


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send_all(data)


async def pair(network=None):
    network = network or MemoryNetwork()
    one, other = network.host("a"), network.host("b")
    await one.connect(other.addrs())
    return network, one, other


async def test_bytes_come_back_and_a_clean_close_ends_the_stream():
    network, one, other = await pair()
    other.handle("echo", echo)
    stream = await one.open_stream(other.peer_id, "echo")
    await stream.send_all(b"hello")
    assert await stream.receive_some() == b"hello"
    await stream.send_eof()
    assert await stream.receive_some() == b""
    await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert network.streams_open() == 0
    assert network.handlers_running() == 0


async def test_peer_ids_are_a_function_of_the_name():
    assert MemoryNetwork().host("a").peer_id == MemoryNetwork().host("a").peer_id
    network = MemoryNetwork()
    assert network.host("a").peer_id != network.host("b").peer_id
    with pytest.raises(LocalFault, match="already running"):
        network.host("a")


async def test_a_writer_waits_while_the_reader_does_not_read():
    _network, one, other = await pair(MemoryNetwork(window_bytes=1000))
    reading = trio.Event()
    got = bytearray()

    async def slow(stream):
        await reading.wait()
        while data := await stream.receive_some(300):
            got.extend(data)

    other.handle("slow", slow)
    stream = await one.open_stream(other.peer_id, "slow")
    sent = trio.Event()

    async def send():
        await stream.send_all(bytes(5000))
        await stream.aclose()
        sent.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert not sent.is_set()
        reading.set()
    await trio.testing.wait_all_tasks_blocked()
    assert got == bytes(5000)


@pytest.mark.parametrize("how", ["disconnect", "kill", "reset", "handler_fails"])
async def test_an_abrupt_end_raises_peer_lost_at_the_reader(how, caplog):
    network, one, other = await pair()

    async def fails(stream):
        await stream.receive_some()
        if how == "handler_fails":
            raise ValueError("deliberate")
        await trio.sleep_forever()

    other.handle("p", fails)
    stream = await one.open_stream(other.peer_id, "p")

    async def end():
        await trio.testing.wait_all_tasks_blocked()
        match how:
            case "disconnect":
                await one.disconnect(other.peer_id)
            case "kill":
                network.kill(other.peer_id)
            case "reset":
                stream.reset()
            case "handler_fails":
                await stream.send_all(b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        with pytest.raises(PeerLost):
            await stream.receive_some()
    with pytest.raises(PeerLost):
        await stream.send_all(b"y")


async def test_both_ends_see_up_and_down():
    network = MemoryNetwork()
    one, other = network.host("a"), network.host("b")
    with one.watch() as at_one, other.watch() as at_other:
        await one.connect(other.addrs())
        assert await at_one.receive() == PeerEvent(other.peer_id, "up")
        assert await at_other.receive() == PeerEvent(one.peer_id, "up")
        assert one.peers() == (other.peer_id,)
        network.kill(other.peer_id)
        assert await at_one.receive() == PeerEvent(other.peer_id, "down")
        assert one.peers() == ()
    with pytest.raises(Unreachable, match="refused"):
        await one.connect(other.addrs())
    again = network.host("b")
    assert await one.connect(again.addrs()) == other.peer_id


async def test_a_partition_is_silence_and_healing_delivers_what_waited(autojump_clock):
    network, one, other = await pair()
    other.handle("echo", echo)
    stream = await one.open_stream(other.peer_id, "echo")
    network.partition([one.peer_id], [other.peer_id])
    await stream.send_all(b"held")
    with trio.move_on_after(60) as silent:
        await stream.receive_some()
    assert silent.cancelled_caught
    assert one.is_connected(other.peer_id)
    with pytest.raises(DeadlineExceeded):
        await one.open_stream(other.peer_id, "echo", deadline_s=1.0)
    network.heal()
    assert await stream.receive_some() == b"held"


async def test_one_end_may_give_up_during_a_partition(autojump_clock):
    network, one, other = await pair()
    network.freeze(other.peer_id)
    await one.disconnect(other.peer_id)
    assert not one.is_connected(other.peer_id)
    assert other.is_connected(one.peer_id)
    with pytest.raises(Unreachable, match="no answer"):
        await one.connect(other.addrs(), deadline_s=2.0)
    network.heal()
    assert not other.is_connected(one.peer_id)
    await one.connect(other.addrs())
    assert other.is_connected(one.peer_id)


async def test_latency_delays_each_direction(autojump_clock):
    _network, one, other = await pair(MemoryNetwork(latency_s=0.1))
    other.handle("echo", echo)
    stream = await one.open_stream(other.peer_id, "echo")
    began_s = trio.current_time()
    await stream.send_all(b"x")
    await stream.receive_some()
    assert trio.current_time() - began_s == pytest.approx(0.2)


async def test_what_is_not_served_is_refused():
    network, one, other = await pair()
    with pytest.raises(ProtocolViolation, match="does not serve"):
        await one.open_stream(other.peer_id, "nothing")
    with pytest.raises(Unreachable, match="not a member"):
        await one.connect(network.host("c", mesh_id="another").addrs())
