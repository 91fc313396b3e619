"""What a router works out once for a set of hosted spans: who begins where, the distances between them, places to look.

Queues, room and times change with every request; spans and distances do not, for a while. It knows no request.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.shapes import Links
from scheduler.shortlist import Shortlist, mix

Place = tuple[str, int, int]
"""A node and the layers [start, end) that it hosts."""


class Terrain:
    """Spans by number, in order, and all that follows from them and from the links alone.

    `places_good` are anchors around which good chains were found; whoever looks first writes them down.
    """

    def __init__(self, spans: Sequence[Place], links: Links) -> None:
        self.spans = list(spans)
        self.links = links
        self.names = [node for node, _, _ in spans]
        self.starts = [start for _, start, _ in spans]
        self.shortlist = Shortlist(self.starts, [end for _, _, end in spans])
        self.marks = [mix(v) for v in range(len(self.spans))]
        self.known: dict[tuple[int, int], tuple[float, float]] = {}
        self.anchors: list[list[float]] = []
        self.places_good: list[int] = []
        self._from_gateway: dict[str, list[float]] = {}

    def near_s(self, gateway: str) -> list[float]:
        """Latency from a gateway to every span's node, asked once."""
        found = self._from_gateway.get(gateway)
        if found is None:
            found = [self.links(gateway, name).latency_s for name in self.names]
            self._from_gateway[gateway] = found
        return found

    def link(self, u: int, v: int) -> tuple[float, float]:
        """Seconds a message and seconds a byte between two spans' nodes, asked once."""
        link = self.links(self.names[u], self.names[v])
        found = self.known[u, v] = link.latency_s, 1 / link.bytes_per_s if link.bytes_per_s > 0 else 0.0
        return found
