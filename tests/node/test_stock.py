"""What of this disk stays when room is needed, and what `/mesh` says of it."""

from types import SimpleNamespace

import pytest

from node.metrics import Metrics
from node.stock import Stock
from p2p import BlobStore, Identity, build_manifest
from p2p.blobs.budget import UploadBudget

ME, PUBLISHER, OTHER = (Identity(bytes([n]) * 32) for n in (1, 2, 3))
CHUNK = 1 << 10
LAYERS = 4


class World:
    """A store with one model of four layers, a chunk each, and whatever view a test wants."""

    def __init__(self, tmp_path, publisher):
        source = tmp_path / "source"
        source.mkdir()
        (source / "config.json").write_bytes(b"{}")
        (source / "model.safetensors").write_bytes(bytes(range(256)) * 4 * (1 + LAYERS))
        self.manifest = build_manifest(source, "m", publisher, chunk_bytes_max=CHUNK)
        store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 20)
        store.open(self.manifest)
        self.held, self.dropped, self.known = {}, set(), True
        self.atlas = SimpleNamespace(
            models={"m": SimpleNamespace(manifest_id=self.manifest.id, layers=LAYERS)},
            adapters={},
            nodes={},
            live_hosts=lambda manifest_id: self.hosts,
        )
        self.hosts = {}
        index = SimpleNamespace(
            span_ranges=lambda config, a, b: {"model.safetensors": [(CHUNK * (1 + a), CHUNK * (1 + b))]}
        )
        files = SimpleNamespace(index=index, config=None)
        library = SimpleNamespace(known=lambda manifest_id: files if self.known else None)
        blobs = SimpleNamespace(
            store=store, budget=UploadBudget(), keep=None, evicted_bytes=0, received_bytes=7,
            fetching=lambda: (), dropped=lambda: (),
        )  # fmt: skip
        self.stock = Stock(
            ME.peer_id,
            blobs,
            library,
            lambda: self.atlas,
            lambda: self.held,
            self.dropped.__contains__,
            tmp_path,
        )

    def kept(self):
        return self.stock.kept().get(self.manifest.id, "nothing")

    def host(self, peer, start, end, state="ready"):
        self.hosts[str(peer.peer_id)] = SimpleNamespace(start=start, end=end, state=state)


async def test_what_this_node_added_stays_until_it_is_dropped(tmp_path):
    world = World(tmp_path, ME)
    assert world.kept() is None
    world.dropped.add(world.manifest.id)
    assert world.kept() == "nothing"


async def test_of_what_others_have_too_the_served_span_and_small_files_stay(tmp_path):
    world = World(tmp_path, PUBLISHER)
    world.atlas.nodes[PUBLISHER.peer_id] = object()
    assert world.kept() == {0, 1}
    world.held = {world.manifest.id: [(1, 3)]}
    assert world.kept() == {0, 1, 3, 4}
    world.known = False
    assert world.kept() is None


@pytest.mark.parametrize(
    ("spans", "safe"), [([(0, 4)], True), ([(0, 2)], False), ([(0, 2), (2, 4)], True), ([], False)]
)
async def test_what_nobody_else_would_have_stays(tmp_path, spans, safe):
    world = World(tmp_path, PUBLISHER)
    for number, span in enumerate(spans):
        world.host(Identity(bytes([10 + number]) * 32), *span)
    assert world.kept() == ({0, 1} if safe else None)
    world.hosts.clear()
    world.host(ME, 0, 4)
    world.host(OTHER, 0, 4, state="loading")
    assert world.kept() is None


async def test_what_the_mesh_forgot_may_go(tmp_path):
    world = World(tmp_path, PUBLISHER)
    world.atlas.models.clear()
    assert world.kept() == "nothing"
    world.held = {world.manifest.id: [(0, 1)]}
    assert world.kept() == {0, 1, 2}


async def test_limits_change_and_are_said_with_the_rest(tmp_path):
    world = World(tmp_path, PUBLISHER)
    assert world.stock.document()["upload_mbps"] is None
    world.stock.set_upload(8.0)
    document = world.stock.document()
    assert document["upload_mbps"] == 8.0
    assert document["disk"]["limit_bytes"] == 1 << 20
    metrics = Metrics()
    metrics.observe_mesh({"blobs": document | {"dropped_sources": [{"peer": "x"}]}})
    text = metrics.text().decode()
    assert "shoal_blob_received_bytes 7.0" in text
    assert 'shoal_blob_disk_bytes{what="limit"} 1.048576e+06' in text
    assert 'shoal_blob_dropped_sources{peer="x"} 1.0' in text
