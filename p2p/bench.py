"""What calls between two processes on this machine cost: round trips, bytes a second, the first connection, and
whether many calls leave anything behind.

`measure` starts the other process, which is `python -m p2p.bench`; everything is encrypted and real, over loopback. It
knows how to measure, and not what the figures are for.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import trio

from p2p.errors import P2pError
from p2p.host import Host, HostConfig, open_host
from p2p.identity import Identity, PeerId
from p2p.links.bench import BenchConfig as LinkBenchConfig
from p2p.links.bench import measure as measure_links
from p2p.rpc import Rpc
from p2p.rpc_lane import Channel
from p2p.rpc_types import Call, Method

_MESH = "rpc-bench"
_KEY = b"benchmark only".ljust(32, b".")
_LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
_SIZES = (16, 8192, 65536)
_WARM_CALLS = 200
_LANES_OF_CALLS = 64
_BODY_BYTES_MAX = 128 << 10


@dataclass(frozen=True, slots=True)
class Block:
    """What goes to and fro."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Question:
    """`wait` until so many calls are in flight."""

    wait: int = 0


@dataclass(frozen=True, slots=True)
class Left:
    """What a process has alive. `rss_bytes` is what it has resident."""

    streams: int
    tasks: int
    calls: int
    rss_bytes: int


ECHO = Method("bench/echo", Block, Block, body_bytes_max=_BODY_BYTES_MAX)
ECHOES = Method("bench/echoes", Question, Block, upstream=Block, body_bytes_max=_BODY_BYTES_MAX)
GATHER = Method("bench/gather", Question, Question, deadline_s=60.0)
LEFT = Method("bench/left", Question, Left)


@dataclass(frozen=True, slots=True)
class RpcBenchConfig:
    """`round_trips` are timed at each size; `at_once` calls are in flight together; `calls` are made, and then what
    is left of them is counted; `connections` first connections are timed; `total_bytes` go each way as bulk."""

    round_trips: int = 3000
    at_once: int = 1000
    calls: int = 100_000
    connections: int = 15
    total_bytes: int = 1 << 30


@contextlib.asynccontextmanager
async def _node() -> AsyncIterator[tuple[Host, Rpc]]:
    async with (
        open_host(Identity.generate(), _MESH, _KEY, _LOOPBACK) as host,
        trio.open_nursery() as nursery,
    ):
        rpc = Rpc(host)
        await nursery.start(rpc.run)
        yield host, rpc
        nursery.cancel_scope.cancel()


def _left(host: Host, rpc: Rpc) -> Left:
    gc.collect()
    return Left(
        host.streams_open(),
        trio.lowlevel.current_statistics().tasks_living,
        rpc.calls_in_flight(),
        psutil.Process().memory_info().rss,
    )


# ---- the other process


class _Gathering:
    """Lets nobody go on until so many have come."""

    def __init__(self) -> None:
        self._here = 0
        self._all = trio.Event()

    async def join(self, wanted: int) -> None:
        self._here += 1
        if self._here >= wanted:
            self._all.set()
            self._here, self._all = 0, trio.Event()
        else:
            await self._all.wait()


async def _serve() -> None:
    async with _node() as (host, rpc):
        gathering = _Gathering()

        async def echo(call: Call, block: Block) -> Block:
            return block

        async def echoes(call: Call, asked: Question, channel: Channel[Block, Block]) -> None:
            async for block in channel:
                await channel.send(block)

        async def gather(call: Call, asked: Question) -> Question:
            await gathering.join(asked.wait)
            return asked

        async def left(call: Call, asked: Question) -> Left:
            return _left(host, rpc)

        rpc.serve(ECHO, echo)
        rpc.serve_channel(ECHOES, echoes)
        rpc.serve(GATHER, gather)
        rpc.serve(LEFT, left)
        print(host.addrs()[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)  # until the starter goes


# ---- this process


async def _times(count: int, once: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Microseconds that `once` takes."""
    for _ in range(min(count, _WARM_CALLS)):
        await once()
    took: list[float] = []
    for _ in range(count):
        began = time.perf_counter_ns()
        await once()
        took.append((time.perf_counter_ns() - began) / 1e3)
    took.sort()
    return {
        "p50": round(took[len(took) // 2], 1),
        "p99": round(took[min(len(took) - 1, len(took) * 99 // 100)], 1),
    }


def _block(size: int) -> Block:
    return Block(bytes(size))


async def _round_trips(rpc: Rpc, peer: PeerId, count: int) -> dict[str, Any]:
    """Of whole calls, and of messages on a channel that is open already."""
    calls: dict[str, dict[str, float]] = {}
    messages: dict[str, dict[str, float]] = {}
    for size in _SIZES:
        block = _block(size)
        calls[str(size)] = await _times(count, lambda block=block: rpc.call(peer, ECHO, block))  # type: ignore[misc]
        async with rpc.open(peer, ECHOES, Question()) as channel:

            async def there_and_back(channel: Channel[Block, Block] = channel, block: Block = block) -> None:
                await channel.send(block)
                await channel.receive()

            messages[str(size)] = await _times(count, there_and_back)
    return {"rtt_us": calls, "channel_rtt_us": messages}


async def _at_once(rpc: Rpc, peer: PeerId, count: int) -> dict[str, Any]:
    """None of these calls is answered before the last one has come."""
    done = 0

    async def one() -> None:
        nonlocal done
        await rpc.call(peer, GATHER, Question(count))
        done += 1

    began_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return {"calls": count, "completed": done, "took_s": round(time.perf_counter() - began_s, 3)}


async def _many(rpc: Rpc, peer: PeerId, count: int) -> None:
    """`count` small calls, some always in flight."""
    left = count
    block = _block(64)

    async def some() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await rpc.call(peer, ECHO, block)

    async with trio.open_nursery() as nursery:
        for _ in range(_LANES_OF_CALLS):
            nursery.start_soon(some)


async def _left_behind(host: Host, rpc: Rpc, peer: PeerId, count: int) -> dict[str, Any]:
    """What `count` calls leave: streams, tasks and calls of both processes, and the memory that they grew by."""
    await _many(rpc, peer, max(count // 10, _LANES_OF_CALLS))
    before = [_left(host, rpc), await rpc.call(peer, LEFT, Question())]
    began_s = time.perf_counter()
    await _many(rpc, peer, count)
    took_s = time.perf_counter() - began_s
    after = [_left(host, rpc), await rpc.call(peer, LEFT, Question())]

    def grown(field: str) -> int:
        return sum(
            int(getattr(now, field) - getattr(then, field)) for now, then in zip(after, before, strict=True)
        )

    return {
        "calls": count,
        "calls_per_s": round(count / took_s, 1),
        "streams": grown("streams"),
        "tasks": grown("tasks"),
        "in_flight": grown("calls"),
        "memory_kib": grown("rss_bytes") // 1024,
    }


async def _first_connections(address: str, count: int) -> dict[str, float]:
    """Milliseconds from nothing to a proven connection, and to the answer of a first call; each from a new node."""
    connected: list[float] = []
    answered: list[float] = []
    for _ in range(count):
        async with _node() as (host, rpc):
            began = time.perf_counter_ns()
            peer = await host.connect([address])
            connected.append((time.perf_counter_ns() - began) / 1e6)
            await rpc.call(peer, ECHO, _block(16))
            answered.append((time.perf_counter_ns() - began) / 1e6)
    connected.sort()
    answered.sort()
    return {
        "p50": round(connected[count // 2], 2),
        "max": round(connected[-1], 2),
        "first_answer_p50": round(answered[count // 2], 2),
    }


async def _measure(config: RpcBenchConfig, address: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    async with _node() as (host, rpc):
        peer = await host.connect([address])
        figures |= await _round_trips(rpc, peer, config.round_trips)
        figures["at_once"] = await _at_once(rpc, peer, config.at_once)
        figures["left_behind"] = await _left_behind(host, rpc, peer, config.calls)
    figures["first_connection_ms"] = await _first_connections(address, config.connections)
    return figures


def _other() -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "p2p.bench"],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def measure(config: RpcBenchConfig | None = None) -> dict[str, Any]:
    """Figures of calls and links between this process and another. MB are 10**6 bytes. Raises P2pError."""
    config = config or RpcBenchConfig()
    with _other() as other:
        try:
            address = "" if other.stdout is None else other.stdout.readline().strip()
            if not address:
                raise P2pError("the other process of the bench did not start")
            figures = trio.run(_measure, config, address)
        finally:
            other.kill()
    direct = measure_links(LinkBenchConfig(total_bytes=config.total_bytes, path="direct"))
    stream = measure_links(LinkBenchConfig(total_bytes=max(config.total_bytes // 4, 1 << 20), path="stream"))
    return figures | {
        "bulk_mb_per_s": round(direct["one_way_gb_per_s"] * 1e3, 1),
        "bulk_each_of_both_ways_mb_per_s": round(direct["both_ways_gb_per_s"] * 500, 1),
        "bulk_path": direct["path"],
        "link_rtt_8192_us": direct["echo_8k_us"],
        "stream_mb_per_s": round(stream["one_way_gb_per_s"] * 1e3, 1),
        "stream_each_of_both_ways_mb_per_s": round(stream["both_ways_gb_per_s"] * 500, 1),
        "stream_path": stream["path"],
        "encrypted": True,
    }


if __name__ == "__main__":
    trio.run(_serve)
