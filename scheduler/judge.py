"""How good a set of assignments is, whatever its shape: the objective over the chains it can run side by side.

Replicas that overlap or are partial have no fixed pipelines; the judge takes the cheapest chain, sets its nodes aside
and goes on, which is what requests would find. It changes nothing and knows nothing of bytes to move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.pipeline import Seat
from scheduler.pool import objective
from scheduler.shapes import Assignment
from scheduler.walk import Ground, Walk, shortest_walk


@dataclass(frozen=True, slots=True)
class SideBySide:
    """A chain of stages: seconds a token, and tokens a second for one request and with the pipeline full, both by the
    chance that all its nodes are there."""

    stages: tuple[Assignment, ...]
    single_s: float
    token_rate: float
    full_rate: float


class Judge:
    """Scores assignments over these seats, up to `chains_max` chains at once."""

    def __init__(
        self, seats: Sequence[Seat], layers: int, hop_s: float | Callable[[int, int], float], chains_max: int
    ) -> None:
        self._seats = {seat.node: seat for seat in seats}
        self._number = {seat.node: k for k, seat in enumerate(seats)}
        self._layers = layers
        self._hop_s = hop_s
        self._chains_max = chains_max

    def hop_s(self, a: str, b: str) -> float:
        """Seconds for one token between two nodes."""
        if callable(self._hop_s):
            return self._hop_s(self._number[a], self._number[b])
        return self._hop_s

    def score(self, assignments: Sequence[Assignment]) -> float:
        """sqrt(S * P) of the chains that these assignments can run at once; 0 when they cover no chain."""
        chains = self.chains(assignments)
        return objective(sum(c.token_rate for c in chains), sum(c.full_rate for c in chains), "balanced")

    def chains(self, assignments: Sequence[Assignment]) -> list[SideBySide]:
        """The chains that these assignments can run at once, no node in two of them, the quickest first."""
        spans = sorted(a for a in assignments if a.node in self._seats)
        seats = [self._seats[a.node] for a in spans]
        ground = Ground(
            layers=self._layers,
            starts=[a.start for a in spans],
            ends=[a.end for a in spans],
            layer_s=[seat.layer_s for seat in seats],
            enter_s=[0.0] * len(spans),
            first_s=lambda _v: 0.0,
            hop_s=lambda u, v: self.hop_s(spans[u].node, spans[v].node),
            back_s=lambda u, v: (
                seats[u].head_s + (self.hop_s(spans[u].node, spans[v].node) if u != v else 0.0)
            ),
        )
        free = list(range(len(spans)))
        found: list[SideBySide] = []
        for _ in range(self._chains_max):
            walk = shortest_walk(ground, free)
            if walk is None:
                break
            stages = tuple(Assignment(spans[v].node, start, end) for v, start, end in walk.stages)
            found.append(SideBySide(stages, walk.cost_s, *self._rates(walk, seats)))
            used = {v for v, _, _ in walk.stages}
            free = [v for v in free if v not in used]
        return found

    def _rates(self, walk: Walk, seats: Sequence[Seat]) -> tuple[float, float]:
        reliability, slowest = 1.0, 0.0
        for v, start, end in walk.stages:
            reliability *= seats[v].reliability
            seconds = (end - start) * seats[v].layer_s + (seats[v].head_s if end == self._layers else 0.0)
            slowest = max(slowest, seconds)
        return reliability / walk.cost_s, reliability / slowest
