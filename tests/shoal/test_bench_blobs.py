"""`shoal bench blobs` at a small size, and what its processes show besides: a fetcher that is killed goes on where it
was, and a source that lies on real, encrypted links is named while the fetch ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2p import BlobStore, Manifest
from shoal import bench_blobs
from shoal.bench_peers import Peers

pytestmark = pytest.mark.slow  # processes that import everything: half a minute
MIB = 1 << 20
LIAR = """
import sys
from p2p.blobs.store import BlobStore
read = BlobStore.read_run
def lie(self, manifest_id, first, count, into):
    read(self, manifest_id, first, count, into)
    into[-1] ^= 1
BlobStore.read_run = lie
from shoal.bench_blobs_peer import main
main()
"""


def span(root, mib):
    (root / "source").mkdir()
    (root / "source" / bench_blobs.FILE).write_bytes(os.urandom(mib * MIB))


def sources(root, mib, count, mbps=None):
    return Peers(
        bench_blobs.PEER,
        [{"root": str(root), "mib": mib, "role": "source", "index": i, "mbps": mbps} for i in range(count)],
    )


def test_the_figures(capsys):
    found = bench_blobs.measure(sources=2, mib=8, rounds=1)
    assert found["sources_used"] == 2
    assert found["paths"] == ["direct"]
    assert found["mb_per_s"] > 0
    assert found["ratio"] == pytest.approx(found["mb_per_s"] / found["tls_socket_mb_per_s"])
    assert found["peak_memory_mib"] < 64


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_fetch_goes_on_where_it_was(tmp_path):
    mib = 24
    span(tmp_path, mib)
    givers = sources(tmp_path, mib, 2, mbps=80)  # 20 MB/s in all: more than a second
    order = {"root": str(tmp_path), "mib": mib, "role": "fetcher", "round": 0}
    try:
        order["addrs"] = [one["addrs"] for one in givers.hear()]
        doomed = Peers(bench_blobs.PEER, [order])
        journal = tmp_path / "fetched-0"
        while sum(path.stat().st_size for path in journal.glob("*/journal")) < 8 * 6:
            assert doomed.children[0].poll() is None
        doomed.children[0].kill()
        doomed.end()
        manifest = Manifest.decode((tmp_path / "manifest").read_bytes())
        store = BlobStore(journal, quota_bytes=1 << 40)
        here = [n for n in range(manifest.chunk_count) if store.has_chunk(manifest.id, n)]
        assert 6 <= len(here) < manifest.chunk_count
        assert all(store.read_chunk(manifest.id, number) for number in here)
        again = Peers(bench_blobs.PEER, [order])
        (found,) = again.hear()
        again.end()
        assert found["fetched_bytes"] <= mib * MIB - len(here) * MIB
    finally:
        givers.end()


def test_a_source_that_lies_is_named_and_the_fetch_ends(tmp_path):
    mib = 8
    span(tmp_path, mib)
    givers = sources(tmp_path, mib, 1)
    settings = {"root": str(tmp_path), "mib": mib, "role": "source", "index": 1, "mbps": None}
    liar = subprocess.Popen(
        [sys.executable, "-c", LIAR, json.dumps(settings)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        honest = givers.hear()[0]["addrs"]
        lying = json.loads(liar.stdout.readline())["addrs"]
        order = {"root": str(tmp_path), "mib": mib, "role": "fetcher", "round": 0, "addrs": [honest, lying]}
        fetcher = Peers(bench_blobs.PEER, [order])
        (found,) = fetcher.hear()
        fetcher.end()
        assert found["dropped"] == [lying[0].rpartition("/")[2]]
        assert found["fetched_bytes"] == mib * MIB
    finally:
        givers.end()
        liar.kill()
        liar.communicate()
