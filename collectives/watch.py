"""Who is alive: pings while a round is open, answered by every member at any time, and the ends of connections.

A process that answers is alive, however slow its work is; one that is silent for longer than its own past explains is
suspected, one whose connection ends is so at once. Time in which this very loop stood still is nobody's silence. It
does not know what a suspicion leads to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

log = logging.getLogger("shoal.collectives")

PING, PONG = b"?", b"!"
PEERS_MAX = 4096
SILENCE_MIN_S = 1.0
SILENCE_MAX_S = 8.0
_WEIGHT = 0.1
_DEVIATIONS = 6.0


@dataclass(eq=False, slots=True)
class _Peer:
    """Intervals between signs of life, smoothed: mean and mean deviation in seconds."""

    heard_s: float
    connected: bool = True
    suspected: bool = False
    interval_s: float = 0.2
    deviation_s: float = 0.1

    @property
    def silence_max_s(self) -> float:
        learnt = self.interval_s + _DEVIATIONS * self.deviation_s
        return min(max(learnt, SILENCE_MIN_S), SILENCE_MAX_S)

    def sign(self, now_s: float) -> None:
        gap_s = min(now_s - self.heard_s, SILENCE_MAX_S)
        self.heard_s = now_s
        self.deviation_s += _WEIGHT * (abs(gap_s - self.interval_s) - self.deviation_s)
        self.interval_s += _WEIGHT * (gap_s - self.interval_s)


class Watch:
    """`ping(peer, body)` sends, `on_health(peer, trusted)` hears of changes; `rounds_open` is the owner's to count."""

    def __init__(
        self, heartbeat_s: float, ping: Callable[[str, bytes], None], on_health: Callable[[str, bool], None]
    ) -> None:
        self.rounds_open = 0
        self._heartbeat_s = heartbeat_s
        self._ping = ping
        self._on_health = on_health
        self._peers: dict[str, _Peer] = {}
        self._down: set[str] = set()

    def suspects(self) -> list[str]:
        return sorted(peer for peer, one in self._peers.items() if one.suspected)

    def follow(self, peer: str) -> None:
        """From now on `peer` is pinged while a round is open."""
        if peer not in self._peers and len(self._peers) < PEERS_MAX:
            self._peers[peer] = _Peer(trio.current_time(), connected=peer not in self._down)

    def heard(self, peer: str) -> None:
        """Any sign of life."""
        one = self._peers.get(peer)
        if one is not None:
            one.sign(trio.current_time())
            self._trust(peer, one)

    def beat(self, peer: str, body: bytes) -> None:
        """A ping or the answer to one; the sign of life itself has been counted."""
        if body == PING:
            self._ping(peer, PONG)

    def up(self, peer: str) -> None:
        self._down.discard(peer)
        one = self._peers.get(peer)
        if one is not None:
            one.connected = True
            one.heard_s = trio.current_time()
            self._trust(peer, one)

    def down(self, peer: str) -> None:
        if len(self._down) < PEERS_MAX:
            self._down.add(peer)
        one = self._peers.get(peer)
        if one is not None:
            one.connected = False
            self._suspect(peer, one, "its connection ended")

    def _trust(self, peer: str, one: _Peer) -> None:
        if one.suspected and one.connected:
            one.suspected = False
            self._on_health(peer, True)

    def _suspect(self, peer: str, one: _Peer, why: str) -> None:
        if not one.suspected:
            one.suspected = True
            log.info("%s is suspected: %s", peer, why)
            self._on_health(peer, False)

    async def run(self) -> None:
        """Until cancelled."""
        was_open = False
        while True:
            slept_from_s = trio.current_time()
            await trio.sleep(self._heartbeat_s)
            now_s = trio.current_time()
            stalled_s = now_s - slept_from_s - self._heartbeat_s
            is_open = self.rounds_open > 0
            for peer, one in list(self._peers.items()):
                if not was_open or stalled_s > self._heartbeat_s:
                    one.heard_s = max(one.heard_s, now_s - self._heartbeat_s)
                elif is_open and now_s - one.heard_s > one.silence_max_s:
                    self._suspect(peer, one, f"silent for {now_s - one.heard_s:.2f} s")
                if is_open and one.connected:
                    self._ping(peer, PING)
            was_open = is_open
