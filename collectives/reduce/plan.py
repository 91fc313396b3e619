"""Who adds up which chunk: a pure function of a declaration, the same for everybody who computes it.

Members of one LAN (`group`) form a unit; everybody else is a unit alone. A chunk has a root, which makes the mean, and
in each unit a head, which adds up the unit's members first and hands the result back to them: only one copy crosses
between LANs. With units of one this is the flat butterfly. Shares follow bandwidth by water-filling; who gets which
chunk is weighted rendezvous hashing within those shares, so that when a member disappears nearly all chunks of the
others stay where they are, whoever computes the new plan and whichever plans it has missed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import numpy as np
import numpy.typing as npt

from collectives.agreement import Declaration, Member
from collectives.reduce.errors import PlanError

WEIGHT_MIN, WEIGHT_MAX = 1e-30, 1e30  # float32 has room for it and for sums of it


@dataclass(frozen=True)
class ReducePlan:
    """Members are numbered in the declaration's order. `units`: their numbers, by unit; a unit's place is that of its
    first member. `roots` [chunks] and `heads` [chunks] of units with several members: numbers of members."""

    key: bytes
    members: tuple[Member, ...]
    elements: int
    chunk_elements: int
    units: tuple[tuple[int, ...], ...]
    roots: npt.NDArray[np.int32]
    heads: dict[int, npt.NDArray[np.int32]]

    @property
    def chunks(self) -> int:
        return len(self.roots)

    @cached_property
    def number(self) -> dict[str, int]:
        """Number of each member by peer."""
        return {member.peer: index for index, member in enumerate(self.members)}

    @cached_property
    def unit_of(self) -> tuple[int, ...]:
        """Unit of each member."""
        units = [0] * len(self.members)
        for unit, numbers in enumerate(self.units):
            for number in numbers:
                units[number] = unit
        return tuple(units)

    @cached_property
    def flat(self) -> bool:
        """No unit has several members."""
        return not self.heads

    def root(self, chunk: int) -> int:
        """Who makes the mean of `chunk`."""
        return int(self.roots[chunk])

    def head(self, unit: int, chunk: int) -> int:
        """Who adds up `chunk` for `unit`, and hands the mean to its members."""
        heads = self.heads.get(unit)
        return self.units[unit][0] if heads is None else int(heads[chunk])

    def leaf_to(self, number: int, chunk: int) -> int:
        """To whom a member gives its own values: itself, the head of its unit, or the root."""
        root = int(self.roots[chunk])
        unit = self.unit_of[number]
        if unit == self.unit_of[root]:
            return root
        heads = self.heads.get(unit)
        return root if heads is None else int(heads[chunk])

    def counts_of(self, number: int) -> int:
        """How many chunks `number` makes the mean of."""
        return int(np.count_nonzero(self.roots == number))


def plan_reduce(
    declaration: Declaration, elements: int, chunk_elements: int, *, flat: bool = False
) -> ReducePlan:
    """The plan for `declaration`; `flat` ignores groups. PlanError if there is nobody, or somebody twice."""
    members = declaration.members
    _check(members)
    chunks = math.ceil(elements / chunk_elements)
    units = tuple((n,) for n in range(len(members))) if flat else _units(members)
    speeds = _speeds(members)
    everybody_hidden = not any(member.dialable for member in members)
    able = [everybody_hidden or member.dialable for member in members]
    heads: dict[int, npt.NDArray[np.int32]] = {}
    capacities = []
    for unit, numbers in enumerate(units):
        owners = [number for number in numbers if able[number]]
        capacities.append(sum(speeds[number] for number in owners))
        if len(numbers) > 1:
            quotas = shares([speeds[number] for number in owners], chunks, len(numbers))
            picks = _deal([members[number].peer for number in owners], quotas, chunks)
            heads[unit] = np.array(owners, np.int32)[picks]
    eligible = [unit for unit, capacity in enumerate(capacities) if capacity > 0]
    quotas = shares([capacities[unit] for unit in eligible], chunks, len(units))
    names = [_name(members[units[unit][0]], unit in heads) for unit in eligible]
    roots = np.zeros(chunks, np.int32)
    for chunk, pick in enumerate(_deal(names, quotas, chunks).tolist()):
        unit = eligible[pick]
        roots[chunk] = heads[unit][chunk] if unit in heads else units[unit][0]
    return ReducePlan(declaration.key, members, elements, chunk_elements, units, roots, heads)


def shares(speeds: Sequence[float], chunks: int, members: int) -> list[int]:
    """How many of `chunks` each owner takes, so that all are done at the same time.

    With a share f of the vector an owner among `members` sends, and receives, 1 + f (members - 2) vectors: the rest of
    its own, and its results to the others. Equal times mean f = max(0, (level * speed - 1) / (members - 2)), with the
    level at which the shares add up to 1. Two members move the same whatever the shares, so they take equal ones.
    """
    if not speeds:
        return []
    if members <= 2:
        exact = [1 / len(speeds)] * len(speeds)
    else:
        exact = _fill(speeds, members - 2)
    quotas = [math.floor(share * chunks) for share in exact]
    rest = sorted(range(len(speeds)), key=lambda n: (quotas[n] - exact[n] * chunks, n))
    for place in range(chunks - sum(quotas)):
        quotas[rest[place % len(rest)]] += 1
    return quotas


def _fill(speeds: Sequence[float], spread: int) -> list[float]:
    fastest = sorted(speeds, reverse=True)
    level = 0.0
    for count in range(1, len(fastest) + 1):
        level = (spread + count) / sum(fastest[:count])
        if count == len(fastest) or level * fastest[count] <= 1:
            break
    return [max(0.0, (level * speed - 1) / spread) for speed in speeds]


def _check(members: Sequence[Member]) -> None:
    if not members:
        raise PlanError("a declaration without members")
    if len({member.peer for member in members}) != len(members):
        raise PlanError("a member is declared twice")
    for member in members:
        if member.weight != 0 and not WEIGHT_MIN <= member.weight <= WEIGHT_MAX:
            limits = f"0, or {WEIGHT_MIN} to {WEIGHT_MAX}"
            raise PlanError(f"the weight of {member.peer} must be {limits}, got {member.weight}")


def _units(members: Sequence[Member]) -> tuple[tuple[int, ...], ...]:
    """A group counts if it has two members or more, somebody in it can be dialled, and there are others outside."""
    groups: dict[str, list[int]] = {}
    for number, member in enumerate(members):
        groups.setdefault(_name(member, bool(member.group)), []).append(number)
    if len(groups) == 1:
        return tuple((number,) for number in range(len(members)))
    units: list[tuple[int, ...]] = []
    for numbers in groups.values():
        if any(members[number].dialable for number in numbers):
            units.append(tuple(numbers))
        else:
            units += [(number,) for number in numbers]
    return tuple(sorted(units))


def _name(member: Member, grouped: bool) -> str:
    return f"group {member.group}" if grouped else f"peer {member.peer}"


def _speeds(members: Sequence[Member]) -> list[float]:
    """Bandwidths, unknown ones taken for the median of the known, within a factor of 1000 of it."""
    known = [m.bandwidth_bps for m in members if math.isfinite(m.bandwidth_bps) and m.bandwidth_bps > 0]
    middle = median(known) if known else 1.0
    speeds = []
    for member in members:
        speed = member.bandwidth_bps
        usable = math.isfinite(speed) and speed > 0
        speeds.append(min(max(speed / middle, 1e-3), 1e3) if usable else 1.0)
    return speeds


def _deal(names: Sequence[str], quotas: Sequence[int], chunks: int) -> npt.NDArray[np.int32]:
    """Each chunk to its best-scoring name that has room left: rendezvous hashing with bounded loads."""
    picks = np.zeros(chunks, np.int32)
    if len(names) < 2 or not chunks:
        return picks
    hashes = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    keys = np.array([int.from_bytes(digest, "little") for digest in hashes], np.uint64)
    grid = _mix(np.arange(1, chunks + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    order = np.argsort(_mix(keys[:, None] ^ grid[None, :]), axis=0, kind="stable").T
    left = list(quotas)
    for chunk in range(chunks):
        for pick in order[chunk]:
            if left[pick] > 0:
                left[pick] -= 1
                picks[chunk] = pick
                break
    return picks


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
