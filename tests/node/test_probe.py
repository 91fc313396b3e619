"""Measuring links over which nothing large came yet."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio

from node.probe import ANSWER_EVERY_S, PROBE, PROBE_BYTES, Probe, ProbeRequest
from p2p import CallFailed, Rpc
from p2p.testing import MemoryNetwork


@asynccontextmanager
async def two_nodes(*metered):
    """Probes of a and b, over a network with latency; those named are metered."""
    network = MemoryNetwork(latency_s=0.05)
    hosts = {name: network.host(name) for name in "ab"}
    rpcs = {name: Rpc(host) for name, host in hosts.items()}
    probes = {name: Probe(rpc, lambda name=name: name in metered) for name, rpc in rpcs.items()}
    async with trio.open_nursery() as nursery:
        for rpc in rpcs.values():
            await nursery.start(rpc.run)
        await network.connect_all(*hosts.values())
        yield SimpleNamespace(a=probes["a"], rpc=rpcs["a"], b=str(hosts["b"].peer_id))
        nursery.cancel_scope.cancel()


async def test_a_peer_is_asked_once_and_its_rate_is_known(autojump_clock):
    async with two_nodes() as mesh:
        await mesh.a.ask_one([mesh.b])
        assert 1e6 < mesh.a.rates.pop(mesh.b) < 1e8
        await mesh.a.ask_one([mesh.b])
        assert mesh.a.rates == {}


@pytest.mark.parametrize("metered", ["a", "b"])
async def test_nothing_is_sent_over_a_line_that_is_paid_by_the_byte(metered, autojump_clock):
    async with two_nodes(metered) as mesh:
        await mesh.a.ask_one([mesh.b])
        assert mesh.a.rates == {}


async def test_who_asks_too_often_or_for_too_much_gets_less(autojump_clock):
    async with two_nodes() as mesh:
        answer = await mesh.rpc.call(mesh.b, PROBE, ProbeRequest(1 << 40))
        assert len(answer.data.data) == PROBE_BYTES
        with pytest.raises(CallFailed):
            await mesh.rpc.call(mesh.b, PROBE, ProbeRequest(1))
        await trio.sleep(ANSWER_EVERY_S)
        assert len((await mesh.rpc.call(mesh.b, PROBE, ProbeRequest(1))).data.data) == 1
