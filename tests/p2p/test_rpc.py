"""Calls between peers: one contract, over the in-memory network and over libp2p."""

from dataclasses import dataclass

import pytest
import trio

from p2p import (
    EndOfChannel,
    Method,
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
