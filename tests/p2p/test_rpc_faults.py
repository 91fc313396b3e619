"""Calls at their limits, peers that misbehave, die or fall silent, and what stays behind: nothing."""

from dataclasses import dataclass

import pytest
import trio

from p2p import (
    CallFailed,
    DeadlineExceeded,
    EndOfChannel,
    LocalFault,
    Method,
    PeerLost,
    ProtocolViolation,
    ResourceLimit,
    Rpc,
    RpcConfig,
    RpcRefusal,
    Tensor,
    Unreachable,
)


@dataclass(frozen=True, slots=True)
class Number:
    value: int


@dataclass(frozen=True, slots=True)
class Block:
    index: int
    data: Tensor


ADD = Method("add", Number, Number)
BLOCK = Method("block", Block, Block, payload_bytes_max=16 << 20)
COUNT = Method("count", Number, Number)
SUM = Method("sum", Number, Number, upstream=Number)
STREAM = Method("stream", Number, Block, upstream=Block, payload_bytes_max=8 << 20)


def block(index, size):
    return Block(index, Tensor("uint8", (size,), bytes([index % 251]) * size))


async def add_one(call, request):
    return Number(request.value + 1)


async def count_up(call, request, channel):
    for value in range(request.value):
        await channel.send(Number(value))


# ---- limits


async def test_messages_beyond_the_methods_limits_never_leave(peers):
    one, other = await peers(2)

    async def add_quietly(call, request):
        return request

    other.serve(BLOCK, add_quietly)
    with pytest.raises(LocalFault, match="at most"):
        await one.call(other.host.peer_id, BLOCK, block(0, (16 << 20) + 1))
    assert (await one.call(other.host.peer_id, BLOCK, block(5, 10))).index == 5


async def test_a_peer_with_other_limits_loses_its_stream_only(peers, caplog):
    one, other = await peers(2)
    stricter = Method("block", Block, Block, payload_bytes_max=1000)

    async def echo(call, request):
        return request

    other.serve(stricter, echo)
    with pytest.raises((PeerLost, ProtocolViolation)):
        await one.call(other.host.peer_id, BLOCK, block(0, 1001))
    assert (await one.call(other.host.peer_id, BLOCK, block(1, 1000))).index == 1
    assert other.faults[one.host.peer_id] == 1


async def test_more_calls_than_the_callee_takes_are_refused_as_busy(memory_peers, network):
    one, other = network.host("a"), network.host("b")
    await one.connect(other.addrs())
    caller = await memory_peers.rpc(one)
    callee = await memory_peers.rpc(other, RpcConfig(calls_per_lane_max=3))
    hold = trio.Event()

    async def held(call, request):
        await hold.wait()
        return request

    callee.serve(ADD, held)
    busy = []

    async def call():
        try:
            await caller.call(other.peer_id, ADD, Number(1))
        except CallFailed as failed:
            busy.append((failed.code, failed.retry_after_s is not None))
            if len(busy) == 2:
                hold.set()

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(call)
    assert busy == [("busy", True)] * 2


async def test_a_callers_own_cap_makes_calls_wait_and_channels_fail(memory_peers, autojump_clock):
    one, other = await memory_peers(2, RpcConfig(calls_per_lane_max=4, channels_per_lane_max=3))
    running = most = 0

    async def handler(call, request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.lowlevel.checkpoint()
        running -= 1
        return request

    async def forever(call, request, channel):
        await trio.sleep_forever()

    other.serve(ADD, handler)
    other.serve_channel(COUNT, forever)
    done = []

    async def call(value):
        done.append(await one.call(other.host.peer_id, ADD, Number(value)))

    async with trio.open_nursery() as nursery:
        for value in range(100):
            nursery.start_soon(call, value)
    assert len(done) == 100
    assert most <= 4
    peer = other.host.peer_id
    async with (
        one.open(peer, COUNT, Number(1)),
        one.open(peer, COUNT, Number(1)),
        one.open(peer, COUNT, Number(1)),
    ):
        with pytest.raises(ResourceLimit):
            async with one.open(peer, COUNT, Number(1)):
                pass
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, 1)
            nursery.start_soon(call, 2)
        with pytest.raises(DeadlineExceeded):
            await one.call(peer, COUNT, Number(1), deadline_s=1.0)


# ---- peers that misbehave, die or fall silent

GARBAGE = [b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n" * 3, b"\x02" + b"\xff" * 63, bytes(range(256))]


async def ends_with_a_reset(stream):
    try:
        while await stream.receive_some():
            pass
    except PeerLost:
        return True
    return False


@pytest.mark.parametrize("garbage", GARBAGE, ids=["zeros", "http", "huge", "counting"])
async def test_garbage_costs_its_own_stream_only(peers, garbage):
    one, other = await peers(2)
    release = trio.Event()

    async def held(call, request):
        await release.wait()
        return request

    other.serve(ADD, held)
    async with trio.open_nursery() as nursery:
        answers = []

        async def call():
            answers.append(await one.call(other.host.peer_id, ADD, Number(1)))

        nursery.start_soon(call)
        for lane in ("small", "bulk"):
            stream = await one.host.open_stream(other.host.peer_id, f"rpc/1/{lane}")
            await stream.send_all(garbage)
            with trio.fail_after(5):
                assert await ends_with_a_reset(stream)
        release.set()
    assert answers == [Number(1)]
    assert other.faults[one.host.peer_id] == 2


async def test_a_request_that_is_no_message_costs_its_stream_only(peers):
    one, other = await peers(2)
    other.serve(Method("add", Block, Block, payload_bytes_max=100), add_one)
    with pytest.raises((PeerLost, ProtocolViolation)):
        await one.call(other.host.peer_id, ADD, Number(1))
    assert other.faults[one.host.peer_id] == 1
    other.serve_channel(COUNT, count_up)
    async with one.open(other.host.peer_id, COUNT, Number(3)) as channel:
        assert [number.value async for number in channel] == [0, 1, 2]


async def test_an_answer_that_is_no_message_is_a_violation(peers):
    one, other = await peers(2)

    async def text(call, request):
        return Block(1, Tensor("uint8", (1,), b"x"))

    other.serve(Method("add", Number, Block, payload_bytes_max=100), text)
    with pytest.raises(ProtocolViolation):
        await one.call(other.host.peer_id, ADD, Number(1))
    assert one.faults[other.host.peer_id] == 1


async def test_streams_beyond_the_cap_are_reset(memory_peers):
    one, other = await memory_peers(2)
    streams = [await one.host.open_stream(other.host.peer_id, "rpc/1/small") for _ in range(12)]
    lost = 0
    for stream in streams:
        with trio.move_on_after(0.02):
            try:
                await stream.receive_some()
            except PeerLost:
                lost += 1
    assert lost >= 4
    other.serve(ADD, add_one)
    assert await one.call(other.host.peer_id, ADD, Number(1)) == Number(2)


@pytest.mark.parametrize("method", [ADD, BLOCK], ids=["small", "large"])
async def test_a_killed_peer_ends_its_calls_at_once(memory_peers, network, method):
    one, other = await memory_peers(2)

    async def never(call, request):
        network.kill(other.host.peer_id)
        await trio.sleep_forever()

    other.serve(method, never)
    request = Number(1) if method is ADD else block(1, 1 << 20)
    with trio.fail_after(2), pytest.raises(PeerLost) as caught:
        await one.call(other.host.peer_id, method, request)
    assert caught.value.peer == other.host.peer_id
    with pytest.raises(PeerLost):
        await one.call(other.host.peer_id, method, request)


async def test_a_silent_peer_is_given_up_after_three_seconds(memory_peers, network, autojump_clock):
    one, other, third = await memory_peers(3)
    for rpc in (other, third):
        rpc.serve(ADD, add_one)
    await one.call(other.host.peer_id, ADD, Number(1))
    await trio.sleep(10)
    assert one.host.is_connected(other.host.peer_id)
    with one.host.watch() as events:
        network.freeze(other.host.peer_id)
        began_s = trio.current_time()
        with pytest.raises(PeerLost, match="nothing came"):
            await one.call(other.host.peer_id, ADD, Number(1), deadline_s=60.0)
        assert 2.0 <= trio.current_time() - began_s <= 4.1
        assert (await events.receive()).kind == "down"
    assert await one.call(third.host.peer_id, ADD, Number(1)) == Number(2)
    with pytest.raises(Unreachable):
        await one.host.connect(other.host.addrs())
    network.heal()
    await one.host.connect(other.host.addrs())
    assert await one.call(other.host.peer_id, ADD, Number(5)) == Number(6)


async def test_our_own_pause_is_not_held_against_others(memory_peers, mock_clock):
    one, other = await memory_peers(2)
    other.serve(ADD, add_one)
    await one.call(other.host.peer_id, ADD, Number(1))
    for _ in range(3):
        mock_clock.jump(30.0)
        await trio.testing.wait_all_tasks_blocked()
    assert one.host.is_connected(other.host.peer_id)
    assert await one.call(other.host.peer_id, ADD, Number(1)) == Number(2)


async def test_round_trips_are_measured(memory_peers, network, autojump_clock):
    network.latency_s = 0.05
    one, other = await memory_peers(2)
    assert one.rtt_s(other.host.peer_id) is None
    await trio.sleep(5)
    assert one.rtt_s(other.host.peer_id) == pytest.approx(0.1, rel=0.1)
    assert one.rtt_s("nobody") is None


async def test_bandwidth_is_measured_from_large_transfers(peers):
    one, other = await peers(2)

    async def echo(call, request):
        return request

    other.serve(BLOCK, echo)
    assert one.bandwidth_bps(other.host.peer_id) is None
    for _ in range(2):
        await one.call(other.host.peer_id, BLOCK, block(1, 8 << 20))
    assert one.bandwidth_bps(other.host.peer_id) > 1e6


async def test_a_peer_that_serves_no_calls_yet_is_not_given_up(memory_peers, network, autojump_clock):
    one, other = network.host("a"), network.host("b")
    await one.connect(other.addrs())
    caller = await memory_peers.rpc(one)
    with pytest.raises(PeerLost, match="serves no calls"):
        await caller.call(other.peer_id, ADD, Number(1))
    await trio.sleep(20)
    assert one.is_connected(other.peer_id)
    callee = await memory_peers.rpc(other)
    callee.serve(ADD, add_one)
    await trio.sleep(2)
    assert await caller.call(other.peer_id, ADD, Number(1)) == Number(2)


async def test_a_peer_that_stops_and_starts_its_calls_is_called_again(memory_peers, network):
    one, other = network.host("a"), network.host("b")
    await one.connect(other.addrs())
    caller = await memory_peers.rpc(one)
    hanging = Rpc(other)
    started = trio.Event()

    async def hang(call, request):
        started.set()
        await trio.sleep_forever()

    hanging.serve(ADD, hang)
    async with trio.open_nursery() as nursery:
        await nursery.start(hanging.run)
        async with trio.open_nursery() as inner:

            async def call():
                with pytest.raises(PeerLost):
                    await caller.call(other.peer_id, ADD, Number(1))

            inner.start_soon(call)
            await started.wait()
            nursery.cancel_scope.cancel()
    again = await memory_peers.rpc(other)
    again.serve(ADD, add_one)
    assert await caller.call(other.peer_id, ADD, Number(1)) == Number(2)


async def test_calls_need_run(network):
    rpc = Rpc(network.host("a"))
    with pytest.raises(LocalFault, match="not running"):
        await rpc.call(rpc.host.peer_id, ADD, Number(1))


async def test_a_direction_that_has_ended_takes_no_more(memory_peers):
    one, other = await memory_peers(2)

    async def leave(call, request, channel):
        await channel.send(Number(1))

    other.serve_channel(SUM, leave)
    async with one.open(other.host.peer_id, SUM, Number(1)) as channel:
        assert await channel.receive() == Number(1)
        with pytest.raises(EndOfChannel):
            await channel.receive()
        with pytest.raises(EndOfChannel):
            await channel.send(Number(2))
    async with one.open(other.host.peer_id, SUM, Number(1)) as channel:
        await channel.end()
        with pytest.raises((LocalFault, EndOfChannel)):
            await channel.send(Number(2))
    async with one.open(other.host.peer_id, COUNT, Number(1)) as channel:
        with pytest.raises(LocalFault, match="no messages in this direction"):
            await channel.send(Number(2))


# ---- nothing stays behind


async def test_nothing_is_left_of_ten_thousand_calls(memory_peers, network):
    one, other = await memory_peers(2)

    async def odd(call, request):
        if request.value % 5 == 0:
            raise RpcRefusal("invalid", "five")
        if request.value % 7 == 0:
            await trio.sleep_forever()
        return request

    async def tick(call, request, channel):
        await channel.send(request)
        await trio.sleep_forever()

    other.serve(ADD, odd)
    other.serve_channel(COUNT, tick)
    peer = other.host.peer_id
    async with (
        trio.open_nursery() as nursery
    ):  # as many at once as will be: some tasks stay for the next calls
        for _ in range(64):
            nursery.start_soon(one.call, peer, ADD, Number(1))
    await trio.testing.wait_all_tasks_blocked()
    before = (
        network.streams_open(),
        network.handlers_running(),
        trio.lowlevel.current_statistics().tasks_living,
    )
    counts = {"answered": 0, "refused": 0, "late": 0, "left": 0}

    async def work(values):
        for value in values:
            try:
                if value % 11 == 0:
                    async with one.open(peer, COUNT, Number(value)) as channel:
                        await channel.receive()
                        counts["left"] += 1
                else:
                    deadline_s = 0.001 if value % 7 == 0 else 10.0
                    await one.call(peer, ADD, Number(value), deadline_s=deadline_s)
                    counts["answered"] += 1
            except CallFailed:
                counts["refused"] += 1
            except DeadlineExceeded:
                counts["late"] += 1

    async with trio.open_nursery() as nursery:
        for worker in range(20):
            nursery.start_soon(work, range(1 + worker, 10_001, 20))
    await trio.testing.wait_all_tasks_blocked()
    assert sum(counts.values()) == 10_000
    assert min(counts.values()) > 500
    assert one.calls_in_flight() == other.calls_in_flight() == 0
    after = (
        network.streams_open(),
        network.handlers_running(),
        trio.lowlevel.current_statistics().tasks_living,
    )
    assert after[:2] == before[:2]
    assert after[2] - before[2] <= 16  # so many tasks stay for the next calls
    for rpc in (one, other):
        for link in rpc._links.values():
            assert link.budget.used_bytes == 0
            assert all(not lane.core.wants_write for lane in link.lanes())


async def test_nothing_is_left_of_a_lost_peer(memory_peers, network):
    one, other = await memory_peers(2)
    other.serve(ADD, add_one)
    await one.call(other.host.peer_id, ADD, Number(1))  # whose task stays for the next call
    await trio.testing.wait_all_tasks_blocked()
    alone = trio.lowlevel.current_statistics().tasks_living
    for _ in range(5):
        await one.host.disconnect(other.host.peer_id)
        await one.host.connect(other.host.addrs())
        assert await one.call(other.host.peer_id, ADD, Number(1)) == Number(2)
    await trio.testing.wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == alone
    network.kill(other.host.peer_id)
    await trio.testing.wait_all_tasks_blocked()
    assert list(one._links) == []
    assert network.streams_open() == 0
