"""Calls between peers: one contract, over the in-memory network and over libp2p."""

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
    ResourceLimit,
    RpcConfig,
    RpcRefusal,
    Tensor,
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


async def add_up(call, request, channel):
    total = request.value
    async for number in channel:
        total += number.value
    await channel.send(Number(total))


async def test_a_call_is_answered(peers):
    one, other = await peers(2)
    other.serve(ADD, add_one)
    assert await one.call(other.host.peer_id, ADD, Number(41)) == Number(42)


async def test_both_directions_and_our_own_peer_id(peers):
    one, other = await peers(2)
    for rpc in (one, other):
        rpc.serve(ADD, add_one)
    for caller in (one, other):
        for callee in (one, other):
            assert await caller.call(callee.host.peer_id, ADD, Number(1)) == Number(2)


@pytest.mark.parametrize("size", [0, 1, 8192, 65536 - 8, 65536, 1 << 20, 5_000_003])
async def test_tensors_of_any_size_come_back_whole(peers, size):
    one, other = await peers(2)

    async def echo(call, request):
        assert call.peer == one.host.peer_id
        return request

    other.serve(BLOCK, echo)
    sent = block(7, size)
    back = await one.call(other.host.peer_id, BLOCK, sent)
    assert back.index == 7
    assert bytes(back.data.data) == bytes(sent.data.data)


async def test_a_channel_delivers_in_order_and_ends(peers):
    one, other = await peers(2)
    other.serve_channel(COUNT, count_up)
    async with one.open(other.host.peer_id, COUNT, Number(1000)) as channel:
        assert [number.value async for number in channel] == list(range(1000))
        with pytest.raises(EndOfChannel):
            await channel.receive()


async def test_a_caller_may_end_its_direction_and_then_be_answered(peers):
    one, other = await peers(2)
    other.serve_channel(SUM, add_up)
    async with one.open(other.host.peer_id, SUM, Number(5)) as channel:
        for value in range(100):
            await channel.send(Number(value))
        await channel.end()
        assert await channel.receive() == Number(4955)
        with pytest.raises(EndOfChannel):
            await channel.receive()


async def test_many_calls_at_once(peers):
    one, other = await peers(2)
    other.serve(ADD, add_one)
    answers = {}

    async def call(value):
        answers[value] = (await one.call(other.host.peer_id, ADD, Number(value))).value

    async with trio.open_nursery() as nursery:
        for value in range(3000):
            nursery.start_soon(call, value)
    assert answers == {value: value + 1 for value in range(3000)}


# ---- what handlers raise


LOST_P = {"cause": "PeerLost", "peer": "P"}


class Surprise(Exception):
    pass


@pytest.mark.parametrize(
    ("problem", "code", "detail"),
    [
        (RpcRefusal("denied", "no", 2.5, {"why": "x"}), "denied", {"why": "x"}),
        (PeerLost("P"), "unavailable", LOST_P),
        (DeadlineExceeded("late"), "unavailable", {"cause": "DeadlineExceeded"}),
        (
            CallFailed("busy", "m", "Q", 1.0, {"peer": "R"}),
            "unavailable",
            {"cause": "CallFailed", "peer": "R"},
        ),
        (ResourceLimit("full", 4.0), "busy", {}),
        (EndOfChannel("early"), "invalid", {}),
        (ExceptionGroup("g", [PeerLost("P"), RpcRefusal("invalid", "m")]), "invalid", {}),
        (ExceptionGroup("g", [ExceptionGroup("h", [PeerLost("P")])]), "unavailable", LOST_P),
        (Surprise("secret"), "internal", {}),
        (ExceptionGroup("g", [PeerLost("P"), Surprise("secret")]), "internal", {}),
        (LocalFault("secret"), "internal", {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)  # fmt: skip
async def test_what_a_handler_raises_reaches_its_caller(memory_peers, problem, code, detail, caplog):
    one, other = await memory_peers(2)

    async def fail(call, request):
        raise problem

    other.serve(ADD, fail)
    for _ in range(2):
        with pytest.raises(CallFailed) as caught:
            await one.call(other.host.peer_id, ADD, Number(1))
        assert (caught.value.code, caught.value.detail) == (code, detail)
        assert caught.value.peer == other.host.peer_id
    assert caught.value.retry_after_s == getattr(problem, "retry_after_s", None)
    assert "secret" not in str(caught.value)
    assert ("Traceback" in caplog.text) == (code == "internal")


async def test_an_answer_that_cannot_be_sent_is_internal(memory_peers, caplog):
    one, other = await memory_peers(2)
    answers = iter([Number("x"), None, Block(1, Tensor("uint8", (1,), b"x"))])

    async def handler(call, request):
        return next(answers)

    other.serve(ADD, handler)
    for _ in range(3):
        with pytest.raises(CallFailed, match="internal"):
            await one.call(other.host.peer_id, ADD, Number(1))


async def test_a_failure_comes_after_what_was_sent_before_it(peers):
    one, other = await peers(2)

    async def fail(call, request, channel):
        for value in range(3):
            await channel.send(Number(value))
        raise RpcRefusal("unavailable", "enough")

    other.serve_channel(COUNT, fail)
    async with one.open(other.host.peer_id, COUNT, Number(0)) as channel:
        assert [(await channel.receive()).value for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(CallFailed, match="enough"):
                await channel.receive()


async def test_what_is_not_served_is_said(peers):
    one, other = await peers(2)
    with pytest.raises(CallFailed, match="not_found"):
        await one.call(other.host.peer_id, ADD, Number(1))
    with pytest.raises(CallFailed, match="not_found"):
        await one.call(one.host.peer_id, ADD, Number(1))
    with pytest.raises(PeerLost, match="not connected"):
        await one.call("12D3KooWnobody", ADD, Number(1))
    other.serve(ADD, add_one)
    with pytest.raises(LocalFault, match="already"):
        other.serve_channel(ADD, add_up)


# ---- deadlines and cancellation


async def never(call, request, channel=None):
    await trio.sleep_forever()


async def test_a_deadline_ends_calls_and_channels(peers):
    one, other = await peers(2)
    other.serve(ADD, never)
    other.serve_channel(COUNT, never)
    with pytest.raises(DeadlineExceeded):
        await one.call(other.host.peer_id, ADD, Number(1), deadline_s=0.01)
    async with one.open(other.host.peer_id, COUNT, Number(1), deadline_s=0.01) as channel:
        with pytest.raises(DeadlineExceeded):
            await channel.receive()


async def test_a_deadline_cancels_the_handler_too(memory_peers, autojump_clock):
    one, other = await memory_peers(2)
    ended = []

    async def slow(call, request):
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time())

    other.serve(ADD, slow)
    began_s = trio.current_time()
    with pytest.raises(DeadlineExceeded):
        await one.call(other.host.peer_id, ADD, Number(1), deadline_s=2.0)
    await trio.testing.wait_all_tasks_blocked()
    assert ended == [pytest.approx(began_s + 2.0)]


async def test_the_callee_keeps_the_deadline_itself(memory_peers, autojump_clock):
    one, other = await memory_peers(2)
    seen = []

    async def slow(call, request, channel):
        seen.append(call.deadline - trio.current_time())
        await trio.sleep_forever()

    other.serve_channel(COUNT, slow)
    async with one.open(other.host.peer_id, COUNT, Number(1), deadline_s=5.0) as channel:
        await trio.sleep(6.0)
        with pytest.raises(DeadlineExceeded, match="gave up"):
            await channel.receive()
    assert seen == [pytest.approx(5.0)]


@pytest.mark.parametrize("how", ["cancel", "leave", "kill"])
async def test_cancellation_reaches_the_last_of_nested_handlers(memory_peers, network, how):
    rpcs = await memory_peers(4)
    working, ended = [], []
    changed = trio.Event()

    def nest(rpc, follower):
        async def handler(call, request, channel):
            nonlocal changed
            working.append(rpc)
            changed.set()
            changed = trio.Event()
            try:
                if follower is None:
                    await trio.sleep_forever()
                async with rpc.open(follower.host.peer_id, SUM, request) as onward:
                    await onward.receive()
            finally:
                ended.append(rpc)
                changed.set()
                changed = trio.Event()

        rpc.serve_channel(SUM, handler)

    first, *stages = rpcs
    for rpc, follower in zip(stages, [*stages[1:], None], strict=True):
        nest(rpc, follower)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def session():
                async with first.open(stages[0].host.peer_id, SUM, Number(1)) as channel:
                    if how == "leave":
                        while len(working) < 3:
                            await changed.wait()
                        return
                    await channel.receive()

            nursery.start_soon(session)
            while len(working) < 3:
                await changed.wait()
            if how == "cancel":
                nursery.cancel_scope.cancel()
            elif how == "kill":
                network.kill(first.host.peer_id)
                nursery.cancel_scope.cancel()
        while len(ended) < 3:
            await changed.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert all(rpc.calls_in_flight() == 0 for rpc in stages)


async def test_a_lost_third_peer_is_told_apart(memory_peers, network):
    one, middle, last = await memory_peers(3)

    async def relay(call, request):
        return await middle.call(last.host.peer_id, ADD, request)

    async def dies(call, request):
        network.kill(last.host.peer_id)
        await trio.sleep_forever()

    middle.serve(ADD, relay)
    last.serve(ADD, dies)
    with pytest.raises(CallFailed) as caught:
        await one.call(middle.host.peer_id, ADD, Number(1))
    assert caught.value.code == "unavailable"
    assert caught.value.detail == {"cause": "PeerLost", "peer": last.host.peer_id}


# ---- backpressure and fairness


async def test_a_stalled_reader_stops_its_own_call_only(peers):
    one, other = await peers(2, RpcConfig(window_bytes=100_000))
    sent = []

    async def stream(call, request, channel):
        for index in range(50):
            await channel.send(block(index, 20_000))
            sent.append(index)

    other.serve_channel(STREAM, stream)
    other.serve(ADD, add_one)
    async with one.open(other.host.peer_id, STREAM, Number(1)) as channel:
        for value in range(200):
            assert (await one.call(other.host.peer_id, ADD, Number(value))).value == value + 1
        assert 4 <= len(sent) <= 20
        assert [message.index async for message in channel] == list(range(50))


async def test_a_sender_waits_for_a_handler_that_does_not_receive(peers):
    one, other = await peers(2, RpcConfig(window_bytes=300_000))
    go = trio.Event()
    got = []

    async def slow(call, request, channel):
        await go.wait()
        async for message in channel:
            got.append(message.index)

    other.serve_channel(STREAM, slow)
    other.serve(ADD, add_one)
    sent = []
    async with one.open(other.host.peer_id, STREAM, Number(1)) as channel:
        async with trio.open_nursery() as nursery:

            async def send():
                for index in range(40):
                    await channel.send(block(index, 50_000))
                    sent.append(index)
                await channel.end()

            nursery.start_soon(send)
            for value in range(100):
                await one.call(other.host.peer_id, ADD, Number(value))
            assert 3 <= len(sent) <= 12
            go.set()
        with pytest.raises(EndOfChannel):
            await channel.receive()
    assert got == list(range(40))


async def test_small_calls_pass_a_large_one_on_the_same_stream(memory_peers):
    one, other = await memory_peers(2)
    done = []

    async def echo(call, request):
        return request

    other.serve(BLOCK, echo)
    other.serve(ADD, add_one)
    async with trio.open_nursery() as nursery:

        async def large():
            await one.call(other.host.peer_id, BLOCK, block(1, 16 << 20))
            done.append("large")

        nursery.start_soon(large)
        for _ in range(20):
            await one.call(other.host.peer_id, ADD, Number(1))
            done.append("small")
    assert done == ["small"] * 20 + ["large"]


async def test_a_cancelled_send_gives_the_memory_back(memory_peers):
    one, other = await memory_peers(2, RpcConfig(window_bytes=300_000))
    go = trio.Event()
    got = []

    async def slow(call, request, channel):
        await go.wait()
        async for message in channel:
            got.append(bytes(message.data.data))

    other.serve_channel(STREAM, slow)
    memory = bytearray(b"a" * 2_000_000)
    async with one.open(other.host.peer_id, STREAM, Number(1)) as channel:
        for index in range(2):
            await channel.send(block(index, 200_000))
        with trio.move_on_after(0.01):
            await channel.send(Block(0, Tensor("uint8", (len(memory),), memoryview(memory))))
        memory[:] = b"b" * len(memory)
        go.set()
        await channel.end()
        with pytest.raises(EndOfChannel):
            await channel.receive()
    assert got[2:] == [b"a" * len(memory)]
