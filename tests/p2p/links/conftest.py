"""Nodes with links: over the in-memory network (streams only), or over libp2p on loopback (direct paths)."""

from dataclasses import dataclass

import pytest
import trio

from p2p import HostConfig, Identity, Links, LinksConfig, Rpc, open_host
from p2p.testing import MemoryNetwork


@dataclass
class Node:
    host: object
    rpc: Rpc
    links: Links

    @property
    def peer_id(self):
        return self.host.peer_id


@dataclass
class Nodes:
    """`await nodes(2)` gives that many connected nodes, which run until the test ends."""

    nursery: trio.Nursery
    network: MemoryNetwork | None

    async def __call__(self, count, *configs):
        made = [
            await self.one(name, *configs[index : index + 1]) for index, name in enumerate("abcd"[:count])
        ]
        for index, node in enumerate(made):
            for other in made[index + 1 :]:
                await node.host.connect(other.host.addrs())
        return made

    async def one(self, name, config=None):
        return await self.nursery.start(self._run, name, config or LinksConfig())

    async def _run(self, name, config, *, task_status):
        if self.network is not None:
            host = self.network.host(name)
            await self._serve(host, host, config, task_status)
            return
        identity = Identity.generate()
        listening = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
        async with open_host(identity, "test", bytes(32), listening) as host:
            await self._serve(host, identity, config, task_status)

    async def _serve(self, host, identity, config, task_status):
        rpc = Rpc(host)
        links = Links(host, rpc, identity, config)
        async with trio.open_nursery() as nursery:
            await nursery.start(rpc.run)
            await nursery.start(links.run)
            task_status.started(Node(host, rpc, links))
            await trio.sleep_forever()


async def _nodes(network):
    async with trio.open_nursery() as nursery:
        yield Nodes(nursery, network)
        nursery.cancel_scope.cancel()


@pytest.fixture(params=["memory", "libp2p"])
async def nodes(request):
    async for one in _nodes(MemoryNetwork() if request.param == "memory" else None):
        yield one


@pytest.fixture
async def real_nodes():
    async for one in _nodes(None):
        yield one


@pytest.fixture
async def memory_nodes():
    async for one in _nodes(MemoryNetwork()):
        yield one
