"""Nodes with links: over the in-memory network (streams only), or over libp2p on loopback (direct paths)."""

import os
from dataclasses import dataclass

import pytest
import trio
import trio.lowlevel

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


class Proxy:
    """A stranger between dialler and listener: it may record, change, withhold or cut what passes."""

    def __init__(self, nursery, target):
        self.nursery = nursery
        self.target = target
        self.said = []
        self.flowing = trio.Event()
        self.flowing.set()
        self.corrupt_after = None
        self.withheld = False
        self.open = []

    async def start(self):
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.nursery.start_soon(trio.serve_listeners, self._serve, [listener])
        return f"127.0.0.1:{listener.socket.getsockname()[1]}"

    async def _serve(self, near):
        host, _, port = self.target.rpartition(":")
        far = await trio.open_tcp_stream(host, int(port))
        self.open += [near, far]
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, near, far, True)
            nursery.start_soon(self._pass, far, near, False)

    async def _pass(self, source, target, record):
        passed = 0
        try:
            async for data in source:
                await self.flowing.wait()
                if record:
                    self.said.append(bytes(data))
                if record and self.corrupt_after is not None and passed + len(data) > self.corrupt_after:
                    changed = bytearray(data)
                    changed[-1] ^= 1
                    data, self.corrupt_after = bytes(changed), None
                if record and self.withheld:
                    continue
                passed += len(data)
                await target.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await target.aclose()

    async def cut(self):
        for stream in self.open:
            await stream.aclose()
        self.open.clear()


@pytest.fixture
def proxy_to(nursery):
    """`await proxy_to(node)` puts a Proxy in front of a node's listener; only its address is offered then."""

    async def make(node):
        proxy = Proxy(nursery, node.links.addrs()[0])
        node.links._listener._offered = [await proxy.start()]
        return proxy

    return make


@pytest.fixture
def until():
    """Poll until something holds."""

    async def wait(condition):
        with trio.fail_after(10):
            while not condition():
                await trio.lowlevel.checkpoint()

    return wait


async def _echo(link):
    while True:
        header, payload = await link.receive()
        await link.send(header, [payload])


async def _idle(link):
    await trio.sleep_forever()


async def _rally(link, count=5, size=300_000):
    """Messages there and back, checked."""
    for index in range(count):
        payload = os.urandom(size)
        await link.send(str(index).encode(), [payload])
        header, got = await link.receive()
        assert (header, bytes(got)) == (str(index).encode(), payload)


@pytest.fixture
def echo():
    """A handler that sends back what it receives."""
    return _echo


@pytest.fixture
def idle():
    """A handler that neither receives nor sends."""
    return _idle


@pytest.fixture
def rally():
    """Sends some messages over a link to `echo`, and checks that they come back."""
    return _rally
