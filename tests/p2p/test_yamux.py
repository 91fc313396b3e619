"""The mended yamux against the faults it mends, and against a peer that breaks the rules.

Tests marked `library` also run py-libp2p's own Yamux, which must fail them: once one passes, its
mend can go, and the strict xfail says so.
"""

import random
import struct

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import Yamux

from p2p.compat.yamux import MendedYamux, MuxLimits
from p2p.compat.yamux_frames import (
    ACK,
    DATA,
    GO_AWAY,
    HEADER_BYTES,
    INITIAL_WINDOW_BYTES,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    pack_header,
    unpack_header,
)

PEER = ID(b"\x00\x24\x08\x01\x12\x20" + b"p" * 32)
SMALL = MuxLimits(streams_max=8, window_bytes=INITIAL_WINDOW_BYTES, control_frames_max=64)


class Pipe:
    """A secured connection over a trio stream."""

    def __init__(self, stream, is_initiator):
        self.stream = stream
        self.is_initiator = is_initiator

    async def read(self, n=None):
        try:
            return await self.stream.receive_some(n)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            return b""

    async def write(self, data):
        await self.stream.send_all(data)

    async def close(self):
        await self.stream.aclose()

    def get_remote_address(self):
        return ("127.0.0.1", 1)

    def get_transport_addresses(self):
        return []


def make_muxer(kind, pipe, limits=None):
    if kind == "library":
        return Yamux(pipe, PEER, is_initiator=pipe.is_initiator)
    return MendedYamux(pipe, PEER, limits)


mended_and_library = pytest.mark.parametrize(
    "kind",
    [
        "mended",
        pytest.param("library", marks=pytest.mark.xfail(strict=True, reason="the fault this mends")),
    ],
)


@pytest.fixture
def bounded_pair():
    """Two stream ends that buffer little, as sockets do: a writer waits for its reader."""
    return trio.testing.lockstep_stream_pair


async def pump(muxer, handler, nursery):
    while True:
        try:
            stream = await muxer.accept_stream()
        except MuxedConnUnavailable:
            return
        nursery.start_soon(handler, stream)


async def for_ever(send, data):
    while True:
        await send(data)


async def read_to_end(stream):
    data = bytearray()
    while True:
        try:
            data += await stream.read(1 << 16)
        except MuxedStreamEOF:
            return bytes(data)


async def echo(stream):
    while True:
        try:
            data = await stream.read(1 << 16)
        except MuxedStreamError:
            break
        await stream.write(data)
    await stream.close()


async def swallow(stream):
    try:
        while True:
            await stream.read(1 << 16)
    except MuxedStreamError:
        return


@mended_and_library
async def test_bulk_both_ways_plus_stream_opens_never_stalls(kind, autojump_clock, bounded_pair):
    left, right = bounded_pair()
    a, b = make_muxer(kind, Pipe(left, True)), make_muxer(kind, Pipe(right, False))
    bulk = b"x" * (64 << 10)
    done = 0

    async def send_bulk(muxer, nursery):
        nonlocal done
        stream = await muxer.open_stream()
        for _ in range(20):
            await stream.write(bulk)
        done += 1

    async def open_many(muxer, nursery):
        nonlocal done
        for _ in range(100):
            stream = await muxer.open_stream()
            await stream.write(b"hello")
            await stream.close()
        done += 1

    with trio.move_on_after(30):
        async with trio.open_nursery() as nursery:
            for muxer in (a, b):
                nursery.start_soon(muxer.start)
                await muxer.event_started.wait()
                nursery.start_soon(pump, muxer, swallow, nursery)
            async with trio.open_nursery() as work:
                for muxer in (a, b):
                    work.start_soon(send_bulk, muxer, nursery)
                    work.start_soon(open_many, muxer, nursery)
            nursery.cancel_scope.cancel()
    assert done == 4


class GatedPipe(Pipe):
    """Stops in the middle of every write while the gate is closed, as a full socket does."""

    gate = None

    async def write(self, data):
        await self.stream.send_all(data[:20])
        if self.gate is not None:
            await self.gate.wait()
        await self.stream.send_all(data[20:])


@mended_and_library
async def test_a_cancelled_write_leaves_the_other_streams_in_step(kind, autojump_clock):
    left, right = trio.testing.memory_stream_pair()
    pipe = GatedPipe(left, True)
    a, b = make_muxer(kind, pipe), make_muxer(kind, Pipe(right, False))
    reply = b""
    with trio.move_on_after(30):
        async with trio.open_nursery() as nursery:
            for muxer in (a, b):
                nursery.start_soon(muxer.start)
                await muxer.event_started.wait()
            nursery.start_soon(pump, b, echo, nursery)
            first, second = await a.open_stream(), await a.open_stream()
            await trio.testing.wait_all_tasks_blocked()
            pipe.gate = trio.Event()
            with trio.move_on_after(1):
                await first.write(b"y" * (200 << 10))
                await trio.sleep_forever()
            pipe.gate.set()
            await second.write(b"still in step")
            while len(reply) < 13:
                reply += await second.read(100)
            nursery.cancel_scope.cancel()
    assert reply == b"still in step"


@mended_and_library
async def test_a_writer_unread_for_a_minute_is_not_reset(kind, autojump_clock):
    left, right = trio.testing.memory_stream_pair()
    a, b = make_muxer(kind, Pipe(left, True)), make_muxer(kind, Pipe(right, False))
    payload = random.Random(1).randbytes(6 << 20)
    got = b""

    async def write_all(stream):
        await stream.write(payload)
        await (stream.close_write if kind == "mended" else stream.close)()

    async with trio.open_nursery() as nursery:
        for muxer in (a, b):
            nursery.start_soon(muxer.start)
            await muxer.event_started.wait()
        out = await a.open_stream()
        nursery.start_soon(write_all, out)
        stream = await b.accept_stream()
        with trio.move_on_after(60):
            await trio.sleep_forever()
        got = await read_to_end(stream)
        nursery.cancel_scope.cancel()
    assert got == payload


@pytest.fixture
async def raw_peer(nursery):
    """A mended muxer (accepting side) and the raw stream of a peer that may send it anything."""
    left, right = trio.testing.memory_stream_pair()
    muxer = MendedYamux(Pipe(right, False), PEER, SMALL)
    nursery.start_soon(muxer.start)
    await muxer.event_started.wait()
    return muxer, left


async def next_frame(stream):
    header = b""
    while len(header) < HEADER_BYTES:
        header += await stream.receive_some(HEADER_BYTES - len(header))
    kind, flags, stream_id, length = unpack_header(header)
    body = b""
    while kind == DATA and len(body) < length:
        body += await stream.receive_some(length - len(body))
    return kind, flags, stream_id, length, body


BROKEN_FRAMES = {
    "unknown version": struct.pack("!BBHII", 1, DATA, SYN, 1, 0),
    "unknown type": struct.pack("!BBHII", 0, 9, 0, 1, 0),
    "unknown flags": struct.pack("!BBHII", 0, DATA, 0x80, 1, 0),
    "data on the session": pack_header(DATA, 0, 0, 5) + b"hello",
    "a ping on a stream": pack_header(PING, SYN, 3, 5),
    "a stream id of our own parity": pack_header(WINDOW_UPDATE, SYN, 2, 0),
    "a stream opened twice": pack_header(WINDOW_UPDATE, SYN, 1, 0) * 2,
    "more than the window": pack_header(DATA, SYN, 1, INITIAL_WINDOW_BYTES + 1),
    "the window twice": (pack_header(DATA, SYN, 1, INITIAL_WINDOW_BYTES) + bytes(INITIAL_WINDOW_BYTES))
    + pack_header(DATA, 0, 1, 1),
    "a huge frame for nobody": pack_header(DATA, 0, 7, 1 << 24),
    "a window beyond 4 GiB": pack_header(WINDOW_UPDATE, SYN, 1, 0xFFFFFFFF),
    "good-bye": pack_header(GO_AWAY, 0, 0, 0),
}


@pytest.mark.parametrize("frames", BROKEN_FRAMES.values(), ids=BROKEN_FRAMES.keys())
async def test_a_broken_frame_ends_that_connection_and_nothing_else(raw_peer, frames):
    muxer, peer = raw_peer
    await peer.send_all(frames)
    with trio.fail_after(5):
        await muxer.event_closed.wait()
    assert not muxer.streams
    assert muxer.close_reason


@pytest.mark.parametrize("seed", range(20))
async def test_random_bytes_end_the_connection_without_an_exception(raw_peer, seed):
    muxer, peer = raw_peer
    await peer.send_all(random.Random(seed).randbytes(1 + seed * 97))
    await peer.aclose()
    with trio.fail_after(5):
        await muxer.event_closed.wait()


async def test_a_ping_is_answered_and_a_flood_of_unread_answers_ends_the_connection(nursery, bounded_pair):
    left, right = bounded_pair()
    muxer = MendedYamux(Pipe(right, False), PEER, SMALL)
    nursery.start_soon(muxer.start)
    await left.send_all(pack_header(PING, SYN, 0, 77))
    assert (await next_frame(left))[:4] == (PING, ACK, 0, 77)
    with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
        await for_ever(left.send_all, pack_header(PING, SYN, 0, 1) * 16)
    assert muxer.is_closed


async def test_streams_beyond_the_cap_are_reset_and_the_connection_lives(raw_peer):
    muxer, peer = raw_peer
    for number in range(SMALL.streams_max + 1):
        await peer.send_all(pack_header(WINDOW_UPDATE, SYN, 1 + 2 * number, 0))
    answers = [await next_frame(peer) for _ in range(SMALL.streams_max + 1)]
    assert [flags for _, flags, *_ in answers] == [ACK] * SMALL.streams_max + [RST]
    assert len(muxer.streams) == SMALL.streams_max
    assert not muxer.is_closed


async def test_a_peer_that_fills_every_stream_loses_the_fullest(nursery):
    left, right = trio.testing.memory_stream_pair()
    limits = MuxLimits(streams_max=8, window_bytes=INITIAL_WINDOW_BYTES, unread_bytes_max=300_000)
    muxer = MendedYamux(Pipe(right, False), PEER, limits)
    nursery.start_soon(muxer.start)
    await left.send_all(pack_header(DATA, SYN, 1, 200_000) + bytes(200_000))
    await left.send_all(pack_header(DATA, SYN, 3, 110_000) + bytes(110_000))
    frames = [await next_frame(left) for _ in range(3)]
    assert [(flags, stream_id) for _, flags, stream_id, *_ in frames] == [(ACK, 1), (ACK, 3), (RST, 1)]
    assert muxer.unread_bytes == 110_000
    assert list(muxer.streams) == [3]


async def test_one_byte_frames_are_joined_instead_of_pinning_packets(raw_peer):
    muxer, peer = raw_peer
    await peer.send_all(pack_header(WINDOW_UPDATE, SYN, 1, 0))
    stream = await muxer.accept_stream()
    for value in range(200):
        await peer.send_all(pack_header(DATA, 0, 1, 1) + bytes([value]))
    await trio.testing.wait_all_tasks_blocked()
    assert len(stream.unread) == 1
    assert await stream.read(3) == bytes([0, 1, 2])
    assert await stream.read() == bytes(range(3, 200))


@pytest.fixture
async def mux_pair(nursery):
    left, right = trio.testing.memory_stream_pair()
    a, b = MendedYamux(Pipe(left, True), PEER), MendedYamux(Pipe(right, False), PEER)
    for muxer in (a, b):
        nursery.start_soon(muxer.start)
        await muxer.event_started.wait()
    return a, b


async def test_half_close_ends_one_direction_only_and_both_forget_the_stream(mux_pair):
    a, b = mux_pair
    out = await a.open_stream()
    await out.write(b"question")
    await out.close_write()
    stream = await b.accept_stream()
    assert await read_to_end(stream) == b"question"
    await stream.write(b"answer")
    await stream.close()
    assert await read_to_end(out) == b"answer"
    await trio.testing.wait_all_tasks_blocked()
    assert not a.streams
    assert not b.streams


async def test_a_reset_wakes_readers_and_writers_on_both_sides(mux_pair):
    a, b = mux_pair
    out = await a.open_stream()
    await out.write(b"x")
    stream = await b.accept_stream()
    await stream.read(1)
    async with trio.open_nursery() as nursery:

        async def wait_for_reset():
            with pytest.raises(MuxedStreamError):
                await out.read(1)

        nursery.start_soon(wait_for_reset)
        await trio.testing.wait_all_tasks_blocked()
        stream.abort()
    with pytest.raises(MuxedStreamError):
        await out.write(b"more")
    assert not a.streams
    assert not b.streams


async def test_a_closed_stream_whose_peer_never_ends_is_reset_after_the_linger_time(mux_pair, autojump_clock):
    a, b = mux_pair
    out = await a.open_stream()
    await out.write(b"x")
    stream = await b.accept_stream()
    await out.close()

    async def write_and_wait(data):
        await stream.write(data)
        with trio.move_on_after(1):
            await trio.sleep_forever()

    with trio.fail_after(3 * a.limits.linger_s), pytest.raises(MuxedStreamError):
        await for_ever(write_and_wait, bytes(1000))
    assert not a.streams


async def test_a_small_message_does_not_queue_behind_bulk(nursery, bounded_pair):
    left, right = bounded_pair()
    a = MendedYamux(Pipe(left, True), PEER, MuxLimits(frame_bytes_max=10_000, batch_bytes_max=10_000))
    nursery.start_soon(a.start)
    bulk, small = await a.open_stream(), await a.open_stream()
    for opened in (bulk, small):
        assert (await next_frame(right))[1:3] == (SYN, opened.stream_id)
    await bulk.write(bytes(250_000))
    await small.write(b"urgent")
    ahead = 0
    while True:
        *_, stream_id, length, _ = await next_frame(right)
        if stream_id == small.stream_id:
            break
        ahead += length
    assert ahead <= 5 * a.limits.frame_bytes_max


async def test_windows_are_granted_in_large_steps(raw_peer):
    muxer, peer = raw_peer
    await peer.send_all(pack_header(WINDOW_UPDATE, SYN, 1, 0))
    assert (await next_frame(peer))[1] == ACK
    stream = await muxer.accept_stream()
    half = INITIAL_WINDOW_BYTES // 2
    for _ in range(8):
        await peer.send_all(pack_header(DATA, 0, 1, half // 8) + bytes(half // 8))
        await stream.read(half // 8)
    assert (await next_frame(peer))[:4] == (WINDOW_UPDATE, 0, 1, half)


async def test_what_was_queued_before_close_goes_out_ahead_of_the_good_bye(raw_peer):
    muxer, peer = raw_peer
    out = await muxer.open_stream()
    await out.write(b"last words" * 1000)
    await muxer.close()
    kinds = []
    while not kinds or kinds[-1] != GO_AWAY:
        kind, _, _, _, body = await next_frame(peer)
        kinds.append(kind)
        if kind == DATA:
            assert body == b"last words" * 1000
    assert DATA in kinds


async def test_a_mutated_buffer_does_not_change_what_was_written(mux_pair):
    a, b = mux_pair
    out = await a.open_stream()
    data = bytearray(b"before")
    await out.write(data)
    data[:] = b"after!"
    await out.close_write()
    assert await read_to_end(await b.accept_stream()) == b"before"


async def test_closing_wakes_a_writer_that_waits_for_the_window(mux_pair):
    a, b = mux_pair
    out = await a.open_stream()

    async def write_for_ever():
        with pytest.raises(MuxedStreamError):
            await for_ever(out.write, bytes(1 << 20))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_for_ever)
        await trio.testing.wait_all_tasks_blocked()
        b.abort("gone")
    assert a.event_closed.is_set() or a.is_closed
    with pytest.raises(MuxedConnUnavailable):
        await a.open_stream()
