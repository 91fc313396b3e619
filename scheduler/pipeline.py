"""One pipeline: given its nodes in order, every sensible way to cut the layers among them.

A cut trades the sum of the stages' times (latency) against the slowest stage (throughput); `cuts` gives the whole
Pareto front. It knows seats (a node's figures for one model) and nothing of links, models or other pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHAVE = 1e-9


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


def cuts(seats: Sequence[Seat], layers: int, coarse: float = 0.0) -> list[Cut]:
    """The Pareto front of cuts for seats in this order, from the least sum to the least maximum.

    For a bound T on every stage the least sum gives each stage one layer and the rest to the fastest that have room
    under T; walking T down from each front point to the next visits all of them. `coarse` skips points that
    lower the maximum by less than that fraction. Empty when the layers do not fit or some stage would be idle.
    """
    size = len(seats)
    limits = rooms(seats)
    if size > layers or sum(limits) < layers or min(limits) < 1:
        return []
    times = [seat.layer_s for seat in seats]
    fixed = [0.0] * (size - 1) + [seats[-1].head_s]
    order = sorted(range(size), key=lambda i: (times[i], i))
    front: list[Cut] = []
    bound = float("inf")
    while True:
        counts = _fill(order, times, fixed, limits, layers, bound)
        if counts is None:
            return front
        stage = [counts[i] * times[i] + fixed[i] for i in range(size)]
        slowest = max(stage)
        front.append(Cut(tuple(counts), sum(stage), slowest))
        shaved = slowest * (1.0 - max(coarse, SHAVE))
        if coarse and _fill(order, times, fixed, limits, layers, shaved) is None:
            shaved = slowest * (1.0 - SHAVE)
            coarse = coarse / 4 if coarse > 0.005 else 0.0
        bound = shaved


def _fill(
    order: Sequence[int],
    times: Sequence[float],
    fixed: Sequence[float],
    limits: Sequence[int],
    layers: int,
    bound: float,
) -> list[int] | None:
    """Counts of the least sum under `bound`, or None."""
    counts = [1] * len(limits)
    left = layers - len(limits)
    unbounded = bound == float("inf")
    for i in order:
        limit = limits[i]
        if not unbounded:
            spare = bound - fixed[i]
            if spare < times[i]:
                return None
            limit = min(limit, int(spare / times[i]))
        more = min(limit - 1, left)
        if more > 0:
            counts[i] += more
            left -= more
    return counts if left == 0 else None
