"""Runs of several members over the in-memory network, under a virtual clock."""

import pytest
import torch
import trio
import trio.testing

from collectives import RunConfig, Settings, open_run
from p2p import HostConfig, Identity, Links, Rpc, open_host
from p2p.testing import MemoryNetwork

torch.set_num_threads(1)
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class Members:
    """`await members.start("a", "b", "c")` gives their runs, all connected, founders of one run."""

    def __init__(self, nursery, network):
        self.nursery, self.network = nursery, network
        self.scopes = {}
        self.founders = ()

    async def start(self, *names, config=None, each=None, **more):
        """`each`: by name, what differs for it. The test itself must ask for `autojump_clock`: one that only a fixture
        asks for is not used."""
        if not isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock):
            raise TypeError("a test of members takes the fixture autojump_clock")
        hosts = [self.network.host(name) for name in names]
        await self.network.connect_all()
        self.founders = self.founders or tuple(host.peer_id for host in hosts)
        config = config or RunConfig(agreement=Settings(members_min=min(2, len(names))))
        runs = []
        for name, host in zip(names, hosts, strict=True):
            its = {"config": config, **more, **(each or {}).get(name, {})}
            runs.append(await self.nursery.start(self._live, host, its.pop("config"), its))
        return runs

    async def join(self, name, config=None, **more):
        """One more, that founded nothing."""
        host = self.network.host(name)
        await self.network.connect_all()
        return await self.nursery.start(self._live, host, config or RunConfig(), {"founders": (), **more})

    async def _live(self, host, config, more, *, task_status):
        with trio.CancelScope() as scope:
            self.scopes[host.peer_id] = scope
            await self._serve(host, host.identity, config, more, task_status)

    async def _serve(self, host, identity, config, more, task_status):
        rpc = Rpc(host)
        links = Links(host, rpc, identity)
        async with trio.open_nursery() as nursery:
            await nursery.start(rpc.run)
            await nursery.start(links.run)
            more = {"founders": self.founders, **more}
            async with open_run(host, rpc, links, identity, "r", config, **more) as run:
                task_status.started(run)
                await trio.sleep_forever()

    def kill(self, run):
        """As a killed process ends."""
        self.scopes[run.me].cancel()
        self.network.kill(run.me)


class RealMembers(Members):
    """The same over libp2p on loopback, in real time. Those in `hidden` listen nowhere: they dial the others, and
    nobody can dial them."""

    def __init__(self, nursery):
        super().__init__(nursery, None)
        self.hosts = {}

    async def start(self, *names, config=None, each=None, hidden=(), **more):
        identities = {name: Identity.generate() for name in names}
        self.founders = tuple(identity.peer_id for identity in identities.values())
        hosts = [
            await self.nursery.start(self._host, identity, () if name in hidden else (LOOPBACK,))
            for name, identity in identities.items()
        ]
        open_to_all = [host for name, host in zip(names, hosts, strict=True) if name not in hidden]
        for number, host in enumerate(open_to_all):
            for other in hosts:
                if other not in open_to_all[: number + 1]:
                    await other.connect(host.addrs())
        runs = []
        for name, host in zip(names, hosts, strict=True):
            its = {"config": config or RunConfig(), **more, **(each or {}).get(name, {})}
            identity = identities[name]
            start = self._serve_host, host, identity, its.pop("config"), its
            runs.append(await self.nursery.start(*start))
        return runs

    async def _host(self, identity, listen, *, task_status):
        with trio.CancelScope() as scope:
            self.scopes[identity.peer_id] = scope
            async with open_host(identity, "test", bytes(32), HostConfig(listen=listen)) as host:
                self.hosts[identity.peer_id] = host
                task_status.started(host)
                await trio.sleep_forever()

    async def _serve_host(self, host, identity, config, more, *, task_status):
        await self._serve(host, identity, config, more, task_status)

    async def partition(self, *groups):
        for number, group in enumerate(groups):
            for one in group:
                for other in [peer for rest in groups[number + 1 :] for peer in rest]:
                    await self.hosts[one].disconnect(other)

    async def heal(self):
        for one in self.hosts.values():
            for other in self.hosts.values():
                if one is not other and other.addrs() and not one.is_connected(other.peer_id):
                    await one.connect(other.addrs())


async def reduced(run, tensors, weight=1.0, *, tag="outer", deadline_s=20.0):
    async with run.round(tag, deadline_s=deadline_s) as r:
        return await r.reduce(tensors, weight)


class Together:
    """Calls of several runs at once; each gives its result, or the error it raised."""

    def __init__(self):
        self.found = {}

    async def one(self, run, call):
        try:
            self.found[run.me] = await call(run)
        except Exception as error:
            self.found[run.me] = error

    async def __call__(self, runs, call):
        self.found = {}
        async with trio.open_nursery() as nursery:
            for run in runs:
                nursery.start_soon(self.one, run, call)
        return [self.found[run.me] for run in runs]


@pytest.fixture
def members(nursery):
    return Members(nursery, MemoryNetwork(latency_s=0.005))


@pytest.fixture
async def real_members():
    async with trio.open_nursery() as nursery:
        yield RealMembers(nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
def together():
    return Together()


@pytest.fixture
def reduce():
    return reduced
