"""What a link between two processes on this machine gives: bytes a second one way and both ways, and CPU a byte.

`measure` starts the other process, which is `python -m p2p.links.bench`; everything is encrypted and real. It knows
how to measure, and not what the figures are for.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from p2p.errors import EndOfChannel
from p2p.host import HostConfig, open_host
from p2p.identity import Identity
from p2p.links.link import Link
from p2p.links.links import Links
from p2p.links.types import LinksConfig
from p2p.rpc import Rpc

_MESH = "links-bench"
_KEY = b"benchmark only".ljust(32, b".")
_SERVICE = "bench"
_DONE = b"done"
_CPU = struct.Struct("!d")
_LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
_WARM_MESSAGES = 32
_PINGS = 200


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """`total_bytes` go each way in messages of `message_bytes`; `path` chooses direct sockets or a libp2p stream."""

    total_bytes: int = 1 << 30
    message_bytes: int = 1 << 20
    path: str = "direct"
    sockets: int = 1


@asynccontextmanager
async def _node(config: BenchConfig) -> AsyncIterator[tuple[Any, Links]]:
    identity = Identity.generate()
    async with open_host(identity, _MESH, _KEY, _LOOPBACK) as host, trio.open_nursery() as nursery:
        rpc = Rpc(host)
        wanted = LinksConfig(
            direct=config.path == "direct", sockets=config.sockets, sockets_near=config.sockets
        )
        links = Links(host, rpc, identity, wanted)
        await nursery.start(rpc.run)
        await nursery.start(links.run)
        yield host, links
        nursery.cancel_scope.cancel()


class _Receiver:
    """Takes messages into one buffer, and says what its process spent."""

    def __init__(self, link: Link, message_bytes: int) -> None:
        self._link = link
        self._place = memoryview(bytearray(message_bytes))

    async def take(self, count: int) -> None:
        for _ in range(count):
            await self._link.receive(lambda header, size: self._place[:size])

    async def send(self, count: int) -> None:
        payload = memoryview(bytearray(self._place))
        for _ in range(count):
            await self._link.send(b"", [payload])


async def _serve_one(link: Link) -> None:
    """The other process: obeys headers "MODE COUNT BYTES"."""
    try:
        while True:
            header, _ = await link.receive()
            mode, count, size = header.decode().split()
            receiver = _Receiver(link, int(size))
            began_s = time.process_time()
            async with trio.open_nursery() as nursery:
                if mode in ("one", "both"):
                    nursery.start_soon(receiver.take, int(count))
                if mode in ("back", "both"):
                    nursery.start_soon(receiver.send, int(count))
                if mode == "ping":
                    for _ in range(int(count)):
                        await receiver.take(1)
                        await receiver.send(1)
            await link.send(_DONE + _CPU.pack(time.process_time() - began_s))
    except EndOfChannel:
        return


async def _ask(link: Link, mode: str, count: int, size: int) -> tuple[float, float]:
    """(seconds, CPU seconds of both processes) of one exercise."""
    receiver = _Receiver(link, size)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    await link.send(f"{mode} {count} {size}".encode())
    async with trio.open_nursery() as nursery:
        if mode in ("one", "both"):
            nursery.start_soon(receiver.send, count)
        if mode in ("back", "both"):
            nursery.start_soon(receiver.take, count)
        if mode == "ping":
            for _ in range(count):
                await receiver.send(1)
                await receiver.take(1)
    header, _ = await link.receive()
    spent_s = time.process_time() - cpu_s + _CPU.unpack(header[len(_DONE) :])[0]
    return time.perf_counter() - began_s, spent_s


async def _measure(config: BenchConfig, address: str) -> dict[str, Any]:
    count, size = max(1, config.total_bytes // config.message_bytes), config.message_bytes
    async with _node(config) as (host, links):
        peer = await host.connect([address])
        async with links.open(peer, _SERVICE) as link:
            if link.path != config.path:
                await trio.sleep(2.5)
            await _ask(link, "both", min(count, _WARM_MESSAGES), size)
            one_s, one_cpu_s = await _ask(link, "one", count, size)
            both_s, both_cpu_s = await _ask(link, "both", count, size)
            ping_s, _ = await _ask(link, "ping", _PINGS, 8192)
            path, report = link.path, links.report()[0]
    moved_gb = count * size / 1e9
    return {
        "path": path,
        "sockets": config.sockets if path == "direct" else 0,
        "message_bytes": size,
        "one_way_gb_per_s": round(moved_gb / one_s, 3),
        "one_way_cpu_s_per_gb": round(one_cpu_s / moved_gb, 3),
        "both_ways_gb_per_s": round(2 * moved_gb / both_s, 3),
        "both_ways_cpu_s_per_gb": round(both_cpu_s / (2 * moved_gb), 3),
        "echo_8k_us": round(ping_s / _PINGS * 1e6, 1),
        "rtt_us": None if report.rtt_s is None else round(report.rtt_s * 1e6, 1),
        "loss": report.loss,
    }


def measure(config: BenchConfig | None = None) -> dict[str, Any]:
    """Figures of a link between this process and another: GB (10**9 bytes) a second, CPU seconds of both together."""
    config = config or BenchConfig()
    command = [sys.executable, "-m", "p2p.links.bench", config.path, str(config.sockets)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            address = "" if other.stdout is None else other.stdout.readline().strip()
            if not address:
                raise RuntimeError("the other process did not start")
            return trio.run(_measure, config, address)
        finally:
            other.kill()


async def _serve(config: BenchConfig) -> None:
    async with _node(config) as (host, links):
        links.serve(_SERVICE, _serve_one)
        print(host.addrs()[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)  # until the starter goes


if __name__ == "__main__":
    trio.run(_serve, BenchConfig(path=sys.argv[1], sockets=int(sys.argv[2])))
