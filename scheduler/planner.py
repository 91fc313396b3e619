"""Who plans, and which plan holds: rank by rendezvous hash, succession, fencing by epoch.

Every member computes the same rank from the same names, so the first live one plans without an election, and the
next takes over when it vanishes. Plans are ordered by epoch and, within one, by their planner's rank, so any two
members that see the same plans hold to the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from scheduler.shapes import Plan


def planner_rank(model_id: str, members: Iterable[str]) -> list[str]:
    """Members from first planner to last, by rendezvous hash (highest random weight; Thaler and Ravishankar).

    A member that leaves changes nobody else's order; models spread their planners over the mesh.
    """

    def weight(member: str) -> bytes:
        return hashlib.blake2b(f"{model_id}\0{member}".encode(), digest_size=16).digest()

    return sorted(set(members), key=lambda member: (weight(member), member), reverse=True)


def adopt(current: Plan | None, offered: Plan, members: Collection[str]) -> bool:
    """Whether to replace `current` by `offered`.

    Never an older epoch, never a plan of a planner that is no member. Of two plans of one epoch only that of the
    better-ranked planner stands: adopting is a step up a total order, so no member ever goes back.
    """
    if offered.planner not in members:
        return False
    if current is None or offered.epoch > current.epoch:
        return True
    if offered.epoch < current.epoch or offered.planner == current.planner:
        return False
    rank = planner_rank(offered.model, {offered.planner, current.planner})
    return rank[0] == offered.planner
