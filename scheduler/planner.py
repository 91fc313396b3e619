"""Who plans, and which plan holds: rank by rendezvous hash, succession, fencing by epoch.

Every member computes the same rank from the same names, so the first live one plans without an election, and the
next takes over when it vanishes. One member plans all models, because they share the same memory. Plans of a model are
ordered by epoch: no member goes back to an older one or takes a second of the same one; where two were made of one
epoch, the first in rank makes a newer one that all can take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from scheduler.shapes import Plan

MESH = "mesh"
"""What members rank themselves for when they plan all models together."""


def planner_rank(subject: str, members: Iterable[str]) -> list[str]:
    """Members from first planner to last, by rendezvous hash (highest random weight; Thaler and Ravishankar).

    A member that leaves changes nobody else's order; different subjects have different orders.
    """

    def weight(member: str) -> bytes:
        return hashlib.blake2b(f"{subject}\0{member}".encode(), digest_size=16).digest()

    return sorted(set(members), key=lambda member: (weight(member), member), reverse=True)


def adopt(current: Plan | None, offered: Plan, members: Collection[str]) -> bool:
    """Whether to replace `current` by `offered`: never by one of an older epoch or a second one of the same epoch,
    never by a plan of a planner that is no member."""
    return offered.planner in members and (current is None or offered.epoch > current.epoch)
