"""Who is thought gone before their records expire. A pure core over connection events and refreshed records.

A lost connection makes a peer suspect at once (requests avoid it) and, unless something is heard of it through others,
gone after a grace (plans do without it). Coming back clears both. Peers never connected count from when they were seen.
"""

from __future__ import annotations

from collections.abc import Collection


class Suspects:
    """Times are monotonic seconds of the caller's clock."""

    def __init__(self, *, grace_s: float, heard_s: float = 12.0) -> None:
        self._grace_s = grace_s
        self._heard_s = heard_s
        self._connected: set[str] = set()
        self._down_since: dict[str, float] = {}
        self._heard: dict[str, float] = {}

    def up(self, peer: str) -> None:
        """A connection to `peer` stands."""
        self._connected.add(peer)
        self._down_since.pop(peer, None)

    def down(self, peer: str, now: float) -> None:
        """The last connection to `peer` ended."""
        self._connected.discard(peer)
        self._down_since[peer] = now

    def heard(self, peer: str, now: float) -> None:
        """A fresh record of `peer` came, from it or through others."""
        self._heard[peer] = now
        if peer not in self._connected:
            self._down_since.setdefault(peer, now)

    def forget(self, known: Collection[str]) -> None:
        """Drop peers that no view knows any more, so that memory stays bounded."""
        for table in (self._down_since, self._heard):
            for peer in [peer for peer in table if peer not in known and peer not in self._connected]:
                del table[peer]

    def suspects(self) -> frozenset[str]:
        """Peers that no request should be sent to."""
        return frozenset(self._down_since)

    def gone(self, now: float) -> frozenset[str]:
        """Peers that plans should do without."""
        return frozenset(peer for peer, since in self._down_since.items() if self._is_gone(peer, since, now))

    def _is_gone(self, peer: str, since: float, now: float) -> bool:
        if now - since < self._grace_s:
            return False
        heard = self._heard.get(peer, float("-inf"))
        return not (heard > since and now - heard < self._heard_s)
