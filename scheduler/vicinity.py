"""Which of very many hosts a gateway weighs: for every layer some, near ones first, other ones at other gateways.

A chain through ten thousand hosts need not be sought among all of them. Each gateway has an order of its own of all
hosts, drawn once by their names and its distance from them (a weighted rendezvous: Efraimidis and Spirakis), and takes
from its beginning what brings each layer to so many hosts. So every layer that is hosted at all is covered, gateways
differ in what they take, together they take all alike, and who comes or goes changes little. Pure.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Mapping

from scheduler.routing import Hosted
from scheduler.shortlist import mix

DEPTH_LEAST = 8
"""Hosts of each layer that a gateway without any sessions weighs."""
SHRINK = 4
"""It goes back to fewer where it could do with so many times fewer."""
NEAR_S = 0.005
"""A host so far away counts half of one that is here."""


class Vicinity:
    """One gateway's choice among the hosts of a model; `latency_s` tells how far away a node is."""

    def __init__(self, gateway: str, latency_s: Callable[[str], float]) -> None:
        self._key = zlib.crc32(gateway.encode()) << 32
        self._latency_s = latency_s
        self._order: list[tuple[float, str]] = []
        self._known: set[str] = set()
        self._depth = DEPTH_LEAST
        self._picks: dict[int, list[str]] = {}
        self._version: Hashable = None

    def depth(self, sessions: int) -> int:
        """Hosts of each layer to weigh with so many sessions open: one for each, so that there may always be a chain
        which none of them uses. In powers of two, that the same hosts be weighed for long."""
        needed = DEPTH_LEAST + sessions
        if needed > self._depth or needed * SHRINK <= self._depth:
            self._depth = 1 << (needed - 1).bit_length()
        return self._depth

    def pick(self, hosts: Mapping[str, Hosted], layers: int, depth: int, version: Hashable) -> list[str]:
        """Names out of `hosts` such that each layer has `depth` hosts among them, or all that there are.

        `version` is any value that differs whenever a host came or went or changed its span.
        """
        if version != self._version:
            self._version = version
            self._picks.clear()
            self._rank(hosts)
        found = self._picks.get(depth)
        if found is None:
            found = self._picks[depth] = self._drawn(hosts, layers, depth)
        return found

    def _rank(self, hosts: Mapping[str, Hosted]) -> None:
        if len(self._known) > 2 * len(hosts):
            self._order = [entry for entry in self._order if entry[1] in hosts]
            self._known.intersection_update(hosts)
        for name in hosts.keys() - self._known:
            drawn = mix(self._key | zlib.crc32(name.encode()))
            far_s = NEAR_S + self._latency_s(hosts[name].node)
            self._order.append((-math.log((drawn + 0.5) / 2.0**64) * far_s, name))
            self._known.add(name)
        self._order.sort()

    def _drawn(self, hosts: Mapping[str, Hosted], layers: int, depth: int) -> list[str]:
        picked, counts = list[str](), [0] * layers
        short = (1 << layers) - 1
        for _, name in self._order:
            h = hosts.get(name)
            if h is None or not ((1 << h.end) - (1 << h.start)) & short:
                continue
            picked.append(name)
            for layer in range(h.start, min(h.end, layers)):
                counts[layer] += 1
                if counts[layer] == depth:
                    short &= ~(1 << layer)
            if not short:
                break
        return picked
