"""Local search over groupings: swap, move, insert and drop seats, merge and repack groups, while that scores better.

Bounded by a count of evaluations; chance comes from a fixed seed, so the same pool gives the same answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from scheduler.exact import solve_weighted
from scheduler.grouping import Grouping
from scheduler.packing import pack

UNUSED_TRIED_MAX = 24
WINDOW_SEATS_MAX = 7
"""Seats of a few groups that are regrouped exactly at once."""
WINDOWS_SEATS_MAX = 128
"""Beyond so many seats in the pool windows cost more than they bring."""
PAIRS_A_ROUND = 2
"""Pairs of groups tried a round, for each group, where there are too many for all."""
ROUNDS_MAX = 64


def improve(grouping: Grouping, evaluations: int, *, fixed: bool = False) -> None:
    """Improve in place until nothing gains or the evaluations are spent. `fixed` keeps the number of groups."""
    pool = grouping.pool
    end = pool.evaluated + evaluations
    if not grouping.groups:
        return
    rng = random.Random(len(pool.seats))
    for _ in range(ROUNDS_MAX):
        before = grouping.score()
        _use_unused(grouping, rng, end)
        if not fixed:
            _repack(grouping, rng, end)
        _trade(grouping, rng, end, fixed=fixed)
        grouping.settle()
        stuck = grouping.score() <= before * (1 + 1e-6)
        if stuck and not fixed and len(pool.seats) <= WINDOWS_SEATS_MAX:
            _windows(grouping, rng, end)
            stuck = grouping.score() <= before * (1 + 1e-6)
        if pool.evaluated >= end or stuck:
            break


def shake(grouping: Grouping, evaluations: int, *, fixed: bool = False) -> Grouping:
    """Break up some groups at random and improve again, as long as evaluations remain; the best seen."""
    pool = grouping.pool
    end = pool.evaluated + evaluations
    rng = random.Random(len(pool.seats) + 1)
    best = grouping
    for _ in range(ROUNDS_MAX):
        if pool.evaluated >= end or not best.groups or fixed:
            break
        size = min(len(best.groups), rng.choice((2, 2, 3, 4)))
        broken = set(rng.sample(range(len(best.groups)), size))
        seats = [x for k in broken for x in best.groups[k]] + best.unused()
        trial = Grouping(pool, best.prefer)
        for group in [g for k, g in enumerate(best.groups) if k not in broken] + _scattered(best, seats, rng):
            trial.append(group)
        improve(trial, end - pool.evaluated)
        if trial.score() > best.score() * (1 + 1e-9):
            best = trial
    return best


def _use_unused(grouping: Grouping, rng: random.Random, end: int) -> None:
    """Insert an unused seat, drop one, or swap one in."""
    pool = grouping.pool
    k = 0
    while k < len(grouping.groups):
        if pool.evaluated >= end:
            return
        group = grouping.groups[k]
        unused = one_of_each(pool.kinds, grouping.unused())
        if len(unused) > UNUSED_TRIED_MAX:
            unused = rng.sample(unused, UNUSED_TRIED_MAX)
        news: list[tuple[int, ...]] = [(*group, u) for u in unused]
        if len(group) > 1:
            news.extend(without(group, x) for x in group)
        news.extend((*without(group, x), u) for u in unused for x in group if pool.kinds[x] != pool.kinds[u])
        if not any(grouping.swap([k], [new]) for new in news):
            k += 1  # else another group stands at k now: look at it


def _trade(grouping: Grouping, rng: random.Random, end: int, *, fixed: bool) -> None:
    """Swap or move seats between two groups, or merge them."""
    pool = grouping.pool
    for i, j in _pairs(len(grouping.groups), rng):
        if pool.evaluated >= end:
            return
        if j >= len(grouping.groups):
            continue
        for _ in range(8):
            a, b = grouping.groups[i], grouping.groups[j]
            if not any(grouping.swap([i, j], news) for news in _trades(pool.kinds, a, b, fixed=fixed)):
                break
            i, j = len(grouping.groups) - 2, len(grouping.groups) - 1
            if i < 0:
                break


def _trades(
    kinds: Sequence[int], a: tuple[int, ...], b: tuple[int, ...], *, fixed: bool
) -> Iterator[list[tuple[int, ...]]]:
    for x in one_of_each(kinds, a):
        for y in one_of_each(kinds, b):
            if kinds[x] != kinds[y]:
                yield [(*without(a, x), y), (*without(b, y), x)]
    if len(a) > 1:
        for x in one_of_each(kinds, a):
            yield [without(a, x), (*b, x)]
    if len(b) > 1:
        for y in one_of_each(kinds, b):
            yield [(*a, y), without(b, y)]
    if not fixed:
        yield [(*a, *b)]


def _repack(grouping: Grouping, rng: random.Random, end: int) -> None:
    """Pack a few groups and some unused seats anew, in hope of one replica more."""
    pool = grouping.pool
    for _ in range(max(4, min(len(grouping.groups), 64))):
        if pool.evaluated >= end:
            return
        size = min(len(grouping.groups), rng.choice((1, 2, 3)))
        olds = sorted(rng.sample(range(len(grouping.groups)), size))
        unused = grouping.unused()
        some = rng.sample(unused, min(len(unused), UNUSED_TRIED_MAX // 2))
        seats = [x for k in olds for x in grouping.groups[k]] + some
        for kind in range(4):
            news = pack(pool, seats=seats, spread=kind == 1) if kind < 2 else _scattered(grouping, seats, rng)
            if news and grouping.swap(olds, news):
                break


def _windows(grouping: Grouping, rng: random.Random, end: int) -> None:
    """Take a few groups and unused seats and group them anew as well as can be at the present weights."""
    pool = grouping.pool
    for _ in range(4 * len(grouping.groups) + 4):
        if pool.evaluated >= end or not grouping.groups:
            return
        olds: list[int] = []
        room = WINDOW_SEATS_MAX
        for k in rng.sample(range(len(grouping.groups)), min(4, len(grouping.groups))):
            if len(grouping.groups[k]) <= room:
                olds.append(k)
                room -= len(grouping.groups[k])
        unused = grouping.unused()
        seats = [x for k in olds for x in grouping.groups[k]] + rng.sample(unused, min(room, len(unused)))
        if len(seats) < 2:
            continue
        part = pool.part(seats)
        found = solve_weighted(part, 1 / grouping.token_rates, 1 / grouping.full_rates)
        pool.evaluated += part.evaluated
        if found:
            grouping.swap(olds, [tuple(seats[i] for i in group) for group, _ in found])


def _scattered(grouping: Grouping, seats: Sequence[int], rng: random.Random) -> list[tuple[int, ...]]:
    """Groups by chance: seats in a random order, each group closed when it holds the model."""
    order = list(seats)
    rng.shuffle(order)
    groups: list[tuple[int, ...]] = []
    open_group: tuple[int, ...] = ()
    for seat in order:
        open_group = (*open_group, seat)
        if grouping.pool.options(open_group):
            groups.append(open_group)
            open_group = ()
    return groups


def _pairs(groups: int, rng: random.Random) -> list[tuple[int, int]]:
    if groups <= 2 * PAIRS_A_ROUND:
        found = [(i, j) for i in range(groups) for j in range(i + 1, groups)]
    else:
        drawn = {tuple(sorted(rng.sample(range(groups), 2))) for _ in range(PAIRS_A_ROUND * groups)}
        found = [(i, j) for i, j in sorted(drawn)]
    rng.shuffle(found)
    return found


def one_of_each(kinds: Sequence[int], seats: Sequence[int]) -> list[int]:
    """The first seat of each kind."""
    return list({kinds[i]: i for i in reversed(seats)}.values())[::-1]


def without(group: tuple[int, ...], seat: int) -> tuple[int, ...]:
    """The group less one seat."""
    return tuple(i for i in group if i != seat)
