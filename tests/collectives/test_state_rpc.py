"""A state comes from many peers at once, whole, whatever some of them do."""

import pytest
import torch
import trio

from collectives.errors import RemoteFault
from collectives.state import CHUNK_BYTES, Shelf, Snapshot
from collectives.state_rpc import Fetch, Head, StateServer, ask_heads, choose_head
from p2p import Rpc
from p2p.testing import MemoryNetwork

torch.set_num_threads(1)


def a_state(seed=0, mib=6):
    g = torch.Generator().manual_seed(seed)
    return {f"layer.{n}": torch.randn(CHUNK_BYTES // 4 + n, generator=g) for n in range(mib)}


class CountingServer(StateServer):
    """Knows which chunks it was asked for."""

    def __init__(self, rpc, shelf):
        self.asked, self.changed = [], trio.lowlevel.ParkingLot()
        super().__init__(rpc, lambda run, tag: shelf if (run, tag) == ("r", "outer") else None)

    async def _chunk(self, call, ask):
        self.asked.append(ask.index)
        self.changed.unpark_all()
        return await super()._chunk(call, ask)

    async def reach(self, count):
        while len(self.asked) < count:
            await self.changed.park()


class Sources:
    """Connected peers with a shelf each; the last one is the joiner."""

    def __init__(self, nursery, network):
        self.nursery, self.network = nursery, network
        self.rpcs, self.shelves, self.servers = [], [], []

    async def start(self, count, *snapshots):
        hosts = [self.network.host(f"peer-{n}") for n in range(count)]
        await self.network.connect_all(*hosts)
        for number, host in enumerate(hosts):
            rpc = Rpc(host)
            shelf = Shelf()
            self.servers.append(CountingServer(rpc, shelf))
            await self.nursery.start(rpc.run)
            self.rpcs.append(rpc)
            self.shelves.append(shelf)
            if number < len(snapshots):
                shelf.put(snapshots[number], 0)
        self.joiner = self.rpcs[-1]
        return [rpc.host.peer_id for rpc in self.rpcs[:-1]]


@pytest.fixture
def sources(nursery):
    return Sources(nursery, MemoryNetwork(latency_s=0.01))


async def test_chunks_come_from_every_peer_once(autojump_clock, sources):
    snapshot = Snapshot.take(a_state(mib=12), 5)
    peers = await sources.start(4, snapshot, snapshot, snapshot)
    heads = await ask_heads(sources.joiner, peers, "r", "outer", 1.0)
    head = choose_head(heads, 0)
    assert head == Head(5, snapshot.digest, snapshot.manifest.nbytes)
    fetch = Fetch(sources.joiner, "r", "outer", head)
    got = await fetch.run(peers)
    assert got.digest == snapshot.digest
    assert got.epoch == 5
    assert all(torch.equal(got.tensors[key], tensor) for key, tensor in snapshot.tensors.items())
    assert fetch.bytes_received == snapshot.manifest.nbytes
    assert all(len(server.asked) >= 3 for server in sources.servers[:3])


async def test_unknown_chains_and_silent_peers_have_no_head(autojump_clock, sources):
    peers = await sources.start(4, Snapshot.take({"a": torch.ones(1)}, 1))
    sources.network.freeze(peers[2])
    assert set(await ask_heads(sources.joiner, peers, "r", "outer", 1.0)) == {peers[0]}
    assert await ask_heads(sources.joiner, peers, "other", "outer", 1.0) == {}


def test_the_state_of_the_majority_of_the_newest_epoch_is_chosen():
    one, two = Head(4, b"1", 9), Head(4, b"2", 9)
    old, new = Head(3, b"0", 9), Head(5, b"9", 9)
    assert choose_head({"a": one, "b": one, "c": two, "d": old}, 0) == one
    assert choose_head({"a": one, "b": two, "d": old}, 0) == old
    assert choose_head({"a": one, "b": two, "d": old}, 4) is None
    assert choose_head({"a": one, "b": one, "d": new}, 4) == new
    assert choose_head({}, 0) is None


async def test_a_liar_is_found_out_and_left(autojump_clock, sources):
    snapshot = Snapshot.take(a_state(), 5)
    peers = await sources.start(3, snapshot, snapshot)
    lying = Snapshot.take(a_state(1), 5)
    lying.digest = snapshot.digest
    sources.shelves[0]._kept.clear()
    sources.shelves[0].put(lying, 0)
    fetch = Fetch(sources.joiner, "r", "outer", Head(5, snapshot.digest, 0))
    got = await fetch.run(peers)
    assert got.digest == snapshot.digest
    assert fetch.bad == {peers[0]}
    assert set(fetch.received_from) == {peers[1]}


async def test_a_silent_peer_is_overtaken(autojump_clock, sources):
    snapshot = Snapshot.take(
        a_state(mib=3), 5
    )  # put together without a thread, during which the clock would run away
    peers = await sources.start(4, snapshot, snapshot, snapshot)
    fetch = Fetch(sources.joiner, "r", "outer", Head(5, snapshot.digest, 0), requests_per_peer=1)
    sources.network.set_latency(peers[1], sources.joiner.host.peer_id, 60.0)
    before = trio.current_time()
    got = await fetch.run([peers[0], peers[1], peers[2]])
    assert got.digest == snapshot.digest
    assert trio.current_time() - before < 10


async def test_what_came_before_everybody_was_lost_is_not_fetched_again(autojump_clock, sources, tmp_path):
    snapshot = Snapshot.take(a_state(mib=8), 5)
    peers = await sources.start(3, snapshot, snapshot)
    head = Head(5, snapshot.digest, 0)
    fetch = Fetch(sources.joiner, "r", "outer", head, tmp_path, requests_per_peer=1)

    async def cut():
        await sources.servers[0].reach(4)
        sources.network.kill(peers[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        with pytest.raises(RemoteFault, match="chunks of the state are not to be had"):
            await fetch.run(peers[:1])
    first_bytes = fetch.bytes_received
    assert 3 * CHUNK_BYTES <= first_bytes < snapshot.manifest.nbytes
    del fetch
    # Another process, the same directory.
    again = Fetch(sources.joiner, "r", "outer", head, tmp_path)
    got = await again.run(peers[1:])
    assert got.digest == snapshot.digest
    assert again.bytes_recalled == first_bytes
    assert again.bytes_received == snapshot.manifest.nbytes - first_bytes
    assert list(tmp_path.iterdir()) == []


async def test_files_of_an_older_state_are_removed_and_damaged_ones_are_not_believed(
    autojump_clock, sources, tmp_path
):
    snapshot = Snapshot.take(a_state(), 5)
    peers = await sources.start(2, snapshot)
    (tmp_path / "unrelated").write_bytes(b"stays")
    old = Fetch(sources.joiner, "r", "outer", Head(4, bytes(32), 0), tmp_path)
    old._files.keep_manifest(b"old")
    head = Head(5, snapshot.digest, 0)
    torn = Fetch(sources.joiner, "r", "outer", head, tmp_path)
    torn._files.keep_manifest(b"torn")
    assert not list(tmp_path.glob("*" + bytes(16).hex() + "*"))
    got = await Fetch(sources.joiner, "r", "outer", head, tmp_path).run(peers)
    assert got.digest == snapshot.digest
    assert [path.name for path in tmp_path.iterdir()] == ["unrelated"]


async def test_a_snapshot_that_is_being_read_outlives_newer_ones(autojump_clock, sources):
    snapshot = Snapshot.take(a_state(mib=8), 5)
    peers = await sources.start(2, snapshot)
    fetch = Fetch(sources.joiner, "r", "outer", Head(5, snapshot.digest, 0), requests_per_peer=1)

    async def publish():
        for epoch in range(6, 12):
            await sources.servers[0].reach(epoch - 4)
            sources.shelves[0].put(Snapshot.take({"a": torch.ones(epoch)}, epoch), trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        got = await fetch.run(peers)
    assert got.digest == snapshot.digest
    assert sources.shelves[0].newest.epoch == 11


async def test_an_empty_state_needs_no_chunks(autojump_clock, sources, tmp_path):
    snapshot = Snapshot.take({"nothing": torch.zeros(0)}, 5)
    peers = await sources.start(2, snapshot)
    got = await Fetch(sources.joiner, "r", "outer", Head(5, snapshot.digest, 0), tmp_path).run(peers)
    assert got.digest == snapshot.digest
