"""Which chunks to ask of which peer next: rarest first, in runs, and never of a peer that sent bad bytes.

A synchronous core: it is told which peers have what, what was asked, and how it ended; the clock is an argument.
It does not know files, disks or calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

_SORT_EVERY_S = 3.0


@dataclass(eq=False, slots=True)
class Source:
    """A peer that has some chunks. `rests_until_s`: when it may be asked again; `refused`: what it did not give;
    `runs_max`: how many runs it takes at once, as far as is known."""

    peer: str
    bits: bytes = b""
    rests_until_s: float = -math.inf
    refused: set[int] = field(default_factory=set)
    cautious: bool = False
    runs: int = 0
    runs_max: float = math.inf

    def has(self, number: int) -> bool:
        at = number >> 3
        claimed = at < len(self.bits) and self.bits[at] >> (number & 7) & 1 == 1
        return claimed and number not in self.refused


@dataclass(slots=True)
class _Asked:
    """Who was asked for a chunk, and when last."""

    peers: set[str] = field(default_factory=set)
    since_s: float = 0.0


class Picker:
    """`missing` chunk numbers, the `length` of each in bytes, and `seed` so that peers fetch in different orders.

    A run is at most `run_bytes_max` bytes and `run_chunks_max` chunks, all with neighbouring numbers. A chunk that a
    peer has not delivered for `stalled_s` may be asked of another too.
    """

    def __init__(
        self,
        missing: Iterable[int],
        length: Callable[[int], int],
        seed: str,
        *,
        run_bytes_max: int = 4 << 20,
        run_chunks_max: int = 256,
        stalled_s: float = 5.0,
    ) -> None:
        self.missing = set(missing)
        self.sources: dict[str, Source] = {}
        self.bad: set[str] = set()
        self._length = length
        self._seed = seed
        self._run_bytes_max = run_bytes_max
        self._run_chunks_max = run_chunks_max
        self._stalled_s = stalled_s
        self._asked: dict[int, _Asked] = {}
        self._order: list[int] = []
        self._head = 0
        self._sorted_s = -math.inf
        self._stale = True

    def offer(self, peer: str, bits: bytes) -> None:
        """What `peer` has now. Ignored for one that sent bad bytes."""
        if peer in self.bad:
            return
        source = self.sources.setdefault(peer, Source(peer))
        if source.bits != bits:
            source.bits = bits
            self._stale = True

    def drop(self, peer: str, *, bad: bool) -> None:
        """`peer` is gone, or never to be asked again."""
        if bad:
            self.bad.add(peer)
        self.sources.pop(peer, None)
        for asked in self._asked.values():
            asked.peers.discard(peer)

    def rest(self, peer: str, until_s: float) -> None:
        """`peer` is busy: leave it alone until then, and ask it for less at once from now on."""
        source = self.sources.get(peer)
        if source is not None:
            source.rests_until_s = max(source.rests_until_s, until_s)
            source.runs_max = max(1, source.runs - 1)

    def refuse(self, peer: str, numbers: Sequence[int]) -> None:
        """`peer` would not give these. One chunk is believed; of a run, its chunks are asked for one by one."""
        source = self.sources.get(peer)
        if source is not None:
            source.cautious = True
            if len(numbers) == 1:
                source.refused.update(numbers)
                self._stale = True

    def useful(self, peer: str) -> bool:
        """Whether `peer` has anything that is missing."""
        source = self.sources.get(peer)
        return source is not None and any(source.has(number) for number in self.missing)

    def complete(self, peer: str) -> bool:
        """Whether `peer` has everything that is missing."""
        source = self.sources.get(peer)
        return source is not None and all(source.has(number) for number in self.missing)

    def pick(self, peer: str, now: float) -> range | None:
        """The next run for `peer`, counted as asked; None while there is nothing for it."""
        source = self.sources.get(peer)
        if source is None or now < source.rests_until_s or source.runs >= source.runs_max:
            return None
        first = self._first(source, now)
        if first is None:
            return None
        last = first
        size = self._length(first)
        chunks_max = 1 if source.cautious else self._run_chunks_max
        fresh = self._unasked(first)
        while last + 1 - first < chunks_max and self._free(last + 1, source, now):
            if self._unasked(last + 1) != fresh:
                break
            size += self._length(last + 1)
            if size > self._run_bytes_max:
                break
            last += 1
        run = range(first, last + 1)
        source.runs += 1
        for number in run:
            asked = self._asked.setdefault(number, _Asked())
            asked.peers.add(peer)
            asked.since_s = now
        return run

    def done(self, numbers: Iterable[int]) -> None:
        """These chunks are here now, from whomever."""
        for number in numbers:
            self.missing.discard(number)
            self._asked.pop(number, None)

    def returned(self, peer: str, numbers: Iterable[int]) -> None:
        """`peer` is done with a run; for what it did not deliver others may be asked at once."""
        source = self.sources.get(peer)
        if source is not None:
            source.runs = max(0, source.runs - 1)
        for number in numbers:
            asked = self._asked.get(number)
            if asked is not None:
                asked.peers.discard(peer)

    def unavailable(self) -> list[int]:
        """Missing chunks that no known peer has."""
        return sorted(
            number for number in self.missing if not any(s.has(number) for s in self.sources.values())
        )

    def _first(self, source: Source, now: float) -> int | None:
        if self._stale and (now - self._sorted_s >= _SORT_EVERY_S or not self._order):
            self._order, self._head = self._by_rarity(), 0
            self._sorted_s = now
            self._stale = False
        order, stalled = self._order, None
        while self._head < len(order) and order[self._head] not in self.missing:
            self._head += 1
        gone = 0
        for index in range(self._head, len(order)):
            number = order[index]
            if number not in self.missing:
                gone += 1
            elif self._unasked(number) and source.has(number):
                break
            elif stalled is None and self._free(number, source, now):
                stalled = number
        else:
            number = (
                -1 if stalled is None else stalled
            )  # before the last chunks, nobody is asked what another was
        if gone > 64 + len(self.missing) // 8:
            self._order, self._head = [one for one in order if one in self.missing], 0
        return None if number < 0 else number

    def _unasked(self, number: int) -> bool:
        asked = self._asked.get(number)
        return asked is None or not asked.peers

    def _free(self, number: int, source: Source, now: float) -> bool:
        if number not in self.missing or not source.has(number):
            return False
        if self._unasked(number):
            return True
        asked = self._asked[number]
        return source.peer not in asked.peers and now - asked.since_s >= self._stalled_s

    def _by_rarity(self) -> list[int]:
        """Rarest first; among equals each fetcher starts elsewhere, so that fetchers have something to exchange."""
        numbers = sorted(self.missing)
        owners: Sequence[Source] = list(self.sources.values())
        start = int.from_bytes(blake3(self._seed.encode()).digest()[:8], "big") % max(1, len(numbers))
        numbers = numbers[start:] + numbers[:start]
        return sorted(numbers, key=lambda number: sum(source.has(number) for source in owners))
