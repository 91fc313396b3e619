"""Whom to dial next: a synchronous core with backoff and jitter.

Knows candidates, where their addresses come from, and when each may be tried again. It has no
clock and no randomness of its own and dials nobody.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from dht.adverts import ADDRS_MAX, own_addrs
from p2p import PeerId


@dataclass(frozen=True, slots=True)
class DialerConfig:
    """`first_delay_max_s` spreads the first dials of the end with the greater id, so that mostly one dials."""

    candidates_max: int = 512
    at_once_max: int = 8
    backoff_first_s: float = 1.0
    backoff_max_s: float = 120.0
    first_delay_s: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"DialerConfig.{name} is {getattr(self, name)!r}: it must be above zero")


@dataclass(slots=True)
class _Candidate:
    addrs: tuple[str, ...]
    due_s: float
    failures: int = 0
    dialling: bool = False
    renewed: bool = False
    found: int = field(default=0)


class Dialer:
    """Times are any monotonic seconds. A peer that is connected is never due."""

    def __init__(self, me: PeerId, rng: random.Random, config: DialerConfig | None = None) -> None:
        self.config = config or DialerConfig()
        self._me = me
        self._rng = rng
        self._candidates: dict[PeerId, _Candidate] = {}
        self._finds = 0

    def found(self, peer: PeerId, addrs: Iterable[str], now_s: float) -> None:
        """`peer` is said to be at `addrs`. New addresses come first and end a long wait."""
        fitting = own_addrs(peer, addrs)
        if peer == self._me or not fitting:
            return
        self._finds += 1
        known = self._candidates.get(peer)
        if known is None:
            self._make_room()
            delay_s = self.config.first_delay_s if peer < self._me else 0.0
            self._candidates[peer] = _Candidate(fitting, now_s + delay_s, found=self._finds)
            return
        known.found = self._finds
        if not set(fitting) <= set(known.addrs):
            known.addrs = tuple(dict.fromkeys((*fitting, *known.addrs)))[:ADDRS_MAX]
            known.failures = 0
            known.renewed = known.dialling
            known.due_s = min(known.due_s, now_s + self._jittered(self.config.backoff_first_s))

    def take_due(self, connected: Collection[PeerId], now_s: float) -> list[tuple[PeerId, tuple[str, ...]]]:
        """Peers to dial now, the longest due first; each counts as being dialled until `ended`."""
        room = self.config.at_once_max - sum(one.dialling for one in self._candidates.values())
        due = [
            (one.due_s, peer)
            for peer, one in self._candidates.items()
            if not one.dialling and one.due_s <= now_s and peer not in connected
        ]
        chosen = [peer for _, peer in sorted(due)[: max(0, room)]]
        for peer in chosen:
            self._candidates[peer].dialling = True
        return [(peer, self._candidates[peer].addrs) for peer in chosen]

    def ended(self, peer: PeerId, connected: bool, now_s: float) -> None:
        """A dial came to its end."""
        one = self._candidates.get(peer)
        if one is None:
            return
        one.dialling = False
        one.failures = 0 if connected or one.renewed else one.failures + 1
        wait_s = self.config.backoff_first_s * 2 ** min(one.failures, 20)
        one.renewed = False  # else: it failed at old addresses, which says nothing of those named meanwhile
        one.due_s = now_s + self._jittered(min(wait_s, self.config.backoff_max_s))

    def lost(self, peer: PeerId, now_s: float) -> None:
        """The connection to `peer` broke: try again soon."""
        one = self._candidates.get(peer)
        if one is not None:
            one.failures = 0
            one.due_s = now_s + self._jittered(self.config.backoff_first_s)

    def drop(self, peer: PeerId) -> None:
        """`peer` has left the mesh."""
        self._candidates.pop(peer, None)

    def addrs(self, peer: PeerId) -> tuple[str, ...]:
        """Where `peer` is said to be."""
        one = self._candidates.get(peer)
        return one.addrs if one else ()

    def __len__(self) -> int:
        return len(self._candidates)

    def _make_room(self) -> None:
        """Whoever failed most, and among those was named longest ago, makes room."""
        if len(self._candidates) >= self.config.candidates_max:
            idle = [
                (-one.failures, one.found, peer) for peer, one in self._candidates.items() if not one.dialling
            ]
            if idle:
                del self._candidates[min(idle)[2]]

    def _jittered(self, delay_s: float) -> float:
        return delay_s * self._rng.uniform(0.75, 1.25)
