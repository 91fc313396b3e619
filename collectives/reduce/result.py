"""The result of a reduction: tensors, a hash for each chunk of their bytes, and the digest that members vote on.

The digest covers the values as they are applied, in the tensors' own dtypes: two members with one digest hold the same
bits. Whoever has it serves chunks to those who missed them; they check each chunk by its hash, and the hashes by the
digest. It does not know how the values came about.
"""

from __future__ import annotations

from collections.abc import Sequence

import blake3
import numpy as np
import torch

from collectives.codecs.base import F32
from collectives.reduce.errors import FrameRefused, MisuseError
from collectives.reduce.layout import Layout, Vector

HASH_BYTES = 32


def digest_of(layout: Layout, hashes: bytes) -> bytes:
    """Digest of a result from the hashes of its chunks, in order."""
    return blake3.blake3(b"shoal result 1\0" + layout.digest + hashes).digest()


class Result:
    """Chunks of a result as they come, in any order. `tensors` are whole once `done`."""

    def __init__(
        self,
        layout: Layout,
        like: Sequence[torch.Tensor] | None = None,
        out: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Into `out` (contiguous) if given, else into new tensors on the devices of `like`."""
        self.layout = layout
        self.tensors = list(out) if out is not None else layout.empty(like)
        if any(not tensor.is_contiguous() for tensor in self.tensors):
            raise MisuseError("results can only be written to contiguous tensors")
        self.vector = Vector(layout, self.tensors)
        self._hashes = bytearray(HASH_BYTES * layout.chunks)
        self._have = bytearray(layout.chunks)
        self._left = layout.chunks

    @property
    def done(self) -> bool:
        """Every chunk is there."""
        return self._left == 0

    @property
    def left(self) -> int:
        """Chunks that are not there yet."""
        return self._left

    def has(self, chunk: int) -> bool:
        """Whether this chunk is there."""
        return bool(self._have[chunk])

    @property
    def hashes(self) -> bytes:
        """32 bytes a chunk, in order. MisuseError before `done`."""
        if not self.done:
            raise MisuseError(f"{self._left} chunks of the result are missing")
        return bytes(self._hashes)

    @property
    def digest(self) -> bytes:
        """What members vote on. MisuseError before `done`."""
        return digest_of(self.layout, self.hashes)

    def begin(self) -> None:
        """Forgets every chunk; the memory stays."""
        self._have = bytearray(self.layout.chunks)
        self._left = self.layout.chunks

    def put(self, chunk: int, values: F32 | None) -> None:
        """The values of a chunk; None if they are in the tensors' memory already."""
        start, end = self.layout.span(chunk)
        if values is not None:
            self.vector.write(start, values)
        self._mark(chunk, _hash(self.vector.raw(start, end)))

    def payload(self, chunk: int) -> tuple[memoryview, ...]:
        """A chunk's bytes in the tensors' own dtypes, for whoever missed it; memory of the result where possible."""
        if not self._have[chunk]:
            raise MisuseError(f"chunk {chunk} of the result is not here")
        start, end = self.layout.span(chunk)
        return tuple([part.data for part in self.vector.raw(start, end)])

    def payload_bytes(self, chunk: int) -> int:
        """Length of what `payload` gives."""
        return self.vector.raw_bytes(*self.layout.span(chunk))

    def accept(self, peer: str, chunk: int, data: memoryview, hashes: bytes) -> None:
        """A chunk that `peer` served, checked by its hash among `hashes` (themselves checked by `check_hashes`)."""
        if not 0 <= chunk < self.layout.chunks:
            raise FrameRefused(peer, "malformed", f"there is no chunk {chunk}")
        if data.nbytes != self.payload_bytes(chunk):
            raise FrameRefused(
                peer, "size", f"chunk {chunk} has {self.payload_bytes(chunk)} bytes, got {data.nbytes}"
            )
        wanted = hashes[HASH_BYTES * chunk : HASH_BYTES * (chunk + 1)]
        found = blake3.blake3(data).digest()
        if found != wanted:
            raise FrameRefused(peer, "malformed", f"chunk {chunk} is not the one that was decided")
        start, end = self.layout.span(chunk)
        self.vector.write_raw(start, end, data)
        self._mark(chunk, found)

    def check_hashes(self, peer: str, hashes: bytes, digest: bytes) -> bytes:
        """`hashes` if they are those of `digest`; FrameRefused if not."""
        if len(hashes) != HASH_BYTES * self.layout.chunks or digest_of(self.layout, hashes) != digest:
            raise FrameRefused(peer, "malformed", "the list of hashes is not that of the decided digest")
        return hashes

    def _mark(self, chunk: int, found: bytes) -> None:
        self._hashes[HASH_BYTES * chunk : HASH_BYTES * (chunk + 1)] = found
        if not self._have[chunk]:
            self._have[chunk] = 1
            self._left -= 1


def _hash(parts: Sequence[np.ndarray[tuple[int], np.dtype[np.uint8]]]) -> bytes:
    if len(parts) == 1:
        return blake3.blake3(parts[0].data).digest()
    hasher = blake3.blake3()
    for part in parts:
        hasher.update(part.data)
    return hasher.digest()
