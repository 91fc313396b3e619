"""One pipeline: given its nodes in order, every sensible way to cut the layers among them.

A cut trades the sum of the stages' times (latency) against the slowest stage (throughput); `cuts` gives the whole
Pareto front. It knows seats (a node's figures for one model) and nothing of links, models or other pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHAVE = 1e-9
QUICK_SLACKS = (1.0, 1.04, 1.15, 1.4)
"""Where `quick_cuts` looks: bounds on the slowest stage, over the least that the layers allow."""
UNBOUNDED = float("inf")


@dataclass(frozen=True, slots=True)
class Seat:
    """A node's figures for one model. Rooms are layers that fit beside embedding and head where those must sit."""

    node: str
    layer_s: float
    head_s: float
    room: int
    room_first: int
    room_last: int
    room_alone: int
    reliability: float = 1.0

    @property
    def figures(self) -> tuple[float, float, int, int, int, int, float]:
        """All but the name: seats with equal figures are interchangeable where links are uniform."""
        return (
            self.layer_s,
            self.head_s,
            self.room,
            self.room_first,
            self.room_last,
            self.room_alone,
            self.reliability,
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """Layers by stage, the sum of stage times, and the slowest stage's time."""

    counts: tuple[int, ...]
    sum_s: float
    max_s: float


def rooms(seats: Sequence[Seat]) -> list[int]:
    """Layers each seat can take at its place in this order."""
    if len(seats) == 1:
        return [seats[0].room_alone]
    inner = [seat.room for seat in seats[1:-1]]
    return [seats[0].room_first, *inner, seats[-1].room_last]


class _Filler:
    """Cuts of one order of seats under a bound on every stage."""

    def __init__(self, seats: Sequence[Seat], layers: int) -> None:
        self.limits = rooms(seats)
        self.layers = layers
        self.times = [seat.layer_s for seat in seats]
        self.head_s = seats[-1].head_s
        self.order = sorted(range(len(seats)), key=self.times.__getitem__)
        self.possible = len(seats) <= layers and min(self.limits) > 0 and sum(self.limits) >= layers

    def under(self, bound: float) -> Cut | None:
        """The least sum with no stage above `bound`: one layer each, the rest to the fastest that have room."""
        times, limits = self.times, self.limits
        last = len(times) - 1
        counts = [1] * (last + 1)
        left = self.layers - last - 1
        total, slowest = self.head_s, 0.0
        for i in self.order:
            limit, each = limits[i], times[i]
            fixed = self.head_s if i == last else 0.0
            if bound != UNBOUNDED:
                by_bound = int((bound - fixed) / each) if bound > fixed else 0
                if by_bound < limit:
                    if by_bound < 1:
                        return None
                    limit = by_bound
            if left:
                more = limit - 1 if limit <= left else left
                counts[i] += more
                left -= more
            seconds = counts[i] * each
            total += seconds
            if seconds + fixed > slowest:
                slowest = seconds + fixed
        return None if left else Cut(tuple(counts), total, slowest)

    def least_bound_s(self) -> float:
        """A lower bound on the slowest stage: the layers taken as a fluid, spread to equal times under the rooms."""
        free = list(range(len(self.times)))
        layers, last = float(self.layers), len(self.times) - 1
        while free:
            rate = sum(1.0 / self.times[i] for i in free)
            head = self.head_s / self.times[last] if last in free else 0.0
            level = (layers + head) / rate
            full = [
                i
                for i in free
                if level > self.limits[i] * self.times[i] + (self.head_s if i == last else 0.0)
            ]
            if not full:
                return level
            layers -= sum(self.limits[i] for i in full)
            free = [i for i in free if i not in full]
        return max(n * t for n, t in zip(self.limits, self.times, strict=True))


def cuts(seats: Sequence[Seat], layers: int) -> list[Cut]:
    """The Pareto front of cuts for seats in this order, from the least sum to the least maximum.

    For a bound on every stage the least sum is found greedily; walking the bound down from each front point to
    the next visits all of them. Empty when the layers do not fit or some stage would be idle.
    """
    filler = _Filler(seats, layers)
    if not filler.possible:
        return []
    front: list[Cut] = []
    cut = filler.under(UNBOUNDED)
    while cut is not None:
        front.append(cut)
        cut = filler.under(cut.max_s * (1.0 - SHAVE))
    return front


def quick_cuts(seats: Sequence[Seat], layers: int) -> list[Cut]:
    """A few points of the front that `cuts` gives whole, for search."""
    filler = _Filler(seats, layers)
    if not filler.possible:
        return []
    fastest = filler.under(UNBOUNDED)
    if fastest is None:
        return []
    found = [fastest]
    least = filler.least_bound_s()
    slowest_layer = max(filler.times)
    for slack in QUICK_SLACKS:
        bound = least * slack + (slowest_layer if slack > 1.0 else 0.5 * slowest_layer)
        if bound < fastest.max_s:
            cut = filler.under(bound)
            if cut is not None:
                found.append(cut)
    return found
