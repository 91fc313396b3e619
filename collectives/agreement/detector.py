"""Who is alive, who is slow, who is dead: learnt from the times at which a peer was heard.

Each peer's silence is judged by its own past: the mean of the gaps between its signs of life plus some deviations (the
accrual idea of Hayashibara et al. 2004, with Jacobson's estimator), between two bounds. The end of a connection counts
at once. A peer that is heard and whose progress mark stands still is slow, not dead. Time in which this process itself
stood still is nobody's silence. A pure core: what to send, and what a suspicion leads to, is for others to know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from collectives.agreement.events import Alive, Suspected


class Health(Enum):
    """`SUSPECTED` and `DEAD` are not counted on; the difference is how sure one is."""

    ALIVE = "alive"
    SLOW = "slow"
    SUSPECTED = "suspected"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """`heartbeat_s` is what peers are expected to keep while they are watched. The bounds follow a LAN's needs: a
    stopped process is noticed within `silence_max_s` plus one poll."""

    heartbeat_s: float = 0.2
    silence_min_s: float = 0.8
    silence_max_s: float = 1.6
    dead_after_s: float = 6.0  # of silence
    stall_min_s: float = 1.0  # a mark that stands still for less is no sign of slowness
    stall_max_s: float = 30.0
    deviations: float = 6.0
    own_pause_s: float = 0.5  # a longer gap between two polls is this process's own
    peers_max: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_s < self.silence_min_s <= self.silence_max_s <= self.dead_after_s:
            raise ValueError(
                "heartbeat_s < silence_min_s <= silence_max_s <= dead_after_s is needed, got "
                f"{self.heartbeat_s}, {self.silence_min_s}, {self.silence_max_s}, {self.dead_after_s}"
            )
        if not 0 < self.stall_min_s <= self.stall_max_s:
            raise ValueError(f"stall_min_s must be positive and at most stall_max_s, got {self.stall_min_s}")
        for name in ("deviations", "own_pause_s", "peers_max"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(slots=True)
class Gaps:
    """Smoothed mean and mean deviation of intervals, in seconds."""

    mean_s: float
    deviation_s: float

    def learn(self, gap_s: float) -> None:
        self.deviation_s += 0.1 * (abs(gap_s - self.mean_s) - self.deviation_s)
        self.mean_s += 0.1 * (gap_s - self.mean_s)

    def limit_s(self, deviations: float, least_s: float, most_s: float) -> float:
        return min(max(self.mean_s + deviations * self.deviation_s, least_s), most_s)


@dataclass(slots=True)
class Peer:
    heard_at: float
    gaps: Gaps
    moved_at: float
    moves: Gaps
    mark: int | None = None
    closed: bool = False
    trusted: bool = True


class Detector:
    """`poll` tells what changed since; call it when `wake_s` has come and after `closed`."""

    def __init__(self, settings: DetectorSettings | None = None) -> None:
        self.settings = settings or DetectorSettings()
        self._peers: dict[str, Peer] = {}
        self._polled_at: float | None = None

    def watch(self, peer: str, now_s: float) -> bool:
        """From now on something is expected of `peer`. False if there is no room. What was learnt is kept."""
        known = self._peers.get(peer)
        if known is not None:
            return True
        if len(self._peers) >= self.settings.peers_max:
            return False
        beat, stall = self.settings.heartbeat_s, self.settings.stall_min_s
        self._peers[peer] = Peer(now_s, Gaps(beat, beat / 2), now_s, Gaps(stall, stall / 2))
        return True

    def rest(self, now_s: float) -> None:
        """Nothing was expected of anybody until now (no round was open)."""
        for one in self._peers.values():
            one.heard_at = max(one.heard_at, now_s)
            one.moved_at = max(one.moved_at, now_s)
        self._polled_at = now_s

    def forget(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def heard(self, peer: str, now_s: float, mark: int | None = None) -> None:
        """A sign of life of any kind. `mark`: how far its work is, in any unit; None: it has none to do."""
        one = self._peers.get(peer)
        if one is None:
            return
        if not one.closed:
            one.gaps.learn(min(max(now_s - one.heard_at, 0.0), self.settings.silence_max_s))
        one.closed = False
        one.heard_at = max(one.heard_at, now_s)
        if mark is None or one.mark is None:
            one.moved_at = now_s
        elif mark != one.mark:
            one.moves.learn(min(max(now_s - one.moved_at, 0.0), self.settings.stall_max_s))
            one.moved_at = now_s
        one.mark = mark

    def closed(self, peer: str) -> None:
        """Its connection ended: it is dead until it is heard again."""
        one = self._peers.get(peer)
        if one is not None:
            one.closed = True

    def silence_max_s(self, peer: str) -> float:
        """How long `peer` may be silent, as far as is learnt."""
        one, settings = self._peers[peer], self.settings
        return one.gaps.limit_s(settings.deviations, settings.silence_min_s, settings.silence_max_s)

    def stall_max_s(self, peer: str) -> float:
        """How long the mark of `peer` may stand still before it is called slow."""
        one, settings = self._peers[peer], self.settings
        return one.moves.limit_s(settings.deviations, settings.stall_min_s, settings.stall_max_s)

    def health(self, peer: str, now_s: float) -> Health:
        """Of a peer that is watched."""
        one = self._peers[peer]
        silence_s = now_s - one.heard_at
        if one.closed or silence_s > self.settings.dead_after_s:
            return Health.DEAD
        if silence_s > self.silence_max_s(peer):
            return Health.SUSPECTED
        if one.mark is not None and now_s - one.moved_at > self.stall_max_s(peer):
            return Health.SLOW
        return Health.ALIVE

    def poll(self, now_s: float) -> list[Alive | Suspected]:
        """Changes of trust since the last poll, for the chains."""
        last = self._polled_at
        if last is not None and now_s - last > self.settings.own_pause_s:
            self._forgive(now_s - last, now_s)
        self._polled_at = now_s
        changes: list[Alive | Suspected] = []
        for peer, one in self._peers.items():
            trusted = self.health(peer, now_s) in (Health.ALIVE, Health.SLOW)
            if trusted != one.trusted:
                one.trusted = trusted
                changes.append(Alive(peer) if trusted else Suspected(peer))
        return changes

    def _forgive(self, pause_s: float, now_s: float) -> None:
        """This process stood still: whatever came meanwhile may still wait to be read."""
        for one in self._peers.values():
            one.heard_at = min(one.heard_at + pause_s, now_s)
            one.moved_at = min(one.moved_at + pause_s, now_s)

    @property
    def wake_s(self) -> float | None:
        """When to poll next; None while nobody is watched."""
        if not self._peers:
            return None
        last = (
            self._polled_at if self._polled_at is not None else min(p.heard_at for p in self._peers.values())
        )
        return last + self.settings.own_pause_s / 2

    def validate(self) -> None:
        """RuntimeError if what must always hold does not."""
        for peer, one in self._peers.items():
            limit_s = self.silence_max_s(peer)
            if not self.settings.silence_min_s <= limit_s <= self.settings.silence_max_s:
                raise RuntimeError(f"the limit for {peer} is out of bounds: {limit_s}")
            if one.gaps.deviation_s < 0 or one.moves.deviation_s < 0:
                raise RuntimeError(f"a negative deviation for {peer}")
