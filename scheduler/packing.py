"""A first grouping of seats into replicas: fill each from the roomiest seat with as few and as near ones as do.

Packing is bin covering with nearness; `search` improves what comes out. Deterministic: ties go by seat number.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from scheduler.pipeline import Seat
from scheduler.pool import Pool

LOOK_AHEAD = 16
"""How many free seats around the wanted size are compared by nearness."""


def pack(
    pool: Pool, *, seats: Sequence[int] | None = None, replicas_max: int | None = None, spread: bool = False
) -> list[tuple[int, ...]]:
    """Disjoint groups of `seats` (all, when not given) that each hold the model.

    `spread` pairs the roomiest with the smallest at the start of each group instead of the next roomiest, which
    makes more and longer replicas.
    """
    free = sorted(
        (pool.seats[i].room, -pool.seats[i].layer_s, i)
        for i in (range(len(pool.seats)) if seats is None else seats)
    )
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


def ends_of_last_resort(seats: Sequence[Seat], layers: int) -> list[int]:
    """Seat numbers in an order that holds the model if any order of any of the seats does; empty if none does.

    First and last are those that lose least by embedding and head; where there are more seats than layers the
    roomiest stay, each with one layer at least.
    """
    alone = [i for i, seat in enumerate(seats) if seat.room_alone >= layers]
    if alone:
        return alone[:1]
    first = sorted(
        (i for i, s in enumerate(seats) if s.room_first > 0), key=lambda i: (_loss_first(seats[i]), i)
    )
    last = sorted(
        (i for i, s in enumerate(seats) if s.room_last > 0), key=lambda i: (_loss_last(seats[i]), i)
    )
    pairs = [(f, g) for f in first[:2] for g in last[:2] if f != g]
    for f, g in sorted(pairs, key=lambda p: (_loss_first(seats[p[0]]) + _loss_last(seats[p[1]]), p)):
        inner = [i for i, s in enumerate(seats) if s.room > 0 and i not in (f, g)]
        inner.sort(key=lambda i: (-seats[i].room, i))
        order = [f, *inner[: max(0, layers - 2)], g]
        if len(order) <= layers and _held(seats, order) >= layers:
            return order
    return []


def _loss_first(seat: Seat) -> int:
    return seat.room - seat.room_first


def _loss_last(seat: Seat) -> int:
    return seat.room - seat.room_last


def _held(seats: Sequence[Seat], order: Sequence[int]) -> int:
    inner = sum(seats[i].room for i in order[1:-1])
    return seats[order[0]].room_first + inner + seats[order[-1]].room_last
