"""The seats of one planning problem, the hops between them, and what any group of them can do as one replica.

`Pool.options` turns a group of seats into its Pareto front of replicas (rate of tokens for one request against
rate with the pipeline full), choosing the order of the stages and the cut. Groups that are alike share the work.
It does not decide which groups to form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scheduler.pipeline import Cut, Seat, cuts, quick_cuts

Prefer = Literal["balanced", "latency", "throughput"]
EXACT_STAGES_MAX = 8
"""Up to so many stages a thorough pool tries every choice of first and last; beyond, a few likely ones."""
TOUR_STAGES_MAX = 6
"""Up to so many stages the shortest ring is found by trying all (one fewer in search)."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A pipeline over every layer: seats in order, layers by seat, 1/seconds a token, tokens a second when full."""

    seats: tuple[int, ...]
    counts: tuple[int, ...]
    single_s: float
    token_rate: float
    full_rate: float


@dataclass(frozen=True, slots=True)
class Option:
    """What a group can do: one point of its front. `order` are positions in the group's canonical order."""

    order: tuple[int, ...]
    cut: Cut
    single_s: float
    token_rate: float
    full_rate: float


def objective(token_rates: float, full_rates: float, prefer: Prefer) -> float:
    """sqrt(S * P), or S, or P: S the sum of 1/latency over replicas, P the sum of full throughputs."""
    if prefer == "latency":
        return token_rates
    if prefer == "throughput":
        return full_rates
    return math.sqrt(token_rates * full_rates)


class Pool:
    """Seats, layers, and seconds by hop from one seat to another.

    `hop_s` is one figure for every pair, or a function of two seat numbers. `batch` is the tokens that a step of the
    pipeline yields. A pool that is not `thorough` looks at likely orders and a few cuts only, for search.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        layers: int,
        hop_s: float | Callable[[int, int], float],
        *,
        batch: int = 1,
        thorough: bool = True,
    ) -> None:
        self.seats = tuple(seats)
        self.layers = layers
        self.batch = batch
        self.thorough = thorough
        self.uniform_hop_s = hop_s if isinstance(hop_s, (int, float)) else None
        self._hop_s = hop_s if callable(hop_s) else None
        self.kinds = self._kinds()
        self._options: dict[tuple[int, ...], tuple[Option, ...]] = {}
        self.evaluated = 0

    def quick(self) -> Pool:
        """The same pool for search: likely orders and few cuts."""
        hop_s = self._hop_s if self._hop_s is not None else self.uniform_hop_s or 0.0
        return Pool(self.seats, self.layers, hop_s, batch=self.batch, thorough=False)

    def part(self, seats: Sequence[int]) -> Pool:
        """A pool of some of the seats, numbered anew in this order."""
        hop_s = self._hop_s
        between = self.uniform_hop_s or 0.0 if hop_s is None else lambda a, b: hop_s(seats[a], seats[b])
        picked = [self.seats[i] for i in seats]
        return Pool(picked, self.layers, between, batch=self.batch, thorough=self.thorough)

    def _kinds(self) -> tuple[int, ...]:
        if self.uniform_hop_s is None:
            return tuple(range(len(self.seats)))
        known: dict[tuple[float, ...], int] = {}
        return tuple(known.setdefault(seat.figures, len(known)) for seat in self.seats)

    def hop_s(self, a: int, b: int) -> float:
        """Seconds from seat `a` to seat `b`."""
        if self._hop_s is not None:
            return self._hop_s(a, b)
        return self.uniform_hop_s or 0.0

    def canonical(self, group: Sequence[int]) -> tuple[int, ...]:
        """The group in the order that `Option.order` refers to."""
        return tuple(sorted(group, key=lambda i: (self.kinds[i], i)))

    def options(self, group: Sequence[int]) -> tuple[Option, ...]:
        """Every undominated replica that uses exactly these seats; empty when they cannot hold the model."""
        members = self.canonical(group)
        key = tuple(self.kinds[i] for i in members)
        found = self._options.get(key)
        if found is None:
            found = self._options[key] = self._explore(members)
        return found

    def replica(self, group: Sequence[int], option: Option) -> Replica:
        """The replica that an option of this group stands for."""
        members = self.canonical(group)
        seats = tuple(members[i] for i in option.order)
        return Replica(seats, option.cut.counts, option.single_s, option.token_rate, option.full_rate)

    def holds(self, group: Sequence[int]) -> bool:
        """Whether the rooms of the group may add up to the model; cheap, and never wrong when it says no."""
        if len(group) == 1:
            return self.seats[group[0]].room_alone >= self.layers
        return len(group) <= self.layers and sum(self.seats[i].room for i in group) >= self.layers

    def _explore(self, members: tuple[int, ...]) -> tuple[Option, ...]:
        if not members or not self.holds(members):
            return ()
        self.evaluated += 1
        reliability = math.prod(self.seats[i].reliability for i in members)
        found: list[Option] = []
        cut_up = cuts if self.thorough else quick_cuts
        for orders in (self._orders(members), self._plain_orders(members)):
            for order, hops in orders:
                seats = [self.seats[members[i]] for i in order]
                for cut in cut_up(seats, self.layers):
                    single = cut.sum_s + hops
                    found.append(
                        Option(order, cut, single, reliability / single, reliability * self.batch / cut.max_s)
                    )
            if found:
                break
        return _undominated(found)

    def _plain_orders(self, members: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
        """The likely ends without regard to distance: where the short rings put embedding or head on a seat too
        small for it, one of these still holds the model if any order does."""
        if self.uniform_hop_s is not None or len(members) < 3:
            return []
        orders = [_between(first, last, len(members)) for first, last in self._ends(members)]
        return [(o, sum(self.hop_s(members[a], members[b]) for a, b in _around(o))) for o in orders]

    def _orders(self, members: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
        """Orders of stages worth trying, as positions in `members`, with the seconds of their hops."""
        size = len(members)
        if size == 1:
            return [((0,), 0.0)]
        if self.uniform_hop_s is not None:
            hops = size * self.uniform_hop_s
            return [(_between(first, last, size), hops) for first, last in self._ends(members)]
        if self.thorough and size <= EXACT_STAGES_MAX:
            return self._best_paths(members)
        ring = self._ring(members)
        seconds = sum(self.hop_s(members[a], members[b]) for a, b in _around(ring))
        wanted = self._ends(members)
        turns = [ring[i:] + ring[:i] for i in range(size)]
        if size > 3:
            firsts, lasts = {first for first, _ in wanted}, {last for _, last in wanted}
            turns.sort(key=lambda turn: ((turn[0] not in firsts) + (turn[-1] not in lasts), turn))
            turns = turns[:3]
        return [(turn, seconds) for turn in turns]

    def _ends(self, members: tuple[int, ...]) -> list[tuple[int, int]]:
        """Pairs (first, last) worth trying: one of each kind when few, else those that lose least."""
        size = len(members)
        kinds = [self.kinds[i] for i in members]
        distinct = [i for i in range(size) if i == kinds.index(kinds[i])] if size <= 64 else list(range(size))
        if size <= (EXACT_STAGES_MAX if self.thorough else 2):
            firsts = lasts = distinct
        else:
            seat = [self.seats[i] for i in members]
            can_begin = [i for i in distinct if seat[i].room_first > 0]
            can_end = [i for i in distinct if seat[i].room_last > 0]
            by_loss = sorted(
                can_begin, key=lambda i: (seat[i].room - seat[i].room_first, -seat[i].layer_s, i)
            )
            by_head = sorted(can_end, key=lambda i: (seat[i].room - seat[i].room_last, seat[i].head_s, i))
            by_speed = sorted(can_end, key=lambda i: (seat[i].head_s, -seat[i].room_last, i))
            # Two of each, so that some pair is of different seats; the speed of the head matters only in the end.
            firsts, lasts = by_loss[:2], list(dict.fromkeys([*by_head[:2], *by_speed[: self.thorough]]))
        pairs: dict[tuple[int, int], tuple[int, int]] = {}
        for first, last in itertools.product(firsts, lasts):
            partner = last
            if first == last:
                twin = next((j for j in range(size) if j != first and kinds[j] == kinds[first]), None)
                if twin is None:
                    continue
                partner = twin
            pairs.setdefault((kinds[first], kinds[partner]), (first, partner))
        return list(pairs.values())

    def _ring(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """A short closed tour: exact when small, else nearest neighbour and or-opt moves."""
        size = len(members)
        cost = [[self.hop_s(a, b) if a != b else 0.0 for b in members] for a in members]

        def length(ring: tuple[int, ...]) -> float:
            return sum(cost[a][b] for a, b in _around(ring))

        if size <= TOUR_STAGES_MAX - (not self.thorough):
            tours = ((0, *rest) for rest in itertools.permutations(range(1, size)))
            return min(tours, key=lambda ring: (length(ring), ring))
        ring = [0]
        free = set(range(1, size))
        while free:
            here = ring[-1]
            nearest = min(free, key=lambda j: (cost[here][j], j))
            ring.append(nearest)
            free.discard(nearest)
        return _or_opt(ring, cost)

    def _best_paths(self, members: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
        """For each (first, last) the shortest way through all members and back (Held and Karp)."""
        size = len(members)
        cost = [[self.hop_s(a, b) if a != b else 0.0 for b in members] for a in members]
        found: list[tuple[tuple[int, ...], float]] = []
        for first in range(size):
            reach: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {
                (1 << first, first): (0.0, (first,))
            }
            for _ in range(size - 1):
                grown: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
                for (mask, last), (seconds, path) in reach.items():
                    for nxt in range(size):
                        if mask >> nxt & 1:
                            continue
                        state = (mask | 1 << nxt, nxt)
                        offer = (seconds + cost[last][nxt], (*path, nxt))
                        if state not in grown or offer < grown[state]:
                            grown[state] = offer
                reach = grown
            found.extend((path, seconds + cost[path[-1]][first]) for seconds, path in reach.values())
        return found


def _between(first: int, last: int, size: int) -> tuple[int, ...]:
    return (first, *(i for i in range(size) if i not in (first, last)), last)


def _around(ring: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(ring, [*ring[1:], ring[0]], strict=True))


def _or_opt(ring: list[int], cost: list[list[float]]) -> tuple[int, ...]:
    """Move single stages to where they lengthen the ring least, until none gains (bounded by its size)."""
    size = len(ring)
    for _ in range(size):
        best = (-1e-12, 0, 0)
        for i in range(size):
            a, x, b = ring[i - 1], ring[i], ring[(i + 1) % size]
            freed = cost[a][x] + cost[x][b] - cost[a][b]
            for j in range(size):
                c, d = ring[j], ring[(j + 1) % size]
                if x in (c, d):
                    continue
                change = cost[c][x] + cost[x][d] - cost[c][d] - freed
                if change < best[0]:
                    best = (change, i, j)
        if best[0] >= -1e-12:
            break
        x, after = ring[best[1]], ring[best[2]]
        ring.remove(x)
        ring.insert(ring.index(after) + 1, x)
    return tuple(ring)


def _undominated(found: list[Option]) -> tuple[Option, ...]:
    """Options by falling token rate, each with a higher full rate than all before it."""
    found.sort(key=lambda o: (-o.token_rate, -o.full_rate, o.order, o.cut.counts))
    kept: list[Option] = []
    for option in found:
        if not kept or option.full_rate > kept[-1].full_rate * (1 + 1e-12):
            kept.append(option)
    return tuple(kept)
