"""What has been received and may be needed: inputs that wait for the others of their chunk, and, as far as the budget
goes, inputs that are added up already but would be needed again should a member disappear.

It counts bytes and recycles buffers; it does not know what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from collectives.reduce.memory import fresh


class Source(NamedTuple):
    """Whose input: `partial` tells sums of a unit from a member's own values; `ident` is the nonce, or who is in the
    sum."""

    partial: bool
    peer: str
    ident: int


Key = tuple[Source, int]


class BufferPool:
    """Buffers for payloads of at most `piece_bytes`, used again: fresh memory costs more than the copy into it. They
    are cut from slabs that are large enough for huge pages where there are many."""

    def __init__(self, piece_bytes: int, pieces_a_slab: int) -> None:
        self.piece_bytes = piece_bytes
        self._pieces_a_slab = pieces_a_slab
        self._spare: list[memoryview] = []
        self._lent: dict[int, memoryview] = {}

    def take(self, size: int) -> memoryview:
        """A buffer of exactly `size` bytes with anything in it. Larger ones are not the pool's, and not used again."""
        if size > self.piece_bytes or size == 0:
            return memoryview(bytearray(size))
        if not self._spare:
            slab = fresh(self.piece_bytes * self._pieces_a_slab)
            step = self.piece_bytes
            self._spare = [slab[start : start + step] for start in range(0, len(slab), step)]
        piece = self._spare.pop()
        self._lent[_address(piece)] = piece
        return piece[:size]

    def give(self, view: memoryview) -> None:
        """Back, if it is one of the pool's; nobody may look at it any more."""
        if view.nbytes:
            piece = self._lent.pop(_address(view), None)
            if piece is not None:
                self._spare.append(piece)

    def forget(self, view: memoryview) -> None:
        """It will not come back: somebody may still be writing to it."""
        if view.nbytes:
            self._lent.pop(_address(view), None)

    def clear(self) -> None:
        """Frees what is idle and forgets what is lent."""
        self._spare.clear()
        self._lent.clear()


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


class Hold:
    """Payloads by source and chunk. `needed` ones are never dropped here; the caller stops reading instead."""

    def __init__(self, pool: BufferPool, bytes_max: int) -> None:
        self.pool = pool
        self.bytes_max = bytes_max
        self.bytes = 0
        self.arriving_bytes = 0
        self._arriving: dict[str, int] = {}
        self.needed_bytes = 0
        self._needed: dict[Key, memoryview] = {}
        self._kept: dict[Key, memoryview] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._needed or key in self._kept

    def arrives(self, peer: str, payload_bytes: int) -> None:
        """So many bytes of a frame of `peer` are coming in, and need room too; 0 once they are here, or never will."""
        self.arriving_bytes += payload_bytes - self._arriving.pop(peer, 0)
        if payload_bytes:
            self._arriving[peer] = payload_bytes
            self._evict()

    def has_room(self, peer: str) -> bool:
        """For the rest of the frame of `peer` that is coming in, or for another one, by dropping what is not needed."""
        more = self.needed_bytes + self.arriving_bytes + self.pool.piece_bytes
        return peer in self._arriving or more <= self.bytes_max

    def get(self, key: Key) -> memoryview:
        """KeyError if it is not held."""
        found = self._needed.get(key)
        return self._kept[key] if found is None else found

    def put(self, key: Key, payload: memoryview, needed: bool) -> bool:
        """Whether it is held now; what is not needed is refused when there is no room."""
        if key in self:
            self.pool.give(payload)
            return True
        if not needed and self.bytes + self.arriving_bytes + payload.nbytes > self.bytes_max:
            self.pool.give(payload)
            return False
        (self._needed if needed else self._kept)[key] = payload
        self.bytes += payload.nbytes
        if needed:
            self.needed_bytes += payload.nbytes
            self._evict()
        return True

    def release(self, keys: Iterable[Key], keep: bool) -> None:
        """These are added up: they may go, and with `keep` they stay while there is room."""
        for key in keys:
            payload = self._needed.pop(key, None)
            if payload is None:
                continue
            self.needed_bytes -= payload.nbytes
            if keep and self.bytes + self.arriving_bytes <= self.bytes_max:
                self._kept[key] = payload
            else:
                self.bytes -= payload.nbytes
                self.pool.give(payload)

    def need(self, key: Key) -> bool:
        """Marks it as needed again; False if it is not held."""
        payload = self._kept.pop(key, None)
        if payload is not None:
            self._needed[key] = payload
            self.needed_bytes += payload.nbytes
        return key in self._needed

    def relax(self) -> None:
        """Nothing is needed for now: a new plan is about to say what is."""
        self._kept.update(self._needed)
        self._needed.clear()
        self.needed_bytes = 0

    def discard(self, wanted: Iterable[Source]) -> None:
        """Drops everything that is not from `wanted`."""
        sources = set(wanted)
        for key in [key for key in self._kept if key[0] not in sources]:
            self._drop(key)

    def trim(self) -> None:
        """Drops the oldest of what is not needed until the budget is kept."""
        self._evict()

    def _evict(self) -> None:
        while self.bytes + self.arriving_bytes > self.bytes_max and self._kept:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        payload = self._kept.pop(key)
        self.bytes -= payload.nbytes
        self.pool.give(payload)
