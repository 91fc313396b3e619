"""Which seats to group into replicas, for pools of any size: exact when small, else packed and improved.

Everything is deterministic and bounded by a count of evaluations, never by a clock. It knows rates, not seconds to
fetch or plans of yesterday.
"""

from __future__ import annotations

from scheduler.exact import EXACT_GROUPS_MAX, group_count, solve_exactly
from scheduler.grouping import Grouping
from scheduler.improve import improve, shake, without
from scheduler.packing import ends_of_last_resort, pack
from scheduler.pipeline import cuts
from scheduler.pool import Pool, Prefer, Replica

SEVERAL_STARTS_MAX = 200
"""Up to so many seats each start is improved; beyond, only the better one."""


THRIFT_LOSS_MAX = 0.0125
THRIFT_GAIN_LEAST = 0.2
THRIFT_SEATS_MAX = 64


def group_seats(pool: Pool, prefer: Prefer, *, replicas_max: int | None = None) -> Grouping:
    """The grouping to use.

    With `replicas_max` (copies wanted) as many replicas as fit come first, up to that number, then the objective.
    """
    found = _group(pool, prefer, replicas_max)
    if prefer == "balanced" and len(pool.seats) <= THRIFT_SEATS_MAX:
        _spare(found)
    return found


def _spare(grouping: Grouping) -> None:
    """Leave out a seat that slows its replica much for almost nothing.

    Where the balanced objective is nearly flat, a stage can cost its replica a fifth of its speed and add a
    hundredth to the whole; the users of that replica, and whoever needs a spare node after a failure, are better
    off without it. All such steps together give up THRIFT_LOSS_MAX of the objective at most.
    """
    least = grouping.score() * (1 - THRIFT_LOSS_MAX)
    while True:
        best: tuple[float, int, tuple[int, ...]] | None = None
        for k, (group, option) in enumerate(zip(grouping.groups, grouping.options, strict=True)):
            s, p = grouping.token_rates - option.token_rate, grouping.full_rates - option.full_rate
            for seat in group if len(group) > 2 else ():
                rest = without(group, seat)
                new = grouping.best(rest, s, p)
                if new is None or new.single_s > option.single_s * (1 - THRIFT_GAIN_LEAST):
                    continue
                score = grouping.score(s + new.token_rate, p + new.full_rate)
                if score >= least and (best is None or score > best[0]):
                    best = (score, k, rest)
        if best is None:
            return
        grouping.replace(best[1], best[2])


def _group(pool: Pool, prefer: Prefer, replicas_max: int | None) -> Grouping:
    """Exact where the pool is small, else packed and improved."""
    found = Grouping(pool, prefer)
    if group_count(pool) <= EXACT_GROUPS_MAX:
        for group, option in solve_exactly(pool, prefer, replicas_max):
            found.add(group, option)
        return found
    quick = pool.quick()
    best = Grouping(quick, prefer)
    budget = evaluations_for(len(pool.seats))
    spent = 0
    for spread in (False, True):
        start = Grouping(quick, prefer)
        for group in pack(quick, replicas_max=replicas_max, spread=spread):
            start.append(group)
        start.settle()
        packed = quick.evaluated
        if len(pool.seats) <= SEVERAL_STARTS_MAX:
            improve(start, budget * 2 // 5, fixed=replicas_max is not None)
        spent += quick.evaluated - packed
        if _ahead(start, best, counted=replicas_max is not None):
            best = start
    left = budget - spent
    if len(pool.seats) > SEVERAL_STARTS_MAX:
        improve(best, left, fixed=replicas_max is not None)
    else:
        best = shake(best, left, fixed=replicas_max is not None)
    for group in best.groups:
        found.append(group)
    found.settle()
    return found


def evaluations_for(seats: int) -> int:
    """How many groups to look at: bounded work by the size of the pool, so that plans never depend on a clock."""
    return 4200 + 12 * seats


def _ahead(a: Grouping, b: Grouping, *, counted: bool) -> bool:
    if counted and len(a.groups) != len(b.groups):
        return len(a.groups) > len(b.groups)
    return a.score() > b.score()


def best_effort_group(pool: Pool) -> list[Replica]:
    """One replica, if any order of any seats holds the model, however slow; for pools where packing finds none."""
    order = ends_of_last_resort(pool.seats, pool.layers)
    found = cuts([pool.seats[i] for i in order], pool.layers) if order else []
    if not found:
        return []
    cut = found[-1]
    ring = zip(order, [*order[1:], order[0]], strict=True)
    single = cut.sum_s + (sum(pool.hop_s(a, b) for a, b in ring) if len(order) > 1 else 0.0)
    return [Replica(tuple(order), cut.counts, single, 1 / single, pool.batch / cut.max_s)]
