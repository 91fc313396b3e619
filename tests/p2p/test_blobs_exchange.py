"""Fetching: from several peers at once, only what is wanted, and whatever the sources do."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import trio

from p2p import (
    BlobExchange,
    BlobStore,
    BlobUnavailable,
    CallFailed,
    ExchangeConfig,
    Identity,
    Links,
    LinksConfig,
    LocalFault,
    ResourceLimit,
    RpcRefusal,
    build_manifest,
    pack_value,
)
from p2p.blobs import protocol
from p2p.messages import codec_of

IDENTITY = Identity(bytes(range(32)))
BIG = 1 << 40
CONFIG = ExchangeConfig(run_bytes_max=40_000, link_run_bytes_max=40_000)
LINKS = LinksConfig(listen=())


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "a").write_bytes(random.Random(1).randbytes(1_000_000))
    (directory / "b").write_bytes(random.Random(2).randbytes(5_000))
    return directory


@pytest.fixture
def manifest(source):
    return build_manifest(source, "m", IDENTITY, chunk_bytes_max=10_000)


@pytest.fixture(params=["calls", "link"])
def lane(request):
    """How chunks travel: by calls, as where no link can be had, or on links."""
    return request.param


@pytest.fixture
def make(tmp_path, lane, nursery):
    """An exchange with a store of its own for an Rpc."""

    def made(rpc, config=CONFIG, quota_bytes=BIG):
        store = BlobStore(tmp_path / f"blobs-{rpc.host.peer_id}", quota_bytes=quota_bytes)
        links = None
        if lane == "link":
            links = Links(rpc.host, rpc, SimpleNamespace(peer_id=rpc.host.peer_id), LINKS)
            nursery.start_soon(links.run)
        return BlobExchange(rpc, store, config, links)

    return made


def whole(manifest):
    return {entry.name: [(0, entry.size)] for entry in manifest.files}


def same(exchange, manifest, source):
    directory = exchange.store.open(manifest)
    return all((directory / e.name).read_bytes() == (source / e.name).read_bytes() for e in manifest.files)


def ids(*rpcs):
    return [rpc.host.peer_id for rpc in rpcs]


def test_the_golden_bytes_of_the_exchanges_messages():
    golden = {
        protocol.ManifestWanted("ab"): "91a26162",
        protocol.HaveWanted("ab"): "91a26162",
        protocol.Have(True, b"\x05"): "92c3c40105",
        protocol.ChunksWanted("ab", 300, 2): "93a26162cd012c02",
    }
    for message, raw in golden.items():
        assert pack_value(message).hex() == raw
    encoded = codec_of(protocol.Bytes).encode(protocol.raw(b"xyz"))
    assert (encoded.body.hex(), b"".join(encoded.payload)) == ("9192a575696e743803", b"xyz")


async def test_a_manifest_and_its_files_come_from_a_peer(peers, make, manifest, source):
    one, other = await peers(2)
    giver, taker = make(one), make(other)
    giver.store.publish(manifest, source)
    got = await taker.fetch_manifest(manifest.id, ids(other, one))
    assert got == manifest
    assert taker.store.manifests() == (manifest,)
    seen = []
    await taker.fetch(got, whole(got), lambda: ids(one), progress=lambda *both: seen.append(both))
    assert same(taker, manifest, source)
    assert seen[0] == (0, 1_005_000)
    assert seen[-1] == (1_005_000, 1_005_000)
    assert seen == sorted(seen)


async def test_only_wanted_ranges_are_fetched_and_only_once(memory_peers, make, manifest, source):
    one, other = await memory_peers(2)
    giver, taker = make(one), make(other)
    giver.store.publish(manifest, source)
    await taker.fetch(manifest, {"a": [(15_000, 25_000), (500_000, 500_001)]}, lambda: ids(one))
    assert taker.store.have_bytes(manifest.id) == 30_000
    assert taker.store.has(manifest.id, "a", 10_000, 30_000)
    told = []
    await taker.fetch(
        manifest, {"a": [(10_000, 20_000)]}, lambda: [], progress=lambda *both: told.append(both)
    )
    assert told == [(10_000, 10_000)]


async def test_several_sources_share_the_work(memory_peers, make, manifest, source, monkeypatch):
    *givers, last = await memory_peers(4)
    served = Counter()
    for rpc in givers:
        giver = make(rpc)
        giver.store.publish(manifest, source)
        read = giver.store.read_run

        def counted(manifest_id, first, count, into, read=read, rpc=rpc):
            served[rpc.host.peer_id] += count
            return read(manifest_id, first, count, into)

        monkeypatch.setattr(giver.store, "read_run", counted)
    taker = make(last)
    await taker.fetch(manifest, whole(manifest), lambda: ids(*givers))
    assert same(taker, manifest, source)
    assert set(served) == set(ids(*givers))
    assert sum(served.values()) == manifest.chunk_count
    assert min(served.values()) >= 10


async def test_peers_that_have_parts_complete_one_another(memory_peers, make, manifest, source):
    one, second, third, last = await memory_peers(4)
    seeder, early, late, taker = make(one), make(second), make(third), make(last)
    seeder.store.publish(manifest, source)
    await early.fetch(manifest, {"a": [(0, 500_000)]}, lambda: ids(one))
    await late.fetch(manifest, {"a": [(500_000, 1_000_000)], "b": [(0, 5_000)]}, lambda: ids(one))
    await taker.fetch(manifest, whole(manifest), lambda: ids(second, third))
    assert same(taker, manifest, source)


@pytest.mark.parametrize("wrong", ["bytes", "length"])
async def test_a_source_of_wrong_bytes_is_dropped_and_named(
    memory_peers, make, manifest, source, wrong, caplog, monkeypatch
):
    good, bad, last = await memory_peers(3)
    make(good).store.publish(manifest, source)
    liar = make(bad)
    liar.store.publish(manifest, source)
    size_of = liar._serving._size
    if wrong == "bytes":
        monkeypatch.setattr(liar.store, "read_run", lambda manifest_id, first, count, into: None)
    else:
        monkeypatch.setattr(liar._serving, "_size", lambda wanted: size_of(wanted) + 1)
        monkeypatch.setattr(liar.store, "read_run", lambda manifest_id, first, count, into: None)
    taker = make(last)
    await taker.fetch(manifest, whole(manifest), lambda: ids(bad, good))
    assert same(taker, manifest, source)
    named = [r.message for r in caplog.records if bad.host.peer_id in r.message and "no source" in r.message]
    assert named
    assert [(one.peer, one.name) for one in taker.dropped()] == [(bad.host.peer_id, "m")]
    assert not any(good.host.peer_id in r.message for r in caplog.records if r.levelname == "WARNING")


async def test_a_source_that_dies_is_replaced(memory_peers, network, make, manifest, source):
    dying, living, last = await memory_peers(3)
    for rpc in (dying, living):
        make(rpc).store.publish(manifest, source)
    taker = make(last)

    def progress(done, total):
        if done >= 200_000:
            network.kill(dying.host.peer_id)

    await taker.fetch(manifest, whole(manifest), lambda: ids(dying, living), progress=progress)
    assert same(taker, manifest, source)


async def test_an_interrupted_fetch_goes_on_where_it_was(memory_peers, make, manifest, source, tmp_path):
    one, other = await memory_peers(2)
    make(one).store.publish(manifest, source)
    taker = make(other)
    with trio.CancelScope() as scope:

        def progress(done, total):
            if done >= 300_000:
                scope.cancel()

        await taker.fetch(manifest, whole(manifest), lambda: ids(one), progress=progress)
    assert scope.cancelled_caught
    taker.store = BlobStore(tmp_path / f"blobs-{other.host.peer_id}", quota_bytes=BIG)
    had = taker.store.have_bytes(manifest.id)
    assert had >= 300_000
    first = []
    await taker.fetch(manifest, whole(manifest), lambda: ids(one), progress=lambda *both: first.append(both))
    assert first[0] == (had, 1_005_000)
    assert same(taker, manifest, source)


async def test_what_no_peer_has_is_said(memory_peers, make, manifest, source):
    one, other = await memory_peers(2)
    config = ExchangeConfig(patience_s=0.05, refresh_s=0.01, link_run_bytes_max=40_000)
    half, taker = make(one), make(other, config)
    with pytest.raises(BlobUnavailable, match="does not know"):
        await taker.fetch(manifest, whole(manifest), lambda: ids(one))
    with pytest.raises(BlobUnavailable, match="no peer was asked") as caught:
        await taker.fetch(manifest, {"b": [(0, 1)]}, lambda: [])
    assert caught.value.file == "b"
    assert "[0, 5000)" in caught.value.missing
    half.store.open(manifest)
    data = (source / "a").read_bytes()
    half.store.write_run(manifest, 0, 1, data[:10_000])
    with pytest.raises(BlobUnavailable) as caught:
        await taker.fetch(manifest, {"a": [(0, 30_000)]}, lambda: ids(one))
    assert caught.value.missing.startswith("bytes [10000, 20000) and 10000 bytes more")
    assert taker.store.has(manifest.id, "a", 0, 10_000)
    with pytest.raises(BlobUnavailable, match="not_found"):
        await taker.fetch_manifest("0" * 64, ids(one))


async def test_a_changed_chunk_of_a_source_does_not_cost_its_neighbours(memory_peers, make, manifest, source):
    one, other = await memory_peers(2)
    make(one).store.publish(manifest, source)
    with (source / "a").open("r+b") as file:
        file.seek(55_000)
        file.write(b"changed")
    taker = make(other, ExchangeConfig(patience_s=0.3, refresh_s=0.01))
    with pytest.raises(BlobUnavailable) as caught:
        await taker.fetch(manifest, whole(manifest), lambda: ids(one))
    assert caught.value.missing == "bytes [50000, 60000)"
    assert caught.value.file == "a"


@pytest.mark.parametrize("lane", ["calls"])
async def test_a_busy_source_is_asked_again_later(memory_peers, make, manifest, source):
    one, other = await memory_peers(2)
    giver = make(one, ExchangeConfig(served_per_peer_max=1, busy_retry_after_s=0.01))
    giver.store.publish(manifest, source)
    asked = []
    serve = one._served["blobs.chunks"]

    async def counted(call, request):
        asked.append(request)
        return await serve.handler(call, request)

    one._served["blobs.chunks"] = type(serve)(serve.method, counted, False)
    taker = make(other, ExchangeConfig(run_bytes_max=40_000, refresh_s=0.01))
    await taker.fetch(manifest, whole(manifest), lambda: ids(one))
    assert same(taker, manifest, source)
    assert giver._serving._calls == {}
    assert 26 < len(asked) < 120


async def test_the_quota_ends_a_fetch_before_it_begins(memory_peers, make, manifest, source):
    one, other = await memory_peers(2)
    make(one).store.publish(manifest, source)
    taker = make(other, quota_bytes=500_000)
    with pytest.raises(ResourceLimit, match="do not fit"):
        await taker.fetch(manifest, whole(manifest), lambda: ids(one))
    assert taker.store.have_bytes(manifest.id) == 0


async def test_what_nobody_needs_makes_room_for_a_fetch(memory_peers, make, manifest, source, tmp_path):
    one, other = await memory_peers(2)
    giver, taker = make(one), make(other, quota_bytes=1_400_000)
    (source / "b").write_bytes(random.Random(3).randbytes(5_000))
    second = build_manifest(source, "second", IDENTITY, chunk_bytes_max=10_000)
    giver.store.publish(second, source)
    await taker.fetch(second, whole(second), lambda: ids(one))
    (source / "b").write_bytes(random.Random(2).randbytes(5_000))
    giver.store.publish(manifest, source)
    taker.keep = lambda: {second.id: None}
    with pytest.raises(ResourceLimit, match="do not fit"):
        await taker.fetch(manifest, whole(manifest), lambda: ids(one))
    assert taker.store.have_bytes(second.id) == 1_005_000
    taker.keep = dict
    await taker.fetch(manifest, whole(manifest), lambda: ids(one))
    assert same(taker, manifest, source)
    assert taker.store.have_bytes(second.id) == 0
    assert taker.evicted_bytes == 1_005_000


@pytest.mark.parametrize("rate", [0, 2e6])
async def test_the_owner_bounds_what_is_uploaded(memory_peers, make, manifest, source, autojump_clock, rate):
    one, other = await memory_peers(2)
    config = ExchangeConfig(patience_s=1.0, run_bytes_max=40_000, link_run_bytes_max=40_000)
    giver, taker = make(one), make(other, config)
    giver.store.publish(manifest, source)
    giver.budget.set_rate(rate)
    begun_s = trio.current_time()
    if rate:
        await taker.fetch(manifest, whole(manifest), lambda: ids(one))
        assert giver.budget.sent_bytes >= 1_005_000
    else:
        with pytest.raises(BlobUnavailable, match="uploads nothing"):
            await taker.fetch(manifest, whole(manifest), lambda: ids(one))
    took_s = trio.current_time() - begun_s
    assert not rate or 0.15 < took_s < 2


async def test_a_disk_that_fills_up_ends_a_fetch(memory_peers, make, manifest, source, monkeypatch):
    one, other = await memory_peers(2)
    make(one).store.publish(manifest, source)
    taker = make(other)

    def full(manifest, first, count, data):
        raise ResourceLimit("no room left")

    monkeypatch.setattr(taker.store, "write_run", full)
    with pytest.raises(ResourceLimit, match="no room"):
        await taker.fetch(manifest, whole(manifest), lambda: ids(one))


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 257), (-1, 2), (100, 10), (1 << 40, 1)])
async def test_requests_beyond_the_limits_are_refused(memory_peers, make, manifest, source, first, count):
    one, other = await memory_peers(2)
    make(one).store.publish(manifest, source)
    wanted = protocol.ChunksWanted(manifest.id, first, count)
    with pytest.raises(CallFailed) as caught:
        await other.call(one.host.peer_id, protocol.CHUNKS, wanted)
    assert caught.value.code == "invalid"


async def test_ranges_outside_the_manifest_are_our_own_fault(memory_peers, make, manifest):
    (one,) = await memory_peers(1)
    with pytest.raises(LocalFault, match="bytes"):
        await make(one).fetch(manifest, {"a": [(0, 2_000_000)]}, lambda: [])


async def test_a_refusal_to_say_anything_is_survived(memory_peers, make, manifest, source):
    one, silent, last = await memory_peers(3)
    make(one).store.publish(manifest, source)

    async def refuse(call, request):
        raise RpcRefusal("denied", "not for you")

    for method in (protocol.HAVE, protocol.MANIFEST, protocol.CHUNKS):
        silent.serve(method, refuse)
    taker = make(last)
    assert await taker.fetch_manifest(manifest.id, ids(silent, one)) == manifest
    await taker.fetch(manifest, whole(manifest), lambda: ids(silent, one))
    assert same(taker, manifest, source)
