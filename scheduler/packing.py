"""A first grouping of seats into replicas: fill each from the roomiest seat with as few and as near ones as do.

Packing is bin covering with nearness; `search` improves what comes out. Deterministic: ties go by seat number.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from scheduler.pool import Pool

LOOK_AHEAD = 16
"""How many free seats around the wanted size are compared by nearness."""


def pack(pool: Pool, *, replicas_max: int | None = None, spread: bool = False) -> list[tuple[int, ...]]:
    """Disjoint groups that each hold the model. `spread` pairs the roomiest with the smallest that completes it at
    the start of each group instead of the next roomiest, which makes more and longer replicas."""
    free = sorted((pool.seats[i].room, -pool.seats[i].layer_s, i) for i in range(len(pool.seats)))
    free = [entry for entry in free if entry[0] > 0]
    groups: list[tuple[int, ...]] = []
    alone = [i for _, _, i in free if pool.seats[i].room_alone >= pool.layers and pool.options((i,))]
    alone.sort(key=lambda i: (pool.seats[i].layer_s, pool.seats[i].head_s, i))
    for i in alone[:replicas_max]:
        groups.append((i,))
    taken = {i for (i,) in groups}
    free = [entry for entry in free if entry[2] not in taken]
    while free and (replicas_max is None or len(groups) < replicas_max):
        group = _grow(pool, free, spread)
        if group is None:
            break
        groups.append(group)
    return groups


def _grow(pool: Pool, free: list[tuple[int, float, int]], spread: bool) -> tuple[int, ...] | None:
    """Take one group out of `free` (sorted by room), or None when what is left cannot hold the model."""
    group = [free.pop()]
    while True:
        members = [i for _, _, i in group]
        if pool.holds(members) and pool.options(members):
            return tuple(members)
        if not free or len(group) >= pool.layers:
            return _any_subset(pool, group, free)
        need = pool.layers - sum(room for room, _, _ in group)
        done = _complete(pool, members, free, need)
        if done is not None:
            return done
        if spread and len(group) % 2 == 1:
            group.append(free.pop(0))
        else:
            group.append(free.pop(_nearest(pool, members, free, len(free) - LOOK_AHEAD, len(free))))


def _complete(
    pool: Pool, members: list[int], free: list[tuple[int, float, int]], need: int
) -> tuple[int, ...] | None:
    """Finish the group with one seat: the smallest rooms that do, the nearest of them first."""
    low = bisect_left(free, (max(1, need), float("-inf"), -1))
    while low < len(free):
        window = list(range(low, min(len(free), low + LOOK_AHEAD)))
        window.sort(key=lambda k: (_distance(pool, members, free[k][2]), k))
        for k in window:
            candidate = (*members, free[k][2])
            if pool.options(candidate):
                free.pop(k)
                return candidate
        # Rooms that do by their sum may still not do beside embedding and head: try roomier ones, in leaps.
        low = max(window[-1] + 1, low + (len(free) - low) // 2)
    return None


def _nearest(
    pool: Pool, members: Sequence[int], free: list[tuple[int, float, int]], low: int, high: int
) -> int:
    """The entry in free[low:high] with the least distance for its room."""
    return min(
        range(max(0, low), high),
        key=lambda k: ((_distance(pool, members, free[k][2]) + 1e-9) / free[k][0], -k),
    )


def _distance(pool: Pool, members: Sequence[int], seat: int) -> float:
    """Seconds to and from the nearest member; 0 where all hops are equal."""
    if pool.uniform_hop_s is not None:
        return 0.0
    return min(pool.hop_s(m, seat) + pool.hop_s(seat, m) for m in members)


def _any_subset(
    pool: Pool, group: list[tuple[int, float, int]], free: list[tuple[int, float, int]]
) -> tuple[int, ...] | None:
    """Everything that is left was taken and still fails: the best ends may be missing, or it truly does not fit.

    More stages than layers is the one case where fewer seats can do; then the roomiest are kept.
    """
    keep = sorted(group, reverse=True)[: pool.layers]
    members = tuple(i for _, _, i in keep)
    if pool.options(members):
        for entry in group:
            if entry not in keep:
                insort(free, entry)
        return members
    for entry in group:
        insort(free, entry)
    return None
