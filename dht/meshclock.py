"""What time the mesh has: the median of its members' clocks. Pure.

Home computers' clocks are off by seconds to hours, and records live for seconds. Each message says
what time its sender's clock shows; the median over this node and its connected peers is a time that
all fully connected members agree on, and that a minority of wrong or lying clocks cannot move. It
does not set any clock.
"""

from __future__ import annotations

import statistics

from p2p import PeerId

DEAD_ZONE_S = 2.0


class MeshClock:
    """Offsets of connected peers' clocks against this node's, in seconds (positive: theirs is ahead).

    A sample is late by one network delay, which is why offsets below DEAD_ZONE_S count as nothing.
    """

    def __init__(self) -> None:
        self._offsets_s: dict[PeerId, float] = {}

    def heard(self, peer: PeerId, their_now_s: float, now_s: float) -> None:
        """`peer` said `their_now_s` when this node's clock showed `now_s`."""
        self._offsets_s[peer] = their_now_s - now_s

    def lost(self, peer: PeerId) -> None:
        """`peer` is no longer connected."""
        self._offsets_s.pop(peer, None)

    def peer_offset_s(self, peer: PeerId) -> float | None:
        """How far `peer`'s clock is ahead of this node's, or None if it was never heard."""
        return self._offsets_s.get(peer)

    @property
    def offset_s(self) -> float:
        """What to add to this node's clock to get the mesh's time; 0 when that is under DEAD_ZONE_S."""
        median_s = statistics.median([0.0, *self._offsets_s.values()])
        return median_s if abs(median_s) > DEAD_ZONE_S else 0.0
