"""Placement as others publish it, re-implemented to be compared with on our objective: Parallax's two.

Parallax (arXiv 2509.26182): greedy fills pipelines from the largest node with look-ahead; the dynamic program
walks the nodes by size over the residual spans of open pipelines, for the fewest stages in k pipelines, and takes the
k of the greatest k**alpha / (compute + stages / k * round trip). Both cut layers inside a pipeline by arithmetic
speed (water-filling). Nothing outside the simulator uses this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from scheduler.pool import Pool, Replica

STATES_NODES_MAX = 12
"""The program's states grow fast with diverse nodes; beyond so many greedy stands in, as its users would have it."""


def measured(pool: Pool, order: Sequence[int], counts: Sequence[int]) -> Replica | None:
    """The replica of these stages with its figures on our terms; None when it breaks a memory bound."""
    seats = [pool.seats[i] for i in order]
    for k, (seat, count) in enumerate(zip(seats, counts, strict=True)):
        first, last = k == 0, k == len(seats) - 1
        room = seat.room_alone if first and last else seat.room_first if first else seat.room
        if count < 1 or count > (seat.room_last if last and not first else room):
            return None
    stage = [seat.layer_s * n for seat, n in zip(seats, counts, strict=True)]
    stage[-1] += seats[-1].head_s
    ring = zip(order, [*order[1:], order[0]], strict=True)
    single = sum(stage) + (sum(pool.hop_s(a, b) for a, b in ring) if len(order) > 1 else 0.0)
    return Replica(tuple(order), tuple(counts), single, 1 / single, pool.batch / max(stage))


def water_fill(pool: Pool, order: Sequence[int], power: Sequence[float]) -> list[int] | None:
    """Layers in proportion to arithmetic speed, within rooms, rounded to the sum."""
    rooms = [pool.seats[i].room for i in order]
    rooms[0] = pool.seats[order[0]].room_first
    rooms[-1] = pool.seats[order[-1]].room_last
    if len(order) == 1:
        rooms = [pool.seats[order[0]].room_alone]
    if sum(rooms) < pool.layers or min(rooms) < 1:
        return None
    counts = [0.0] * len(order)
    free = set(range(len(order)))
    left = float(pool.layers)
    while free and left > 1e-9:
        total = sum(power[order[k]] for k in free)
        full = {k for k in free if counts[k] + left * power[order[k]] / total >= rooms[k]}
        if not full:
            for k in free:
                counts[k] += left * power[order[k]] / total
            break
        for k in full:
            left -= rooms[k] - counts[k]
            counts[k] = float(rooms[k])
        free -= full
    whole = [max(1, math.floor(c + 1e-9)) for c in counts]
    while sum(whole) != pool.layers:
        step = 1 if sum(whole) < pool.layers else -1
        able = [k for k in range(len(order)) if 1 <= whole[k] + step <= rooms[k]]
        if not able:
            return None
        whole[max(able, key=lambda k: (step * (counts[k] - whole[k]), -k))] += step
    return whole


def _finished(pool: Pool, groups: Sequence[Sequence[int]], power: Sequence[float]) -> list[Replica]:
    replicas = []
    for group in groups:
        counts = water_fill(pool, group, power)
        replica = None if counts is None else measured(pool, group, counts)
        if replica is not None:
            replicas.append(replica)
    return replicas


def parallax_greedy(pool: Pool, power: Sequence[float]) -> list[Replica]:
    """Pipelines one after another from the largest free node; the smallest node that finishes one is taken."""
    free = sorted(
        (i for i in range(len(pool.seats)) if pool.seats[i].room > 0), key=lambda i: (-pool.seats[i].room, i)
    )
    groups: list[list[int]] = []
    while free:
        group: list[int] = []
        left = pool.layers
        while free and left > 0:
            ending = [i for i in free if _room(pool, i, not group, True) >= left]
            pick = ending[-1] if ending else free[0]
            free.remove(pick)
            left -= _room(pool, pick, not group, bool(ending))
            group.append(pick)
        if left <= 0:
            groups.append(group)
    return _finished(pool, groups, power)


def parallax_program(pool: Pool, power: Sequence[float], alpha: float = 2.0) -> list[Replica]:
    """The dynamic program over residual spans, then the best number of pipelines by Z(k)."""
    seats = [i for i in range(len(pool.seats)) if pool.seats[i].room > 0]
    if len(seats) > STATES_NODES_MAX:
        return parallax_greedy(pool, power)
    seats.sort(key=lambda i: (-pool.seats[i].room, i))
    best: tuple[float, list[Replica]] = (-1.0, [])
    compute = sum(pool.seats[i].layer_s for i in seats) / max(1, len(seats)) * pool.layers
    hop = sum(pool.hop_s(a, b) for a in seats for b in seats if a != b) / max(
        1, len(seats) * (len(seats) - 1)
    )
    for k, (stages, groups) in sorted(_fewest_stages(pool, seats).items()):
        score = k**alpha / (compute + stages / k * hop)
        replicas = _finished(pool, groups, power)
        if replicas and score > best[0]:
            best = (score, replicas)
    return best[1]


def _fewest_stages(pool: Pool, seats: Sequence[int]) -> dict[int, tuple[int, list[list[int]]]]:
    """For each number of pipelines, the fewest stages and who forms them."""
    Open = tuple[int, ...]

    @lru_cache(maxsize=200_000)
    def walk(at: int, residuals: Open, done: int) -> dict[int, tuple[int, tuple[tuple[int, int], ...]]]:
        """By pipelines finished in the end: stages from here on, and (seat, residual it joined; 0 for a new one)."""
        if at == len(seats):
            return {} if residuals else {done: (0, ())}
        seat = seats[at]
        found = dict(walk(at + 1, residuals, done))
        for joined in (0, *sorted(set(residuals))):
            left = (joined or pool.layers) - _room(pool, seat, joined == 0, False)
            rest = list(residuals)
            if joined:
                rest.remove(joined)
            if left > 0:
                rest.append(left)
            for k, (stages, way) in walk(at + 1, tuple(sorted(rest)), done + (left <= 0)).items():
                if k not in found or stages + 1 < found[k][0]:
                    found[k] = (stages + 1, ((seat, joined), *way))
        return found

    out = {}
    for k, (stages, way) in walk(0, (), 0).items():
        if k:
            out[k] = (stages, _groups(pool, way))
    return out


def _groups(pool: Pool, way: Sequence[tuple[int, int]]) -> list[list[int]]:
    groups: list[tuple[int, list[int]]] = []
    for seat, joined in way:
        for n, (left, group) in enumerate(groups):
            if joined and left == joined:
                groups[n] = (left - _room(pool, seat, False, False), [*group, seat])
                break
        else:
            groups.append((pool.layers - _room(pool, seat, True, False), [seat]))
    return [group for _, group in groups]


def _room(pool: Pool, i: int, first: bool, last: bool) -> int:
    seat = pool.seats[i]
    if first and last:
        return seat.room_alone if seat.room_alone >= pool.layers else 0
    return seat.room_first if first else seat.room_last if last else seat.room
