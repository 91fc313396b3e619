"""The best grouping of a small pool, by trying every group and every way to put groups together.

Seats with equal figures count once, so five of one kind and two of another are eighteen groups, not 128. The
objective couples the two sums of rates; it is met by weighing one rate against the other over a grid of weights,
each solved exactly, then refining around the best. It knows nothing of the heuristics for larger pools.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.pool import Option, Pool, Prefer, objective

EXACT_GROUPS_MAX = 256
WEIGHTS = tuple(i / 16 for i in range(17))
REFINEMENTS_MAX = 6

Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Split:
    """A state taken apart: the group taken, and the state left."""

    group: int
    rest: int


def group_count(pool: Pool) -> int:
    """How many different groups the pool's seats can form, the empty one included."""
    return math.prod(pool.kinds.count(kind) + 1 for kind in set(pool.kinds))


def solve_exactly(
    pool: Pool, prefer: Prefer, replicas_max: int | None = None
) -> list[tuple[tuple[int, ...], Option]]:
    """Groups of seats with their options that maximise the objective; empty when nothing holds the model."""
    table = _Table(pool)
    if not table.feasible:
        return []
    tops = [
        max(getattr(o, rate) for g in table.feasible for o in table.options[g])
        for rate in ("token_rate", "full_rate")
    ]
    best: tuple[float, list[tuple[int, Option]]] = (-1.0, [])
    weights = {"balanced": WEIGHTS, "latency": (1 - 1e-7,), "throughput": (1e-7,)}[prefer]
    queue = [(w / tops[0], (1 - w) / tops[1]) for w in weights]
    seen: set[tuple[tuple[int, Option], ...]] = set()
    for step in range(len(queue) + REFINEMENTS_MAX):
        if step >= len(queue):
            s, p = _sums(best[1])
            queue.append((1 / s, 1 / p))
        found = table.solve(*queue[step], replicas_max)
        if tuple(found) in seen and step >= len(weights):
            break
        seen.add(tuple(found))
        for candidate in (found, _retuned(table, found, prefer)):
            score = objective(*_sums(candidate), prefer)
            if score > best[0] * (1 + 1e-12):
                best = (score, candidate)
    return table.seated(best[1])


def _sums(found: Sequence[tuple[int, Option]]) -> tuple[float, float]:
    return sum(o.token_rate for _, o in found), sum(o.full_rate for _, o in found)


def _retuned(table: _Table, found: list[tuple[int, Option]], prefer: Prefer) -> list[tuple[int, Option]]:
    """The same groups, each option chosen again beside the others until none changes."""
    found = list(found)
    for _ in range(4):
        before = list(found)
        for k, (group, option) in enumerate(found):
            s, p = _sums(found)
            s, p = s - option.token_rate, p - option.full_rate
            found[k] = (
                group,
                max(
                    table.options[group],
                    key=lambda o: objective(s + o.token_rate, p + o.full_rate, prefer),
                ),
            )
        if found == before:
            break
    return found


class _Table:
    """Every multiset of kinds, numbered so that parts come before wholes, with options and ways to split."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.kinds = sorted(set(pool.kinds))
        self.members = {kind: [i for i, k in enumerate(pool.kinds) if k == kind] for kind in self.kinds}
        self.states: list[Counts] = list(
            itertools.product(*(range(len(self.members[kind]) + 1) for kind in self.kinds))
        )
        self.number = {state: k for k, state in enumerate(self.states)}
        self.options = [pool.options(self._seats(state)) for state in self.states]
        self.feasible = [k for k, options in enumerate(self.options) if options]
        self.splits = [self._splits(state) for state in self.states]

    def _seats(self, state: Counts) -> tuple[int, ...]:
        return tuple(i for kind, n in zip(self.kinds, state, strict=True) for i in self.members[kind][:n])

    def _splits(self, state: Counts) -> list[_Split]:
        """Feasible groups within `state` that use its first kind, and what they leave."""
        lead = next((k for k, n in enumerate(state) if n), None)
        if lead is None:
            return []
        found = []
        for group in self.feasible:
            taken = self.states[group]
            if taken[lead] and all(t <= n for t, n in zip(taken, state, strict=True)):
                rest = tuple(n - t for n, t in zip(state, taken, strict=True))
                found.append(_Split(group, self.number[rest]))
        return found

    def solve(self, token_weight: float, full_weight: float, most: int | None) -> list[tuple[int, Option]]:
        """The groups of greatest weighted rate, at most `most` of them."""
        values: list[tuple[float, Option] | None] = [None] * len(self.states)
        for g in self.feasible:
            pick = max(self.options[g], key=lambda o: token_weight * o.token_rate + full_weight * o.full_rate)
            values[g] = (token_weight * pick.token_rate + full_weight * pick.full_rate, pick)
        rounds = 1 if most is None else most
        layers: list[list[tuple[float, _Split | None]]] = [[(0.0, None)] * len(self.states)]
        for _ in range(rounds):
            layers.append(self._round(values, layers[-1], unlimited=most is None))
        return self._trace(values, layers, unlimited=most is None)

    def _round(
        self,
        values: Sequence[tuple[float, Option] | None],
        below: Sequence[tuple[float, _Split | None]],
        *,
        unlimited: bool,
    ) -> list[tuple[float, _Split | None]]:
        best: list[tuple[float, _Split | None]] = []
        for k, state in enumerate(self.states):
            lead = next((i for i, n in enumerate(state) if n), None)
            if lead is None:
                best.append((0.0, None))
                continue
            smaller = self.number[tuple(n - (i == lead) for i, n in enumerate(state))]
            top: tuple[float, _Split | None] = (best[smaller][0], _Split(-1, smaller))
            rests = best if unlimited else below
            for split in self.splits[k]:
                value = values[split.group]
                if value is not None and value[0] + rests[split.rest][0] > top[0] * (1 + 1e-13):
                    top = (value[0] + rests[split.rest][0], split)
            best.append(top)
        return best

    def _trace(
        self,
        values: Sequence[tuple[float, Option] | None],
        layers: Sequence[Sequence[tuple[float, _Split | None]]],
        *,
        unlimited: bool,
    ) -> list[tuple[int, Option]]:
        found: list[tuple[int, Option]] = []
        depth, state = len(layers) - 1, len(self.states) - 1
        while depth > 0:
            split = layers[depth][state][1]
            if split is None:
                break
            state = split.rest
            value = values[split.group] if split.group >= 0 else None
            if value is not None:
                found.append((split.group, value[1]))
                depth -= 0 if unlimited else 1
        return found

    def seated(self, found: Sequence[tuple[int, Option]]) -> list[tuple[tuple[int, ...], Option]]:
        """The groups as seats, each seat once."""
        left = {kind: list(members) for kind, members in self.members.items()}
        out = []
        for group, option in found:
            seats = [
                left[kind].pop(0)
                for kind, n in zip(self.kinds, self.states[group], strict=True)
                for _ in range(n)
            ]
            out.append((tuple(seats), option))
        return out
