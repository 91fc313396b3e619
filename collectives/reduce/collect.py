"""One member's work as a collector: which inputs its chunks still lack, what it holds of them, and their sums.

It decodes, checks (finite, not longer than claimed) and adds up; to whom the sums go is not its business.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from collectives.agreement import Member
from collectives.codecs import Codec, CodecFault
from collectives.codecs.base import F32
from collectives.errors import NonFinite
from collectives.reduce import combine
from collectives.reduce.frames import IDENT_MASK
from collectives.reduce.hold import Hold, Source
from collectives.reduce.layout import Layout
from collectives.reduce.plan import ReducePlan

OwnValues = Callable[[int], F32]
Input = tuple[float, Source | F32]
SOURCES_MAX = 16  # a peer's values, and its sums under this plan and others


def leaf_of(member: Member) -> Source:
    """The source that is a member's own values."""
    return Source(False, member.peer, member.nonce & IDENT_MASK)


def ident_of(plan: ReducePlan, unit: int) -> int:
    """Names the sum over a unit by who is in it, so that it survives a new plan unless they change."""
    members = [plan.members[number] for number in plan.units[unit]]
    names = [f"{member.peer}\0{member.nonce}\0{member.weight!r}" for member in members if member.weight > 0]
    return int.from_bytes(hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest(), "little")


class Collector:
    """For the chunks that the plan gives to member `me`, as root or as head of its unit."""

    def __init__(self, layout: Layout, codec: Codec, hold: Hold, own: OwnValues) -> None:
        self._layout = layout
        self._codec = codec
        self._hold = hold
        self._own = own
        self._scratch = np.empty(combine.SUM_SLAB, np.float32)
        exact = codec.relative_error == 0
        self._decoded = np.empty(0 if exact else min(layout.chunk_elements, layout.elements), np.float32)
        self._seen: dict[Source, bytearray] = {}
        self._lacking: dict[int, set[Source]] = {}
        self._roles: dict[int, list[int]] = {}
        self._norms: dict[Source, float] = {}
        self.norm_limits: dict[str, float] = {}
        self.refused: dict[str, str] = {}

    def adopt(self, plan: ReducePlan, me: int) -> list[int]:
        """Takes a plan over; returns the chunks for which everything needed is here already."""
        self._plan = plan
        self._me = me
        self.refused = {}
        self._norms = {}
        self._hold.relax()
        self._idents = {unit: ident_of(plan, unit) for unit in plan.heads}
        leaves = {leaf_of(member) for member in plan.members}
        sums = set(self._idents.values())
        self._seen = {
            s: bits for s, bits in self._seen.items() if s in leaves or (s.partial and s.ident in sums)
        }
        self._hold.discard(self._seen)
        self._lacking = {}
        mine = set(np.flatnonzero(plan.roots == me).tolist())
        heads = plan.heads.get(plan.unit_of[me])
        if heads is not None:
            mine |= set(np.flatnonzero(heads == me).tolist())
        ready = []
        for chunk in sorted(mine):
            lacking = {source for source in self.sources(chunk) if not self._hold.need((source, chunk))}
            if lacking:
                self._lacking[chunk] = lacking
            elif plan.root(chunk) == me or self._groups(chunk):
                ready.append(chunk)
        self._hold.trim()
        return ready

    def collects(self, chunk: int) -> bool:
        """Whether this member adds `chunk` up."""
        plan = self._plan
        return plan.root(chunk) == self._me or plan.leaf_to(self._me, chunk) == self._me

    def sources(self, chunk: int) -> list[Source]:
        """From whom inputs are needed for `chunk`; members of weight 0 give none, and this member's own are here."""
        return [
            source
            for group in self._groups(chunk)
            for _, source in group
            if source.peer != self._plan.members[self._me].peer
        ]

    def _groups(self, chunk: int) -> list[list[tuple[float, Source]]]:
        """What is added up for `chunk`, in groups: weight and source."""
        plan = self._plan
        mine = plan.unit_of[self._me]
        units = range(len(plan.units)) if plan.root(chunk) == self._me else [mine]
        groups: list[list[tuple[float, Source]]] = []
        for unit in units:
            members = [plan.members[number] for number in plan.units[unit] if plan.members[number].weight > 0]
            if not members:
                continue
            if unit == mine or len(plan.units[unit]) == 1:
                groups.append([(member.weight, leaf_of(member)) for member in members])
            else:
                groups.append([(1.0, self.partial(unit, chunk))])
        return groups

    def partial(self, unit: int, chunk: int) -> Source:
        """The source that is the sum over a unit."""
        head = self._plan.members[self._plan.head(unit, chunk)]
        return Source(True, head.peer, self._idents[unit])

    def expects(self, source: Source) -> bool:
        """Whether to take note of frames of this source: a member's is known, and a few may be of plans to come."""
        return source in self._seen or sum(known.peer == source.peer for known in self._seen) < SOURCES_MAX

    def settle(self, chunk: int) -> None:
        """The sum of `chunk` is not needed any more for now."""
        self._lacking.pop(chunk, None)
        self._hold.release(
            [(source, chunk) for source in self.sources(chunk)], keep=len(self._plan.members) > 2
        )

    def accept(self, source: Source, chunk: int, payload: memoryview) -> bool:
        """Takes an input, ownership of `payload` included; whether `chunk` has everything now."""
        seen = self._seen.setdefault(source, bytearray(self._layout.chunks))
        seen[chunk] = 1
        lacking = self._lacking.get(chunk)
        wanted = lacking is not None and source in lacking
        self._hold.put((source, chunk), payload, wanted)
        if lacking is None or not wanted:
            return False
        lacking.discard(source)
        if lacking:
            return False
        del self._lacking[chunk]
        return True

    def lost(self) -> dict[str, tuple[set[int], set[int]]]:
        """Inputs that came once and are needed again: by peer, chunks of its leaves and of its partials."""
        return self._missing(
            lambda source, chunk: bool(self._seen.get(source, b"")) and self._seen[source][chunk] == 1
        )

    def missing(self) -> dict[str, tuple[set[int], set[int]]]:
        """Every input that is lacking."""
        return self._missing(lambda source, chunk: True)

    def _missing(self, test: Callable[[Source, int], bool]) -> dict[str, tuple[set[int], set[int]]]:
        found: dict[str, tuple[set[int], set[int]]] = {}
        for chunk, lacking in self._lacking.items():
            for source in lacking:
                if test(source, chunk):
                    found.setdefault(source.peer, (set(), set()))[source.partial].add(chunk)
        return found

    def again(self, chunk: int) -> bool:
        """A sum that was made is wanted once more: whether its inputs are here; if not they are lacking again."""
        lacking = {source for source in self.sources(chunk) if not self._hold.need((source, chunk))}
        if lacking:
            self._lacking[chunk] = lacking
        return not lacking

    def lags(self, peer: str) -> bool:
        """Whether `peer` is among those that the chunks which came furthest still wait for."""
        fewest = min((len(lacking) for lacking in self._lacking.values()), default=0)
        return any(
            len(lacking) == fewest and any(source.peer == peer for source in lacking)
            for lacking in self._lacking.values()
        )

    def total(self, chunk: int, out: F32) -> bool:
        """out = the weighted sum of `chunk`. False, with the culprits in `refused`, if an input cannot be used."""
        return self._sum(chunk, out, None)

    def mean(self, chunk: int, out: F32) -> bool:
        """out = the weighted mean of `chunk`, for its root."""
        return self._sum(chunk, out, combine.total_weight([member.weight for member in self._plan.members]))

    def _sum(self, chunk: int, out: F32, total: float | None) -> bool:
        groups = self._groups(chunk)
        good = True
        if not groups:
            out.fill(0)
        elif len(groups) == 1:
            good = self._add(list(groups[0]), chunk, out, total)
        else:
            inputs: list[Input] = []
            for group in groups:
                if len(group) == 1:
                    inputs.append(group[0])
                else:
                    part = np.empty(len(out), np.float32)
                    good = self._add(list(group), chunk, part, None) and good
                    inputs.append((1.0, part))
            good = good and self._add(inputs, chunk, out, total)
        if good:
            self.settle(chunk)
        return good

    def _add(self, inputs: Sequence[Input], chunk: int, out: F32, total: float | None) -> bool:
        """out = sum of the inputs. With an exact codec in one go over all of them, else one after the other, so that
        only one is decoded at a time."""
        norms = [0.0] * len(inputs)
        try:
            if self._codec.relative_error == 0:
                terms = [(weight, self._values(what, chunk)) for weight, what in inputs]
                combine.add_up(terms, out, self._scratch, norms, total)
            else:
                for index, (weight, what) in enumerate(inputs):
                    values = self._values(what, chunk)
                    norms[index] = combine.squares(values)
                    before = [(1.0, out)] if index else []
                    last = total if index == len(inputs) - 1 else None
                    combine.add_up([*before, (weight, values)], out, self._scratch, None, last)
        except CodecFault as fault:
            self.refused[fault.args[1]] = "mismatch"
            return False
        return self._check(inputs, norms, chunk)

    def _values(self, what: Source | F32, chunk: int) -> F32:
        """Values of an input. May be scratch memory of the collector unless the codec is exact."""
        if not isinstance(what, Source):
            return what
        if what.peer == self._plan.members[self._me].peer:
            return self._own(chunk)
        codec = self._codec.result if what.partial else self._codec
        size = self._layout.size(chunk)
        out = None if codec.relative_error == 0 else torch.from_numpy(self._decoded[:size])
        try:
            values: F32 = codec.decode(self._hold.get((what, chunk)), size, out).numpy()
        except CodecFault as fault:
            raise CodecFault(str(fault), what.peer) from fault
        return values

    def _check(self, inputs: Sequence[Input], norms: Sequence[float], chunk: int) -> bool:
        good = True
        for (_, what), square in zip(inputs, norms, strict=True):
            if not isinstance(what, Source):
                continue
            if what.peer == self._plan.members[self._me].peer:
                if not math.isfinite(square):
                    raise NonFinite(f"this member's own values hold NaN or infinity in chunk {chunk}")
                continue
            if not math.isfinite(square):
                self.refused[what.peer] = "nonfinite"
                good = False
                continue
            total = self._norms[what] = self._norms.get(what, 0.0) + square
            limit = self.norm_limits.get(what.peer)
            if limit is not None and not what.partial and total > limit * limit:
                self.refused[what.peer] = "norm"
                good = False
        return good


def encoded(codec: Codec, values: F32) -> memoryview:
    """`values` encoded; the memory of `values` itself for fp32."""
    return codec.encode(torch.from_numpy(values))
