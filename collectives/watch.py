"""Who is alive, for the chains of a run: pings while a round is open, answered by every member at any time.

The judgement is the detector's; this gives it signs of life, the ends of connections and progress marks, and passes
on what changes. A process that answers is alive, however slow its work is. What a suspicion leads to is not known.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable

import trio

from collectives.agreement import Suspected
from collectives.agreement.detector import Detector, DetectorSettings, Health

log = logging.getLogger("shoal.collectives")

_BEAT = struct.Struct("!BQ")  # asks for an answer; progress mark, 0 for none
_PEERS_MAX = 4096


class Watch:
    """`ping(peer, body)` sends, `on_health(peer, trusted)` hears of changes, `mark()` says how far this node's own work
    is (0: it has none). `rounds_open` is the owner's to count."""

    def __init__(
        self,
        settings: DetectorSettings,
        ping: Callable[[str, bytes], None],
        on_health: Callable[[str, bool], None],
        mark: Callable[[], int],
    ) -> None:
        self.rounds_open = 0
        self._detector = Detector(settings)
        self._heartbeat_s = settings.heartbeat_s
        self._ping = ping
        self._on_health = on_health
        self._mark = mark
        self._followed: set[str] = set()
        self._suspects: set[str] = set()
        self._down: set[str] = set()
        self._look = trio.Event()

    def suspects(self) -> list[str]:
        return sorted(self._suspects)

    def health(self, peer: str) -> Health:
        """ALIVE for peers that nothing is known of."""
        if peer not in self._followed:
            return Health.ALIVE
        return self._detector.health(peer, trio.current_time())

    def follow(self, peer: str) -> None:
        """From now on `peer` is pinged while a round is open."""
        if peer in self._followed or not self._detector.watch(peer, trio.current_time()):
            return
        self._followed.add(peer)
        if peer in self._down:
            self._detector.closed(peer)
            self._look.set()

    def heard(self, peer: str) -> None:
        """A sign of life, and no word of progress."""
        if peer in self._followed and peer not in self._down:
            self._detector.heard(peer, trio.current_time())
            if peer in self._suspects:
                self._look.set()

    def beat(self, peer: str, body: bytes) -> None:
        """A ping, or the answer to one."""
        if len(body) != _BEAT.size:
            return
        asks, mark = _BEAT.unpack(body)
        if peer in self._followed and peer not in self._down:
            self._detector.heard(peer, trio.current_time(), mark or None)
            if peer in self._suspects:
                self._look.set()
        if asks:
            self._ping(peer, _BEAT.pack(0, self._mark()))

    def up(self, peer: str) -> None:
        self._down.discard(peer)
        self.heard(peer)

    def down(self, peer: str) -> None:
        if len(self._down) < _PEERS_MAX:
            self._down.add(peer)
        self._detector.closed(peer)
        self._look.set()

    async def run(self) -> None:
        """Until cancelled."""
        ping_s = trio.current_time()
        while True:
            self._look = trio.Event()
            with trio.move_on_at(ping_s):
                await self._look.wait()
            now_s = trio.current_time()
            if self.rounds_open == 0:
                self._detector.rest(now_s)
            for change in self._detector.poll(now_s):
                trusted = not isinstance(change, Suspected)
                (self._suspects.discard if trusted else self._suspects.add)(change.peer)
                log.info("%s is %s", change.peer, "trusted again" if trusted else "suspected")
                self._on_health(change.peer, trusted)
            if now_s >= ping_s:
                ping_s = now_s + self._heartbeat_s
                if self.rounds_open:
                    for peer in self._followed - self._down:
                        self._ping(peer, _BEAT.pack(1, self._mark()))
