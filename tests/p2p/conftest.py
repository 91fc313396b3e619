"""Peers that can call one another: over the in-memory network, or over libp2p on loopback."""

from dataclasses import dataclass

import pytest
import trio
from hypothesis import settings

from p2p import HostConfig, Identity, Rpc, open_host
from p2p.testing import MemoryNetwork

# The same examples every time, however slow the machine.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

ON_LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))


@dataclass
class Peers:
    """`await peers(2)` gives that many connected Rpcs, which run until the test ends."""

    nursery: trio.Nursery
    network: MemoryNetwork | None

    async def __call__(self, count, config=None, **rest):
        hosts = [await self.host(name) for name in "abcdefgh"[:count]]
        for index, host in enumerate(hosts):
            for other in hosts[index + 1 :]:
                await host.connect(other.addrs())
        return [await self.rpc(host, config) for host in hosts]

    async def host(self, name):
        if self.network is not None:
            return self.network.host(name)
        return await self.nursery.start(self._run_host)

    async def _run_host(self, *, task_status):
        config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
        async with open_host(Identity.generate(), "test", bytes(32), config) as host:
            task_status.started(host)
            await trio.sleep_forever()

    async def rpc(self, host, config=None):
        rpc = Rpc(host, config)
        await self.nursery.start(rpc.run)
        return rpc


async def _peers(network):
    async with trio.open_nursery() as nursery:
        yield Peers(nursery, network)
        nursery.cancel_scope.cancel()


@pytest.fixture
def network():
    return MemoryNetwork()


@pytest.fixture(params=["memory", "libp2p"])
async def peers(request, network):
    """The same contract for the fake and the real host."""
    async for one in _peers(network if request.param == "memory" else None):
        yield one


@pytest.fixture
async def memory_peers(network):
    async for one in _peers(network):
        yield one


@pytest.fixture
def make_host(nursery):
    """Opens hosts of one mesh, each in a task of its own; all end with the test."""

    async def run(identity, mesh_id, key, config, task_status):
        async with open_host(identity, mesh_id, key, config) as host:
            task_status.started(host)
            await trio.sleep_forever()

    async def make(config=ON_LOOPBACK, mesh_id="mesh", key=b"k" * 32, identity=None):
        return await nursery.start(run, identity or Identity.generate(), mesh_id, key, config)

    return make


@pytest.fixture
def peers_class():
    return Peers
