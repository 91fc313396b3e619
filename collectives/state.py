"""Keyed shared state as bytes that can be checked: snapshots, their manifests, and which of them are kept.

A snapshot is immutable: it holds its own copies. Its bytes are those of its tensors, in the order of their keys, cut
into chunks of CHUNK_BYTES; a key is named by its SHA-256, a chunk by its BLAKE3, and the digest of the whole covers
keys, dtypes, shapes and every chunk. Nothing here knows peers, files or epochs' meaning.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from blake3 import blake3

from collectives.errors import BadContribution, LocalFault
from p2p import P2pError, ProtocolViolation, pack_value, unpack_value

CHUNK_BYTES = 1 << 20
KEYS_MAX = 1 << 17
KEY_CHARS_MAX = 512
DIMS_MAX = 16
STATE_BYTES_MAX = 1 << 44
_HASH_BYTES = 32
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One key: `sha256` is of its bytes, row-major and little-endian."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    sha256: bytes

    @classmethod
    def of(cls, key: str, tensor: torch.Tensor) -> StateEntry:
        """That of a contiguous CPU tensor."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(key, dtype, tuple(tensor.shape), hashlib.sha256(byte_view(tensor)).digest())

    @property
    def nbytes(self) -> int:
        return _DTYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StateManifest:
    """What a state consists of. `chunks`: the 32-byte hashes one after another."""

    entries: tuple[StateEntry, ...]
    chunks: bytes

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def chunk_count(self) -> int:
        return len(self.chunks) // _HASH_BYTES

    def chunk_bytes(self, index: int) -> int:
        return min(CHUNK_BYTES, self.nbytes - index * CHUNK_BYTES)

    def is_chunk(self, index: int, data: bytes | memoryview) -> bool:
        """Whether `data` is chunk `index`."""
        wanted = self.chunks[index * _HASH_BYTES : (index + 1) * _HASH_BYTES]
        return blake3(data).digest() == wanted

    def digest(self) -> bytes:
        """32 bytes that name the whole."""
        return hashlib.sha256(b"shoal state 1\0" + pack_value(self)).digest()

    def encode(self) -> bytes:
        return pack_value(self)


def decode_manifest(data: bytes, digest: bytes, peer: str) -> StateManifest:
    """The manifest with this digest. Raises BadContribution naming `peer` for anything else."""
    try:
        manifest = unpack_value(StateManifest, data)
    except (ProtocolViolation, P2pError) as error:
        raise BadContribution(peer, "mismatch", f"{peer} sent no manifest: {error}") from error
    problem = manifest_problem(manifest)
    if problem is None and manifest.digest() != digest:
        problem = "its digest is another"
    if problem is not None:
        raise BadContribution(peer, "mismatch", f"{peer} sent a bad manifest of the state: {problem}")
    return manifest


def manifest_problem(manifest: StateManifest) -> str | None:
    """Why this cannot be a state's manifest; sizes are checked before anybody allocates for them."""
    if len(manifest.entries) > KEYS_MAX:
        return f"{len(manifest.entries)} keys"
    total = 0
    last = None
    for entry in manifest.entries:
        if entry.dtype not in _DTYPES or len(entry.key) > KEY_CHARS_MAX or len(entry.sha256) != _HASH_BYTES:
            return f"key {entry.key[:40]!r} is malformed"
        if len(entry.shape) > DIMS_MAX or any(size < 0 for size in entry.shape):
            return f"key {entry.key[:40]!r} has shape {entry.shape[:DIMS_MAX]}"
        if last is not None and entry.key <= last:
            return "its keys are not in order"
        last = entry.key
        total += entry.nbytes
        if total > STATE_BYTES_MAX:
            return f"more than {STATE_BYTES_MAX} bytes"
    if len(manifest.chunks) != -(-total // CHUNK_BYTES) * _HASH_BYTES:
        return "its chunks do not cover its keys"
    return None


class Snapshot:
    """A state at one epoch, in memory of its own. `tensors` are on the CPU and must not be written to."""

    def __init__(self, epoch: int, manifest: StateManifest, tensors: Mapping[str, torch.Tensor]) -> None:
        self.epoch = epoch
        self.manifest = manifest
        self.digest = manifest.digest()
        self.tensors = dict(tensors)
        self._bytes = _Bytes([byte_view(self.tensors[entry.key]) for entry in manifest.entries])

    @classmethod
    def take(cls, state: Mapping[str, torch.Tensor], epoch: int) -> Snapshot:
        """Copy and hash `state`: tensors of any device and layout. Raises LocalFault for keys or dtypes that cannot
        travel. Takes a second for each 1.5 GB or so, without holding the interpreter."""
        tensors: dict[str, torch.Tensor] = {}
        entries: list[StateEntry] = []
        for key in sorted(state):
            tensor = state[key].detach()
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES or not key or len(key) > KEY_CHARS_MAX or tensor.dim() > DIMS_MAX:
                raise LocalFault(
                    f"state[{key[:60]!r}]: a {dtype} tensor of {tensor.dim()} dimensions cannot be shared"
                )
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
            copy.copy_(tensor)
            tensors[key] = copy
            entries.append(StateEntry.of(key, copy))
        chunks = b"".join(_chunk_hashes([byte_view(tensors[entry.key]) for entry in entries]))
        return cls(epoch, StateManifest(tuple(entries), chunks), tensors)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], epoch: int) -> Snapshot:
        """Hash tensors that nobody writes to any more, as those of other snapshots, without copying them."""
        entries = tuple(StateEntry.of(key, tensors[key]) for key in sorted(tensors))
        chunks = b"".join(_chunk_hashes([byte_view(tensors[entry.key]) for entry in entries]))
        return cls(epoch, StateManifest(entries, chunks), tensors)

    def chunk(self, index: int) -> list[memoryview]:
        """The bytes of one chunk, as views."""
        return list(self._bytes.slice(index * CHUNK_BYTES, self.manifest.chunk_bytes(index)))


class Assembly:
    """A state in the making: chunks arrive in any order and go straight into their place."""

    def __init__(self, manifest: StateManifest, buffer: memoryview | None = None) -> None:
        """`buffer`: manifest.nbytes of writable memory, a mapped file's say, whose bytes may already be right
        (`recall`); None allocates it."""
        self.manifest = manifest
        self.missing = set(range(manifest.chunk_count))
        self._borrowed = buffer is not None
        self._buffer = memoryview(bytearray(manifest.nbytes)) if buffer is None else buffer

    def _place(self, index: int) -> memoryview:
        return self._buffer[index * CHUNK_BYTES : index * CHUNK_BYTES + self.manifest.chunk_bytes(index)]

    def recall(self) -> int:
        """Count what is in the buffer already; how many chunks were right."""
        right = {index for index in self.missing if self.manifest.is_chunk(index, self._place(index))}
        self.missing -= right
        return len(right)

    def add(self, index: int, data: bytes | memoryview) -> bool:
        """Put a chunk in its place; False (and nothing happens) if it is not what the manifest names."""
        if not 0 <= index < self.manifest.chunk_count or len(data) != self.manifest.chunk_bytes(index):
            return False
        if not self.manifest.is_chunk(index, data):
            return False
        if index in self.missing:
            self._place(index)[:] = data
            self.missing.discard(index)
        return True

    def finish(self, epoch: int) -> Snapshot:
        """The whole, checked once more key by key. Raises LocalFault if memory is not what was put there."""
        if self.missing:
            raise LocalFault(f"{len(self.missing)} chunks of the state are missing")
        tensors: dict[str, torch.Tensor] = {}
        at = 0
        for entry in self.manifest.entries:
            place = self._buffer[at : at + entry.nbytes]
            if hashlib.sha256(place).digest() != entry.sha256:
                raise LocalFault(f"state[{entry.key[:60]!r}] does not have its SHA-256")
            dtype = _DTYPES[entry.dtype]
            raw = (
                torch.frombuffer(place, dtype=torch.uint8)
                if entry.nbytes
                else torch.empty(0, dtype=torch.uint8)
            )
            if self._borrowed or at % dtype.itemsize:
                raw = raw.clone()
            tensors[entry.key] = raw.view(dtype).reshape(entry.shape)
            at += entry.nbytes
        return Snapshot(epoch, self.manifest, tensors)


@dataclass(eq=False, slots=True)
class _Kept:
    snapshot: Snapshot
    read_s: float = -math.inf


@dataclass(eq=False, slots=True)
class Shelf:
    """The newest snapshot, and older ones that somebody still reads: at most `kept_max`, each until nobody has read it
    for `lease_s`. A newer snapshot always finds room: the one longest unread makes it."""

    kept_max: int = 3
    lease_s: float = 20.0
    newest: Snapshot | None = None
    _kept: dict[bytes, _Kept] = field(default_factory=dict)

    def put(self, snapshot: Snapshot, now_s: float) -> None:
        self.newest = snapshot
        self._kept[snapshot.digest] = _Kept(snapshot, now_s if snapshot.digest in self._kept else -math.inf)
        self.trim(now_s)

    def get(self, digest: bytes, now_s: float) -> Snapshot | None:
        """The snapshot with this digest, whose lease begins anew."""
        kept = self._kept.get(digest)
        if kept is None:
            return None
        kept.read_s = now_s
        return kept.snapshot

    def trim(self, now_s: float) -> None:
        newest = None if self.newest is None else self.newest.digest
        old = sorted((k for d, k in self._kept.items() if d != newest), key=lambda kept: kept.read_s)
        excess = len(self._kept) - self.kept_max
        for number, kept in enumerate(old):
            if number < excess or now_s - kept.read_s > self.lease_s:
                del self._kept[kept.snapshot.digest]


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class _Bytes:
    """Views laid end to end."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = [view for view in views if len(view)]
        self._ends = list(itertools.accumulate(len(view) for view in self._views))

    def slice(self, start: int, count: int) -> Iterator[memoryview]:
        """Bytes [start, start + count)."""
        number = bisect.bisect_right(self._ends, start)
        while count > 0 and number < len(self._views):
            view = self._views[number]
            began = self._ends[number] - len(view)
            piece = view[start - began : start - began + count]
            yield piece
            start += len(piece)
            count -= len(piece)
            number += 1


def _chunk_hashes(views: Sequence[memoryview]) -> Iterator[bytes]:
    hasher, room = blake3(), CHUNK_BYTES
    for view in views:
        at = 0
        while at < len(view):
            piece = view[at : at + room]
            hasher.update(piece)
            at += len(piece)
            room -= len(piece)
            if room == 0:
                yield hasher.digest()
                hasher, room = blake3(), CHUNK_BYTES
    if room < CHUNK_BYTES:
        yield hasher.digest()
