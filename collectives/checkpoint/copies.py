"""A state as pieces: what is cut, how it is described and signed, and where a holder keeps its own.

A copy is the state's manifest and bytes, cut into stripes, each stripe into n pieces of which k suffice. Its
description holds the BLAKE3 of every piece of every stripe and is signed by whoever made it, so that a holder that lies
is seen at once. It knows nothing of calls.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from collectives.checkpoint.erasure import N_MAX, Code
from collectives.errors import BadContribution, CheckpointProblem, ResourceLimit
from collectives.journal import sync_directory
from collectives.state import STATE_BYTES_MAX, Assembly, Snapshot, StateManifest, decode_manifest
from p2p import Identity, P2pError, PeerId, pack_value, unpack_value, verify

log = logging.getLogger("shoal.checkpoint")
STRIPE_BYTES = 4 << 20
STRIPE_BYTES_MAX = 16 << 20
NAME_CHARS_MAX = 128
META_BYTES_MAX = 1 << 16
PIECES_MAX = 1024
DESCRIPTION_BYTES_MAX = 64 << 20
_DOMAIN = "shoal/copy/1"
_HASH = 32
_LENGTH = 8
_FILE, _PIECE = "copy", "piece"


@dataclass(frozen=True, slots=True)
class Description:
    """A copy. `hashes[i]`: those of piece i, stripe after stripe, 32 bytes each; `holders[i]` was to have piece i.
    `nbytes` counts the state's manifest with its length, and the state."""

    run: str
    name: str
    epoch: int
    owner: str
    state: bytes
    meta: bytes
    k: int
    stripe_bytes: int
    nbytes: int
    holders: tuple[str, ...]
    hashes: tuple[bytes, ...] = ()
    signature: bytes = b""

    @property
    def code(self) -> Code:
        return Code(self.k, len(self.holders))

    @property
    def stripes(self) -> int:
        return -(-self.nbytes // self.stripe_bytes)

    def stripe_size(self, stripe: int) -> int:
        return min(self.stripe_bytes, self.nbytes - stripe * self.stripe_bytes)

    @property
    def piece_bytes(self) -> int:
        """What a holder keeps of it."""
        code = self.code
        return sum(code.piece_bytes(self.stripe_size(s)) for s in {0, self.stripes - 1}) if self.stripes < 3 else (
            (self.stripes - 1) * code.piece_bytes(self.stripe_bytes)
            + code.piece_bytes(self.stripe_size(self.stripes - 1))
        )  # fmt: skip

    def is_piece(self, index: int, stripe: int, data: bytes | memoryview) -> bool:
        """Whether `data` is piece `index` of a stripe."""
        return blake3(data).digest() == self.hashes[index][stripe * _HASH : (stripe + 1) * _HASH]

    def digest(self) -> bytes:
        """32 bytes that name it, signature and all."""
        return hashlib.sha256(self.encode()).digest()

    def encode(self) -> bytes:
        return pack_value(self)

    def signed(self, identity: Identity) -> Description:
        return replace(self, signature=identity.sign(_DOMAIN, replace(self, signature=b"").encode()))


def decode_description(data: bytes, peer: str) -> Description:
    """A description, its bounds and signature checked. Raises BadContribution naming `peer`."""
    try:
        found = unpack_value(Description, data)
    except P2pError as error:
        raise BadContribution(peer, "mismatch", f"{peer} sent no description of a copy: {error}") from error
    n = len(found.holders)
    sane = (
        0 < found.k <= n <= N_MAX
        and 0 < found.stripe_bytes <= STRIPE_BYTES_MAX
        and _LENGTH < found.nbytes <= STATE_BYTES_MAX
        and 0 <= found.epoch < 1 << 53
        and len(found.state) == _HASH
        and len(found.meta) <= META_BYTES_MAX
        and max(len(found.run), len(found.name)) <= NAME_CHARS_MAX
        and len(found.hashes) == n
    )
    if not sane or any(len(hashes) != found.stripes * _HASH for hashes in found.hashes):
        raise BadContribution(peer, "mismatch", f"{peer} sent a description of a copy that cannot be")
    unsigned = replace(found, signature=b"").encode()
    if not verify(PeerId(found.owner), _DOMAIN, unsigned, found.signature):
        raise BadContribution(peer, "mismatch", f"{peer} sent a description that {found.owner} did not sign")
    return found


class Cutter:
    """Cuts one snapshot; in memory at once: the snapshot, and the pieces of one stripe."""

    def __init__(
        self,
        identity: Identity,
        run: str,
        name: str,
        snapshot: Snapshot,
        meta: Mapping[str, Any],
        holders: tuple[str, ...],
        k: int,
        stripe_bytes: int = STRIPE_BYTES,
    ) -> None:
        self._snapshot = snapshot
        encoded = snapshot.manifest.encode()
        self._head = len(encoded).to_bytes(_LENGTH, "little") + encoded
        self._plain = Description(
            run=run, name=name, epoch=snapshot.epoch, owner=str(identity.peer_id), state=snapshot.digest,
            meta=json.dumps(dict(meta), sort_keys=True).encode(), k=k, stripe_bytes=stripe_bytes,
            nbytes=len(self._head) + snapshot.manifest.nbytes, holders=holders,
        )  # fmt: skip
        self._identity = identity
        self._code = self._plain.code

    def describe(self) -> Description:
        """Hashes every piece, which means to make each once. Takes a second for some hundred MiB."""
        hashes = [bytearray() for _ in self._plain.holders]
        for stripe in self.stripes():
            for index, piece in enumerate(self._code.encode(stripe)):
                hashes[index] += blake3(piece).digest()
        return replace(self._plain, hashes=tuple(map(bytes, hashes))).signed(self._identity)

    def pieces(self) -> Iterator[list[bytes]]:
        """All n pieces of each stripe in turn."""
        for stripe in self.stripes():
            yield self._code.encode(stripe)

    def stripes(self) -> Iterator[bytes]:
        """Head and state, cut."""
        waiting, room = bytearray(), self._plain.stripe_bytes
        for view in self._views():
            at = 0
            while at < len(view):
                taken = view[at : at + room - len(waiting)]
                waiting += taken
                at += len(taken)
                if len(waiting) == room:
                    yield bytes(waiting)
                    waiting.clear()
        if waiting:
            yield bytes(waiting)

    def _views(self) -> Iterator[memoryview]:
        yield memoryview(self._head)
        for index in range(self._snapshot.manifest.chunk_count):
            yield from self._snapshot.chunk(index)


class Joiner:
    """Puts stripes together again, in order. `feed` raises BadContribution where they are no state."""

    def __init__(self, description: Description) -> None:
        self._description = description
        self._head = bytearray()
        self._buffer: bytearray | None = None
        self._manifest: StateManifest | None = None
        self._at = 0

    def feed(self, stripe: bytes | memoryview) -> None:
        view = memoryview(stripe)
        while len(view) and self._buffer is None:
            wanted = _LENGTH if len(self._head) < _LENGTH else self._head_bytes()
            taken = view[: wanted - len(self._head)]
            self._head += taken
            view = view[len(taken) :]
            if len(self._head) > _LENGTH and len(self._head) == self._head_bytes():
                self._begin()
        if self._buffer is not None and len(view):
            if self._at + len(view) > len(self._buffer):
                raise self._wrong("more bytes than it says")
            self._buffer[self._at : self._at + len(view)] = view
            self._at += len(view)

    def _head_bytes(self) -> int:
        length = int.from_bytes(self._head[:_LENGTH], "little")
        if not 0 < length <= min(DESCRIPTION_BYTES_MAX, self._description.nbytes - _LENGTH):
            raise self._wrong("a manifest of that length")
        return _LENGTH + length

    def _begin(self) -> None:
        owner, description = self._description.owner, self._description
        self._manifest = decode_manifest(bytes(self._head[_LENGTH:]), description.state, owner)
        if self._manifest.nbytes + len(self._head) != description.nbytes:
            raise self._wrong("another size than it says")
        self._buffer = bytearray(self._manifest.nbytes)

    def finish(self) -> Snapshot:
        """The state, every key checked."""
        if self._manifest is None or self._buffer is None or self._at != len(self._buffer):
            raise self._wrong("fewer bytes than it says")
        whole = Assembly(self._manifest, memoryview(self._buffer))
        whole.recall()
        if whole.missing:
            raise self._wrong("other bytes than its manifest says")
        return whole.finish(self._description.epoch)

    def _wrong(self, what: str) -> BadContribution:
        owner = self._description.owner
        return BadContribution(owner, "mismatch", f"{owner} made a copy with {what}")


@dataclass(eq=False, slots=True)
class Held:
    """A piece that this node keeps. Those of its stripes that have come are in `parts`, or in the file."""

    description: Description
    index: int
    digest: bytes
    directory: Path | None = None
    parts: dict[int, bytes] = field(default_factory=dict)
    whole: bool = False

    def part(self, stripe: int) -> bytes | None:
        """The piece of one stripe. Raises OSError."""
        if stripe in self.parts or self.directory is None:
            return self.parts.get(stripe)
        code = self.description.code
        with (self.directory / _PIECE).open("rb") as file:
            file.seek(stripe * code.piece_bytes(self.description.stripe_bytes))
            return file.read(code.piece_bytes(self.description.stripe_size(stripe)))


class Pantry:
    """The pieces this node keeps for others: at most `memory_bytes` in memory, the others on the disk (`directory`;
    None: none there) up to `disk_bytes`. Of each run and name the newest `kept` whole copies stay."""

    def __init__(
        self,
        directory: Path | None,
        *,
        memory_bytes: int = 64 << 20,
        disk_bytes: int = 8 << 30,
        kept: int = 2,
    ) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._kept = kept
        self._held: dict[tuple[bytes, int], Held] = {}
        if directory is not None:
            self._recall(directory)

    def held(self, run: str, name: str | None = None) -> list[Held]:
        """Whole pieces of a run's copies, the newest first."""
        found = [
            one
            for one in self._held.values()
            if one.whole and one.description.run == run and name in (None, one.description.name)
        ]
        return sorted(found, key=lambda one: (-one.description.epoch, one.index))

    def get(self, digest: bytes, index: int) -> Held | None:
        return self._held.get((digest, index))

    def open(self, description: Description, index: int) -> Held:
        """Make room for a piece; the one that is here already, where there is one. Raises ResourceLimit."""
        digest = description.digest()
        known = self._held.get((digest, index))
        if known is not None:
            return known
        for other in list(self._held.values()):  # what its owner began before and never ended
            begun = other.description
            if not other.whole and (begun.owner, begun.run, begun.name) == (
                description.owner, description.run, description.name,
            ):  # fmt: skip
                self.drop(other)
        if len(self._held) >= PIECES_MAX:
            raise ResourceLimit(f"{PIECES_MAX} pieces are kept here already")
        one = Held(description, index, digest)
        memory, disk = self._used()
        size = description.piece_bytes
        if self._directory is not None and disk + size <= self._disk_bytes:
            one.directory = self._directory / f"{digest.hex()[:32]}-{index:03d}"
        elif memory + size > self._memory_bytes:
            raise ResourceLimit(f"no room for a piece of {size} bytes")
        self._held[digest, index] = one
        return one

    def put(self, one: Held, stripe: int, data: bytes) -> bool:
        """Keep the piece of one stripe, in order; False if it is not what the description names. Raises
        CheckpointProblem."""
        if not one.description.is_piece(one.index, stripe, data):
            return False
        if one.whole or stripe in one.parts:
            return True
        if one.directory is None:
            one.parts[stripe] = data
        else:
            self._append(one, stripe, data)
        return True

    def _append(self, one: Held, stripe: int, data: bytes) -> None:
        directory = one.directory
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            at = stripe * one.description.code.piece_bytes(one.description.stripe_bytes)
            with (directory / _PIECE).open("r+b" if (directory / _PIECE).exists() else "x+b") as file:
                file.seek(at)
                file.write(data)
        except OSError as error:
            raise CheckpointProblem(directory, f"cannot be written: {error.strerror or error}") from error

    def close(self, one: Held) -> None:
        """All of it has come: on a disk it is durable from now on, and older copies go. Raises CheckpointProblem."""
        description = one.description
        parts = (one.part(stripe) for stripe in range(description.stripes))
        try:
            right = all(
                part is not None and description.is_piece(one.index, stripe, part)
                for stripe, part in enumerate(parts)
            )
            if not right:
                raise CheckpointProblem(one.directory or "memory", "a piece is not whole")
            if one.directory is not None:
                _seal(one.directory, one)
        except OSError as error:
            raise CheckpointProblem(one.directory, f"cannot be written: {error.strerror or error}") from error
        one.whole = True
        epochs = sorted(
            {h.description.epoch for h in self.held(description.run, description.name)}, reverse=True
        )
        for old in self.held(description.run, description.name):
            if old.description.epoch not in epochs[: self._kept]:
                self.drop(old)

    def drop(self, one: Held) -> None:
        """Let go of a piece."""
        self._held.pop((one.digest, one.index), None)
        if one.directory is not None:
            with contextlib.suppress(OSError):
                (one.directory / _FILE).unlink(missing_ok=True)
            shutil.rmtree(one.directory, ignore_errors=True)

    def _used(self) -> tuple[int, int]:
        memory = sum(h.description.piece_bytes for h in self._held.values() if h.directory is None)
        return memory, sum(h.description.piece_bytes for h in self._held.values()) - memory

    def _recall(self, root: Path) -> None:
        """What was kept before a restart; what was not whole goes."""
        for directory in sorted(root.iterdir()) if root.is_dir() else ():
            try:
                description = decode_description((directory / _FILE).read_bytes(), "this disk")
                index = int(directory.name[-3:])
                one = Held(description, index, description.digest(), directory, whole=True)
                if (
                    index >= len(description.holders)
                    or (directory / _PIECE).stat().st_size != description.piece_bytes
                ):
                    raise BadContribution("this disk", "mismatch")
                self._held[one.digest, index] = one
            except (OSError, ValueError, BadContribution) as problem:
                log.warning("a piece of a copy on this disk is not whole and is removed: %s", problem)
                shutil.rmtree(directory, ignore_errors=True)


def _seal(directory: Path, one: Held) -> None:
    """Bytes first, then the description, whose presence says that all is there."""
    with (directory / _PIECE).open("r+b") as file:
        os.fsync(file.fileno())
    spare = directory / f".{_FILE}"
    with spare.open("wb") as file:
        file.write(one.description.encode())
        file.flush()
        os.fsync(file.fileno())
    spare.replace(directory / _FILE)
    sync_directory(directory)
    sync_directory(directory.parent)
