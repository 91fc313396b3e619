"""A few good spans out of many: enough choices for every layer, found without looking at pairs.

With the costs blurred by a seed the list is a random draw that favours the good, so that a gateway chooses among a
few and different gateways among different few (power of d choices). It knows numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

CHOICES = 3
"""Hosts that the list should hold for every layer."""
ANCHORS = 10
"""Places of the mesh that chains are sought around."""
_MASK = (1 << 64) - 1


def mix(number: int) -> int:
    """A number of 64 bits that looks like chance (splitmix64)."""
    z = (number * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def noise(marks: Sequence[int], seed: int, spread: float) -> list[float]:
    """Factors from 1 to 1 + spread, one for each of `marks` (fixed numbers by `mix`), other ones for each seed."""
    scale, key = spread / (1 << 24), mix(seed) | 1
    return [1.0 + ((mark * key & _MASK) >> 40) * scale for mark in marks]


def anchors(latency_s: Callable[[int, int], float], size: int) -> list[list[float]]:
    """Latencies from some nodes, each as far as can be from those before it, to all [ANCHORS][size]."""
    found: list[list[float]] = []
    nearest = [float("inf")] * size
    at = 0
    for _ in range(min(ANCHORS, size)):
        row = [latency_s(at, v) if v != at else 0.0 for v in range(size)]
        found.append(row)
        nearest = [min(a, b) for a, b in zip(nearest, row, strict=True)]
        at = max(range(size), key=lambda v: (nearest[v], -v))
    return found


class Shortlist:
    """Spans by number, ready to be drawn from."""

    def __init__(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        self._starts = starts
        self._ends = list(ends)
        self._masks = [(1 << end) - (1 << start) for start, end in zip(starts, ends, strict=True)]
        self._share = [1.0 / (end - start) for start, end in zip(starts, ends, strict=True)]
        self._cut: dict[int, list[int]] = {}

    def ends_to(self, layers: int) -> list[int]:
        """Ends of the spans, none beyond `layers`."""
        if layers not in self._cut:
            self._cut[layers] = [min(end, layers) for end in self._ends]
        return self._cut[layers]

    def rank(
        self,
        usable: Sequence[int],
        enter_s: Sequence[float],
        layer_s: Sequence[float],
        near_s: Sequence[float],
        hops: float,
    ) -> list[int]:
        """The usable spans from best to worst by what a layer costs there, entering and getting there included.

        `near_s` are latencies to some place of the mesh: nodes near one place are near each other.
        """
        score = [
            layer + (enter + hops * near) * share
            for layer, enter, near, share in zip(layer_s, enter_s, near_s, self._share, strict=True)
        ]
        return sorted(usable, key=score.__getitem__)

    def pick(self, ranked: Sequence[int], layers: int, avoid: Collection[int]) -> list[int]:
        """The first spans by rank until every layer has CHOICES hosts, those to avoid last."""
        full = (1 << layers) - 1
        counted = [0] * CHOICES
        masks = self._masks
        picked: list[int] = []
        top = CHOICES - 1
        later: list[int] = []
        for v in ranked:
            mask = masks[v] & full
            if not mask & ~counted[top]:
                continue
            if v in avoid:
                later.append(v)
                continue
            picked.append(v)
            for k in range(top, 0, -1):
                counted[k] |= counted[k - 1] & mask
            counted[0] |= mask
            if counted[top] == full:
                return picked
        once = counted[0]
        for v in later:
            if masks[v] & full & ~once:
                picked.append(v)
                once |= masks[v]
        return picked
