"""Chunks on this disk: fetched ones in sparse files under the store, published ones where their owner keeps them.

Knows directories, quotas and journals. Everything is verified: a chunk before it is written, and again whenever it is
read for a peer. All methods block on the disk and may be called from any thread. It does not know peers.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from p2p.blobs.errors import SourceChanged, StoreFault
from p2p.blobs.files import empty, flush, punch, read_at, write_at
from p2p.blobs.journal import Journal
from p2p.blobs.manifest import Chunk, Manifest
from p2p.errors import LocalFault, P2pError, ProtocolViolation, ResourceLimit

logger = logging.getLogger(__name__)

Keep = Mapping[str, Collection[int] | None]

# EDQUOT is not known on every system.
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_SYNC_EVERY_BYTES = 512 << 20
_RETRY_AFTER_FULL_S = 60.0


@dataclass(eq=False, slots=True)
class _Held:
    """One manifest of the store. `source` is set while its files are published from elsewhere."""

    manifest: Manifest
    root: Path
    journal: Journal
    source: Path | None
    have_bytes: int
    lock: threading.RLock
    syncing: threading.Lock = field(default_factory=threading.Lock)
    unsynced_bytes: int = 0
    ready: bool = False
    used_s: float = 0.0

    @property
    def directory(self) -> Path:
        return self.source or self.root / "files"

    def path(self, name: str) -> Path:
        return self.directory / name


class BlobStore:
    """Under `root`, one directory a manifest. `quota_bytes` bounds what is fetched; what is published is not copied."""

    def __init__(self, root: Path, *, quota_bytes: int) -> None:
        """Raises StoreFault where `root` cannot be used. What is damaged inside is left out, and logged."""
        self._root = root
        self._quota_bytes = quota_bytes
        self._held: dict[str, _Held] = {}
        self._reserved_bytes = 0
        self._lock = threading.RLock()
        with _disk(root):
            root.mkdir(parents=True, exist_ok=True)
            for directory in sorted(root.iterdir()):
                if directory.is_dir() and not directory.name.startswith("."):
                    self._load(directory)

    # ---- manifests

    def manifests(self) -> tuple[Manifest, ...]:
        """All that were published, opened or remembered here, also before a restart."""
        return tuple(held.manifest for held in self._held.values())

    def manifest(self, manifest_id: str) -> Manifest | None:
        held = self._held.get(manifest_id)
        return None if held is None else held.manifest

    def remember(self, manifest: Manifest) -> None:
        """Keep a manifest, without any of its data."""
        with self._lock:
            if manifest.id not in self._held:
                directory = self._root / manifest.id
                with _disk(directory):
                    directory.mkdir(parents=True, exist_ok=True)
                    _write_atomically(directory / "manifest", manifest.encode())
                    self._load(directory)

    def publish(self, manifest: Manifest, directory: Path) -> None:
        """Serve straight from `directory`, of which `manifest` was built. Raises StoreFault, SourceChanged."""
        directory = directory.resolve()
        for entry in manifest.files:
            _check_source(directory / entry.name, entry.size)
        self.remember(manifest)
        held = self._get(manifest.id)
        with held.lock, _disk(held.root):
            _write_atomically(held.root / "source", os.fsencode(directory))
            held.source = directory

    def open(self, manifest: Manifest) -> Path:
        """The directory of its files: being filled, each with its whole size, or the published source."""
        self.remember(manifest)
        held = self._get(manifest.id)
        with held.lock:
            held.used_s = time.time()
            if held.source is None and not held.ready:
                self._make_files(held)
            with _disk(held.root):
                os.utime(held.root / "manifest", (held.used_s, held.used_s))
            return held.directory

    def remove(self, manifest_id: str) -> None:
        """Forget a manifest and delete what was fetched; a published source is left alone."""
        with self._lock:
            held = self._held.pop(manifest_id, None)
            if held is not None:
                with held.lock, _disk(held.root):
                    shutil.rmtree(held.root)

    # ---- what is here

    def has(self, manifest_id: str, file: str, start: int, end: int) -> bool:
        """Whether bytes [start, end) of `file` are here. False for what is not known."""
        held = self._held.get(manifest_id)
        if held is None or file not in held.manifest.by_name:
            return False
        if held.source is not None:
            return True
        return all(number in held.journal.present for number in held.manifest.numbers(file, start, end))

    def missing(self, manifest_id: str, file: str, start: int, end: int) -> list[Chunk]:
        """Chunks of bytes [start, end) of `file` that are not here."""
        held = self._get(manifest_id)
        present = held.journal.present
        numbers = held.manifest.numbers(file, start, end) if held.source is None else ()
        return [held.manifest.chunk(number)[1] for number in numbers if number not in present]

    def have_bytes(self, manifest_id: str) -> int:
        """Bytes of a manifest that can be read here; 0 for one that is not known."""
        held = self._held.get(manifest_id)
        if held is None:
            return 0
        return held.manifest.size_bytes if held.source is not None else held.have_bytes

    def has_chunk(self, manifest_id: str, number: int) -> bool:
        held = self._held.get(manifest_id)
        return held is not None and (held.source is not None or number in held.journal.present)

    def bits(self, manifest_id: str) -> bytes | None:
        """One bit a chunk, the first in the lowest bit of the first byte; None for a manifest not known."""
        held = self._held.get(manifest_id)
        if held is None:
            return None
        count = held.manifest.chunk_count
        bits = bytearray(b"\xff" * (-(-count // 8)) if held.source is not None else -(-count // 8))
        if held.source is None:
            for number in list(held.journal.present):
                bits[number >> 3] |= 1 << (number & 7)
        elif count % 8:
            bits[-1] = (1 << (count % 8)) - 1
        return bytes(bits)

    def used_bytes(self) -> int:
        """What fetched chunks take of the quota, those included that are just being written."""
        return self._reserved_bytes + sum(held.have_bytes for held in list(self._held.values()))

    @property
    def quota_bytes(self) -> int:
        return self._quota_bytes

    def set_quota(self, quota_bytes: int) -> None:
        """From now on; what is more already stays until room is made."""
        self._quota_bytes = quota_bytes

    def free_bytes(self) -> int:
        """Of the disk, for this process."""
        with _disk(self._root):
            return shutil.disk_usage(self._root).free

    def check_room(self, more_bytes: int) -> None:
        """Raises ResourceLimit where `more_bytes` would not fit into the quota, or on the disk."""
        used = self.used_bytes()
        free = self.free_bytes()
        if more_bytes > free:
            raise ResourceLimit(
                f"{more_bytes} bytes more do not fit on the disk of {self._root}, of which {free} are free",
                _RETRY_AFTER_FULL_S,
            )
        if used + more_bytes > self._quota_bytes:
            raise ResourceLimit(
                f"{more_bytes} bytes more do not fit into the {self._quota_bytes} bytes of {self._root}, "
                f"of which {used} are used",
                _RETRY_AFTER_FULL_S,
            )

    def evict(self, wanted_bytes: int, keep: Keep) -> int:
        """Let fetched chunks go that nobody needs, the least lately used manifest first, until `wanted_bytes` are free;
        returns how many are. Nothing goes where all that may go is not enough.

        `keep` says by manifest which chunks (global numbers) stay, None for all of them; others may go whole.
        """
        with self._lock:
            fetched = [held for held in self._held.values() if held.source is None]
            mine = sorted(fetched, key=lambda held: held.used_s)
            spare = {held.manifest.id: evictable(held.manifest, held.journal.present, keep) for held in mine}
        sizes = {held.manifest.id: _bytes_of(held.manifest, spare[held.manifest.id]) for held in mine}
        if sum(sizes.values()) < wanted_bytes:
            return 0
        freed = 0
        for held in mine:
            if freed >= wanted_bytes:
                break
            numbers = spare[held.manifest.id]
            if numbers:
                freed += self._let_go(held, numbers)
                logger.info("%d bytes of %s made room", sizes[held.manifest.id], held.manifest.name)
        return freed

    def _let_go(self, held: _Held, numbers: Collection[int]) -> int:
        """Unmark chunks, then free what they take. Returns the bytes."""
        manifest = held.manifest
        with held.lock, _disk(held.root):
            gone = {number for number in numbers if number in held.journal.present}
            held.journal.forget(gone)
            freed = _bytes_of(manifest, gone)
            held.have_bytes -= freed
            kept = {manifest.chunk(number)[0].name for number in held.journal.present}
            for name in {manifest.chunk(number)[0].name for number in gone}:
                if name not in kept:
                    empty(held.path(name), manifest.file(name).size)
            for number in sorted(gone):
                entry, chunk = manifest.chunk(number)
                if entry.name in kept:
                    punch(held.path(entry.name), chunk.offset, chunk.end)
        return freed

    # ---- data

    def write_chunk(self, manifest: Manifest, file: str, index: int, data: bytes | memoryview) -> None:
        """Verify and keep one chunk. Raises ProtocolViolation for wrong bytes, ResourceLimit when full."""
        self.write_run(manifest, manifest.first_chunk[manifest.by_name[file]] + index, 1, data)

    def write_run(self, manifest: Manifest, first: int, count: int, data: bytes | memoryview) -> None:
        """Verify and keep `count` chunks with the global numbers from `first` on; `data` is all of them. All or none
        are marked. Raises ProtocolViolation for wrong bytes, ResourceLimit when the quota or the disk is full."""
        held = self._get(manifest.id)
        pieces = _verified(manifest, first, count, memoryview(data))
        with held.lock:
            if held.source is not None:
                return
            new = [number for number in range(first, first + count) if number not in held.journal.present]
            new_bytes = sum(manifest.chunk(number)[1].length for number in new)
            if not held.ready:
                self._make_files(held)
        with self._lock:
            self.check_room(new_bytes)
            self._reserved_bytes += new_bytes
        try:
            if new:
                for name, offset, piece in pieces:
                    with _disk(held.root):
                        write_at(held.path(name), offset, piece)
            with held.lock, _disk(held.root):
                fresh = [number for number in new if number not in held.journal.present]
                held.journal.add(fresh)
                fresh_bytes = sum(manifest.chunk(number)[1].length for number in fresh)
                held.have_bytes += fresh_bytes
                held.unsynced_bytes += fresh_bytes
                due = held.unsynced_bytes >= _SYNC_EVERY_BYTES
                if due:
                    held.unsynced_bytes = 0
        finally:
            with self._lock:
                self._reserved_bytes -= new_bytes
        if due:
            self.sync(manifest.id)

    def sync(self, manifest_id: str) -> None:
        """Flush what was written to the disk, so that a power cut does not cost it. Others write on meanwhile."""
        held = self._get(manifest_id)
        with held.syncing, _disk(held.root):
            with held.lock:
                covered = set(held.journal.unsynced)
                held.unsynced_bytes = 0
            if held.source is not None or not covered:
                return
            for name in {held.manifest.chunk(number)[0].name for number in covered}:
                flush(held.path(name))
            with held.lock:
                held.journal.synced(covered)

    def read_chunk(self, manifest_id: str, number: int) -> bytes:
        """A verified chunk by its global number. Raises SourceChanged, or LocalFault where it is not here."""
        manifest = self._get(manifest_id).manifest
        size = manifest.chunk(number)[1].length if 0 <= number < manifest.chunk_count else 0
        into = bytearray(size)
        self.read_run(manifest_id, number, 1, memoryview(into))
        return bytes(into)

    def read_run(self, manifest_id: str, first: int, count: int, into: memoryview) -> None:
        """`count` verified chunks by their global numbers from `first` on, into a buffer of their size. Raises
        SourceChanged, or LocalFault where one is not here."""
        held = self._get(manifest_id)
        manifest = held.manifest
        for number in range(first, first + count):
            if not self.has_chunk(manifest_id, number) or not 0 <= number < manifest.chunk_count:
                raise LocalFault(f"chunk {number} of {manifest.name} is not here")
        whole = True
        for name, offset, piece in _pieces(manifest, first, count, into):
            path = held.path(name)
            with _disk(path):
                whole = read_at(path, offset, piece) and whole
        bad = [
            number
            for number, piece in _chunks(manifest, first, count, into)
            if not _right(manifest, number, piece)
        ]
        if whole and not bad:
            return
        path = held.path(manifest.chunk((bad or [first])[0])[0].name)
        if held.source is not None:
            raise SourceChanged(f"{path} is no longer what was published; publish it again")
        with held.lock, _disk(held.root):
            for number in bad:
                self._forget(held, number)
        raise LocalFault(
            f"chunk {(bad or [first])[0]} of {path} was damaged on the disk; it will be fetched again"
        )

    # ---- inside

    def _get(self, manifest_id: str) -> _Held:
        held = self._held.get(manifest_id)
        if held is None:
            raise LocalFault(f"manifest {manifest_id} is not in the store; open it first")
        return held

    def _load(self, directory: Path) -> None:
        try:
            manifest = Manifest.decode((directory / "manifest").read_bytes())
            if manifest.id != directory.name:
                raise StoreFault("it holds another manifest")
            journal = Journal(directory / "journal", manifest.id, manifest.chunk_count)
        except (OSError, P2pError) as error:
            logger.warning("leaving out the damaged blobs in %s: %s", directory, error)
            return
        held = _Held(manifest, directory, journal, _read_source(directory), 0, threading.RLock())
        held.used_s = (directory / "manifest").stat().st_mtime
        whole = {
            entry.name for entry in manifest.files if _has_size(directory / "files" / entry.name, entry.size)
        }
        for number in sorted(journal.present):
            name = manifest.chunk(number)[0].name
            if name not in whole or (number in journal.unsynced and not _intact(held, number)):
                journal.forget([number])
        held.have_bytes = sum(manifest.chunk(number)[1].length for number in journal.present)
        self._held[manifest.id] = held

    def _forget(self, held: _Held, number: int) -> None:
        if number in held.journal.present:
            held.journal.forget([number])
            held.have_bytes -= held.manifest.chunk(number)[1].length

    def _make_files(self, held: _Held) -> None:
        """Sparse files of the final sizes, so that whatever reads them can seek."""
        with _disk(held.root):
            (held.root / "files").mkdir(exist_ok=True)
            for entry in held.manifest.files:
                path = held.path(entry.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    if file.tell() != entry.size:
                        file.truncate(entry.size)
            held.ready = True


def evictable(manifest: Manifest, present: Collection[int], keep: Keep) -> set[int]:
    """Which of the chunks that are here may go."""
    if manifest.id not in keep:
        return set(present)
    kept = keep[manifest.id]
    return set() if kept is None else set(present) - set(kept)


def _bytes_of(manifest: Manifest, numbers: Collection[int]) -> int:
    return sum(manifest.chunk(number)[1].length for number in numbers)


def _chunks(manifest: Manifest, first: int, count: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(global number, its bytes) of the chunks that `data` holds one after another."""
    at = 0
    for number in range(first, first + count):
        length = manifest.chunk(number)[1].length
        yield number, data[at : at + length]
        at += length


def _pieces(
    manifest: Manifest, first: int, count: int, data: memoryview
) -> list[tuple[str, int, memoryview]]:
    """(file, offset, bytes), one for each file that the run touches."""
    found: list[tuple[str, int, memoryview]] = []
    at = begin = 0
    for number in range(first, first + count):
        entry, chunk = manifest.chunk(number)
        if not found or found[-1][0] != entry.name:
            found.append((entry.name, chunk.offset, data[at:at]))
            begin = at
        at += chunk.length
        found[-1] = (entry.name, found[-1][1], data[begin:at])
    return found


def _right(manifest: Manifest, number: int, data: memoryview) -> bool:
    chunk = manifest.chunk(number)[1]
    return len(data) == chunk.length and bool(blake3(data).digest() == chunk.hash)


def _verified(
    manifest: Manifest, first: int, count: int, data: memoryview
) -> list[tuple[str, int, memoryview]]:
    """The run's pieces by file. Raises ProtocolViolation for bytes that are not those of the manifest."""
    pieces = _pieces(manifest, first, count, data)
    if sum(manifest.chunk(number)[1].length for number in range(first, first + count)) != len(data):
        raise ProtocolViolation(
            f"{len(data)} bytes cannot have the hashes of {count} chunks of {manifest.name}"
        )
    for number, piece in _chunks(manifest, first, count, data):
        if not _right(manifest, number, piece):
            entry, chunk = manifest.chunk(number)
            raise ProtocolViolation(
                f"bytes [{chunk.offset}, {chunk.end}) of {entry.name} do not have the hash that the manifest of "
                f"{manifest.name} says"
            )
    return pieces


def _intact(held: _Held, number: int) -> bool:
    entry, chunk = held.manifest.chunk(number)
    try:
        with (held.root / "files" / entry.name).open("rb") as file:
            file.seek(chunk.offset)
            return blake3(file.read(chunk.length)).digest() == chunk.hash
    except OSError:
        return False


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _check_source(path: Path, size: int) -> None:
    with _disk(path):
        found = path.stat().st_size
    if found != size:
        raise SourceChanged(f"{path} has {found} bytes, {size} were published")


def _read_source(directory: Path) -> Path | None:
    try:
        source = Path(os.fsdecode((directory / "source").read_bytes()))
    except FileNotFoundError:
        return None
    if source.is_dir():
        return source
    logger.warning("%s, which was published, is gone", source)
    return None


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """A full disk is a limit, any other trouble with it one clear line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise ResourceLimit(f"no room left for {path}: {reason}", _RETRY_AFTER_FULL_S) from error
        raise StoreFault(f"cannot use {path}: {reason}") from error
