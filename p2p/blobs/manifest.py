"""A manifest: which files a model has, cut into chunks that are known by their BLAKE3 hashes, and signed.

Knows how a directory becomes a manifest and what a well-formed one is. File names are checked so that no manifest
can name anything outside its directory, on any system. It does not know where files are kept or who has them.
"""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from blake3 import blake3

from p2p.blobs.errors import SourceChanged, StoreFault
from p2p.errors import LocalFault, ProtocolViolation
from p2p.identity import Identity, PeerId, verify
from p2p.messages import pack_value, unpack_value

Progress = Callable[[int, int], None]

VERSION = 1
HASH_BYTES = 32
CHUNK_BYTES_MAX = 16 << 20
CHUNKS_MAX = 1 << 22
FILES_MAX = 1 << 14
NAME_BYTES_MAX = 512
PART_BYTES_MAX = 200
FILE_BYTES_MAX = 1 << 44
MANIFEST_BYTES_MAX = 192 << 20
_SIGNING_DOMAIN = "blob manifest"
_FORBIDDEN = frozenset('\\:*?"<>|')
_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))]
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [offset, offset + length) of a file, with their BLAKE3 hash."""

    offset: int
    length: int
    hash: bytes

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class FileEntry:
    """`name` is a relative POSIX path; `chunks` cover [0, size) without gaps."""

    name: str
    size: int
    chunks: tuple[Chunk, ...]

    @cached_property
    def _offsets(self) -> list[int]:
        return [chunk.offset for chunk in self.chunks]

    def overlapping(self, start: int, end: int) -> range:
        """Indexes of the chunks that hold bytes [start, end). LocalFault for a range beyond the file."""
        if not 0 <= start <= end <= self.size:
            raise LocalFault(f"bytes [{start}, {end}) of {self.name}, which has {self.size}")
        if start == end:
            return range(0)
        return range(bisect_right(self._offsets, start) - 1, bisect_right(self._offsets, end - 1))


@dataclass(frozen=True)
class Manifest:
    """Made by `build_manifest` or `decode`, which check it. Chunks have global numbers, file after file."""

    name: str
    files: tuple[FileEntry, ...]
    publisher: PeerId
    signature: bytes

    @cached_property
    def id(self) -> str:
        """BLAKE3 of the signed bytes, in hex."""
        return blake3(_signed_bytes(self)).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, int]:
        """File name -> its index in `files`."""
        return {entry.name: index for index, entry in enumerate(self.files)}

    @cached_property
    def first_chunk(self) -> tuple[int, ...]:
        """The global number of each file's first chunk, and in the end the count of all."""
        counts = [0]
        for entry in self.files:
            counts.append(counts[-1] + len(entry.chunks))
        return tuple(counts)

    @property
    def chunk_count(self) -> int:
        return self.first_chunk[-1]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.files)

    def file(self, name: str) -> FileEntry:
        """LocalFault for a name that is not in the manifest."""
        index = self.by_name.get(name)
        if index is None:
            raise LocalFault(f"{self.name} has no file {name!r}")
        return self.files[index]

    def chunk(self, number: int) -> tuple[FileEntry, Chunk]:
        """A chunk by its global number."""
        file = bisect_right(self.first_chunk, number) - 1
        entry = self.files[file]
        return entry, entry.chunks[number - self.first_chunk[file]]

    def numbers(self, name: str, start: int, end: int) -> range:
        """Global numbers of the chunks that hold bytes [start, end) of file `name`."""
        entry = self.file(name)
        first = self.first_chunk[self.by_name[name]]
        inside = entry.overlapping(start, end)
        return range(first + inside.start, first + inside.stop)

    def encode(self) -> bytes:
        return pack_value(_Wire(_unsigned(self), self.signature))

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Manifest:
        """Raises ProtocolViolation for anything but a well-formed manifest with its publisher's signature."""
        if len(data) > MANIFEST_BYTES_MAX:
            raise ProtocolViolation(f"a manifest of {len(data)} bytes")
        wire = unpack_value(_Wire, data)
        manifest = _checked(wire)
        if not verify(manifest.publisher, _SIGNING_DOMAIN, _signed_bytes(manifest), manifest.signature):
            raise ProtocolViolation(f"the manifest of {manifest.name!r} is not signed by its publisher")
        return manifest


@dataclass(frozen=True, slots=True)
class _WireFile:
    """Chunks follow one another, so their lengths say where they are; `hashes` are joined."""

    name: str
    lengths: tuple[int, ...]
    hashes: bytes


@dataclass(frozen=True, slots=True)
class _Unsigned:
    version: int
    name: str
    publisher: str
    files: tuple[_WireFile, ...]


@dataclass(frozen=True, slots=True)
class _Wire:
    manifest: _Unsigned
    signature: bytes


def _unsigned(manifest: Manifest) -> _Unsigned:
    files = tuple(
        _WireFile(
            entry.name,
            tuple(chunk.length for chunk in entry.chunks),
            b"".join(chunk.hash for chunk in entry.chunks),
        )
        for entry in manifest.files
    )
    return _Unsigned(VERSION, manifest.name, manifest.publisher, files)


def _signed_bytes(manifest: Manifest) -> bytes:
    return pack_value(_unsigned(manifest))


def _checked(wire: _Wire) -> Manifest:
    unsigned = wire.manifest
    if unsigned.version != VERSION:
        raise ProtocolViolation(f"a manifest of version {unsigned.version}, this node reads {VERSION}")
    if len(unsigned.files) > FILES_MAX or sum(len(one.lengths) for one in unsigned.files) > CHUNKS_MAX:
        raise ProtocolViolation("a manifest of too many files or chunks")
    problem = name_problem(unsigned.name) or names_problem(one.name for one in unsigned.files)
    if problem:
        raise ProtocolViolation(problem)
    files = tuple(_checked_file(one) for one in unsigned.files)
    return Manifest(unsigned.name, files, PeerId(unsigned.publisher), wire.signature)


def _checked_file(wire: _WireFile) -> FileEntry:
    if len(wire.hashes) != HASH_BYTES * len(wire.lengths):
        raise ProtocolViolation(
            f"{wire.name}: {len(wire.lengths)} chunks, {len(wire.hashes)} bytes of hashes"
        )
    chunks = []
    offset = 0
    for index, length in enumerate(wire.lengths):
        if not 0 < length <= CHUNK_BYTES_MAX:
            raise ProtocolViolation(f"{wire.name}: a chunk of {length} bytes")
        at = index * HASH_BYTES
        chunks.append(Chunk(offset, length, wire.hashes[at : at + HASH_BYTES]))
        offset += length
    if offset > FILE_BYTES_MAX:
        raise ProtocolViolation(f"{wire.name}: {offset} bytes")
    return FileEntry(wire.name, offset, tuple(chunks))


def name_problem(name: str) -> str:
    """Why `name` cannot be a manifest's or a file's name on every system; empty when it can."""
    if not name or len(name.encode("utf-8", "replace")) > NAME_BYTES_MAX:
        return f"a name of {len(name)} characters"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"the name {name!r} is not a plain relative path"
        if any(char in _FORBIDDEN or ord(char) < 32 or ord(char) == 127 for char in part):
            return f"the name {name!r} has characters that not every system allows"
        if part[-1] in ". " or part.partition(".")[0].lower() in _RESERVED:
            return f"the name {name!r} is not allowed on every system"
        if len(part.encode("utf-8", "replace")) > PART_BYTES_MAX:
            return f"the name {name!r} has too long a part"
    return ""


def names_problem(names: Iterable[str]) -> str:
    """Why these cannot be the files of one directory: a bad name, the same twice, a file that is also a directory."""
    seen: set[str] = set()
    directories: set[str] = set()
    for name in names:
        problem = name_problem(name)
        folded = name.casefold()
        if problem or folded in seen:
            return problem or f"the name {name!r} comes twice"
        seen.add(folded)
        parts = folded.split("/")
        directories.update("/".join(parts[:count]) for count in range(1, len(parts)))
    clash = seen & directories
    return f"{min(clash)!r} is both a file and a directory" if clash else ""


def build_manifest(
    directory: Path,
    name: str,
    identity: Identity,
    *,
    cuts: Mapping[str, Sequence[int]] | None = None,
    chunk_bytes_max: int = 1 << 20,
    progress: Progress | None = None,
    only: Collection[str] | None = None,
) -> Manifest:
    """Hash every file under `directory` (hidden ones left out; only those named, where any are) and sign the result.
    Blocking: run it in a thread.

    A chunk ends at every offset in `cuts[file]`, so that what belongs together is whole chunks, and after
    `chunk_bytes_max` at the latest. `progress(done_bytes, total_bytes)`. Raises StoreFault for a directory or a name
    that cannot be published, SourceChanged for a file that changes meanwhile.
    """
    if not 0 < chunk_bytes_max <= CHUNK_BYTES_MAX:
        raise LocalFault(f"chunk_bytes_max must be 1 to {CHUNK_BYTES_MAX}, got {chunk_bytes_max}")
    try:
        sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in _files_of(directory)}
        sizes = {name: size for name, size in sizes.items() if only is None or name in only}
    except OSError as error:
        raise StoreFault(f"cannot read {directory}: {error.strerror or error}") from error
    problem = name_problem(name) or names_problem(sizes)
    if problem:
        raise StoreFault(f"cannot publish {directory}: {problem}")
    total = sum(sizes.values())
    done = 0
    files = []
    for file, size in sorted(sizes.items()):
        chunks: list[Chunk] = []
        for chunk in _hashed(directory / file, size, (cuts or {}).get(file, ()), chunk_bytes_max):
            chunks.append(chunk)
            done += chunk.length
            if progress is not None:
                progress(done, total)
        files.append(FileEntry(file, size, tuple(chunks)))
    draft = Manifest(name, tuple(files), identity.peer_id, b"")
    return Manifest(
        draft.name, draft.files, draft.publisher, identity.sign(_SIGNING_DOMAIN, _signed_bytes(draft))
    )


def _files_of(directory: Path) -> Iterator[Path]:
    """Regular files (links to files are followed, as in Hugging Face's cache), none of them hidden."""
    if not directory.is_dir():
        raise StoreFault(f"{directory} is not a directory")
    for root, folders, files in os.walk(directory):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file in sorted(files):
            path = Path(root) / file
            if not file.startswith(".") and path.is_file():
                yield path


def _hashed(path: Path, size: int, cuts: Sequence[int], chunk_bytes_max: int) -> Iterator[Chunk]:
    edges = sorted({0, size, *(cut for cut in cuts if 0 < cut < size)})
    try:
        with path.open("rb") as file:
            for start, end in itertools.pairwise(edges):
                for offset in range(start, end, chunk_bytes_max):
                    data = file.read(min(chunk_bytes_max, end - offset))
                    if len(data) != min(chunk_bytes_max, end - offset):
                        raise SourceChanged(f"{path} became shorter while it was read")
                    yield Chunk(offset, len(data), blake3(data).digest())
    except OSError as error:
        raise StoreFault(f"cannot read {path}: {error.strerror or error}") from error
