"""The best grouping of a small pool, by trying every group and every way to put groups together.

Seats with equal figures count once, so five of one kind and two of another are eighteen groups, not 128. The
objective couples the two sums of rates. Weighing one against the other, over a grid of weights, gives good plans and
upper bounds; a walk over all sums that are neither dominated nor out of bounds then finds the best plan there is. It
knows nothing of the heuristics for larger pools.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.pool import Option, Pool, Prefer, objective

EXACT_GROUPS_MAX = 256
WEIGHTS = tuple(i / 16 for i in range(17))
REPLICA_BONUS = 1e6
WALK_STEPS_MAX = 400_000
"""Bounds the walk on pools with very many plans of nearly one score; what is found by then stands."""

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
    """Groups of seats with their options that maximise the objective; empty when nothing holds the model.

    With `replicas_max`, the most replicas that fit come first, up to that number, then the objective.
    """
    table = _Table(pool)
    if not table.feasible:
        return []
    tops = [
        max(getattr(o, rate) for g in table.feasible for o in table.options[g])
        for rate in ("token_rate", "full_rate")
    ]
    weights = {"balanced": WEIGHTS, "latency": (1 - 1e-7,), "throughput": (1e-7,)}[prefer]
    scaled = [(w / tops[0], (1 - w) / tops[1]) for w in weights]
    best: tuple[float, list[tuple[int, Option]]] = (-1.0, [])
    bounds: list[_Bound] = []
    for token_weight, full_weight in scaled:
        found, values = table.solve(token_weight, full_weight, replicas_max)
        bounds.append(_Bound(token_weight, full_weight, values))
        for candidate in (found, _retuned(table, found, prefer)):
            score = objective(*_sums(candidate), prefer)
            if (len(candidate), score) > (len(best[1]), best[0]) if replicas_max else score > best[0]:
                best = (score, candidate)
    if prefer == "balanced" and replicas_max is None:
        best = table.walk(best, [b for b in bounds if b.token_weight > 0 and b.full_weight > 0])
    return table.seated(best[1])


def solve_weighted(
    pool: Pool, token_weight: float, full_weight: float
) -> list[tuple[tuple[int, ...], Option]]:
    """Groups that maximise the weighted sum of their rates; for a part of a larger pool."""
    table = _Table(pool)
    return table.seated(table.solve(token_weight, full_weight, None)[0]) if table.feasible else []


@dataclass(frozen=True, slots=True)
class _Bound:
    """By state, the most that `token_weight` * S + `full_weight` * P can still gain."""

    token_weight: float
    full_weight: float
    values: Sequence[float]

    def ceiling(self, s: float, p: float, state: int) -> float:
        """No plan with sums (s, p) and the seats of `state` left scores more: AM >= GM on the weighted sums."""
        total = self.token_weight * s + self.full_weight * p + self.values[state]
        return total / (2 * math.sqrt(self.token_weight * self.full_weight))


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


_Path = tuple[int, Option, Any] | None
_Label = tuple[float, float, _Path]


def _path(path: _Path) -> list[tuple[int, Option]]:
    found = []
    while path is not None:
        found.append((path[0], path[1]))
        path = path[2]
    return found


def _undominated(labels: list[_Label]) -> list[_Label]:
    kept: list[_Label] = []
    for label in sorted(labels, key=lambda x: (-x[0], -x[1])):
        if not kept or label[1] > kept[-1][1]:
            kept.append(label)
    return kept


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
        self.smaller = [self._smaller(state) for state in self.states]

    def _seats(self, state: Counts) -> tuple[int, ...]:
        return tuple(i for kind, n in zip(self.kinds, state, strict=True) for i in self.members[kind][:n])

    def _smaller(self, state: Counts) -> int:
        """The state less one seat of its first kind; -1 for the empty one."""
        lead = next((i for i, n in enumerate(state) if n), None)
        return -1 if lead is None else self.number[tuple(n - (i == lead) for i, n in enumerate(state))]

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

    def solve(
        self, token_weight: float, full_weight: float, most: int | None
    ) -> tuple[list[tuple[int, Option]], list[float]]:
        """The groups of greatest weighted rate (with `most`: as many as fit, at most `most`), and the rate by state."""
        values: list[tuple[float, Option] | None] = [None] * len(self.states)
        for g in self.feasible:
            pick = max(self.options[g], key=lambda o: token_weight * o.token_rate + full_weight * o.full_rate)
            value = token_weight * pick.token_rate + full_weight * pick.full_rate
            values[g] = (value if most is None else value + REPLICA_BONUS, pick)
        rounds = 1 if most is None else most
        layers: list[list[tuple[float, _Split | None]]] = [[(0.0, None)] * len(self.states)]
        for _ in range(rounds):
            layers.append(self._round(values, layers[-1], unlimited=most is None))
        return self._trace(values, layers, unlimited=most is None), [value for value, _ in layers[-1]]

    def _round(
        self,
        values: Sequence[tuple[float, Option] | None],
        below: Sequence[tuple[float, _Split | None]],
        *,
        unlimited: bool,
    ) -> list[tuple[float, _Split | None]]:
        best: list[tuple[float, _Split | None]] = []
        for k in range(len(self.states)):
            smaller = self.smaller[k]
            if smaller < 0:
                best.append((0.0, None))
                continue
            top: tuple[float, _Split | None] = (best[smaller][0], _Split(-1, smaller))
            rests = best if unlimited else below
            for split in self.splits[k]:
                value = values[split.group]
                if value is not None and value[0] + rests[split.rest][0] > top[0] * (1 + 1e-13):
                    top = (value[0] + rests[split.rest][0], split)
            best.append(top)
        return best

    def walk(
        self, best: tuple[float, list[tuple[int, Option]]], bounds: Sequence[_Bound]
    ) -> tuple[float, list[tuple[int, Option]]]:
        """Improve `best` to the optimum: from all seats down, every undominated pair of sums that may still beat it."""
        labels: list[list[_Label]] = [[] for _ in self.states]
        labels[-1] = [(0.0, 0.0, None)]
        steps = 0
        for k in range(len(self.states) - 1, -1, -1):
            here = _undominated(labels[k])
            labels[k] = []
            for s, p, path in here:
                if s * p > (best[0] * (1 + 1e-12)) ** 2:
                    best = (math.sqrt(s * p), _path(path))
                steps += len(self.splits[k])
                if steps > WALK_STEPS_MAX or any(b.ceiling(s, p, k) <= best[0] * (1 + 1e-12) for b in bounds):
                    continue
                if self.smaller[k] >= 0:
                    labels[self.smaller[k]].append((s, p, path))
                for split in self.splits[k]:
                    for option in self.options[split.group]:
                        sums = s + option.token_rate, p + option.full_rate
                        if all(b.ceiling(*sums, split.rest) > best[0] for b in bounds):
                            labels[split.rest].append((*sums, (split.group, option, path)))
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
