"""Room on the disk: what nobody needs goes, the least lately used first, and never more or less than helps."""

import os
import random
import sys

import pytest

from p2p import BlobStore, Identity, ResourceLimit, build_manifest
from p2p.blobs import files
from p2p.blobs import store as store_module

IDENTITY = Identity(bytes(range(32)))
CHUNK = 64 << 10
COUNT = 8


@pytest.fixture
def models(tmp_path):
    """Three manifests of two files, `COUNT` chunks each."""
    made = []
    for number in range(3):
        source = tmp_path / f"source-{number}"
        source.mkdir()
        for name in ("a", "b"):
            data = random.Random(f"{number}{name}").randbytes(COUNT * CHUNK)
            (source / name).write_bytes(data)
        made.append((build_manifest(source, f"m{number}", IDENTITY, chunk_bytes_max=CHUNK), source))
    return made


def fill(store, models):
    """Everything of all of them, the first used first."""
    for age, (manifest, source) in enumerate(models):
        directory = store.open(manifest)
        for number in range(manifest.chunk_count):
            entry, chunk = manifest.chunk(number)
            with (source / entry.name).open("rb") as file:
                file.seek(chunk.offset)
                store.write_run(manifest, number, 1, file.read(chunk.length))
        store._get(manifest.id).used_s = 1000.0 + age
        assert directory.is_dir()


def taken(store, manifest):
    """Bytes that its files take on the disk."""
    os.sync()
    return sum((store.open(manifest) / e.name).stat().st_blocks * 512 for e in manifest.files)


def test_the_least_lately_used_goes_first_and_no_more_than_is_wanted(tmp_path, models):
    store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 30)
    fill(store, models)
    whole = 2 * COUNT * CHUNK
    assert store.evict(10, {}) == whole
    assert [store.have_bytes(manifest.id) for manifest, _ in models] == [0, whole, whole]
    again = BlobStore(tmp_path / "blobs", quota_bytes=1 << 30)
    assert [again.have_bytes(manifest.id) for manifest, _ in models] == [0, whole, whole]
    assert taken(store, models[0][0]) == 0
    fill(store, models[:1])
    assert store.read_chunk(models[0][0].id, 3)


def test_what_is_kept_stays_and_can_be_read(tmp_path, models):
    store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 30)
    fill(store, models)
    (first, _), (second, _), (third, _) = models
    kept = {1, 2, 5}
    keep = {first.id: kept, second.id: None, third.id: None}
    assert store.evict(CHUNK, keep) == (2 * COUNT - len(kept)) * CHUNK
    assert [n for n in range(first.chunk_count) if store.has_chunk(first.id, n)] == sorted(kept)
    assert all(len(store.read_chunk(first.id, n)) == CHUNK for n in kept)
    assert store.have_bytes(second.id) == store.have_bytes(third.id) == 2 * COUNT * CHUNK
    if sys.platform == "linux":
        assert taken(store, first) <= (len(kept) + 1) * CHUNK


def test_nothing_goes_where_it_would_not_be_enough(tmp_path, models):
    store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 30)
    fill(store, models)
    keep = {manifest.id: None for manifest, _ in models[1:]}
    assert store.evict(2 * COUNT * CHUNK + 1, keep) == 0
    assert store.have_bytes(models[0][0].id) == 2 * COUNT * CHUNK


def test_published_files_are_never_touched(tmp_path, models):
    store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 30)
    manifest, source = models[0]
    store.publish(manifest, source)
    assert store.evict(1, {}) == 0
    assert store.read_chunk(manifest.id, 0) == (source / "a").read_bytes()[:CHUNK]


def test_without_holes_in_files_whole_ones_go(tmp_path, models, monkeypatch):
    monkeypatch.setattr(files, "_fallocate", lambda: None)
    store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 30)
    fill(store, models[:1])
    manifest = models[0][0]
    assert store.evict(COUNT * CHUNK, {manifest.id: {0}}) == (2 * COUNT - 1) * CHUNK
    assert store.read_chunk(manifest.id, 0)
    assert (store.open(manifest) / "b").stat().st_blocks == 0


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, models, monkeypatch):
    store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 60)
    with pytest.raises(ResourceLimit, match=r"of which .* are free"):
        store.check_room(1 << 59)


def test_a_disk_that_fills_up_in_mid_write_loses_nothing(tmp_path, models, monkeypatch):
    store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 30)
    manifest, source = models[0]
    store.open(manifest)
    data = (source / "a").read_bytes()
    store.write_run(manifest, 0, 1, data[:CHUNK])

    def full(path, offset, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_at", full)
    with pytest.raises(ResourceLimit, match=r"no room left .*No space left"):
        store.write_run(manifest, 1, 1, data[CHUNK : 2 * CHUNK])
    assert store.used_bytes() == CHUNK
    monkeypatch.undo()
    again = BlobStore(tmp_path / "blobs", quota_bytes=1 << 30)
    assert again.read_chunk(manifest.id, 0) == data[:CHUNK]
    again.write_run(manifest, 1, 1, data[CHUNK : 2 * CHUNK])
