"""The store: verified chunks in sparse files, a journal that survives any death, quotas, published sources."""

import errno
import os
import random
import signal
import subprocess
import sys

import pytest

from p2p import (
    BlobStore,
    Identity,
    LocalFault,
    ProtocolViolation,
    ResourceLimit,
    SourceChanged,
    StoreFault,
    build_manifest,
)
from p2p.blobs import files
from p2p.blobs import store as store_module
from p2p.blobs.journal import Journal

IDENTITY = Identity(bytes(range(32)))
BIG = 1 << 40


def content(size, seed=1):
    return random.Random(seed).randbytes(size)


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    (directory / "sub").mkdir(parents=True)
    (directory / "a").write_bytes(content(2500))
    (directory / "sub" / "b").write_bytes(content(1000, 2))
    return directory


@pytest.fixture
def manifest(source):
    return build_manifest(source, "m", IDENTITY, chunk_bytes_max=1000)


def chunk_data(source, manifest, number):
    entry, chunk = manifest.chunk(number)
    return (source / entry.name).read_bytes()[chunk.offset : chunk.end]


def test_written_chunks_are_in_place_and_counted(tmp_path, source, manifest):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    directory = store.open(manifest)
    assert (directory / "a").stat().st_size == 2500
    store.write_chunk(manifest, "a", 1, chunk_data(source, manifest, 1))
    assert store.has(manifest.id, "a", 1000, 2000)
    assert not store.has(manifest.id, "a", 999, 2000)
    assert [chunk.offset for chunk in store.missing(manifest.id, "a", 0, 2500)] == [0, 2000]
    assert store.have_bytes(manifest.id) == store.used_bytes() == 1000
    assert (directory / "a").read_bytes()[1000:2000] == (source / "a").read_bytes()[1000:2000]
    assert store.read_chunk(manifest.id, 1) == chunk_data(source, manifest, 1)
    assert store.bits(manifest.id) == bytes([0b0010])
    store.write_chunk(manifest, "sub/b", 0, chunk_data(source, manifest, 3))
    assert store.has(manifest.id, "sub/b", 0, 1000)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: bytes(len(data))]
)
def test_wrong_bytes_are_refused_and_not_marked(tmp_path, source, manifest, change):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    store.open(manifest)
    with pytest.raises(ProtocolViolation, match="hash"):
        store.write_chunk(manifest, "a", 0, change(chunk_data(source, manifest, 0)))
    assert store.have_bytes(manifest.id) == 0


def test_everything_is_there_after_a_restart(tmp_path, source, manifest):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    store.open(manifest)
    for number in (0, 3):
        store.write_run(manifest, number, 1, chunk_data(source, manifest, number))
    again = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    assert again.manifests() == (manifest,)
    assert again.have_bytes(manifest.id) == 2000
    assert again.has(manifest.id, "a", 0, 1000)
    assert not again.has(manifest.id, "a", 1000, 1001)


@pytest.mark.parametrize("tail", [b"\x00", b"\x00\x00\x00\x01\x00\x00\x00\x00", os.urandom(21)])
def test_a_journals_unverifiable_tail_is_cut_off(tmp_path, source, manifest, tail):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    store.open(manifest)
    store.write_run(manifest, 0, 1, chunk_data(source, manifest, 0))
    journal = tmp_path / "blobs" / manifest.id / "journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    again = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    assert again.have_bytes(manifest.id) == 1000
    assert journal.read_bytes() == whole
    again.write_run(manifest, 1, 1, chunk_data(source, manifest, 1))
    assert BlobStore(tmp_path / "blobs", quota_bytes=BIG).have_bytes(manifest.id) == 2000


@pytest.mark.parametrize("cut", range(0, 17))
def test_a_journal_cut_anywhere_keeps_its_whole_records(tmp_path, cut):
    journal = Journal(tmp_path / "journal", "id", 10)
    journal.add([4])
    journal.add([7])
    raw = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(raw[:cut])
    assert Journal(tmp_path / "journal", "id", 10).present == set([4, 7][: cut // 8])
    assert Journal(tmp_path / "journal", "another", 10).present == set()


def test_marked_data_that_never_reached_the_disk_is_found_unless_it_was_synced(tmp_path, source, manifest):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    directory = store.open(manifest)
    store.write_run(manifest, 0, 1, chunk_data(source, manifest, 0))
    store.sync(manifest.id)
    store.write_run(manifest, 1, 2, b"".join(chunk_data(source, manifest, number) for number in (1, 2)))
    with (directory / "a").open("r+b") as file:
        file.seek(1000)
        file.write(bytes(1000))
    again = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    assert [chunk.offset for chunk in again.missing(manifest.id, "a", 0, 2500)] == [1000]
    assert again.have_bytes(manifest.id) == 1500


def test_what_is_written_while_others_are_flushed_does_not_count_as_flushed(
    tmp_path, source, manifest, monkeypatch
):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    store.open(manifest)
    store.write_run(manifest, 0, 1, chunk_data(source, manifest, 0))
    flush = store_module.flush

    def slow(path):
        flush(path)
        store.write_run(manifest, 1, 1, chunk_data(source, manifest, 1))

    monkeypatch.setattr(store_module, "flush", slow)
    store.sync(manifest.id)
    hashed = []
    monkeypatch.setattr(store_module, "_intact", lambda held, number: hashed.append(number) or True)
    assert BlobStore(tmp_path / "blobs", quota_bytes=BIG).have_bytes(manifest.id) == 2000
    assert hashed == [1]


@pytest.mark.parametrize("shift", [0, 1, 4095])
def test_large_pieces_are_written_whole_wherever_they_lie(tmp_path, shift):
    path, offset = tmp_path / "file", 3 * 4096 + shift
    data = random.Random(shift).randbytes(600_001)
    path.write_bytes(bytes(offset + len(data) + 10))
    memory = files.place(files.page_memory(len(data) + files.PAGE_BYTES), len(data), offset)
    memory[:] = data
    files.write_at(path, offset, memory)
    assert path.read_bytes() == bytes(offset) + data + bytes(10)
    read = memoryview(bytearray(len(data)))
    assert files.read_at(path, offset, read)
    assert read == data
    assert not files.read_at(path, offset + 11, read)


def test_synced_chunks_are_not_hashed_again(tmp_path, source, manifest, monkeypatch):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    store.open(manifest)
    store.write_run(manifest, 0, 2, b"".join(chunk_data(source, manifest, number) for number in (0, 1)))
    store.sync(manifest.id)
    store.write_run(manifest, 3, 1, chunk_data(source, manifest, 3))
    hashed = []
    monkeypatch.setattr(store_module, "_intact", lambda held, number: hashed.append(number) or True)
    assert BlobStore(tmp_path / "blobs", quota_bytes=BIG).have_bytes(manifest.id) == 3000
    assert hashed == [3]


def test_a_file_that_was_deleted_is_fetched_again(tmp_path, source, manifest):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    directory = store.open(manifest)
    store.write_run(manifest, 0, 4, b"".join(chunk_data(source, manifest, number) for number in range(4)))
    store.sync(manifest.id)
    (directory / "a").unlink()
    again = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    assert len(again.missing(manifest.id, "a", 0, 2500)) == 3
    assert again.missing(manifest.id, "sub/b", 0, 1000) == []


def test_bytes_damaged_on_the_disk_are_never_served(tmp_path, source, manifest):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    directory = store.open(manifest)
    store.write_run(manifest, 0, 1, chunk_data(source, manifest, 0))
    (directory / "a").write_bytes(bytes(2500))
    with pytest.raises(LocalFault, match="damaged"):
        store.read_chunk(manifest.id, 0)
    assert not store.has(manifest.id, "a", 0, 1000)
    assert store.have_bytes(manifest.id) == 0


def test_published_files_stay_where_they_are(tmp_path, source, manifest):
    store = BlobStore(tmp_path / "blobs", quota_bytes=0 + 1)
    store.publish(manifest, source)
    assert store.open(manifest) == source.resolve()
    assert store.have_bytes(manifest.id) == 3500
    assert store.used_bytes() == 0
    assert store.bits(manifest.id) == bytes([0b1111])
    assert store.missing(manifest.id, "a", 0, 2500) == []
    assert (
        b"".join(store.read_chunk(manifest.id, number) for number in range(3)) == (source / "a").read_bytes()
    )
    assert sum(path.stat().st_size for path in (tmp_path / "blobs").rglob("*") if path.is_file()) < 3500
    again = BlobStore(tmp_path / "blobs", quota_bytes=1)
    assert again.open(manifest) == source.resolve()


def test_a_changed_source_is_refused(tmp_path, source, manifest):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    store.publish(manifest, source)
    (source / "a").write_bytes(content(2500, 9))
    with pytest.raises(SourceChanged):
        store.read_chunk(manifest.id, 0)
    (source / "a").write_bytes(b"short")
    with pytest.raises(SourceChanged):
        store.read_chunk(manifest.id, 2)
    with pytest.raises(SourceChanged):
        BlobStore(tmp_path / "others", quota_bytes=BIG).publish(manifest, source)
    (source / "a").unlink()
    with pytest.raises(StoreFault):
        store.read_chunk(manifest.id, 0)


def test_the_quota_is_kept(tmp_path, source, manifest):
    store = BlobStore(tmp_path / "blobs", quota_bytes=1500)
    store.open(manifest)
    store.write_run(manifest, 0, 1, chunk_data(source, manifest, 0))
    with pytest.raises(ResourceLimit) as caught:
        store.write_run(manifest, 1, 1, chunk_data(source, manifest, 1))
    assert caught.value.retry_after_s > 0
    store.write_run(manifest, 0, 1, chunk_data(source, manifest, 0))
    store.remove(manifest.id)
    assert store.used_bytes() == 0
    assert store.manifests() == ()
    assert not (tmp_path / "blobs" / manifest.id).exists()


def test_a_full_disk_is_a_limit_and_nothing_is_marked(tmp_path, source, manifest, monkeypatch):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    store.open(manifest)

    def full(self, numbers):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "add", full)
    with pytest.raises(ResourceLimit, match="No space left"):
        store.write_run(manifest, 0, 1, chunk_data(source, manifest, 0))
    assert store.have_bytes(manifest.id) == 0


@pytest.mark.parametrize("damage", ["manifest", "other", "none"])
def test_damaged_directories_are_left_out(tmp_path, source, manifest, damage, caplog):
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    store.open(manifest)
    directory = tmp_path / "blobs" / manifest.id
    match damage:
        case "manifest":
            (directory / "manifest").write_bytes(b"garbage")
        case "other":
            directory.rename(directory.with_name("0" * 64))
        case "none":
            (directory / "manifest").unlink()
    assert BlobStore(tmp_path / "blobs", quota_bytes=BIG).manifests() == ()
    assert "damaged" in caplog.text


def test_a_store_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreFault, match="cannot use"):
        BlobStore(tmp_path / "file" / "blobs", quota_bytes=1)


WRITER = """
import random, sys
from pathlib import Path
from p2p import BlobStore, Manifest
root, source, encoded = map(Path, sys.argv[1:])
manifest = Manifest.decode(encoded.read_bytes())
store = BlobStore(root, quota_bytes=1 << 40)
store.open(manifest)
data = (source / "a").read_bytes()
numbers = list(range(manifest.chunk_count))
random.Random(5).shuffle(numbers)
for number in numbers:
    chunk = manifest.chunk(number)[1]
    store.write_run(manifest, number, 1, data[chunk.offset : chunk.end])
    print(number, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_writer_killed_at_any_moment_loses_nothing_that_was_marked(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(content(400_000))
    manifest = build_manifest(source, "m", IDENTITY, chunk_bytes_max=100)
    (tmp_path / "encoded").write_bytes(manifest.encode())
    command = [sys.executable, "-c", WRITER, str(tmp_path / "blobs"), str(source), str(tmp_path / "encoded")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
    store = BlobStore(tmp_path / "blobs", quota_bytes=BIG)
    for number in told:
        assert store.read_chunk(manifest.id, number)
    present = [number for number in range(manifest.chunk_count) if store.has_chunk(manifest.id, number)]
    assert set(told) <= set(present)
    for number in present:
        assert store.read_chunk(manifest.id, number)
