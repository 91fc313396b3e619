"""Calls under a seeded schedule of deaths, partitions and slow links: each ends in time, and rightly."""

import random
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p import CallFailed, EndOfChannel, Method, RemoteFault, Rpc, RpcConfig, RpcRefusal, Tensor
from p2p.testing import MemoryNetwork

NOTHING = Tensor("uint8", (0,), b"")


@dataclass(frozen=True, slots=True)
class Ask:
    value: int
    hops: tuple[str, ...] = ()
    data: Tensor = NOTHING


ASK = Method("ask", Ask, Ask, payload_bytes_max=1 << 20)
STREAM = Method("stream", Ask, Ask, upstream=Ask, payload_bytes_max=1 << 20)
DEADLINE_S = 8.0


class World:
    """A few peers, each serving calls that go on to others, and a random source of everything that happens."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.network = MemoryNetwork(latency_s=0.01)
        self.rpcs = {}
        self.scopes = {}
        self.codes = set()
        self.ended = {"right": 0, "failed": 0}

    async def run(self, *, task_status):
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            for name in "abcd":
                await self.start(name)
            await self.network.connect_all()
            task_status.started()
            await trio.sleep_forever()

    async def start(self, name):
        rpc = Rpc(self.network.host(name), RpcConfig(window_bytes=50_000))
        rpc.serve(ASK, self.answer(rpc))
        rpc.serve_channel(STREAM, self.stream)
        self.rpcs[name] = rpc
        self.scopes[name] = await self.nursery.start(self.keep, rpc)

    async def keep(self, rpc, *, task_status):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(rpc.run)
                task_status.started(scope)

    def answer(self, rpc):
        async def handler(call, request):
            if request.value % 13 == 0:
                raise RpcRefusal("invalid", "thirteen")
            if request.hops:
                peer = self.rpcs[request.hops[0]].host.peer_id
                return await rpc.call(peer, ASK, Ask(request.value, request.hops[1:], request.data))
            await trio.sleep(request.value % 3)
            return Ask(request.value + 1, (), request.data)

        return handler

    async def stream(self, call, request, channel):
        async for message in channel:
            await channel.send(Ask(message.value + 1, (), message.data))

    async def ask(self):
        rpc = self.rpcs[self.random.choice("abcd")]
        hops = tuple(self.random.choice("abcd") for _ in range(self.random.randint(1, 4)))
        size = self.random.choice([0, 0, 5000, 300_000])
        value = self.random.randrange(1000)
        request = Ask(value, hops[1:], Tensor("uint8", (size,), bytes(size)))
        began_s = trio.current_time()
        try:
            peer = self.rpcs[hops[0]].host.peer_id
            reply = await rpc.call(peer, ASK, request, deadline_s=DEADLINE_S)
            assert (reply.value, reply.data.nbytes) == (value + 1, size)
            self.ended["right"] += 1
        except CallFailed as failed:
            self.codes.add(failed.code)
            self.ended["failed"] += 1
        except RemoteFault:
            self.ended["failed"] += 1
        assert trio.current_time() - began_s <= DEADLINE_S + 0.001

    async def talk(self):
        one, other = self.random.sample("abcd", 2)
        count = self.random.randint(1, 40)
        size = self.random.choice([10, 20_000])
        data = Tensor("uint8", (size,), bytes(size))
        try:
            peer = self.rpcs[other].host.peer_id
            async with self.rpcs[one].open(peer, STREAM, Ask(0), deadline_s=DEADLINE_S) as channel:
                async with trio.open_nursery() as nursery:

                    async def send():
                        for value in range(count):
                            await channel.send(Ask(value, (), data))
                        await channel.end()

                    nursery.start_soon(send)
                    for value in range(count):
                        assert (await channel.receive()).value == value + 1
                    with pytest.raises(EndOfChannel):
                        await channel.receive()
            self.ended["right"] += 1
        except BaseExceptionGroup as group:
            _, rest = group.split(RemoteFault)
            if rest is not None:
                raise
            self.ended["failed"] += 1
        except RemoteFault:
            self.ended["failed"] += 1

    async def trouble(self):
        name = self.random.choice("abcd")
        match self.random.choice(["kill", "freeze", "partition", "slow", "disconnect", "stop"]):
            case "kill":
                self.network.kill(self.rpcs[name].host.peer_id)
                self.scopes[name].cancel()
                await trio.sleep(self.random.random())
                await self.start(name)
            case "freeze":
                self.network.freeze(self.rpcs[name].host.peer_id)
            case "partition":
                ids = [rpc.host.peer_id for rpc in self.rpcs.values()]
                self.random.shuffle(ids)
                self.network.partition(ids[:2], ids[2:])
            case "slow":
                self.network.latency_s = self.random.choice([0.0, 0.001, 0.2])
            case "disconnect":
                other = self.random.choice("abcd")
                await self.rpcs[name].host.disconnect(self.rpcs[other].host.peer_id)
            case "stop":
                self.scopes[name].cancel()
                await self.start_again(name)
        await trio.sleep(self.random.random() * 4)
        self.network.heal()

    async def start_again(self, name):
        self.network.kill(self.rpcs[name].host.peer_id)
        await self.start(name)

    async def reconnect(self):
        self.network.heal()
        self.network.latency_s = 0.01
        await self.network.connect_all()


async def schedule(seed):
    world = World(seed)
    async with trio.open_nursery() as outer:
        await outer.start(world.run)
        for _ in range(4):
            async with trio.open_nursery() as work:
                for _ in range(12):
                    work.start_soon(world.ask)
                    work.start_soon(world.talk)
                await trio.sleep(world.random.random() * 0.1)
                await world.trouble()
            await world.reconnect()
        await trio.sleep(10)
        await world.reconnect()
        for one in world.rpcs.values():
            for other in world.rpcs.values():
                assert (await one.call(other.host.peer_id, ASK, Ask(3))).value == 4
        await trio.sleep(2.5)
        for rpc in world.rpcs.values():
            assert rpc.calls_in_flight() == 0
            assert all(link.budget.used_bytes == 0 for link in rpc._links.values())
            assert not rpc.faults
        assert world.codes <= {"invalid", "unavailable", "busy"}
        outer.cancel_scope.cancel()
    return world.ended


@given(st.integers(0, 10**6))
@settings(max_examples=12, deadline=None)
def test_every_call_ends_in_time_and_rightly_whatever_happens(seed):
    clock = trio.testing.MockClock(autojump_threshold=0)
    ended = trio.run(schedule, seed, clock=clock)
    assert sum(ended.values()) == 96
    assert ended["right"] > 20
